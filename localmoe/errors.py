"""What can go wrong, in a person's words: a message, a hint with the next command, an exit code.

Raised anywhere, turned into one line once, in the click group.
"""

from __future__ import annotations

import re


class LocalMoeError(Exception):
    """One sentence saying what was wanted and the numbers, and a hint naming the next command."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(LocalMoeError):
    """What was asked for makes no sense as it stands: a bad value, an unknown name."""

    exit_code = 2


class PromptError(UsageError):
    """A conversation that the model's prompt format can't express."""


class DoesNotFit(LocalMoeError):
    """Needs more memory than there is."""

    exit_code = 3


class ModelFileError(LocalMoeError):
    """A model file that can't be used: not GGUF, damaged, cut short, of an early layout."""


class DownloadError(LocalMoeError):
    """The Hub or a transfer: unknown, gated, broken off, or not what its hash says."""

    exit_code = 4


class EngineError(LocalMoeError):
    """llama.cpp refused, or its process died."""


class RequestError(EngineError):
    """The engine lives on, but can't answer this request (too long, a bad grammar)."""


def gib(n_bytes: int) -> str:
    """Bytes in a sentence."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**27 else f"{n_bytes / 2**20:.1f} MiB"


MESSAGE_CHARS = 200  # message and hint together
NAME_CHARS = 60


def model_file_error(file: str, reason: str, hint: str = "") -> ModelFileError:
    """The error for a file: `reason` may quote what stands in it; it is made harmless here."""
    # of a long name the end says more: quant and shard
    shown = printable(file) if len(file) <= NAME_CHARS else "…" + printable(file[1 - NAME_CHARS :])
    message = printable(f"{shown}: {reason}" if shown else reason)
    room = MESSAGE_CHARS - (len(hint) + 2 if hint else 1)
    message = message if len(message) <= room else message[: room - 1] + "…"
    return ModelFileError(message if message.endswith((".", "?", "…")) else message + ".", hint)


# C0 but tab and newline, DEL, C1, the controls of bidirectional text (Unicode UAX 9), Unicode's own
# line ends, and halves of surrogate pairs, which can't be written
UNSAFE_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What steers a terminal or breaks a line, wherever text from outside is shown or kept."""


def escape_unsafe(json_text: str) -> str:
    """A JSON document with its unsafe characters escaped: it says the same, and steers nothing."""
    return UNSAFE_CHARACTERS.sub(lambda found: f"\\u{ord(found[0]):04x}", json_text)


def printable(text: str, instead: str = "?") -> str:
    """Returns `text` on one line, with `instead` in place of controls and bidirectional marks."""
    return "".join(c if c.isprintable() else instead for c in text)
