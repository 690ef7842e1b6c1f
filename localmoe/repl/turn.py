"""An answer that is generated in a thread of its own, so that Ctrl-C never breaks into a message
to the engine: it is an event like the others.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..engine.protocol import Delta

WAKE_SECONDS = 0.2
"""A wait without an end can't be interrupted by Ctrl-C on Windows."""


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for the person."""

    text: str


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Ctrl-C."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing happened for a moment."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The generator is closed; `error` is what it raised."""

    error: BaseException | None = None


Event = Delta | Note | Interrupt | Tick | Ended


class Turn:
    """Runs a generator of deltas. `events` gives them, and what happens meanwhile."""

    def __init__(self, deltas: Generator[Delta, None, None]) -> None:
        self._deltas = deltas
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def is_over(self) -> bool:
        """Whether the generator has ended."""
        return not self._thread.is_alive()

    def start(self) -> Turn:
        """Starts the generator in a thread of its own."""
        self._thread.start()
        return self

    def note(self, text: str) -> None:
        """Say something in the middle of it, from any thread."""
        self._queue.put(Note(text))

    def stop(self) -> None:
        """End it at its next delta; what came of it is kept."""
        self._is_stopping = True

    def events(self) -> Iterator[Event]:
        """What happens, up to the end; a Tick now and then."""
        while True:
            try:
                event = self._queue.get(timeout=WAKE_SECONDS)
            except queue.Empty:
                event = Tick()
            yield event
            if isinstance(event, Ended):
                return

    @contextmanager
    def taking_interrupts(self) -> Iterator[None]:
        """Ctrl-C becomes an event meanwhile."""
        with handling_sigint(lambda: self._queue.put(Interrupt())):
            yield

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for delta in self._deltas:
                self._queue.put(delta)
                if self._is_stopping:
                    break
        except BaseException as raised:
            error = raised
        finally:
            with contextlib.suppress(Exception):
                self._deltas.close()
            self._queue.put(Ended(error))


@contextmanager
def handling_sigint(handle: Callable[[], None]) -> Iterator[None]:
    """Calls `handle` on Ctrl-C while the block runs."""
    before = signal.signal(signal.SIGINT, lambda *_: handle())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
