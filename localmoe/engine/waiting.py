"""Requests that wait: those that begin alike come one after the other.

Among requests in the order of their tokens, as words in a dictionary, those that share most are
neighbours. So the next to be started is a neighbour of the one that was started last, as long as
they share something worth it; otherwise it is the oldest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .protocol import Request

WORTH_SHARING = 32
"""Tokens: beginnings shorter than that, such as a prompt format's own, change no order, and nobody
waits for another to compute them."""

MAX_PASSED = 1024
"""How many later ones may be started before the oldest, however much they share."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request with the moment of its arrival, in seconds of time.perf_counter."""

    id: int
    request: Request
    arrived: float

    @property
    def place(self) -> tuple[tuple[int, ...], int]:
        """Where it stands among others: by its tokens, if it wants to share any."""
        return (self.request.tokens if self.request.share else (), self.id)


class Queue:
    """Waiting requests. Ids grow with arrival."""

    def __init__(self) -> None:
        self._places: list[tuple[tuple[int, ...], int]] = []  # sorted
        self._by_id: dict[int, Waiting] = {}
        self._last: tuple[int, ...] = ()
        self._n_passed = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._by_id.values())

    def add(self, waiting: Waiting) -> None:
        insort(self._places, waiting.place)
        self._by_id[waiting.id] = waiting

    def remove(self, id: int) -> Waiting | None:
        """Take one out that is no longer wanted; None where it isn't here."""
        waiting = self._by_id.pop(id, None)
        if waiting is not None:
            del self._places[bisect_left(self._places, waiting.place)]
        return waiting

    def pop(self) -> Waiting:
        """The next to start."""
        oldest = min(self._by_id)
        id = oldest
        if self._n_passed < MAX_PASSED:
            id = self._neighbour(oldest)
        self._n_passed = 0 if id == oldest else self._n_passed + 1
        waiting = self._by_id[id]
        self.remove(id)
        self._last = waiting.place[0]
        return waiting

    def _neighbour(self, otherwise: int) -> int:
        at = bisect_left(self._places, (self._last, 0))
        n_most, id = WORTH_SHARING - 1, otherwise
        for tokens, neighbour in self._places[max(0, at - 1) : at + 1]:
            if (n_shared := common_prefix(tokens, self._last)) > n_most:
                n_most, id = n_shared, neighbour
        return id


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    at, step, end = 0, 16, min(len(a), len(b))
    while at < end:
        stop = min(at + step, end)
        if tuple(a[at:stop]) == tuple(b[at:stop]):
            at, step = stop, 2 * step
        elif stop - at == 1:
            break
        else:
            end, step = stop, (stop - at) // 2
    return at
