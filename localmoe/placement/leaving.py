"""Which experts to leave in RAM where not all fit on a GPU: those that are read soonest. Pure.

A token's step takes as long as its experts in RAM are read, and for each layer with any of them a
trip to RAM and back. So whole layers are left rather than a tensor here and there, but not at the
price of many bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

MAX_WAYS = 40
"""Ways that are gone on with from one kind of layers to the next, the most promising ones. With
5,000 of them plans of 50,000 made-up files cost 0.01 % less on average, and 1 % at most."""
MANY_KINDS, FEW_WAYS = 6, 6
"""Of more kinds fewer ways: on three GPUs there are thousands of divisions to look at."""
MANY_TENSORS = 6
"""Layers of more, such as one for each expert, are divided after one or two."""


@dataclass(frozen=True, slots=True)
class Share:
    """Of layers of one kind so many whole ones, and of one more the tensors at these places."""

    n_layers: int
    part: tuple[int, ...] = ()

    @property
    def n_touched(self) -> int:
        return self.n_layers + bool(self.part)


@dataclass(frozen=True)
class Kind:
    """Layers whose experts have the same sizes in bytes, in order, and how many layers there are.

    A divided layer leaves its first tensor in RAM, alone or with others, or one other alone: what
    is computed between two of the others must not be on the GPU (sizes.py).
    """

    sizes: tuple[int, ...]
    n_layers: int

    @cached_property
    def layer_bytes(self) -> int:
        return sum(self.sizes)

    @cached_property
    def parts(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """What a divided layer may leave, by places, and its bytes; at first nothing of none."""
        most = len(self.sizes) if len(self.sizes) <= MANY_TENSORS else 3
        found: dict[int, tuple[int, ...]] = {0: ()}
        for n in range(1, most):
            for part in combinations(range(len(self.sizes)), n):
                if n == 1 or part[0] == 0:
                    found.setdefault(sum(self.sizes[i] for i in part), part)
        return tuple((part, n_bytes) for n_bytes, part in found.items())

    def shares(
        self, missing: int, may_divide: bool, all_of_it: bool
    ) -> Iterator[tuple[Share, int]]:
        """For each part the numbers of whole layers up to the first that comes to what is missing,
        or that one alone, where `all_of_it` has to come from here; with their bytes."""
        for part, n_bytes in self.parts if may_divide else self.parts[:1]:
            enough = max(0, -(-(missing - n_bytes) // self.layer_bytes))
            most = min(enough, self.n_layers - bool(part))
            for n in range(enough if all_of_it else 0, most + 1):
                yield Share(n, part), n_bytes + n * self.layer_bytes


NONE = Share(0)


class Way(NamedTuple):
    """Shares of some kinds: their bytes, and what they cost with the trips."""

    n_bytes: int = 0
    cost: int = 0
    is_divided: bool = False
    shares: tuple[Share, ...] = ()


def least(kinds: Sequence[Kind], needed: int, trip_bytes: int) -> tuple[Share, ...]:
    """The shares that come to `needed` bytes and cost least: their bytes, and for each layer that
    is touched what is read during a trip. One layer at most is divided.

    All kinds together have what is needed. For one or two kinds at most a thousandth is lost.
    """
    order = sorted(range(len(kinds)), key=lambda i: -kinds[i].layer_bytes)
    best = Way(shares=(NONE,) * len(kinds))
    if needed > 0:
        ordered = [kinds[i] for i in order]
        # a first one, however it is, spares looking at most of what could be
        first = cheapest(ordered, needed, trip_bytes, 1, None)
        n_ways = MAX_WAYS if len(kinds) <= MANY_KINDS else FEW_WAYS
        best = cheapest(ordered, needed, trip_bytes, n_ways, first) or best
    return tuple(best.shares[order.index(i)] for i in range(len(kinds)))


def cheapest(
    kinds: Sequence[Kind], needed: int, trip_bytes: int, n_ways: int, best: Way | None
) -> Way | None:
    """The cheapest way to what is needed, or the one that is known."""
    ways = [Way()]
    for n_before, kind in enumerate(kinds, 1):
        after = kinds[n_before:]
        largest = after[0].layer_bytes if after else 0
        longer: dict[tuple[int, bool], Way] = {}
        for way in ways:
            missing = needed - way.n_bytes
            for share, n_bytes in kind.shares(missing, not way.is_divided, not after):
                cost = way.cost + n_bytes + trip_bytes * share.n_touched
                rest = max(0, missing - n_bytes)
                if best and cost + at_least(rest, largest, trip_bytes) >= worth_finding(best):
                    continue
                is_divided = way.is_divided or bool(share.part)
                new = Way(way.n_bytes + n_bytes, cost, is_divided, (*way.shares, share))
                if not rest:
                    best = new._replace(shares=new.shares + (NONE,) * len(after))
                    continue
                known = longer.setdefault((new.n_bytes, is_divided), new)
                if cost < known.cost:
                    longer[new.n_bytes, is_divided] = new
        ways = promising(longer.values(), needed, largest, trip_bytes, n_ways)
    return best


def worth_finding(best: Way) -> int:
    """Ways that are cheaper by less than a thousandth aren't looked for."""
    return best.cost - best.cost // 1000


def at_least(missing: int, largest: int, trip_bytes: int) -> int:
    """What the rest costs at least, of layers of which the largest has so many bytes."""
    return missing + (-(-missing // largest) * trip_bytes if missing else 0)


def promising(
    ways: Collection[Way], needed: int, largest: int, trip_bytes: int, n_ways: int
) -> list[Way]:
    """Those that may come to the least, and the one with most bytes, which is sure to get there."""

    def likely_cost(way: Way) -> float:
        missing = needed - way.n_bytes
        return way.cost + missing + missing * trip_bytes / max(1, largest)

    best = sorted(ways, key=likely_cost)[:n_ways]
    fullest = max(ways, key=lambda way: way.n_bytes, default=None)
    return best if fullest is None or fullest in best else [*best, fullest]
