"""What a conversation is made of, and the check of what came from outside.

Messages have the Hugging Face form: a list of {"role": ..., "content": ...}, the content a string
or a list of {"type": "text", "text": ...}. `parse_messages` takes anything and gives messages, or a
sentence that names the message that is wrong by its number, the first being 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..engine.interfaces import Tokenizer
from ..errors import PromptError

ROLES = ("system", "user", "assistant")
NOT_TEXT = re.compile("[\0\ud800-\udfff]")
FORM = 'A message looks like {"role": "user", "content": "Hello"}.'
# what people bring along from other programs, and what to do about it
OTHER_ROLES = {
    "developer": 'Call it "system".',
    "tool": "Tool calls are not supported yet.",
    "function": "Tool calls are not supported yet.",
    "human": 'Call it "user".',
    "gpt": 'Call it "assistant".',
}


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a conversation.

    `tokens` are the ids that were sampled for an answer, without its end of turn, if they spell
    `content` and nothing more; None for a text that a person wrote or changed. `thinking` is what
    a model thought before it answered: kept to be shown, never part of a prompt.
    """

    role: str
    content: str
    tokens: tuple[int, ...] | None = None
    thinking: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` is what a person is shown, control tokens spelled; `tokens` is what the model gets."""

    text: str
    tokens: tuple[int, ...]


class PromptFormat(Protocol):
    """How a family of models wants a conversation written.

    A conversation that ends with the user's turn is followed by the model's; one that ends with the
    assistant's is left open after it, to be continued.
    """

    @property
    def answers_start_text(self) -> bool:
        """Whether an answer begins a text of its own, whose first space is not part of it."""
        ...

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Prompt:
        """The prompt of a conversation. Raises PromptError where the format can't express it."""
        ...


def parse_messages(value: object) -> list[Message]:
    """Messages out of decoded JSON or a caller's own lists. Raises PromptError.

    The last one has to be the user's: what else would be answered?
    """
    if not isinstance(value, (list, tuple)):
        raise PromptError(f"Messages must be a list, not {_kind(value)}.", FORM)
    messages = check_conversation([_message(n, item) for n, item in enumerate(value, 1)])
    if messages[-1].role != "user":
        raise PromptError(
            f'Message {len(value)}, the last one, has the role "{messages[-1].role}"; '
            "only a user's message can be answered.",
            'End the conversation with a message of the role "user".',
        )
    return messages


def check_conversation(messages: Sequence[Message]) -> list[Message]:
    """The messages, if they can be a conversation at all. Raises PromptError.

    An empty system message says nothing and is allowed; an empty turn is a mistake.
    """
    for number, message in enumerate(messages, 1):
        if message.role not in ROLES:
            raise _unknown_role(number, message.role)
        _check_text(number, message.content)
        if message.role != "system" and not message.content and not message.tokens:
            raise PromptError(
                f"Message {number} ({message.role}) is empty.",
                "Leave it out, or give it some text.",
            )
    if not any(message.role == "user" for message in messages):
        raise PromptError("There is no message of the user to answer.", FORM)
    return list(messages)


def without_empty_system(messages: Sequence[Message]) -> list[Message]:
    """The messages that say something."""
    return [m for m in messages if m.role != "system" or m.content]


def _message(number: int, value: object) -> Message:
    if not isinstance(value, dict):
        raise PromptError(f"Message {number} is {_kind(value)}, not an object.", FORM)
    for key in value:
        if key not in ("role", "content"):
            raise PromptError(
                f"Message {number} has the key {_shown(key)}, which is not known.",
                'The known keys are "role" and "content".',
            )
    for key in ("role", "content"):
        if key not in value:
            raise PromptError(f'Message {number} has no "{key}".', FORM)
    role = value["role"]
    if not isinstance(role, str):
        raise PromptError(f'The "role" of message {number} is {_kind(role)}, not a string.', FORM)
    return Message(role, _content(number, value["content"]))


def _content(number: int, value: object) -> str:
    """The text of a content. Parts are joined with a blank line, as mistral-common joins them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise PromptError(f'The "content" of message {number} is {_kind(value)}, not text.', FORM)
    parts = [_part(f"Part {n} of message {number}", part) for n, part in enumerate(value, 1)]
    return "\n\n".join(part for part in parts if part)


def _part(place: str, value: object) -> str:
    form = 'A part looks like {"type": "text", "text": "Hello"}.'
    if not isinstance(value, dict):
        raise PromptError(f"{place} is {_kind(value)}, not an object.", form)
    if value.get("type") != "text":
        kind = f"of the type {_shown(value['type'])}" if "type" in value else "without a type"
        raise PromptError(f"{place} is {kind}; only text is supported.", form)
    for key in value:
        if key not in ("type", "text"):
            raise PromptError(f"{place} has the key {_shown(key)}, which is not known.", form)
    text = value.get("text")
    if not isinstance(text, str):
        raise PromptError(f'The "text" of {place[0].lower()}{place[1:]} is {_kind(text)}.', form)
    return text


def _check_text(number: int, text: str) -> None:
    bad = NOT_TEXT.search(text)
    if bad:
        problem = "a NUL character" if bad[0] == "\0" else "half of a surrogate pair"
        raise PromptError(
            f"Message {number} holds {problem} at character {bad.start() + 1}.",
            "Is it text in UTF-8? Take the character out.",
        )


def _unknown_role(number: int, role: str) -> PromptError:
    known = ", ".join(f'"{name}"' for name in ROLES)
    return PromptError(
        f"Message {number} has the role {_shown(role)}, which is not known.",
        OTHER_ROLES.get(role, f"The roles are {known}."),
    )


def _shown(value: object) -> str:
    """A name from outside, short and without anything that a terminal would obey."""
    text = ascii(value).strip("'\"")
    return f'"{text[:40]}{"..." if len(text) > 40 else ""}"'


def _kind(value: object) -> str:
    """What a value is, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
