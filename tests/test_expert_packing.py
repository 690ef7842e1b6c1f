"""The search for a layout: equal to looking at every placement, and never worse with more room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.planner.expert_packing import (
    GpuCapacity,
    Layer,
    LayerGroup,
    LayerPlacement,
    LayerSplit,
    best_counts,
    cheapest_split,
    fill,
    fill_most,
    place_layers,
    placement_with,
    runs,
)

sizes = st.integers(1, 12)


@st.composite
def layers_of_a_model(draw: st.DrawFn, most: int = 6, most_experts: int = 2) -> tuple[Layer, ...]:
    """Few sizes, so that many placements come to the same sum."""
    n, trip = draw(st.integers(1, most)), draw(st.integers(0, 6))
    return tuple(
        Layer(
            i,
            draw(sizes),
            draw(st.integers(0, 4)),
            tuple((f"{i}.{k}", draw(sizes)) for k in range(draw(st.integers(0, most_experts)))),
            trip,
        )
        for i in range(n)
    )


def rooms_for(n_gpus: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(-3, 90)] * n_gpus)


# ---- every placement, one by one ----


def every_split(n: int, n_gpus: int) -> Iterator[tuple[int, ...]]:
    return (s for s in product(range(n + 1), repeat=n_gpus) if sum(s) == n)


def subsets(tensors: Sequence[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], ...]]:
    return chain.from_iterable(combinations(tensors, k) for k in range(len(tensors) + 1))


def worth(layers: Sequence[Layer], on_gpu: frozenset[str]) -> int:
    """Bytes of experts on a GPU, less what the trips to layers with some in RAM cost."""
    held = sum(size for layer in layers for name, size in layer.experts if name in on_gpu)
    return held - sum(
        layer.trip_bytes for layer in layers if not on_gpu >= {name for name, _ in layer.experts}
    )


def n_divided(layers: Sequence[Layer], on_gpu: frozenset[str]) -> int:
    names = [{name for name, _ in layer.experts} for layer in layers]
    return sum(bool(some & on_gpu) and not some <= on_gpu for some in names)


def best_in_room(layers: Sequence[Layer], room: int) -> int | None:
    """The most that is worth, with one layer divided; None where the fixed parts don't fit."""
    left = room - sum(layer.fixed_bytes for layer in layers)
    if left < 0:
        return None
    everything = subsets([tensor for layer in layers for tensor in layer.experts])
    fitting = (
        frozenset(name for name, _ in chosen)
        for chosen in everything
        if sum(size for _, size in chosen) <= left
    )
    return max(worth(layers, some) for some in fitting if n_divided(layers, some) <= 1)


def brute_force(layers: Sequence[Layer], output_bytes: int, rooms: GpuCapacity) -> tuple[int, int]:
    """The most layers on GPUs, and what the best experts are worth, by trying everything."""
    output = Layer(len(layers), output_bytes, 0)
    for n in range(len(layers) + 1, 0, -1):
        on_gpu = [*layers, output][len(layers) + 1 - n :]
        merits = []
        for split in every_split(n, len(rooms.mixed)):
            parts = [on_gpu[start:end] for start, end in runs(split)]
            found = [
                best_in_room(part, room) if part else 0
                for part, room in zip(parts, rooms.mixed, strict=True)
            ]
            if None not in found:
                merits.append(sum(f for f in found if f))
            weights = [sum(x.fixed_bytes + x.expert_bytes for x in part) for part in parts]
            held = all(w <= r for w, r in zip(weights, rooms.whole, strict=True) if w)
            if n == len(layers) + 1 and held:
                merits.append(sum(layer.expert_bytes for layer in layers))
        if merits:
            return n, max(merits)
    return 0, 0


def merit_of(layers: Sequence[Layer], layout: LayerPlacement) -> tuple[int, int]:
    first = len(layers) + 1 - layout.n_gpu_layers
    mine = layers[first:] if layout.n_gpu_layers else ()
    names = {name for layer in mine for name, _ in layer.experts}
    return layout.n_gpu_layers, worth(mine, frozenset(names - layout.cpu_experts))


def held_by(layers: Sequence[Layer], output_bytes: int, layout: LayerPlacement) -> tuple[int, ...]:
    """Bytes on each GPU."""
    blocks = [*layers, Layer(len(layers), output_bytes, 0)]
    on_gpu = blocks[len(blocks) - layout.n_gpu_layers :]
    return tuple(
        sum(
            x.fixed_bytes + sum(s for n, s in x.experts if n not in layout.cpu_experts)
            for x in on_gpu[start:end]
        )
        for start, end in runs(layout.split)
    )


