"""What can go wrong, in a person's words: a message, a hint with the next command, an exit code.

Raised anywhere, turned into one line once, in the click group.
"""

from __future__ import annotations


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
