"""What a conversation is made of, and the check of what came from outside.

Messages have the Hugging Face form: a list of {"role": ..., "content": ...}, the content a string
or a list of {"type": "text", "text": ...}. `parse_messages` takes anything and gives messages, or a
sentence that names the message that is wrong by its number, the first being 1.

Answers come back as programs give them out: OpenAI's SDK writes every field of a message, most of
them null, and other servers add fields of their own. Null and empty say nothing. What an answer's
fields say about it is read past, its thinking is kept apart, and what would be lost is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..engine.interfaces import Tokenizer
from ..errors import PromptError

ROLES = ("system", "user", "assistant")
NOT_TEXT = re.compile("[\0\ud800-\udfff]")
FORM = 'A message looks like {"role": "user", "content": "Hello"}.'
# what people bring along from other programs, and what to do about it
OTHER_ROLES = {
    "tool": "Tool calls are not supported yet.",
    "function": "Tool calls are not supported yet.",
    "human": 'Call it "user".',
    "gpt": 'Call it "assistant".',
}
SAME_ROLES = {"developer": "system"}
"""What OpenAI's API calls a role of ours."""
TEXT_PARTS = ("text", "input_text", "output_text")
THINKING_PARTS = ("thinking", "reasoning", "redacted_thinking")
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where servers put what was thought: DeepSeek and llama-server, vLLM and OpenRouter, Ollama."""
NOTES = frozenset(["annotations", "cache_control", "created_at", "id", "index", "logprobs",
    "metadata", "name", "object", "prefix", "status", "timestamp", "type", "weight"])  # fmt: skip
"""What may be said about a message that says nothing to a model."""
LOST = {
    "tool_calls": "Tool calls are not supported yet.",
    "function_call": "Tool calls are not supported yet.",
    "tool_call_id": "Tool calls are not supported yet.",
    "audio": "Only text is supported.",
    "images": "Only text is supported.",
}
"""What a message may say that no prompt could hold."""


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
    """`text` is what a person is shown, control tokens spelled; `tokens` is what the model gets.

    Where `is_begun`, it ends with the beginning of the answer.
    """

    text: str
    tokens: tuple[int, ...]
    is_begun: bool = False


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

    The last one is the user's, to be answered, or the assistant's, to be continued.
    """
    if not isinstance(value, (list, tuple)):
        raise PromptError(f"Messages must be a list, not {_kind(value)}.", FORM)
    messages = check_conversation([_message(n, item) for n, item in enumerate(value, 1)])
    if messages[-1].role == "assistant" and not messages[-1].content:
        messages.pop()  # an answer of which nothing is there yet
    if messages[-1].role == "system":
        raise PromptError(
            f'Message {len(messages)}, the last one, has the role "system"; '
            "only a user's message can be answered.",
            'End the conversation with a message of the role "user".',
        )
    return messages


def check_conversation(messages: Sequence[Message]) -> list[Message]:
    """The messages, if they can be a conversation at all. Raises PromptError.

    An empty system message says nothing and is allowed, and so is an answer of which nothing came;
    an empty question is a mistake.
    """
    for number, message in enumerate(messages, 1):
        if message.role not in ROLES:
            raise _unknown_role(number, message.role)
        _check_text(number, message.content)
        if message.role == "user" and not message.content:
            raise PromptError(
                f"Message {number} ({message.role}) is empty.",
                "Leave it out, or give it some text.",
            )
    if not any(message.role == "user" for message in messages):
        raise PromptError("There is no message of the user to answer.", FORM)
    return list(messages)


def is_begun_answer(messages: Sequence[Message]) -> bool:
    """Whether a conversation ends with an answer that is to be continued."""
    return bool(messages) and messages[-1].role == "assistant"


def without_empty_system(messages: Sequence[Message]) -> list[Message]:
    """The messages that say something."""
    return [m for m in messages if m.role != "system" or m.content]


