"""The search for a layout: equal to looking at every placement, and never worse with more room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.placement.fill import (
    Layer,
    Layout,
    Rooms,
    best_counts,
    fill,
    fill_most,
    lay_out,
    layout_of,
    runs,
)

sizes = st.integers(1, 12)


@st.composite
def layers_of_a_model(draw: st.DrawFn, most: int = 6, most_experts: int = 2) -> tuple[Layer, ...]:
    """Few sizes, so that many placements come to the same sum."""
    n = draw(st.integers(1, most))
    return tuple(
        Layer(
            i,
            draw(sizes),
            draw(st.integers(0, 4)),
            tuple((f"{i}.{k}", draw(sizes)) for k in range(draw(st.integers(0, most_experts)))),
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


def best_in_room(layers: Sequence[Layer], room: int) -> tuple[int, int] | None:
    """Most bytes in whole layers, then most in all; None where the fixed parts don't fit."""
    left = room - sum(layer.fixed_bytes for layer in layers)
    if left < 0:
        return None
    best = (0, 0)
    for chosen in subsets([tensor for layer in layers for tensor in layer.experts]):
        total = sum(size for _, size in chosen)
        names = {name for name, _ in chosen}
        whole = sum(
            layer.expert_bytes for layer in layers if names >= {name for name, _ in layer.experts}
        )
        if total <= left:
            best = max(best, (whole, total))
    return best


def brute_force(
    layers: Sequence[Layer], output_bytes: int, rooms: Rooms
) -> tuple[int, tuple[int, int]]:
    """The most layers on GPUs, and of them the best experts, by trying everything."""
    output = Layer(len(layers), output_bytes, 0)
    for n in range(len(layers) + 1, 0, -1):
        on_gpu = [*layers, output][len(layers) + 1 - n :]
        merits = []
        for split in every_split(n, len(rooms.mixed)):
            parts = [on_gpu[start:end] for start, end in runs(split)]
            found = [
                best_in_room(part, room) if part else (0, 0)
                for part, room in zip(parts, rooms.mixed, strict=True)
            ]
            if all(f is not None for f in found):
                merits.append(tuple(map(sum, zip(*filter(None, found), strict=True))))
            weights = [sum(x.fixed_bytes + x.expert_bytes for x in part) for part in parts]
            held = all(w <= r for w, r in zip(weights, rooms.whole, strict=True) if w)
            if n == len(layers) + 1 and held:
                everything = sum(layer.expert_bytes for layer in layers)
                merits.append((everything, everything))
        if merits:
            return n, max(merits)  # type: ignore[return-value]
    return 0, (0, 0)


def merit_of(layers: Sequence[Layer], layout: Layout) -> tuple[int, tuple[int, int]]:
    first = len(layers) + 1 - layout.n_gpu_layers
    on_gpu = layers[first:] if layout.n_gpu_layers else ()
    whole = sum(
        x.expert_bytes for x in on_gpu if not {n for n, _ in x.experts} & layout.cpu_experts
    )
    total = sum(s for x in on_gpu for n, s in x.experts if n not in layout.cpu_experts)
    return layout.n_gpu_layers, (whole, total)


def held_by(layers: Sequence[Layer], output_bytes: int, layout: Layout) -> tuple[int, ...]:
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
    rooms = Rooms(tuple(room + more for room in mixed), mixed)
    assert merit_of(layers, lay_out(layers, output, rooms)) == brute_force(layers, output, rooms)


@given(layers_of_a_model(most=5), sizes, rooms_for(2), st.integers(0, 9))
@settings(max_examples=60)
def test_two_gpus_are_filled_as_well_as_can_be(
    layers: tuple[Layer, ...], output: int, mixed: tuple[int, ...], more: int
) -> None:
    rooms = Rooms(tuple(room + more for room in mixed), mixed)
    assert merit_of(layers, lay_out(layers, output, rooms)) == brute_force(layers, output, rooms)


