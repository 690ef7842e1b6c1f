"""What was said in a chat, as lines of JSON that a person can read and any crash can cut short.

The first line says which model it was; then each line is a message, or says what of the messages
before it no longer counts. Lines are only ever added, a whole turn in one write; the line without
an end that a crash or a power cut left is cut off when the chat goes on.

    {"type": "head", "version": 1, "model": "mixtral", "file": "...", "at": "2026-01-31T09:00:00Z"}
    {"type": "message", "n": 0, "role": "user", "content": "Hello", "at": "..."}
    {"type": "message", "n": 1, "role": "assistant", "content": "Hi!", "tokens": [15359, 28808]}
    {"type": "cut", "keep": 1}        the messages from the second on were taken back
    {"type": "dropped", "n": 2}       how many the prompt leaves out, as they don't fit any more
    {"type": "model", "model": ...}   another model goes on from here

Messages are counted, so that one that is damaged leaves a hole and moves no other. Types that this
version doesn't know are read past.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import LocalMoeError, escape_unsafe
from ..files import InputLine, is_torn_record, open_regular, read_lines
from ..prompt.messages import Message

VERSION = 1
MAX_RECORD_BYTES = 64 << 20
RECORD_OPENING = b'{"type": "'


@dataclass(slots=True)
class Transcript:
    """A chat as its lines tell it.

    `file` stands for the model file that the messages' tokens are of; `end` is the byte after the
    last record, which may lack its line end (`lacks_line_end`). `damaged` are the numbers of the
    lines that can't be read.
    """

    model: str = ""
    file: str = ""
    created: str = ""
    messages: list[Message] = field(default_factory=list)
    n_dropped: int = 0
    end: int = 0
    lacks_line_end: bool = False
    damaged: list[int] = field(default_factory=list)

    @property
    def title(self) -> str:
        """How the first question begins."""
        question = next((m.content for m in self.messages if m.role == "user"), "")
        return " ".join(question[:400].split())


def read_transcript(path: Path) -> Transcript:
    """A chat from its file, as far as it can be read. Raises LocalMoeError on a later format."""
    found, slots = Transcript(), dict[int, Message]()
    for line in _lines(path):
        record = chat_record_of(line)
        if record is None:
            if not is_torn_record(line, RECORD_OPENING):
                found.damaged.append(line.number)
            continue
        if record.get("type") == "head" and record["version"] > VERSION:
            raise LocalMoeError(
                f"{path} was written by a later version of localmoe.", "Update localmoe to open it."
            )
        _apply(found, slots, record)
        found.end, found.lacks_line_end = line.offset + line.n_bytes, not line.whole
    found.messages = [slots[n] for n in sorted(slots)]
    found.n_dropped = min(found.n_dropped, len(slots))
    return found


def _lines(path: Path) -> Iterator[InputLine]:
    with open_regular(path) as file:
        yield from read_lines(file, MAX_RECORD_BYTES)


def chat_record_of(line: InputLine) -> dict[str, Any] | None:
    """The record that a line is, checked; None where it isn't one."""
    if line.raw is None:
        return None
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        record = json.loads(line.raw.decode("utf-8-sig"))
        if isinstance(record, dict) and _is_sound(record):
            return record
    return None


def _is_sound(record: dict[str, Any]) -> bool:
    match record["type"]:
        case "head":
            return _is_count(record["version"]) and _are_texts(record, "model", "file", "at")
        case "model":
            return _are_texts(record, "model", "file")
        case "message":
            tokens = record.get("tokens")
            return (
                _is_count(record["n"])
                and _are_texts(record, "role", "content", "thinking")
                and record["role"] in ("system", "user", "assistant")
                and (tokens is None or (isinstance(tokens, list) and all(map(_is_count, tokens))))
            )
        case "cut":
            return _is_count(record["keep"])
        case "dropped":
            return _is_count(record["n"])
        case other:
            return isinstance(other, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _are_texts(record: dict[str, Any], *names: str) -> bool:
    return all(isinstance(record.get(name, ""), str) for name in names)


def _apply(found: Transcript, slots: dict[int, Message], record: dict[str, Any]) -> None:
    """Let a record count. A message takes its place, and whatever came after that is gone."""
    match record["type"]:
        case "head":
            found.model, found.file = record.get("model", ""), record.get("file", "")
            found.created = record.get("at", "")
        case "model":
            if record.get("file", "") != found.file:  # ids of another vocabulary say nothing
                for n, message in slots.items():
                    slots[n] = replace(message, tokens=None)
            found.model, found.file = record.get("model", ""), record.get("file", "")
        case "message":
            _cut(slots, record["n"])
            tokens, thinking = record.get("tokens"), record.get("thinking", "")
            content = record.get("content", "")
            kept = None if tokens is None else tuple(tokens)
            slots[record["n"]] = Message(record["role"], content, kept, thinking)
        case "cut":
            _cut(slots, record["keep"])
        case "dropped":
            found.n_dropped = record["n"]


def _cut(slots: dict[int, Message], keep: int) -> None:
    for n in [n for n in slots if n >= keep]:
        del slots[n]


# ---- writing ----


def head(model: str, file: str) -> bytes:
    """The first record of a session."""
    return _line({"type": "head", "version": VERSION, "model": model, "file": file, "at": now()})


def other_model(model: str, file: str) -> bytes:
    """The record of a change of the model."""
    return _line({"type": "model", "model": model, "file": file, "at": now()})


def changes(
    old: Sequence[Message], new: Sequence[Message], n_dropped: tuple[int, int] = (0, 0)
) -> bytes:
    """The records that make one conversation of another; `n_dropped` is that of both."""
    n_same = 0
    while n_same < min(len(old), len(new)) and old[n_same] == new[n_same]:
        n_same += 1
    lines = [_line({"type": "cut", "keep": n_same})] if n_same < len(old) else []
    at = now()
    lines += [_message(n, new[n], at) for n in range(n_same, len(new))]
    if n_dropped[0] != n_dropped[1]:
        lines.append(_line({"type": "dropped", "n": n_dropped[1]}))
    return b"".join(lines)


def _message(n: int, message: Message, at: str) -> bytes:
    record: dict[str, Any] = {"type": "message", "n": n, "role": message.role}
    record["content"] = message.content
    if message.thinking:
        record["thinking"] = message.thinking
    if message.tokens is not None:
        record["tokens"] = list(message.tokens)
    return _line({**record, "at": at})


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False)
    text = escape_unsafe(text)
    try:
        raw = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        raw = json.dumps(record).encode()
    if len(raw) > MAX_RECORD_BYTES:
        raise LocalMoeError(
            f"A message of {len(raw) >> 20} MiB is too large to be kept.", "Go on with --no-save."
        )
    return raw + b"\n"


def now() -> str:
    """The time, UTC, in ISO 8601."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
