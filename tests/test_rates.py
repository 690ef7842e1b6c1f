"""Rates are really measured, by graphs that compute what they say; and kept, and looked up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmoe.engine.native import llama
from localmoe.engine.native.device_benchmark import DeviceBenchmark, measure, ram_rates, read_all
from localmoe.engine.native.ggml import (
    ACTIVATION_FILL,
    F16,
    F32,
    I32,
    GraphBenchmark,
    GraphError,
    best_seconds,
    devices_of,
    weight_types,
)
from localmoe.engine.rates import CPU, Bandwidths, DeviceRates, ProductRate
from localmoe.gguf.reader import TENSOR_TYPES
from localmoe.perf.rates import NO_BANDWIDTHS, rates_of, threads_to_measure
from localmoe.perf.store import MeasurementKey, MeasurementStore, unmeasured

LIBRARY: Any = llama.ggml
SMALL = 0.02  # of the sizes that a real measurement has
FILL = float(np.frombuffer(bytes([ACTIVATION_FILL]) * 4, np.float32)[0])


@pytest.fixture(scope="module")
def cpu() -> int:
    """The CPU device's handle."""
    return next(device for device, _, kind in devices_of(LIBRARY) if kind == 0)


@pytest.fixture
def bench(cpu: int) -> Iterator[GraphBenchmark]:
    with GraphBenchmark(LIBRARY, cpu) as bench:
        yield bench


# ---- measuring ----


def test_a_machine_is_measured_with_each_number_of_threads() -> None:
    found = measure(LIBRARY, (1, 2), ("Q4_K", "F16", "NO_SUCH_TYPE"), SMALL)
    assert [(d.device, d.n_threads) for d in found.devices] == [(CPU, 1), (CPU, 2)]
    products = {(p.device, p.n_threads, p.type) for p in found.products}
    assert products == {(CPU, n, type) for n in (1, 2) for type in ("Q4_K", "F16")}
    for device in found.devices:
        # slower than a disk or faster than any cache would be a mistake in arithmetic
        assert 1e8 < device.read_bytes_per_s < 1e12
        assert 1e-9 < device.node_s < 1e-2
        assert 1e7 < device.attention_values_per_s < 1e13
        assert 1e7 < device.attention_batch_values_per_s < 1e13
        assert (device.pinned_bytes_per_s, device.round_trip_s) == (0, 0)
    for product in found.products:
        assert 1e7 < product.vector_bytes_per_s < 1e12
        assert 1e8 < product.matrix_flops < 1e14
        assert 1e7 < product.few_flops <= product.matrix_flops


def test_what_a_gpu_is_asked_works_on_a_device(cpu: int) -> None:
    """Copies and a GPU's sizes, on the one device that every machine has."""
    place = DeviceBenchmark(LIBRARY, cpu, "like a GPU", (0,), SMALL / 10)
    (rates,) = place.device_rates()
    assert (rates.device, rates.n_threads) == ("like a GPU", 0)
    assert rates.pinned_bytes_per_s == rates.pageable_bytes_per_s > 1e8  # a CPU pins nothing
    assert rates.read_bytes_per_s > 1e8
    assert 0 < rates.round_trip_s < 0.1
    (product,) = place.product_rates("F16", F16)
    assert product.vector_bytes_per_s > 0
    assert product.few_flops == 0  # a GPU has one kernel for batches


def test_every_type_of_weights_can_be_measured() -> None:
    """A CPU aborts on a type that it has no kernel for, so none such may be tried."""
    names = {name for name, _, _ in TENSOR_TYPES.values()}
    found = measure(LIBRARY, (2,), sorted(names), SMALL / 10)
    assert names - {p.type for p in found.products} == {
        "I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K",
    }  # fmt: skip


def test_ram_is_read_whole_by_any_number_of_threads() -> None:
    words = np.ones(1001, np.uint64)
    for n_threads in (1, 2, 3):
        read_all(words, n_threads)
    assert len(ram_rates((1, 2, 3), 1 << 20)) == 3


def test_the_best_of_several_times_counts() -> None:
    calls = []
    assert 0 <= best_seconds(lambda: calls.append(1), at_most_s=0.0, at_least=4) < 1
    assert len(calls) == 5  # one more to warm up


