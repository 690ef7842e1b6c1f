"""How many requests are answered at once: what is wanted, and what a cache for them needs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from .request import PlanRequest

AT_ONCE = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of sequences that are tried; llama.cpp takes 256 at most (LLAMA_MAX_SEQ)."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """Requests that are known before a model is loaded.

    `n_at_once` are the numbers to choose from, `n_ctx` the tokens of the longest, its answer
    included. `n_cells` has, for a number of sequences, the cells of a cache that they share because
    they begin alike; for others each has room of its own. `is_open`: the number is not a person's.
    """

    n_at_once: tuple[int, ...]
    n_ctx: int
    n_cells: Mapping[int, int] = field(default_factory=dict)
    is_open: bool = True

    def requests(self, request: PlanRequest, has_gpu: bool) -> Iterator[PlanRequest]:
        """The request for each number, the largest first.

        On the CPU each has room of its own: that is no slower there, and lets answers be the same
        whatever is beside them. So does a single one, as long as there is room for a second.
        """
        n_ctx = min(self.n_ctx, request.n_ctx or self.n_ctx)
        wanted = {*self.n_at_once, *((2,) if self.is_open and not has_gpu else ())}
        for n in sorted(wanted, reverse=True):
            n_cells = max(self.n_cells[n], n_ctx) if has_gpu and n in self.n_cells else 0
            alike = n > 1 and not has_gpu
            yield replace(request, n_ctx=n_ctx, n_seq=n, n_cells=n_cells, alike=alike)


def numbers(n_requests: int, wanted: int | None = None) -> tuple[int, ...]:
    """The numbers to choose from: the one that is wanted, else up to all of the requests."""
    if wanted is not None:
        return (wanted,)
    enough = next((n for n in AT_ONCE if n >= n_requests), AT_ONCE[-1])
    return tuple(n for n in AT_ONCE if n <= enough)
