"""How often an engine that died is replaced, and its question asked again.

    text = retry_on_crash(ask, revive, n_tries=CHAT_ENCODE_TRIES)

Every limit stands in the table below. Who brings the next engine, and what a person is told of it,
is the callers' own business (loading.EngineReloader, batch/job.py).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from ..errors import EngineError, RequestError
from .protocol import Delta

# ---- the limits ----

ANSWER_TRIES = 3
"""How often one answer of a conversation is begun. What kills three engines is no accident."""
CHAT_ENCODE_TRIES = 2
"""How often a conversation is encoded to be measured. That is quick, so an engine that dies of it
died before, or will die of it always."""
REQUEST_TRIES = 3
"""How often one request of a batch is asked, each time beside fewer others: its neighbour may have
killed the engine the first two times, but the third time it is alone."""
DISPATCH_CRASHES = 9
"""Engines of a batch that may die one after the other without an answer between them. Several
requests that kill an engine may follow each other; after nine nothing will ever be answered."""
VOCABULARY_CRASHES = 5
"""Vocabularies of a batch that may die one after the other. Each death refuses the one text that
caused it, so five in a row are no longer the fault of the texts."""

T = TypeVar("T")


@dataclass(slots=True)
class CrashCounter:
    """Counts engines that died one after the other; `n_most` of them are followed by another."""

    n_most: int
    n_in_a_row: int = 0

    def add(self, error: EngineError) -> None:
        """Counts a crash. Raises the error where it is one too many.

        A refused request (RequestError) is raised at once, since its engine lives on.
        """
        if isinstance(error, RequestError):
            raise error
        self.n_in_a_row += 1
        if self.n_in_a_row > self.n_most:
            raise error

    def reset(self) -> None:
        """Notes that an engine answered."""
        self.n_in_a_row = 0


def retry_on_crash(ask: Callable[[], T], revive: Callable[[EngineError], None], n_tries: int) -> T:
    """Returns what `ask` returns, which is called again where the engine died.

    `revive` provides the engine that `ask` uses next, or raises. Raises EngineError where `n_tries`
    engines died, and RequestError at once.
    """
    crashes = CrashCounter(n_tries - 1)
    while True:
        try:
            return ask()
        except EngineError as error:
            crashes.add(error)
            revive(error)


def stream_with_retry(
    ask: Callable[[], Generator[Delta, None, None]],
    revive: Callable[[EngineError, bool], None],
    n_tries: int = ANSWER_TRIES,
) -> Generator[Delta, None, None]:
    """Yields the deltas of an answer, which begins anew where the engine died.

    As `retry_on_crash`; `revive` is also told whether tokens of the answer came before the crash.
    Then a delta with `anew` says that those are void.
    """
    crashes = CrashCounter(n_tries - 1)
    while True:
        has_begun = False
        try:
            with closing(ask()) as deltas:
                for delta in deltas:
                    has_begun = has_begun or bool(delta.tokens)
                    yield delta
            return
        except EngineError as error:
            crashes.add(error)
            revive(error, has_begun)
        if has_begun:
            yield Delta(0, anew=True)