# ---- graphs ----


def result_of(bench: GraphBenchmark, tensor: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = np.empty(bench.n_bytes(tensor) // 4, np.float32)
    bench.read(tensor, values.ctypes.data, values.nbytes)
    return values


def test_types_have_the_names_of_model_files(cpu: int) -> None:
    named = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
    types = weight_types(LIBRARY)
    assert types.items() <= named.items()
    assert {"F16", "BF16", "Q4_K", "Q8_0", "IQ2_XXS", "MXFP4"} <= set(types)


def test_products_go_to_the_chosen_experts(bench: GraphBenchmark) -> None:
    """Each expert has weights of its own, and a token's result is the sum over its width."""
    weights, token = bench.tensor(F32, 32, 4, 3), bench.tensor(F32, 32, 1, 1)
    chosen = bench.tensor(I32, 2, 1)
    result = bench.expert_product(weights, token, chosen)
    graph = bench.graph(result)
    bench.allocate()
    bench.fill(token, ACTIVATION_FILL)
    experts = np.repeat(np.arange(3, dtype=np.float32), 32 * 4)
    bench.write(weights, experts.ctypes.data, experts.nbytes)
    ids = np.array([2, 1], np.int32)
    bench.write(chosen, ids.ctypes.data, ids.nbytes)
    bench.compute(graph)
    expected = [2 * 32 * FILL] * 4 + [1 * 32 * FILL] * 4
    assert result_of(bench, result) == pytest.approx(expected, rel=1e-5)


def test_sums_and_copies_hold_what_was_filled(bench: GraphBenchmark) -> None:
    first, other = bench.tensor(F32, 64), bench.tensor(F32, 64)
    total = bench.sum(bench.sum(first, first), first)
    graph = bench.graph(total)
    bench.allocate()
    bench.set_threads(2)
    bench.fill(first, ACTIVATION_FILL)
    bench.compute(graph)
    assert result_of(bench, total) == pytest.approx([3 * FILL] * 64)
    bench.copy(total, other)
    assert result_of(bench, other) == pytest.approx([3 * FILL] * 64)


def test_a_device_without_room_says_so(bench: GraphBenchmark) -> None:
    bench.tensor(F32, 1 << 44)
    with pytest.raises(GraphError):
        bench.allocate()


# ---- looking up ----

HOST = DeviceRates(CPU, 8, 80e9, 2e-6, 8e9, 16e9)
CARD = DeviceRates("CUDA0", 0, 900e9, 3e-6, 1e12, 2e12, 25e9, 8e9, 4e-5)
Q4 = ProductRate(CPU, 8, "Q4_K", 60e9, 400e9)
KNOWN = Bandwidths(
    (replace(HOST, n_threads=4, read_bytes_per_s=60e9, node_s=1e-6), HOST, CARD),
    (replace(Q4, n_threads=4, vector_bytes_per_s=40e9, matrix_flops=200e9), Q4),
)


@pytest.mark.parametrize(
    ("n_threads", "read", "vector", "flops"),
    [(8, 80e9, 60e9, 400e9), (4, 60e9, 40e9, 200e9), (6, 70e9, 50e9, 300e9), (2, 30e9, 20e9, 1e11),
     (16, 80e9, 60e9, 400e9)],
)  # fmt: skip
def test_between_numbers_of_threads_rates_are_interpolated(
    n_threads: int, read: float, vector: float, flops: float
) -> None:
    rates = rates_of(KNOWN, CPU, n_threads)
    product = rates.product("Q4_K")
    assert rates.device.read_bytes_per_s == pytest.approx(read)
    assert product.vector_bytes_per_s == pytest.approx(vector)
    assert product.matrix_flops == pytest.approx(flops)
    assert 1e-6 <= rates.device.node_s <= 2e-6


def test_a_gpu_has_its_own_rates() -> None:
    rates = rates_of(KNOWN, "CUDA0", 8)
    assert rates.device == CARD
    assert rates.is_gpu
    assert rates.product("Q4_K").vector_bytes_per_s == pytest.approx(0.8 * 900e9)


def test_an_unmeasured_type_is_as_slow_as_the_slowest() -> None:
    faster = replace(Q4, type="Q8_0", vector_bytes_per_s=70e9, matrix_flops=300e9)
    rates = rates_of(KNOWN.with_newer(Bandwidths((), (faster,))), CPU, 8)
    unknown = rates.product("IQ3_S")
    assert (unknown.vector_bytes_per_s, unknown.matrix_flops) == (60e9, 300e9)


def test_of_nothing_measured_everything_is_by_formula() -> None:
    for device, n_threads in ((CPU, 8), ("CUDA0", 8)):
        rates = rates_of(NO_BANDWIDTHS, device, n_threads)
        numbers = [v for k, v in asdict(rates.device).items() if k.endswith(("_per_s", "_s"))]
        assert [n > 0 for n in numbers] == [True] * 4 + [device != CPU] * 3
        assert rates.product("Q4_K").matrix_flops > 0


def test_newer_rates_replace_older_ones() -> None:
    newer = Bandwidths((replace(HOST, node_s=9e-6),), (replace(Q4, type="Q6_K"), Q4))
    merged = KNOWN.with_newer(newer)
    assert len(merged.devices) == 3
    assert rates_of(merged, CPU, 8).device.node_s == 9e-6
    assert {p.type for p in merged.products} == {"Q4_K", "Q6_K"}


def test_half_the_threads_are_measured_too() -> None:
    assert [threads_to_measure(n) for n in (1, 2, 3, 16)] == [(1,), (1, 2), (1, 3), (8, 16)]


def test_only_what_is_missing_is_measured() -> None:
    assert unmeasured(KNOWN, (4, 8), ("Q4_K",)) == ((), ())
    assert unmeasured(KNOWN, (4, 8), ("Q4_K", "Q6_K")) == ((4, 8), ("Q4_K", "Q6_K"))
    assert unmeasured(KNOWN, (2,), ("Q4_K",)) == ((2,), ("Q4_K",))
    assert unmeasured(NO_BANDWIDTHS, (1,), ()) == ((1,), ())


# ---- between runs ----

KEY = MeasurementKey("a machine", "a build", "a model")


def test_rates_are_kept_for_their_machine_whatever_the_model(tmp_path: Path) -> None:
    MeasurementStore(tmp_path / "new").write_rates(KEY, KNOWN)
    store = MeasurementStore(tmp_path / "new")
    assert store.rates(KEY) == KNOWN
    assert store.rates(replace(KEY, model="another")) == KNOWN
    assert store.rates(replace(KEY, machine="another")) == NO_BANDWIDTHS
    assert store.rates(replace(KEY, build="another")) == NO_BANDWIDTHS
    assert [path.suffix for path in (tmp_path / "new").glob("[!.]*")] == [".json"]


DEVICE = asdict(HOST)
DAMAGED = [
    b"", b"null", b"[]", b"{}", b"\xff\xfe\x00", b'{"devices": 1, "products": []}',
    *(json.dumps({"devices": [{**DEVICE, **wrong}], "products": []}).encode() for wrong in (
        {"node_s": -1.0}, {"node_s": float("inf")}, {"node_s": float("nan")}, {"node_s": "2"},
        {"n_threads": 1.5}, {"n_threads": -1}, {"device": 3},
    )),
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_counts_as_none(text: bytes, tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path)
    store.write_rates(KEY, KNOWN)
    (path,) = tmp_path.glob("[!.]*")
    path.write_bytes(text)
    assert store.rates(KEY) == NO_BANDWIDTHS
    store.write_rates(KEY, KNOWN)
    assert store.rates(KEY) == KNOWN


def test_where_nothing_can_be_written_it_is_measured_again(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    store = MeasurementStore(tmp_path / "taken")
    store.write_rates(KEY, KNOWN)
    assert store.rates(KEY) == NO_BANDWIDTHS


def test_no_processor_multiplies_faster_than_its_ram_gives_the_weights() -> None:
    rates = Bandwidths(
        (DeviceRates("CPU", 16, 79e9, 1e-6, 6e10, 2e11),),
        (ProductRate("CPU", 16, "Q4_K", 122e9, 1e12),),
    )
    assert rates_of(rates, "CPU", 16).product("Q4_K").vector_bytes_per_s == 79e9
