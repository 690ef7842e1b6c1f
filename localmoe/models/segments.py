"""Who fetches what: the missing bytes of a file, dealt out to a few connections."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from .pieces import PIECE_BYTES

LONGEST_BYTES = 64 << 20
SHORTEST_BYTES = 2 << 20
WORTH_SHARING_BYTES = 4 << 20
"""A connection with less left is not helped: the request would cost more than it brings."""


@dataclass(slots=True, eq=False)
class Segment:
    """Bytes that one connection fetches, from `at` on; both ends are those of pieces.

    `at` is moved by its connection alone, `end` comes down when others take over its tail.
    """

    at: int
    end: int


class Segments:
    """What no connection has yet, and what each is at.

    The share of a connection gets smaller towards the end, so that all end at about the same time;
    one that is free takes over half of what the slowest has left.
    """

    def __init__(self, missing: Iterable[tuple[int, int]], connections: int) -> None:
        self._waiting = [Segment(*ends) for ends in missing]
        self._active: list[Segment] = []
        self._connections = connections
        self._lock = threading.Lock()
        self._streaming: Segment | None = None

    def take(self) -> Segment | None:
        """The next one, to be handed back with `done`; None where nothing is left to do."""
        with self._lock:
            if self._streaming:
                return None
            taken = self._next() if self._waiting else self._share_of_slowest()
            if taken:
                self._active.append(taken)
            return taken

    def _next(self) -> Segment:
        left = sum(segment.end - segment.at for segment in self._waiting)
        share = left // (2 * self._connections)
        first = self._waiting[0]
        n_bytes = _whole_pieces(min(max(share, SHORTEST_BYTES), LONGEST_BYTES))
        if first.end - first.at <= n_bytes:
            return self._waiting.pop(0)
        first.at += n_bytes
        return Segment(first.at - n_bytes, first.at)

    def _share_of_slowest(self) -> Segment | None:
        slowest = max(self._active, key=lambda s: s.end - s.at, default=None)
        if slowest is None or slowest.end - slowest.at < WORTH_SHARING_BYTES:
            return None
        middle = slowest.at + _whole_pieces((slowest.end - slowest.at) // 2)
        tail = Segment(middle, slowest.end)
        slowest.end = middle
        return tail

    def done(self, segment: Segment) -> None:
        """Its connection is through with it, or gives up; others take what is left of it."""
        with self._lock:
            self._active.remove(segment)
            if segment.at < segment.end:
                self._waiting.insert(0, segment)

    def in_one_stream(self, segment: Segment, n_bytes: int) -> bool:
        """The server sends the file from its beginning, whatever is asked: one connection takes it.

        That is the first one to ask; for the others this is False and their segment is empty now.
        """
        with self._lock:
            if not self._streaming:
                self._streaming = segment
                self._waiting.clear()
                for other in self._active:
                    other.end = other.at
            if self._streaming is segment:
                segment.at, segment.end = 0, n_bytes
            return self._streaming is segment


def _whole_pieces(n_bytes: int) -> int:
    return max(PIECE_BYTES, n_bytes - n_bytes % PIECE_BYTES)
