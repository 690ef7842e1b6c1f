"""Models without a chat template: base models, which continue a text and can do no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.protocol import TextPiece
from ..errors import PromptError
from .messages import Message, Prompt, Tokenizer, check_conversation, without_empty_system


@dataclass(frozen=True, slots=True)
class TextFormat:
    """A single question is the text to be continued. `bos` begins a text, where the model wants
    that."""

    bos: int | None = None
    bos_text: str = ""

    @property
    def answers_start_text(self) -> bool:
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