def _message(number: int, value: object) -> Message:
    if not isinstance(value, Mapping):
        raise PromptError(f"Message {number} is {_kind(value)}, not an object.", FORM)
    role = value.get("role")
    if "role" not in value:
        raise PromptError(f'Message {number} has no "role".', FORM)
    if not isinstance(role, str):
        raise PromptError(f'The "role" of message {number} is {_kind(role)}, not a string.', FORM)
    _check_keys(number, role, value)
    parts = _parts(number, value.get("content"))
    content = parts.content
    if not content and role == "assistant" and isinstance(value.get("refusal"), str):
        content = value["refusal"]
    thinking = next((text for key in THINKING_KEYS if (text := thinking_of(value.get(key)))), "")
    return Message(SAME_ROLES.get(role, role), content, thinking=thinking or parts.thinking)


def is_unsaid(value: object) -> bool:
    """Whether a value stands for one that was not given: null, or empty."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def _check_keys(number: int, role: str, value: Mapping[Any, Any]) -> None:
    """Raises PromptError where a message says what would be lost, or doesn't say its text.

    What isn't known of an answer is about it: it has been given by then.
    """
    is_answer = role == "assistant"
    for key in value:
        if key in ("role", "content") or key in NOTES or is_unsaid(value[key]):
            continue
        if key in LOST:
            raise PromptError(f"Message {number} has {_shown(key)}.", LOST[key])
        if not is_answer:
            raise PromptError(
                f"Message {number} has the key {_shown(key)}, which is not known.",
                'The known keys are "role" and "content".',
            )
    says_otherwise = is_answer and any(key in value for key in ("refusal", *THINKING_KEYS))
    if "content" not in value and role in (*ROLES, *SAME_ROLES) and not says_otherwise:
        raise PromptError(f'Message {number} has no "content".', FORM)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the parts of a content say."""

    content: str = ""
    thinking: str = ""


def _parts(number: int, value: object) -> _Parts:
    """A content. Parts are joined with a blank line, as mistral-common joins them."""
    if value is None:
        return _Parts()
    if isinstance(value, str):
        return _Parts(value)
    if not isinstance(value, (list, tuple)):
        raise PromptError(f'The "content" of message {number} is {_kind(value)}, not text.', FORM)
    parts = [_part(f"Part {n} of message {number}", part) for n, part in enumerate(value, 1)]
    texts = [part.content for part in parts if part.content]
    return _Parts("\n\n".join(texts), "".join(part.thinking for part in parts))


def _part(place: str, value: object) -> _Parts:
    form = 'A part looks like {"type": "text", "text": "Hello"}.'
    if not isinstance(value, Mapping):
        raise PromptError(f"{place} is {_kind(value)}, not an object.", form)
    kind = value.get("type")
    if kind in THINKING_PARTS:
        return _Parts(thinking=thinking_of(value.get("thinking", value.get("text"))))
    name = "refusal" if kind == "refusal" else "text"
    if kind not in (*TEXT_PARTS, "refusal"):
        what = f"of the type {_shown(kind)}" if "type" in value else "without a type"
        raise PromptError(f"{place} is {what}; only text is supported.", form)
    for key in value:
        if key not in ("type", name, *NOTES) and not is_unsaid(value[key]):
            raise PromptError(f"{place} has the key {_shown(key)}, which is not known.", form)
    text = value.get(name)
    if not isinstance(text, str):
        raise PromptError(f'The "{name}" of {place[0].lower()}{place[1:]} is {_kind(text)}.', form)
    return _Parts(text)


def thinking_of(value: object) -> str:
    """The text of what was thought, be it a text or parts of one; else "": it is only shown."""
    if isinstance(value, (list, tuple)):
        return "".join(map(thinking_of, value))
    if isinstance(value, Mapping):
        return thinking_of(value.get("thinking", value.get("text")))
    return NOT_TEXT.sub("", value) if isinstance(value, str) else ""


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
