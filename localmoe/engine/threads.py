"""How many compute threads a step gets: all that were planned, fewer while others want the cores.

llama.cpp's threads wait for each other after every operation. Where another program has one of
their cores, all of them wait for that one, and a thread less is several times as fast
(docs/notes/busy-machine.md). How long threads waited for a core is what the kernel counts for each
of them (Linux, Documentation/scheduler/sched-stats.rst).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

WINDOW_S = 0.25
"""How long it is looked before anything is decided."""
MUCH = 0.15
"""Seconds that threads waited in a second, all together, from which on cores are wanted by others:
a busy program takes half of a core from a thread, an idle machine a hundredth."""
PATIENCE_S, MOST_PATIENCE_S = 2.0, 60.0
"""After how long all threads are tried again; each time in vain it is twice as long."""
TASKS = Path("/proc/self/task")


def waited_s(tasks: Path = TASKS) -> float:
    """Seconds that this process's threads have been ready to run without a core; 0 where the
    system does not tell. Threads come and go, so it may fall."""
    nanoseconds = 0
    with suppress(OSError):  # no such system
        for task in tasks.iterdir():
            with suppress(OSError, ValueError, IndexError):  # a thread that has just ended
                nanoseconds += int((task / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9


class Threads:
    """The number of threads for the next step, by what was lost in those before."""

    def __init__(
        self,
        n_most: int,
        waited: Callable[[], float] = waited_s,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n = self._n_most = n_most
        self._n_least = max(1, n_most // 2)
        self._waited, self._clock = waited, clock
        self._patience_s, self._lowered_at = PATIENCE_S, -MOST_PATIENCE_S
        self._seconds, self._before = 0.0, waited()

    def stepped(self, seconds: float) -> None:
        """A step took so long, with `n` threads."""
        self._seconds += seconds
        if self._seconds >= WINDOW_S:
            waited = self._waited()
            self._decide((waited - self._before) / self._seconds)
            self._seconds, self._before = 0.0, waited

    def _decide(self, lost: float) -> None:
        """`lost` are seconds in a second; one busy program takes about half of them."""
        since = self._clock() - self._lowered_at
        if lost >= MUCH and self.n > self._n_least:
            if self.n == self._n_most:
                is_still_busy = since < 2 * self._patience_s
                longer = min(2 * self._patience_s, MOST_PATIENCE_S)
                self._patience_s = longer if is_still_busy else PATIENCE_S
            self.n = max(self._n_least, self.n - max(1, round(2 * lost)))
            self._lowered_at = self._clock()
        elif self.n < self._n_most and since >= self._patience_s:
            self.n = self._n_most
