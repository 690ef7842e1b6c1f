"""What a command line asks of a model: a prompt in one or more parts, or a whole conversation."""

from __future__ import annotations

import errno
import io
import os
import queue
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..files import decoded, read_text
from ..prompt.messages import Message, parse_messages
from ..terminal import console
from .options import read_messages

if TYPE_CHECKING:
    from ..prompt.messages import Message


MAX_SILENCE_S = 1.0
MAX_STDIN_BYTES = 64 << 20
CHUNK_BYTES = 1 << 16


def conversation_of(
    prompt: str | None,
    messages: str | None,
    system: str | None,
    files: Sequence[str] = (),
    quiet: bool = False,
) -> list[Message]:
    """The conversation that a command line means. Raises UsageError."""
    if messages is not None:
        if prompt is not None or files:
            raise UsageError("Both a prompt and --messages were given.", "Leave one of them out.")
        return [*system_message(system), *parse_messages(read_messages(messages))]
    user: list[object] = [{"role": "user", "content": whole_prompt(prompt, files, quiet)}]
    return [*system_message(system), *parse_messages(user)]


def system_message(text: str | None) -> list[Message]:
    """Returns the system message as the beginning of a conversation."""
    return [] if text is None else [Message("system", text)]


def whole_prompt(
    prompt: str | None,
    files: Sequence[str] = (),
    quiet: bool = False,
    max_silence_s: float = MAX_SILENCE_S,
) -> str:
    """The argument, then the files, then stdin, with a blank line between; `-` is stdin.

    Beside an argument or a file, stdin is taken only where something is piped into it, and its
    beginning is not waited for: programs that others start are often left an open pipe which
    nobody writes to. A pipe of which nothing came within `max_silence_s` is left alone, which is
    said unless `quiet`; one that has begun is read to its end. Raises UsageError.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("The prompt is empty.", 'Try: localmoe run demo "Hi!"')
    given = ([] if prompt is None else [prompt]) + list(files)
    if not given or given == ["-"]:
        if sys.stdin.isatty() and not given:
            raise UsageError("There is no prompt.", 'Try: localmoe run demo "Hi!"')
        text = file_text("-")
        if not text.strip():
            raise UsageError("There is no prompt: stdin is empty.", 'Try: localmoe run demo "Hi!"')
        return text
    parts = [file_text("-") if prompt == "-" else prompt] if prompt else []
    parts += [file_text(file) for file in files]
    if "-" not in given:
        parts.append(piped_text(max_silence_s, quiet).rstrip("\r\n"))
    return "\n\n".join(part for part in parts if part)


def file_text(path: str) -> str:
    """Reads a text file without its last line end. Raises UsageError."""
    return read_text(path).rstrip("\r\n")


def check_stdin() -> None:
    """Raises UsageError where stdin was closed by who started this program, or can't be read."""
    try:
        os.read(sys.stdin.fileno(), 0)
    except io.UnsupportedOperation:  # not a stream of the system
        return
    except OSError as error:
        reason = "it is closed" if error.errno == errno.EBADF else error.strerror
        raise UsageError(f"stdin can't be read: {reason}.", "Pipe something in.") from None


def piped_text(max_silence_s: float, quiet: bool = False) -> str:
    """What is piped into stdin, or "" where it doesn't begin in time. Raises UsageError."""
    try:
        if sys.stdin.isatty():
            return ""
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError):
        return ""
    chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # in a thread, because nothing else can wait for a pipe with a limit on every platform
    threading.Thread(target=_read_all, args=(descriptor, chunks), daemon=True).start()
    found: list[bytes] = []
    n_bytes = 0
    while True:
        try:
            chunk = chunks.get(timeout=None if found else max_silence_s)
        except queue.Empty:
            if not quiet:
                console.note(
                    f"Nothing came on stdin within {max_silence_s:g} s: answering without it. "
                    "Say -f - to wait for it, or < /dev/null where nothing is to come."
                )
            return ""
        if not chunk:
            return decoded(b"".join(found), "stdin")
        found.append(chunk)
        n_bytes += len(chunk)
        if n_bytes > MAX_STDIN_BYTES:
            raise UsageError(f"stdin brings more than {MAX_STDIN_BYTES >> 20} MiB.")


def _read_all(descriptor: int, chunks: queue.SimpleQueue[bytes]) -> None:
    """Pass on what comes, and b"" at its end."""
    chunk = b"."
    while chunk:
        try:
            chunk = os.read(descriptor, CHUNK_BYTES)
        except OSError:  # a terminal that went away, a folder, a descriptor that is write-only
            chunk = b""
        chunks.put(chunk)
