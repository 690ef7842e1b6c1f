"""Which format a model gets, by what its file says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from localmoe.errors import PromptError
from localmoe.prompt.chat_template import TemplateFormat
from localmoe.prompt.formats import TemplateFacts, TextFormat, is_mistral, prompt_format
from localmoe.prompt.mistral import MistralFormat

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
V0 = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
MIXTRAL = TemplateFacts("llama", bos=1, eos=2, chat_template=V0)


def test_mixtral_gets_the_reference_and_not_its_template() -> None:
    assert prompt_format(MIXTRAL) == MistralFormat("v1", 1, 2)
    v3 = replace(MIXTRAL, control_tokens=frozenset(["[INST]", "[/INST]"]))
    assert prompt_format(v3) == MistralFormat("v3", 1, 2)
    no_space = replace(MIXTRAL, add_space_prefix=False)
    assert prompt_format(no_space) == MistralFormat("v1", 1, 2, add_space_prefix=False)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("mistralai_mixtral-8x7b-instruct-v0.1", True),
        ("Mixtral 8x22B Instruct v0.1", True),
        ("Mistral-7B-Instruct-v0.3", True),
        ("Mixtral-8x7B-v0.1", False),
        ("Nous-Hermes-2-Mixtral-8x7B-DPO", False),
        ("", False),
    ],
)
def test_without_a_template_the_name_decides(name: str, known: bool) -> None:
    facts = replace(MIXTRAL, chat_template=None, name=name)
    assert is_mistral(facts) is known
    if not known:
        assert prompt_format(facts) == TextFormat(bos=1)  # it can continue a text
        assert prompt_format(replace(facts, add_bos=False)) == TextFormat()


@pytest.mark.parametrize(
    "facts",
    [
        replace(MIXTRAL, chat_template=CHATML),
        replace(MIXTRAL, chat_template="[INST] <<SYS>>{{ system }}<</SYS>> [/INST]"),
        replace(MIXTRAL, chat_template="[SYSTEM_PROMPT]{{ system }}[/SYSTEM_PROMPT][INST]"),
        replace(MIXTRAL, tokenizer_model="gpt2"),
        replace(MIXTRAL, architecture="qwen3moe"),
        replace(MIXTRAL, control_tokens=frozenset(["<|im_start|>"])),
        replace(MIXTRAL, user_tokens=frozenset(["[INST]", "[/INST]"])),
    ],
)
def test_others_get_their_own_template(facts: TemplateFacts) -> None:
    format = prompt_format(facts, variables={"enable_thinking": False}, env={"TZ": "UTC"})
    assert isinstance(format, TemplateFormat)
    assert format.template == facts.chat_template
    assert format.puts_space is (facts.tokenizer_model == "llama")


def test_a_mixtral_without_bos_is_refused() -> None:
    with pytest.raises(PromptError, match="begin and end"):
        prompt_format(replace(MIXTRAL, bos=None))


def test_control_tokens_are_also_what_a_template_uses_as_such() -> None:
    """Files often give the marks of ChatML the type of plain text, and Gemma's "\\n\\n" too."""
    template = CHATML + "<think>\n\n"
    user_tokens = frozenset(["<|im_start|>", "<think>", "\n\n", "<table>"])
    facts = replace(MIXTRAL, chat_template=template, user_tokens=user_tokens)
    format = prompt_format(replace(facts, control_tokens=frozenset(["<s>"])))
    assert isinstance(format, TemplateFormat)
    assert {"<s>", "<|im_start|>", "<think>", "<|im_end|>", "<unk>"} <= format.control_tokens
    assert not {"\n\n", "<table>"} & format.control_tokens
