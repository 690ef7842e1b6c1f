"""Which experts to leave in RAM where not all fit on a GPU: those that are read soonest. Pure.

A token's step takes as long as its experts in RAM are read, and for each layer with any of them a
trip to RAM and back. So whole layers are left rather than a tensor here and there, but not at the
price of many bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TypeAlias

Ways: TypeAlias = dict[tuple[int, bool], tuple[int, tuple["Share", ...]]]

MAX_SUMS = 500
"""Sums looked at when sizes differ wildly; beyond that the largest so far go on."""


@dataclass(frozen=True, slots=True)
class Share:
    """Of layers of one kind so many whole ones, and of one more the tensors of these sizes."""

    n_layers: int
    part: tuple[int, ...] = ()

    @property
    def n_touched(self) -> int:
        return self.n_layers + bool(self.part)


@dataclass(frozen=True)
class Kind:
    """Layers whose experts have the same sizes in bytes, and how many layers there are."""

    sizes: tuple[int, ...]
    n_layers: int

    @cached_property
    def layer_bytes(self) -> int:
        return sum(self.sizes)

    @cached_property
    def parts(self) -> list[tuple[int, ...]]:
        """What a divided layer may leave, by sizes; at first nothing, where none is divided."""
        return sorted(
            {part for n in range(len(self.sizes)) for part in combinations(self.sizes, n)}
        )

    def shares(self, missing: int, may_divide: bool, all_of_it: bool) -> Iterator[Share]:
        """For each part the numbers of whole layers up to the first that comes to what is missing,
        or that one alone, where `all_of_it` has to come from here."""
        for part in self.parts if may_divide else ((),):
            enough = max(0, -(-(missing - sum(part)) // self.layer_bytes))
            most = self.n_layers - bool(part)
            for n in range(enough if all_of_it else 0, min(enough, most) + 1):
                yield Share(n, part)

    def n_bytes(self, share: Share) -> int:
        return share.n_layers * self.layer_bytes + sum(share.part)


def least(kinds: Sequence[Kind], needed: int, trip_bytes: int) -> tuple[Share, ...]:
    """The shares that come to `needed` bytes and cost least: their bytes, and for each layer that
    is touched what is read during a trip. One layer at most is divided.

    All kinds together have what is needed. Exact where there are few sizes, as in most models.
    """
    best, lowest = tuple(Share(0) for _ in kinds), math.inf if needed > 0 else 0
    # by bytes, and whether a layer is divided: what that costs, and how it came about
    ways: Ways = {(0, False): (0, ())}
    for n_after, kind in zip(range(len(kinds) - 1, -1, -1), kinds, strict=True):
        longer: Ways = {}
        for (n_bytes, is_divided), (cost, before) in ways.items():
            for share in kind.shares(needed - n_bytes, not is_divided, not n_after):
                more = kind.n_bytes(share)
                total = cost + more + trip_bytes * share.n_touched
                if total >= lowest:
                    continue
                way = (*before, share)
                if n_bytes + more >= needed:
                    lowest, best = total, (*way, *[Share(0)] * n_after)
                key = n_bytes + more, is_divided or bool(share.part)
                if key not in longer or total < longer[key][0]:
                    longer[key] = total, way
        ways = dict(sorted(longer.items(), reverse=True)[:MAX_SUMS])
    return best
