"""Which layers and experts go to which GPU: the search, on sizes alone. Pure.

Dense parts come first (every token needs all of them), then whole layers of experts, then single
expert tensors, until no more fits. llama.cpp puts the last layers on GPUs and counts the output
matrix as one layer more (src/llama-model.cpp); layers go to devices in order, in one run each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_SUMS = 20_000
"""Sums looked at when sizes differ wildly; beyond that the best ones so far go on."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A transformer block in bytes: `dense` is all but its routed experts, `kv` its cache."""

    index: int
    dense_bytes: int
    kv_bytes: int
    experts: tuple[tuple[str, int], ...] = ()

    @property
    def expert_bytes(self) -> int:
        return sum(n_bytes for _, n_bytes in self.experts)

    @property
    def fixed_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class Rooms:
    """Bytes that each GPU has for weights and cache: with all experts on GPUs, and with some in
    RAM, when llama.cpp also keeps room to copy them over (a larger compute buffer)."""

    whole: tuple[int, ...]
    mixed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """`split` counts the layers of each GPU, the output as one; `cpu_experts` are tensor names."""

    n_gpu_layers: int
    split: tuple[int, ...]
    cpu_experts: frozenset[str]


def lay_out(
    layers: Sequence[Layer], output_bytes: int, rooms: Rooms, n_gpu_layers: int | None = None
) -> Layout:
    """The layout with most on the GPUs, dense parts before experts.

    With `n_gpu_layers` that many layers are there, whether they fit or not; only experts move.
    """
    everything = len(layers) + 1
    all_experts = frozenset(name for layer in layers for name, _ in layer.experts)
    wanted = [n_gpu_layers] if n_gpu_layers is not None else range(everything, 0, -1)
    for n in wanted:
        if n == 0 or not rooms.mixed:
            break
        if n == everything and (split := whole_split(layers, output_bytes, rooms.whole)):
            return Layout(n, split, frozenset())
        on_gpu = layers[everything - n :]
        best = best_split(on_gpu, output_bytes, rooms.mixed, forced=n_gpu_layers is not None)
        if best:
            split, on_gpus = best
            return Layout(n, split, all_experts - on_gpus)
    return Layout(0, (), all_experts)


def whole_split(
    layers: Sequence[Layer], output_bytes: int, rooms: Sequence[int]
) -> tuple[int, ...] | None:
    """A split with every byte on the GPUs; None where they don't hold it."""
    sizes = [layer.fixed_bytes + layer.expert_bytes for layer in layers] + [output_bytes]
    fitting = [s for s in splits(len(sizes), rooms, sizes) if fits(s, sizes, rooms)]
    return min(fitting, key=lambda s: unevenness(s, sizes, rooms), default=None)


def best_split(
    on_gpu: Sequence[Layer], output_bytes: int, rooms: Sequence[int], forced: bool
) -> tuple[tuple[int, ...], frozenset[str]] | None:
    """The split that leaves room for most experts, and their names; None where none fits."""
    sizes = [layer.fixed_bytes for layer in on_gpu] + [output_bytes]
    best: tuple[tuple[int, int], tuple[int, ...], frozenset[str]] | None = None
    for split in splits(len(sizes), rooms, sizes):
        if not (fits(split, sizes, rooms) or forced):
            continue
        whole, total, names = 0, 0, set[str]()
        for (start, end), room in zip(runs(split), rooms, strict=True):
            mine = fill(on_gpu[start:end], room - sum(sizes[start:end]))
            whole, total, names = whole + mine.whole_bytes, total + mine.n_bytes, names | mine.names
        if best is None or (whole, total) > best[0]:
            best = ((whole, total), split, frozenset(names))
    return (best[1], best[2]) if best else None


@dataclass(frozen=True, slots=True)
class Filling:
    """Expert tensors that fit: bytes in whole layers, bytes in all, names."""

    whole_bytes: int
    n_bytes: int
    names: frozenset[str]


def fill(layers: Sequence[Layer], room: int) -> Filling:
    """The experts that fill a room best: most bytes in whole layers, then most in single tensors.

    Of layers of one size the last ones are taken, so that the first ones' experts stay in RAM.
    """
    with_experts = [layer for layer in layers if layer.experts]
    whole = pick([layer.expert_bytes for layer in with_experts], room)
    chosen = [with_experts[i] for i in whole]
    rest = [layer for i, layer in enumerate(with_experts) if i not in whole]
    whole_bytes = sum(layer.expert_bytes for layer in chosen)
    singles = [tensor for layer in rest for tensor in layer.experts]
    single = [singles[i] for i in pick([size for _, size in singles], room - whole_bytes)]
    names = {name for layer in chosen for name, _ in layer.experts} | {name for name, _ in single}
    return Filling(whole_bytes, whole_bytes + sum(size for _, size in single), frozenset(names))


def pick(sizes: Sequence[int], room: int) -> set[int]:
    """Indices of the sizes whose sum comes closest to a room from below; of equals, the last.

    Exact where there are few different sizes, as in every model: sums are counted by size.
    """
    counts = Counter(sizes)
    sums: dict[int, tuple[int, ...]] = {0: ()} if room >= 0 else {}
    for size, count in sorted(counts.items(), reverse=True):
        longer: dict[int, tuple[int, ...]] = {}
        for total, used in sums.items():
            for k in range(count + 1):
                if total + k * size > room:
                    break
                longer.setdefault(total + k * size, (*used, k))
        sums = dict(sorted(longer.items(), reverse=True)[:MAX_SUMS])
    if not sums:
        return set()
    taken = dict(zip(sorted(counts, reverse=True), sums[max(sums)], strict=True))
    picked = set()
    for i in range(len(sizes) - 1, -1, -1):
        if taken[sizes[i]]:
            taken[sizes[i]] -= 1
            picked.add(i)
    return picked


def splits(n: int, rooms: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Ways to give n layers to the GPUs in order; of more than two GPUs, those near an even one."""
    if len(rooms) == 1:
        yield (n,)
    elif len(rooms) == 2:
        yield from ((k, n - k) for k in range(n + 1))
    else:
        yield from near_even_splits(n, rooms, sizes)


def near_even_splits(
    n: int, rooms: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Splits by share of room, each boundary moved by up to two layers."""
    total_room, total = sum(max(0, room) for room in rooms) or 1, sum(sizes) or 1
    edges, at, done = [], 0, 0.0
    for room in rooms[:-1]:
        done += max(0, room) / total_room
        while at < n and sum(sizes[: at + 1]) / total <= done:
            at += 1
        edges.append(at)
    moved: list[list[int]] = [[]]
    for edge in edges:
        moved = [
            [*before, e]
            for before in moved
            for e in range(max(0, edge - 2), min(n, edge + 2) + 1)
            if not before or e >= before[-1]
        ]
    for bounds in moved:
        ends = [*bounds, n]
        yield tuple(end - start for start, end in zip([0, *bounds], ends, strict=True))


def runs(split: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each GPU's run of layers."""
    start = 0
    for n in split:
        yield start, start + n
        start += n


def fits(split: Sequence[int], sizes: Sequence[int], rooms: Sequence[int]) -> bool:
    return all(
        sum(sizes[start:end]) <= room
        for (start, end), room in zip(runs(split), rooms, strict=True)
        if end > start
    )


def unevenness(split: Sequence[int], sizes: Sequence[int], rooms: Sequence[int]) -> float:
    """How full the fullest GPU is, as a share of its room."""
    shares = (
        sum(sizes[start:end]) / max(1, room)
        for (start, end), room in zip(runs(split), rooms, strict=True)
    )
    return max(shares)
