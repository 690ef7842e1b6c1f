"""The Mistral Instruct family: tokens as Mistral's own reference gives them.

The reference is mistral-common: its V1 for Mixtral 8x7B, where [INST] is plain text and the system
prompt opens the first user turn, and its V3 for Mixtral 8x22B, where [INST] is a control token and
the system prompt opens the last user turn (tokens/tokenizers/instruct.py, and the joining of
messages in protocol/instruct/normalize.py). Every turn is encoded apart; tokenizing the text of a
whole conversation at once gives other tokens from the second turn on. The chat templates inside
model files differ from the reference, so they are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from ..engine.interfaces import Tokenizer
from ..engine.protocol import TextPiece
from ..errors import PromptError
from .messages import Message, Prompt, check_conversation, is_begun_answer, without_empty_system

JOIN = "\n\n"
BEGIN, END = "[INST]", "[/INST]"
Part = tuple[int, ...] | TextPiece
"""Ids that are known, or text that has yet to become ids."""


@dataclass(frozen=True, slots=True)
class MistralFormat:
    """Mistral Instruct. `add_space_prefix`: llama.cpp puts the space before a text by itself."""

    version: Literal["v1", "v3"]
    bos: int
    eos: int
    bos_text: str = "<s>"
    eos_text: str = "</s>"
    add_space_prefix: bool = True

    @property
    def answers_start_text(self) -> bool:
        """An answer is a text of its own, as the reference encodes it."""
        return True

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Prompt:
        """The prompt of a conversation. Raises PromptError."""
        system, turns = conversation_turns(messages)
        asked = [n for n, turn in enumerate(turns) if turn.role == "user"]
        opened = asked[0] if self.version == "v1" else asked[-1]
        opening = system + JOIN if system else ""
        parts: list[Part] = [(self.bos,)]
        text = self.bos_text
        for n, turn in enumerate(turns):
            if turn.role == "user":
                content = opening + turn.content if n == opened else turn.content
                parts += self._user(content)
                text += self._shown_user(content)
            else:
                is_open = n == len(turns) - 1
                parts += self._assistant(turn, is_open)
                text += f" {self._answer(turn)}" + ("" if is_open else self.eos_text)
        return Prompt(text, tuple(_ids(parts, tokenizer)), is_begun_answer(turns))

    def _user(self, content: str) -> list[Part]:
        if self.version == "v1":
            return [self._text(f"{BEGIN} {content} {END}")]
        return [TextPiece(BEGIN, special=True), self._text(content), TextPiece(END, special=True)]

    def _shown_user(self, content: str) -> str:
        return f" {BEGIN} {content} {END}" if self.version == "v1" else f"{BEGIN} {content}{END}"

    def _assistant(self, turn: Message, is_open: bool) -> list[Part]:
        part = turn.tokens or self._text(self._answer(turn))
        return [part] if is_open else [part, (self.eos,)]

    def _answer(self, turn: Message) -> str:
        """V3 takes spaces off the end of an answer, and V1 does not."""
        return turn.content if self.version == "v1" else turn.content.rstrip(" ")

    def _text(self, text: str) -> TextPiece:
        """SentencePiece puts a space before every text it encodes, and so has llama.cpp to."""
        return TextPiece(text if self.add_space_prefix or not text else f" {text}")


def conversation_turns(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """The system prompt, and turns of changing roles that begin with the user's.

    Neighbours of one role are joined with a blank line; before an assistant who speaks first
    stands an empty turn of the user. As mistral-common, this refuses what the system says after
    an answer.
    """
    said = without_empty_system(check_conversation(messages))
    for before, message in zip(said, said[1:], strict=False):
        if before.role == "assistant" and message.role == "system":
            raise PromptError(
                "A system message follows an answer; Mistral's format has no place for it.",
                "Put the system message first.",
            )
    system = JOIN.join(m.content for m in said if m.role == "system")
    turns = list(_joined(said))
    return system, turns if turns[0].role == "user" else [Message("user", ""), *turns]


def _joined(messages: Sequence[Message]) -> Iterator[Message]:
    for role, group in groupby(messages, key=lambda message: message.role):
        same = list(group)
        if role != "system":
            yield same[0] if len(same) == 1 else Message(role, JOIN.join(m.content for m in same))


def _ids(parts: Sequence[Part], tokenizer: Tokenizer) -> Iterator[int]:
    pieces = [part for part in parts if isinstance(part, TextPiece)]
    encoded = zip(pieces, tokenizer.tokenize(pieces), strict=True)
    for part in parts:
        if not isinstance(part, TextPiece):
            yield from part
            continue
        piece, ids = next(encoded)
        if piece.special and len(ids) != 1:
            raise PromptError(f"The model's vocabulary has no token {piece.text}.")
        yield from ids
