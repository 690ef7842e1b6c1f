"""Requests that wait for a slot: those with a common prefix start one after the other.

Among requests in the order of their tokens, as words in a dictionary, those that share most are
neighbours. So the next to be started is a neighbour of the one that was started last, as long as
they share something worth it; otherwise it is the oldest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from ..prefix import MIN_SHARED_TOKENS, common_prefix
from ..protocol import Request

MAX_PASSED = 1024
"""How many later ones may be started before the oldest, however much they share."""


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """A request with the moment of its arrival, in seconds of time.perf_counter."""

    id: int
    request: Request
    arrived: float

    @property
    def sort_key(self) -> tuple[tuple[int, ...], int]:
        """Orders requests by their tokens, so that those with a common prefix are neighbours."""
        return (self.request.tokens if self.request.reuse_prefix else (), self.id)


class RequestQueue:
    """Waiting requests. Ids grow with arrival."""

    def __init__(self) -> None:
        self._sorted: list[tuple[tuple[int, ...], int]] = []  # sorted
        self._by_id: dict[int, QueuedRequest] = {}
        self._last: tuple[int, ...] = ()
        self._n_passed = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[QueuedRequest]:
        return iter(self._by_id.values())

    def add(self, waiting: QueuedRequest) -> None:
        """Queues a request."""
        insort(self._sorted, waiting.sort_key)
        self._by_id[waiting.id] = waiting

    def remove(self, id: int) -> QueuedRequest | None:
        """Take one out that is no longer wanted; None where it isn't here."""
        waiting = self._by_id.pop(id, None)
        if waiting is not None:
            del self._sorted[bisect_left(self._sorted, waiting.sort_key)]
        return waiting

    def pop(self) -> QueuedRequest:
        """The next to start."""
        oldest = min(self._by_id)
        id = oldest
        if self._n_passed < MAX_PASSED:
            id = self._neighbour(oldest)
        self._n_passed = 0 if id == oldest else self._n_passed + 1
        waiting = self._by_id[id]
        self.remove(id)
        self._last = waiting.sort_key[0]
        return waiting

    def _neighbour(self, otherwise: int) -> int:
        at = bisect_left(self._sorted, (self._last, 0))
        n_most, id = MIN_SHARED_TOKENS - 1, otherwise
        for tokens, neighbour in self._sorted[max(0, at - 1) : at + 1]:
            if (n_shared := common_prefix(tokens, self._last)) > n_most:
                n_most, id = n_shared, neighbour
        return id