@given(layers_of_a_model(), sizes, rooms_for(1), st.integers(0, 9))
@settings(max_examples=150)
def test_one_gpu_is_filled_as_well_as_can_be(
    layers: tuple[Layer, ...], output: int, mixed: tuple[int, ...], more: int
) -> None:
    rooms = GpuCapacity(tuple(room + more for room in mixed), mixed)
    assert merit_of(layers, place_layers(layers, output, rooms)) == brute_force(
        layers, output, rooms
    )


@given(layers_of_a_model(most=5), sizes, rooms_for(2), st.integers(0, 9))
@settings(max_examples=60)
def test_two_gpus_are_filled_as_well_as_can_be(
    layers: tuple[Layer, ...], output: int, mixed: tuple[int, ...], more: int
) -> None:
    rooms = GpuCapacity(tuple(room + more for room in mixed), mixed)
    assert merit_of(layers, place_layers(layers, output, rooms)) == brute_force(
        layers, output, rooms
    )


@given(layers_of_a_model(most=6, most_experts=1), sizes, rooms_for(2), st.integers(0, 9))
@settings(max_examples=40)
def test_two_gpus_and_six_layers(
    layers: tuple[Layer, ...], output: int, mixed: tuple[int, ...], more: int
) -> None:
    rooms = GpuCapacity(tuple(room + more for room in mixed), mixed)
    assert merit_of(layers, place_layers(layers, output, rooms)) == brute_force(
        layers, output, rooms
    )


@given(layers_of_a_model(most=4, most_experts=1), sizes, rooms_for(3))
@settings(max_examples=40)
def test_three_gpus_are_filled_as_well_as_can_be(
    layers: tuple[Layer, ...], output: int, mixed: tuple[int, ...]
) -> None:
    rooms = GpuCapacity(mixed, mixed)
    assert merit_of(layers, place_layers(layers, output, rooms)) == brute_force(
        layers, output, rooms
    )


@given(layers_of_a_model(), sizes, st.integers(1, 3).flatmap(rooms_for))
@settings(max_examples=150)
def test_no_gpu_gets_more_than_it_has_room_for(
    layers: tuple[Layer, ...], output: int, mixed: tuple[int, ...]
) -> None:
    rooms = GpuCapacity(mixed, mixed)
    for layout in (
        place_layers(layers, output, rooms),
        placement_with(layers, output, rooms, len(layers), fill_most),
    ):
        if layout:
            held = held_by(layers, output, layout)
            assert all(h <= room for h, room in zip(held, mixed, strict=False) if h)
            assert sum(layout.split) == layout.n_gpu_layers


@given(layers_of_a_model(), sizes, st.integers(-3, 90), st.integers(0, 20))
@settings(max_examples=150)
def test_more_room_never_holds_less(
    layers: tuple[Layer, ...], output: int, room: int, more: int
) -> None:
    less, larger = (
        place_layers(layers, output, GpuCapacity((r,), (r,))) for r in (room, room + more)
    )
    assert merit_of(layers, larger) >= merit_of(layers, less)


@given(layers_of_a_model(), sizes, st.integers(-3, 90), st.integers(0, 20))
@settings(max_examples=150)
def test_more_room_never_holds_fewer_bytes_where_trips_cost_nothing(
    layers: tuple[Layer, ...], output: int, room: int, more: int
) -> None:
    layers = tuple(replace(layer, trip_bytes=0) for layer in layers)
    less, larger = (
        place_layers(layers, output, GpuCapacity((r,), (r,))) for r in (room, room + more)
    )
    assert sum(held_by(layers, output, larger)) >= sum(held_by(layers, output, less))


@given(layers_of_a_model(), st.integers(-3, 90))
@settings(max_examples=100)
def test_most_bytes_are_most_of_all_subsets(layers: tuple[Layer, ...], room: int) -> None:
    tensors = [tensor for layer in layers for tensor in layer.experts]
    sums = (sum(size for _, size in chosen) for chosen in subsets(tensors))
    assert fill_most(layers, room).n_bytes == max((s for s in sums if s <= room), default=0)


# ---- single cases ----


def test_of_two_ways_to_leave_as_much_the_one_that_fills_the_room_is_taken() -> None:
    """One of two layers of 6 stays in RAM but for a tensor; only the second has a small one."""
    layers = (
        Layer(0, 1, 0, (("0.a", 3), ("0.b", 3))),
        Layer(1, 1, 0, (("1.a", 1), ("1.b", 5))),
    )
    found = fill(layers, 7)
    assert found.n_bytes == 7
    assert found.names == {"0.a", "0.b", "1.a"}


