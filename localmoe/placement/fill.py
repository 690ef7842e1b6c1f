"""Which layers and experts go to which GPU: the search, on sizes alone. Pure.

Dense parts come first (every token needs all of them), then experts, so that what stays in RAM is
read soonest: few bytes in few layers. llama.cpp puts the last layers on GPUs and counts the output
matrix as one layer more (src/llama-model.cpp); layers go to devices in order, in one run each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from .leaving import Kind, Share, least

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
        return sum(n_bytes for _, n_bytes in self.experts)

    @property
    def fixed_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class Rooms:
    """Bytes that each GPU has for weights and cache: with all experts on GPUs, with some in RAM
    (`mixed`), when llama.cpp also keeps room to copy them over, and with whole layers in RAM
    (`split`; as `mixed` where nothing else is given). Each is at most the one before."""

    whole: tuple[int, ...]
    mixed: tuple[int, ...]
    split: tuple[int, ...] = ()

    def with_layers_in_ram(self) -> tuple[int, ...]:
        return self.split or self.mixed


@dataclass(frozen=True, slots=True)
class Layout:
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


def lay_out(
    layers: Sequence[Layer], output_bytes: int, rooms: Rooms, n_gpu_layers: int | None = None
) -> Layout:
    """The layout with most layers on the GPUs, and then with what is read soonest in RAM.

    With `n_gpu_layers` that many layers are there, whether they fit or not; only experts move.
    """
    wanted = [n_gpu_layers] if n_gpu_layers is not None else range(len(layers) + 1, 0, -1)
    for n in wanted:
        layout = layout_of(layers, output_bytes, rooms, n, fill)
        if layout:
            return layout
    if n_gpu_layers and rooms.mixed:
        return Layout(n_gpu_layers, even_split(n_gpu_layers, rooms.mixed), expert_names(layers))
    return Layout(0, (), expert_names(layers))


def layout_of(
    layers: Sequence[Layer], output_bytes: int, rooms: Rooms, n_gpu_layers: int, filler: Filler
) -> Layout | None:
    """The best layout with so many layers on GPUs; None where their dense parts don't fit."""
    if n_gpu_layers == 0 or not rooms.mixed:
        return None
    everything = len(layers) + 1
    if n_gpu_layers == everything:
        as_blocks = [Layer(n.index, n.dense_bytes + n.expert_bytes, n.kv_bytes) for n in layers]
        if found := best_split(as_blocks, output_bytes, rooms.whole, filler):
            return Layout(everything, found[0], frozenset())
    on_gpu = layers[everything - n_gpu_layers :]
    room = rooms.mixed if n_gpu_layers == everything else rooms.with_layers_in_ram()
    found = best_split(on_gpu, output_bytes, room, filler)
    return Layout(n_gpu_layers, found[0], expert_names(layers) - found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Run:
    """What GPUs so far hold at best, the first layers in order. `evenness` breaks ties: GPUs
    that hold the same share of their room."""

    worth: int
    evenness: float
    split: tuple[int, ...]
    names: frozenset[str]

    @property
    def merit(self) -> tuple[int, float]:
        return self.worth, self.evenness


def best_split(
    on_gpu: Sequence[Layer], output_bytes: int, rooms: Sequence[int], filler: Filler
) -> tuple[tuple[int, ...], frozenset[str]] | None:
    """The split that leaves least in RAM, and the names of experts on GPUs; None where none fits.

    GPU by GPU, with the best that comes before every boundary: as good as the filler is, since
    merits add up.
    """
    ends = [0, *accumulate([layer.fixed_bytes for layer in on_gpu] + [output_bytes])]
    n, best = len(ends) - 1, {0: Run(0, 0.0, (), frozenset())}
    for place, room in enumerate(rooms):
        longer: dict[int, Run] = {}
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
    before: Run, n: int, fixed_bytes: int, room: int, layers: Sequence[Layer], filler: Filler
) -> Run:
    """One GPU more, with `n` layers (perhaps the output among them) and what experts fit."""
    mine = filler(layers, room - fixed_bytes) if n else NOTHING
    held = fixed_bytes + mine.n_bytes
    return Run(
        before.worth + mine.worth,
        before.evenness - held * held / max(1, room),
        (*before.split, n),
        before.names | mine.names,
    )


# ---- experts of one GPU ----


def fill(layers: Sequence[Layer], room: int) -> Filling:
    """The experts that fill a room best: what stays in RAM is read soonest (leaving.py).

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
    kinds = [Kind(sizes, len(some)) for sizes, some in alike.items()]
    shares = least(kinds, everything - room, trip_bytes)
    left = frozenset(
        name
        for some, share in zip(alike.values(), shares, strict=True)
        for name in left_of(some, share)
    )
    held = [(n, size) for layer in layers for n, size in layer.experts if n not in left]
    n_bytes = sum(size for _, size in held)
    trips = trip_bytes * sum(share.n_touched for share in shares)
    return Filling(n_bytes - trips, n_bytes, frozenset(name for name, _ in held))


def left_of(alike: Sequence[Layer], share: Share) -> Iterator[str]:
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
