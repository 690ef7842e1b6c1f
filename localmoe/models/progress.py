"""How far a download is, as data: what is done, at which speed, and how long it will still take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["downloading", "verifying", "waiting"]

AT_MOST_EVERY_S = 0.2
SMOOTHED_OVER_S = 5.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Over all files of one download; bytes that an earlier run had fetched count as done.

    `bytes_per_s` is that of the last seconds, `seconds_left` None where there is nothing to tell it
    by. Phase "verifying" reads what is here, "waiting" waits for another program's download.
    `trouble` is why nothing comes just now, while it is tried again; "" where all is well.
    """

    n_bytes_done: int
    n_bytes_total: int
    bytes_per_s: float
    seconds_left: float | None
    n_files_done: int
    n_files: int
    file_name: str
    phase: Phase
    trouble: str = ""


class Meter:
    """Makes Progress of counts, and hands it on at most five times a second."""

    def __init__(
        self, n_bytes_total: int, n_files: int, on_progress: Callable[[Progress], None] | None
    ) -> None:
        self._n_bytes_total, self._n_files = n_bytes_total, n_files
        self._n_bytes_before = self._n_files_done = 0
        self._on_progress = on_progress
        self._samples: deque[tuple[float, int]] = deque()
        self._phase: Phase | None = None
        self._shown_at = 0.0

    def update(
        self, name: str, phase: Phase, n_bytes_done: int, n_counted: int, trouble: str = ""
    ) -> None:
        """Of the file that is in work: its bytes done; `n_counted` is what the speed is made of."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase = phase
            self._samples.clear()
        elif now - self._shown_at < AT_MOST_EVERY_S:
            return
        self._shown_at = now
        self._samples.append((now, n_counted))
        while now - self._samples[0][0] > SMOOTHED_OVER_S:
            self._samples.popleft()
        if self._on_progress:
            done = self._n_bytes_before + n_bytes_done
            self._on_progress(self._progress(name, phase, done, trouble))

    def file_done(self, name: str, n_bytes: int) -> None:
        """The file is whole, right, and in its place."""
        self._n_bytes_before += n_bytes
        self._n_files_done += 1
        if self._on_progress and self._n_files_done == self._n_files:
            phase = self._phase or "verifying"
            self._on_progress(self._progress(name, phase, self._n_bytes_before))

    def _progress(self, name: str, phase: Phase, n_done: int, trouble: str = "") -> Progress:
        speed, left = self._bytes_per_s(), self._n_bytes_total - n_done
        seconds_left = 0.0 if not left else left / speed if speed else None
        return Progress(
            n_done, self._n_bytes_total, speed, seconds_left,
            self._n_files_done, self._n_files, name, phase, trouble,
        )  # fmt: skip

    def _bytes_per_s(self) -> float:
        if len(self._samples) < 2:
            return 0.0
        (first_at, first), (last_at, last) = self._samples[0], self._samples[-1]
        return (last - first) / (last_at - first_at) if last_at > first_at else 0.0