@pytest.mark.parametrize(("trip", "n_layers", "n_bytes"), [(0, 3, 8), (1, 1, 9)])
def test_a_trip_is_worth_so_many_bytes(trip: int, n_layers: int, n_bytes: int) -> None:
    """Of 8 that must be left: 3 + 3 + 2 exactly in three layers, or 9 in one."""
    layers = tuple(Layer(i, 1, 0, ((f"{i}", n),), trip) for i, n in enumerate((3, 3, 2, 9)))
    found = fill(layers, 9)
    assert (len(layers) - len(found.names), 17 - found.n_bytes) == (n_layers, n_bytes)
    assert found.worth == found.n_bytes - trip * n_layers


def test_of_several_kinds_the_layers_with_most_bytes_are_left_where_trips_are_dear() -> None:
    """Qwen3 30B in a mix of four kinds. Ways that begin with many layers of the first kinds, and
    come closest to the bytes, cost a third more."""
    kinds = [
        LayerGroup((82, 108, 108), 23),
        LayerGroup((82, 82, 82), 23),
        LayerGroup((204, 204, 204), 17),
        LayerGroup((82, 204, 204), 10),
    ]
    assert cheapest_split(kinds, 11319, 320) == (
        LayerSplit(0),
        LayerSplit(0),
        LayerSplit(17),
        LayerSplit(2),
    )


@given(
    st.lists(st.tuples(st.lists(sizes, min_size=1, max_size=3), st.integers(1, 4)), max_size=3),
    st.integers(0, 6),
    st.floats(0, 1),
)
@settings(max_examples=150)
def test_what_is_left_in_ram_costs_least(
    drawn: list[tuple[list[int], int]], trip: int, share: float
) -> None:
    kinds = [LayerGroup(tuple(some), n_layers) for some, n_layers in drawn]
    needed = int(share * sum(kind.layer_bytes * kind.n_layers for kind in kinds))

    def total(shares: Sequence[LayerSplit]) -> tuple[int, int]:
        n_bytes = sum(
            share.n_layers * kind.layer_bytes + sum(kind.sizes[place] for place in share.part)
            for kind, share in zip(kinds, shares, strict=True)
        )
        return n_bytes, n_bytes + trip * sum(share.n_touched for share in shares)

    every = product(
        *[
            [
                LayerSplit(n, part)
                for part, _ in kind.parts
                for n in range(kind.n_layers + (not part))
            ]
            for kind in kinds
        ]
    )
    totals = (total(shares) for shares in every if sum(bool(s.part) for s in shares) <= 1)
    n_bytes, cost = total(cheapest_split(kinds, needed, trip))
    assert n_bytes >= needed
    assert cost == min(cost for n_bytes, cost in totals if n_bytes >= needed)


def test_layers_of_many_kinds_are_filled_in_bounded_time() -> None:
    """A file whose every tensor has a size of its own: near the best, at once."""
    layers = tuple(
        Layer(i, 1, 0, tuple((f"{i}.{k}", 1_000_003 + 7919 * (3 * i + k) ** 2) for k in range(3)))
        for i in range(48)
    )
    room = sum(layer.expert_bytes for layer in layers) // 2
    assert 0.99 * room <= fill(layers, room).n_bytes <= room


def test_of_equal_layers_the_last_are_filled() -> None:
    layers = tuple(Layer(i, 1, 0, ((f"{i}", 4),)) for i in range(5))
    assert fill(layers, 8).names == {"3", "4"}


def test_many_sizes_are_searched_in_bounded_time() -> None:
    """A file whose every tensor has a size of its own: near the best, at once."""
    tensors = [1_000_003 + 7919 * i * i for i in range(64)]
    counts = best_counts(tensors, [1] * 64, sum(tensors) // 2)
    assert counts
    total = sum(size for size, count in zip(tensors, counts, strict=True) if count)
    assert 0.99 * sum(tensors) // 2 <= total <= sum(tensors) // 2


def test_what_a_person_fixed_stays_although_it_does_not_fit() -> None:
    layers = tuple(Layer(i, 10, 0, ((f"{i}", 4),)) for i in range(5))
    layout = place_layers(layers, 10, GpuCapacity((20, 10), (20, 10)), n_gpu_layers=6)
    assert layout.n_gpu_layers == sum(layout.split) == 6
    assert layout.split == (4, 2)
    assert len(layout.cpu_experts) == 5


@pytest.mark.parametrize("rooms", [(60, 30), (30, 60)])
def test_gpus_with_room_to_spare_are_filled_by_share(rooms: tuple[int, int]) -> None:
    layers = tuple(Layer(i, 4, 0) for i in range(11))
    layout = place_layers(layers, 4, GpuCapacity(rooms, rooms))
    assert layout.split == ((8, 4) if rooms == (60, 30) else (4, 8))
