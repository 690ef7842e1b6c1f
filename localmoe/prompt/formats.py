"""Chooses the prompt format of a model.

Mistral's Instruct models get the tokens of Mistral's own reference (mistral.py), whatever template
their file holds. Every other model gets its own template (chat_template.py). A base model without a
template continues a text and can do no more (TextFormat).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from ..engine.interfaces import Tokenizer
from ..engine.protocol import TextPiece
from ..errors import PromptError
from .chat_template import TemplateFormat
from .messages import Message, Prompt, PromptFormat, check_conversation, without_empty_system
from .mistral import BEGIN, MistralFormat

# marks of other formats that share [INST] or the architecture with Mistral's
CHATML = "<|im_start|>"
LLAMA2_SYSTEM = "<<SYS>>"
MISTRAL_V7_SYSTEM = "[SYSTEM_PROMPT]"
# what llama.cpp takes for the end of a turn or for no token, whatever type the file gives it
# (src/llama-vocab.cpp, llama_vocab::impl::load); a text that is no token of the model does no harm
ENDS = frozenset([
    "<unk>", "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<turn|>",
    "<end_of_turn>", "<end_of_utterance>", "<|end|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>",
    "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|endoftext|>", "<|end_of_text|>",
    "<|tool_response>", "<｜end▁of▁sentence｜>",
])  # fmt: skip
# what templates call it: Qwen3, GLM, Gemma 4 and others; DeepSeek V3.1, Kimi and Granite; Seed-OSS;
# gpt-oss can only do less
NO_THINKING: Mapping[str, object] = {
    "enable_thinking": False, "thinking": False, "thinking_budget": 0, "reasoning_effort": "low",
}  # fmt: skip
THINKING: Mapping[str, object] = {"enable_thinking": True, "thinking": True}
EFFORTS = ("low", "medium", "high")
MARKER = re.compile(r"[<\[].+[>\]]")
INSTRUCT_NAME = re.compile(r"(mixtral|mistral).*instruct", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What a model file says about prompts.

    `control_tokens` are the texts of the tokens of type CONTROL, `user_tokens` those of type
    USER_DEFINED, which llama.cpp finds in any text. `add_space_prefix` None stands for a file
    without that key: then a SentencePiece vocabulary ("llama") does put a space before a text, and
    no other does (llama.cpp, src/llama-vocab.cpp). `name` is general.name or the file's name.
    """

    architecture: str
    tokenizer_model: str = "llama"
    name: str = ""
    chat_template: str | None = None
    bos: int | None = None
    eos: int | None = None
    bos_text: str = ""
    eos_text: str = ""
    add_bos: bool = True
    add_space_prefix: bool | None = None
    control_tokens: frozenset[str] = frozenset()
    user_tokens: frozenset[str] = frozenset()

    @property
    def puts_space(self) -> bool:
        """Whether llama.cpp puts a space before each text that it encodes."""
        if self.tokenizer_model != "llama":
            return False
        return self.add_space_prefix is not False


def thinking_variables(think: str | None) -> Mapping[str, object]:
    """Returns what a template is told of thinking: nothing, on, off, or how much of it.

    "hide" is on: whether a person sees it is nothing to a template.
    """
    if think is None:
        return {}
    if think == "off":
        return NO_THINKING
    return {**THINKING, "reasoning_effort": think} if think in EFFORTS else THINKING


def prompt_format(
    facts: TemplateFacts,
    *,
    env: Mapping[str, str] | None = None,
    variables: Mapping[str, object] | None = None,
    now: datetime | None = None,
) -> PromptFormat:
    """The format that a model wants. Raises PromptError where its file doesn't say enough.

    For templates: `env` is the environment of the process that renders them, `variables` are what
    they may ask for (enable_thinking, reasoning_effort), `now` is the time that they are told, one
    and the same for all turns of a conversation.
    """
    if is_mistral(facts):
        return _mistral(facts)
    if facts.chat_template is None:
        return TextFormat(*((facts.bos, facts.bos_text) if facts.add_bos else ()))
    return TemplateFormat(
        template=facts.chat_template,
        bos=facts.bos,
        bos_text=facts.bos_text,
        eos_text=facts.eos_text,
        add_bos=facts.add_bos,
        puts_space=facts.puts_space,
        control_tokens=control_texts(facts),
        variables=dict(variables or {}),
        env=dict(env or {}),
        now=now or datetime.now(),
    )


def control_texts(facts: TemplateFacts) -> frozenset[str]:
    """What messages must not spell: control tokens, and what a template uses as if it were one.

    Many files give <|im_start|> or <think> the type of plain text.
    """
    template = facts.chat_template or ""
    used = (t for t in facts.user_tokens if MARKER.fullmatch(t) and t in template)
    return facts.control_tokens.union(ENDS, used)


def is_mistral(facts: TemplateFacts) -> bool:
    """Whether a model speaks Mistral's Instruct format, V1 or V3.

    Fine-tunes on Mixtral with ChatML, Llama 2's chat models and Mistral's later formats do not.
    """
    if facts.architecture != "llama" or facts.tokenizer_model != "llama":
        return False
    # a file with a user-defined [INST] finds it in any text: its template keeps messages from it
    if {CHATML, MISTRAL_V7_SYSTEM} & facts.control_tokens or BEGIN in facts.user_tokens:
        return False
    if facts.chat_template is None:
        return bool(INSTRUCT_NAME.search(facts.name))
    others = (CHATML, LLAMA2_SYSTEM, MISTRAL_V7_SYSTEM)
    return BEGIN in facts.chat_template and not any(o in facts.chat_template for o in others)


def _mistral(facts: TemplateFacts) -> MistralFormat:
    if facts.bos is None or facts.eos is None:
        raise PromptError("The model file doesn't name the tokens that begin and end a text.")
    return MistralFormat(
        version="v3" if BEGIN in facts.control_tokens else "v1",
        bos=facts.bos,
        eos=facts.eos,
        bos_text=facts.bos_text or "<s>",
        eos_text=facts.eos_text or "</s>",
        add_space_prefix=facts.puts_space,
    )


@dataclass(frozen=True, slots=True)
class TextFormat:
    """A single question is the text to be continued. `bos` begins a text, where the model wants
    that."""

    bos: int | None = None
    bos_text: str = ""

    @property
    def answers_start_text(self) -> bool:
        """An answer goes on with the text."""
        return False

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Prompt:
        """The prompt that is one message of the user. Raises PromptError on a conversation."""
        said = without_empty_system(check_conversation(messages))
        if len(said) > 1:
            raise no_template()
        begins = () if self.bos is None else (self.bos,)
        text = said[0].content
        shown = text if self.bos is None else self.bos_text + text
        return Prompt(shown, begins + tokenizer.tokenize([TextPiece(text)])[0])


def no_template() -> PromptError:
    """What to tell whoever wants to talk to a model without a chat template."""
    return PromptError(
        "The model file has no chat template, and nothing else says how to talk to it.",
        "Choose an Instruct or chat version of the model; base models only continue text.",
    )
