"""Searches which layers and experts go to which GPU, on sizes alone. Pure.

Dense parts come first, since every token needs all of them. Then come experts, so that what stays
in RAM is read soonest: a token's step takes as long as its experts in RAM are read, and for each
layer with any of them a trip to RAM and back. Whole layers are left rather than a tensor here and
there, but not at the price of many bytes. llama.cpp puts the last layers on GPUs and counts the
output matrix as one layer more (src/llama-model.cpp); layers go to devices in order, in one run
each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, combinations
from typing import NamedTuple, TypeAlias

from ..engine.protocol import first_gpu_layer

MAX_WAYS = 40
"""Ways that are gone on with from one kind of layers to the next, the most promising ones. With
5,000 of them plans of 50,000 made-up files cost 0.01 % less on average, and 1 % at most."""
MANY_KINDS, FEW_WAYS = 6, 6
"""Of more kinds fewer ways: on three GPUs there are thousands of divisions to look at."""
MANY_TENSORS = 6
"""Layers of more, such as one for each expert, are divided after one or two."""


@dataclass(frozen=True, slots=True)
class LayerSplit:
    """Of layers of one kind so many whole ones, and of one more the tensors at these places."""

    n_layers: int
    part: tuple[int, ...] = ()

    @property
    def n_touched(self) -> int:
        """Layers that have experts in RAM."""
        return self.n_layers + bool(self.part)


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose experts have the same sizes in bytes, in order, and how many layers there are.

    A divided layer leaves its first tensor in RAM, alone or with others, or one other alone: what
    is computed between two of the others must not be on the GPU (model_bytes.py).
    """

    sizes: tuple[int, ...]
    n_layers: int

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes of one layer's experts."""
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
    ) -> Iterator[tuple[LayerSplit, int]]:
        """For each part the numbers of whole layers up to the first that comes to what is missing,
        or that one alone, where `all_of_it` has to come from here; with their bytes."""
        for part, n_bytes in self.parts if may_divide else self.parts[:1]:
            enough = max(0, -(-(missing - n_bytes) // self.layer_bytes))
            most = min(enough, self.n_layers - bool(part))
            for n in range(enough if all_of_it else 0, most + 1):
                yield LayerSplit(n, part), n_bytes + n * self.layer_bytes


NONE = LayerSplit(0)


class SplitCandidate(NamedTuple):
    """Shares of some kinds: their bytes, and what they cost with the trips."""

    n_bytes: int = 0
    cost: int = 0
    is_divided: bool = False
    shares: tuple[LayerSplit, ...] = ()


def cheapest_split(
    kinds: Sequence[LayerGroup], needed: int, trip_bytes: int
) -> tuple[LayerSplit, ...]:
    """The shares that come to `needed` bytes and cost least: their bytes, and for each layer that
    is touched what is read during a trip. One layer at most is divided.

    All kinds together have what is needed. For one or two kinds at most a thousandth is lost.
    """
    order = sorted(range(len(kinds)), key=lambda i: -kinds[i].layer_bytes)
    best = SplitCandidate(shares=(NONE,) * len(kinds))
    if needed > 0:
        ordered = [kinds[i] for i in order]
        # a first one, however it is, spares looking at most of what could be
        first = cheapest(ordered, needed, trip_bytes, 1, None)
        n_ways = MAX_WAYS if len(kinds) <= MANY_KINDS else FEW_WAYS
        best = cheapest(ordered, needed, trip_bytes, n_ways, first) or best
    return tuple(best.shares[order.index(i)] for i in range(len(kinds)))


def cheapest(
    kinds: Sequence[LayerGroup],
    needed: int,
    trip_bytes: int,
    n_ways: int,
    best: SplitCandidate | None,
) -> SplitCandidate | None:
    """The cheapest way to what is needed, or the one that is known."""
    ways = [SplitCandidate()]
    for n_before, kind in enumerate(kinds, 1):
        after = kinds[n_before:]
        largest = after[0].layer_bytes if after else 0
        longer: dict[tuple[int, bool], SplitCandidate] = {}
        for way in ways:
            missing = needed - way.n_bytes
            for share, n_bytes in kind.shares(missing, not way.is_divided, not after):
                cost = way.cost + n_bytes + trip_bytes * share.n_touched
                rest = max(0, missing - n_bytes)
                if best and cost + at_least(rest, largest, trip_bytes) >= worth_finding(best):
                    continue
                is_divided = way.is_divided or bool(share.part)
                new = SplitCandidate(way.n_bytes + n_bytes, cost, is_divided, (*way.shares, share))
                if not rest:
                    best = new._replace(shares=new.shares + (NONE,) * len(after))
                    continue
                known = longer.setdefault((new.n_bytes, is_divided), new)
                if cost < known.cost:
                    longer[new.n_bytes, is_divided] = new
        ways = promising_splits(longer.values(), needed, largest, trip_bytes, n_ways)
    return best


def worth_finding(best: SplitCandidate) -> int:
    """Ways that are cheaper by less than a thousandth aren't looked for."""
    return best.cost - best.cost // 1000


def at_least(missing: int, largest: int, trip_bytes: int) -> int:
    """What the rest costs at least, of layers of which the largest has so many bytes."""
    return missing + (-(-missing // largest) * trip_bytes if missing else 0)


def promising_splits(
    ways: Collection[SplitCandidate], needed: int, largest: int, trip_bytes: int, n_ways: int
) -> list[SplitCandidate]:
    """Those that may come to the least, and the one with most bytes, which is sure to get there."""

    def likely_cost(way: SplitCandidate) -> float:
        missing = needed - way.n_bytes
        return way.cost + missing + missing * trip_bytes / max(1, largest)

    best = sorted(ways, key=likely_cost)[:n_ways]
    fullest = max(ways, key=lambda way: way.n_bytes, default=None)
    return best if fullest is None or fullest in best else [*best, fullest]


MAX_SUMS = 500
"""Sums looked at when sizes differ wildly; beyond that the best ones so far go on."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A transformer block in bytes: `dense` is all but the experts that may go to RAM, `kv` its
    cache. Of experts there is a name for each matrix, biases and scales counted with it.

    While `trip_bytes` of experts in RAM are read, a token's state goes to RAM and back once.
    """

    index: int
    dense_bytes: int
    kv_bytes: int
    experts: tuple[tuple[str, int], ...] = ()
    trip_bytes: int = 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of its experts."""
        return sum(n_bytes for _, n_bytes in self.experts)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that go with the layer wherever it is."""
        return self.dense_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class GpuCapacity:
    """Bytes that each GPU has for weights and cache: with all experts on GPUs, with some in RAM
    (`mixed`), when llama.cpp also keeps room to copy them over, and with whole layers in RAM
    (`split`; as `mixed` where nothing else is given). Each is at most the one before."""

    whole: tuple[int, ...]
    mixed: tuple[int, ...]
    split: tuple[int, ...] = ()

    def with_layers_in_ram(self) -> tuple[int, ...]:
        """Bytes of each GPU where whole layers stay in RAM."""
        return self.split or self.mixed


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """`split` counts the layers of each GPU, the output as one; `cpu_experts` are tensor names."""

    n_gpu_layers: int
    split: tuple[int, ...]
    cpu_experts: frozenset[str]


@dataclass(frozen=True, slots=True)
class Filling:
    """Expert tensors that fit, by names, and in bytes; `worth` are these less what the trips cost
    to the layers that have some in RAM."""

    worth: int
    n_bytes: int
    names: frozenset[str]


Filler: TypeAlias = Callable[[Sequence[Layer], int], Filling]
NOTHING = Filling(0, 0, frozenset())


def place_layers(
    layers: Sequence[Layer], output_bytes: int, rooms: GpuCapacity, n_gpu_layers: int | None = None
) -> LayerPlacement:
    """The layout with most layers on the GPUs, and then with what is read soonest in RAM.

    With `n_gpu_layers` that many layers are there, whether they fit or not; only experts move.
    """
    wanted = [n_gpu_layers] if n_gpu_layers is not None else range(len(layers) + 1, 0, -1)
    for n in wanted:
        layout = placement_with(layers, output_bytes, rooms, n, fill)
        if layout:
            return layout
    if n_gpu_layers and rooms.mixed:
        return LayerPlacement(
            n_gpu_layers, even_split(n_gpu_layers, rooms.mixed), expert_names(layers)
        )
    return LayerPlacement(0, (), expert_names(layers))


def placement_with(
    layers: Sequence[Layer],
    output_bytes: int,
    rooms: GpuCapacity,
    n_gpu_layers: int,
    filler: Filler,
) -> LayerPlacement | None:
    """The best layout with so many layers on GPUs; None where their dense parts don't fit."""
    if n_gpu_layers == 0 or not rooms.mixed:
        return None
    everything = len(layers) + 1
    if n_gpu_layers == everything:
        as_blocks = [Layer(n.index, n.dense_bytes + n.expert_bytes, n.kv_bytes) for n in layers]
        if found := best_split(as_blocks, output_bytes, rooms.whole, filler):
            return LayerPlacement(everything, found[0], frozenset())
    on_gpu = layers[first_gpu_layer(len(layers), n_gpu_layers) :]
    room = rooms.mixed if n_gpu_layers == everything else rooms.with_layers_in_ram()
    found = best_split(on_gpu, output_bytes, room, filler)
    return (
        LayerPlacement(n_gpu_layers, found[0], expert_names(layers) - found[1]) if found else None
    )


@dataclass(frozen=True, slots=True)
class LayerRun:
    """What GPUs so far hold at best, the first layers in order. `evenness` breaks ties: GPUs
    that hold the same share of their room."""

    worth: int
    evenness: float
    split: tuple[int, ...]
    names: frozenset[str]

    @property
    def merit(self) -> tuple[int, float]:
        """What runs are compared by."""
        return self.worth, self.evenness


def best_split(
    on_gpu: Sequence[Layer], output_bytes: int, rooms: Sequence[int], filler: Filler
) -> tuple[tuple[int, ...], frozenset[str]] | None:
    """The split that leaves least in RAM, and the names of experts on GPUs; None where none fits.

    GPU by GPU, with the best that comes before every boundary: as good as the filler is, since
    merits add up.
    """
    ends = [0, *accumulate([layer.fixed_bytes for layer in on_gpu] + [output_bytes])]
    n, best = len(ends) - 1, {0: LayerRun(0, 0.0, (), frozenset())}
    for place, room in enumerate(rooms):
        longer: dict[int, LayerRun] = {}
        for start, before in best.items():
            is_last = place == len(rooms) - 1
            for end in [n] if is_last else range(start, n + 1):
                fixed = ends[end] - ends[start]
                if end > start and fixed > room:
                    break
                run = extended(before, end - start, fixed, room, on_gpu[start:end], filler)
                if end not in longer or run.merit > longer[end].merit:
                    longer[end] = run
        best = longer
    return (best[n].split, best[n].names) if n in best else None


def extended(
    before: LayerRun, n: int, fixed_bytes: int, room: int, layers: Sequence[Layer], filler: Filler
) -> LayerRun:
    """One GPU more, with `n` layers (perhaps the output among them) and what experts fit."""
    mine = filler(layers, room - fixed_bytes) if n else NOTHING
    held = fixed_bytes + mine.n_bytes
    return LayerRun(
        before.worth + mine.worth,
        before.evenness - held * held / max(1, room),
        (*before.split, n),
        before.names | mine.names,
    )


# ---- experts of one GPU ----


def fill(layers: Sequence[Layer], room: int) -> Filling:
    """The experts that fill a room best: what stays in RAM is read soonest (expert_packing.py).

    Of layers of one kind the last ones are taken, so that the first ones' experts stay in RAM.
    """
    if room < 0:
        return NOTHING
    alike: dict[tuple[int, ...], list[Layer]] = {}
    for layer in layers:
        if layer.experts:
            alike.setdefault(tuple(size for _, size in layer.experts), []).append(layer)
    everything = sum(layer.expert_bytes for layer in layers)
    trip_bytes = max((layer.trip_bytes for layer in layers), default=0)
    kinds = [LayerGroup(sizes, len(some)) for sizes, some in alike.items()]
    shares = cheapest_split(kinds, everything - room, trip_bytes)
    left = frozenset(
        name
        for some, share in zip(alike.values(), shares, strict=True)
        for name in left_of(some, share)
    )
    held = [(n, size) for layer in layers for n, size in layer.experts if n not in left]
    n_bytes = sum(size for _, size in held)
    trips = trip_bytes * sum(share.n_touched for share in shares)
    return Filling(n_bytes - trips, n_bytes, frozenset(name for name, _ in held))


def left_of(alike: Sequence[Layer], share: LayerSplit) -> Iterator[str]:
    """The names of what a share of some layers leaves in RAM."""
    for layer in alike[: share.n_layers]:
        yield from (name for name, _ in layer.experts)
    yield from (alike[share.n_layers].experts[place][0] for place in share.part)


def fill_most(layers: Sequence[Layer], room: int) -> Filling:
    """The experts that leave least of a room empty, however many layers are divided."""
    found = pick(layers, room)
    n_bytes = sum(size for _, size in found)
    return Filling(n_bytes, n_bytes, frozenset(name for name, _ in found))


def pick(layers: Sequence[Layer], room: int) -> list[tuple[str, int]]:
    """Expert tensors that come closest to a room from below; of equals, the last layers'."""
    sizes: dict[int, list[tuple[str, int]]] = {}
    for layer in sorted(layers, key=lambda layer: -layer.index):
        for tensor in layer.experts:
            sizes.setdefault(tensor[1], []).append(tensor)
    counts = best_counts(list(sizes), [len(tensors) for tensors in sizes.values()], room)
    pairs = zip(sizes.values(), counts or (0,) * len(sizes), strict=True)
    return [tensor for tensors, count in pairs for tensor in tensors[:count]]


def best_counts(sizes: Sequence[int], limits: Sequence[int], room: int) -> tuple[int, ...] | None:
    """How many to take of each size, at most its limit, to come closest to a room from below.

    None where there is less room than nothing. Exact where there are few different sizes.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    sums: dict[int, tuple[int, ...]] = {0: ()} if room >= 0 else {}
    for i in order:
        longer: dict[int, tuple[int, ...]] = {}
        for total, way in sums.items():
            most = min(limits[i], (room - total) // max(1, sizes[i]))
            for k in range(most + 1):
                longer.setdefault(total + k * sizes[i], (*way, k))
        sums = dict(sorted(longer.items(), reverse=True)[:MAX_SUMS])
    if not sums:
        return None
    way = sums[max(sums)]
    return tuple(way[order.index(i)] for i in range(len(sizes)))


# ---- splits ----


def expert_names(layers: Sequence[Layer]) -> frozenset[str]:
    """Returns the names of all experts of some layers."""
    return frozenset(name for layer in layers for name, _ in layer.experts)


def even_split(n: int, rooms: Sequence[int]) -> tuple[int, ...]:
    """Layers by share of room, for a layout that doesn't fit however it is split."""
    shares = [max(1, room) for room in rooms]
    edges = [round(n * done / sum(shares)) for done in accumulate(shares)]
    return tuple(end - start for start, end in zip([0, *edges], edges, strict=False))


def runs(split: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each GPU's run of layers."""
    start = 0
    for n in split:
        yield start, start + n
        start += n