@given(layers_of_a_model(most=6, most_experts=1), sizes, rooms_for(2), st.integers(0, 9))
@settings(max_examples=40)
def test_two_gpus_and_six_layers(
    layers: tuple[Layer, ...], output: int, mixed: tuple[int, ...], more: int
) -> None:
    rooms = Rooms(tuple(room + more for room in mixed), mixed)
    assert merit_of(layers, lay_out(layers, output, rooms)) == brute_force(layers, output, rooms)


@given(layers_of_a_model(most=4, most_experts=1), sizes, rooms_for(3))
@settings(max_examples=40)
def test_three_gpus_are_filled_as_well_as_can_be(
    layers: tuple[Layer, ...], output: int, mixed: tuple[int, ...]
) -> None:
    rooms = Rooms(mixed, mixed)
    assert merit_of(layers, lay_out(layers, output, rooms)) == brute_force(layers, output, rooms)


@given(layers_of_a_model(), sizes, st.integers(1, 3).flatmap(rooms_for))
@settings(max_examples=150)
def test_no_gpu_gets_more_than_it_has_room_for(
    layers: tuple[Layer, ...], output: int, mixed: tuple[int, ...]
) -> None:
    rooms = Rooms(mixed, mixed)
    for layout in (
        lay_out(layers, output, rooms),
        layout_of(layers, output, rooms, len(layers), fill_most),
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
    less, larger = (lay_out(layers, output, Rooms((r,), (r,))) for r in (room, room + more))
    assert merit_of(layers, larger) >= merit_of(layers, less)
    assert sum(held_by(layers, output, larger)) >= sum(held_by(layers, output, less))


@given(layers_of_a_model(), st.integers(-3, 90))
@settings(max_examples=100)
def test_most_bytes_are_most_of_all_subsets(layers: tuple[Layer, ...], room: int) -> None:
    tensors = [tensor for layer in layers for tensor in layer.experts]
    sums = (sum(size for _, size in chosen) for chosen in subsets(tensors))
    assert fill_most(layers, room).n_bytes == max((s for s in sums if s <= room), default=0)


# ---- single cases ----


def test_ways_to_one_sum_are_all_looked_at() -> None:
    """One of two layers of 6 fits; only the second one has a tensor for the rest."""
    layers = (
        Layer(0, 1, 0, (("0.a", 3), ("0.b", 3))),
        Layer(1, 1, 0, (("1.a", 1), ("1.b", 5))),
    )
    found = fill(layers, 7)
    assert (found.whole_bytes, found.n_bytes) == (6, 7)
    assert found.names == {"0.a", "0.b", "1.a"}


def test_of_equal_layers_the_last_are_filled() -> None:
    layers = tuple(Layer(i, 1, 0, ((f"{i}", 4),)) for i in range(5))
    assert fill(layers, 8).names == {"3", "4"}


def test_many_sizes_are_searched_in_bounded_time() -> None:
    """A file whose every tensor has a size of its own: near the best, at once."""
    tensors = [1_000_003 + 7919 * i * i for i in range(64)]
    ways = best_counts(tensors, [1] * 64, sum(tensors) // 2)
    total = sum(size for size, count in zip(tensors, ways[0], strict=True) if count)
    assert 0.99 * sum(tensors) // 2 <= total <= sum(tensors) // 2


def test_what_a_person_fixed_stays_although_it_does_not_fit() -> None:
    layers = tuple(Layer(i, 10, 0, ((f"{i}", 4),)) for i in range(5))
    layout = lay_out(layers, 10, Rooms((20, 10), (20, 10)), n_gpu_layers=6)
    assert layout.n_gpu_layers == sum(layout.split) == 6
    assert layout.split == (4, 2)
    assert len(layout.cpu_experts) == 5


@pytest.mark.parametrize("rooms", [(60, 30), (30, 60)])
def test_gpus_with_room_to_spare_are_filled_by_share(rooms: tuple[int, int]) -> None:
    layers = tuple(Layer(i, 4, 0) for i in range(11))
    layout = lay_out(layers, 4, Rooms(rooms, rooms))
    assert layout.split == ((8, 4) if rooms == (60, 30) else (4, 8))
