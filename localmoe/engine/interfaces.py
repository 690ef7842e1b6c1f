"""What other layers need of an engine; engine.client.EngineProcess has all of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Protocol

from .protocol import Delta, Request, StateRestored, StateSaved, TextPiece

if TYPE_CHECKING:
    from .client import Inbox


class Tokenizer(Protocol):
    """A model's vocabulary at work. Every method raises EngineError where the engine died."""

    def tokenize(self, pieces: Sequence[TextPiece]) -> list[tuple[int, ...]]:
        """Returns the ids of each piece by itself; only `special` pieces spell control tokens."""
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Returns the text of some tokens, control tokens spelled out."""
        ...


class Engine(Tokenizer, Protocol):
    """A loaded model that answers requests and keeps states of conversations in files."""

    def generate(self, request: Request) -> Generator[Delta, None, None]:
        """Yields an answer in deltas; closing the generator cancels the request."""
        ...

    def submit(self, request: Request, inbox: Inbox) -> int:
        """Sends a request whose deltas go to `inbox`; returns its id."""
        ...

    def cancel(self, id: int, *, only_waiting: bool = False) -> None:
        """Ends a request; with `only_waiting`, one that is being computed goes on."""
        ...

    def save_state(self, path: str, key: str, tokens: Sequence[int], room_bytes: int) -> StateSaved:
        """Writes the cache's state of the longest prefix of `tokens` to a file."""
        ...

    def restore_state(self, path: str, key: str) -> StateRestored:
        """Restores the state of a file that suits `key`."""
        ...

    def close(self) -> None:
        """Ends the engine and waits for it."""
        ...

    def kill(self) -> None:
        """Ends the engine at once."""
        ...
