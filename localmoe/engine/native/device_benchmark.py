"""Measures how fast the devices of this machine are, in about a second.

Threads read RAM, and everything else is timed through ggml itself: products in the shape of
experts (one token, and a batch), attention, an empty operation, copies to a device. Nothing needs
a model. Sizes are larger than caches, but small beside what a model takes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..rates import CPU, Bandwidths, DeviceRates, ProductRate
from .ggml import (
    ACTIVATION_FILL,
    F16,
    F32,
    I32,
    WEIGHT_FILL,
    GraphBenchmark,
    GraphError,
    best_seconds,
    devices_of,
    weight_types,
)

CPU_KIND, GPU_KINDS = 0, (1, 2)  # enum ggml_backend_dev_type (ggml-backend.h)
MIB = 1 << 20
READ_BYTES = 256 * MIB
COPY_BYTES = 128 * MIB
WEIGHT_BYTES = {False: 128 * MIB, True: 256 * MIB}
"""Weights that a token's products go over, on a CPU and on a GPU (an H100's cache has 50 MB)."""
N_EXPERTS, N_USED = 8, 2
WIDTH, HEIGHT = {False: 2048, True: 4096}, {False: 2048, True: 8192}
"""Of an expert's matrix. With a small one a GPU is timed at launching kernels: an H100 reads
0.7 TB/s of the former, and more than twice as much of Mixtral 8x7B's (4096 x 14336)."""
BATCH = {False: 128, True: 2048}
"""Tokens of a large product; every expert gets a quarter of them."""
FEW = 4
"""Tokens that an expert gets of a small product: a CPU takes its kernel for large ones from 8 on
(ggml/src/ggml-cpu/tiled/tiled.cpp)."""
N_NODES = 256
HEADS, KV_HEADS, HEAD_DIM, DEPTH = 32, 8, 128, 1024
"""Attention as in Mixtral 8x7B, at a depth between a question and a document."""
N_ATTENTION_BATCH = 64  # from so many on, a CPU's threads go over tiles (ggml-cpu/ops.cpp)
SMALL_BYTES = 16 << 10
TIME_S = 0.02
"""How long each thing is repeated; the best of it counts."""


def measure(
    library: Any, n_threads: Sequence[int], types: Iterable[str], scale: float = 1.0
) -> Bandwidths:
    """The rates of every device, of the CPU with each number of threads, for tensors of `types`.

    `library` is the handle that resolves ggml's symbols. What a device can't do, or has no room
    for, is left out, and so are types that no matrix has. A `scale` below 1 takes that much less
    memory and work.
    """
    numbers = weight_types(library)
    wanted = [(name, numbers[name]) for name in types if name in numbers]
    devices: list[DeviceRates] = []
    products: list[ProductRate] = []
    for device, name, kind in devices_of(library):
        if kind == CPU_KIND:
            place = DeviceBenchmark(library, device, CPU, n_threads, scale)
        elif kind in GPU_KINDS:
            place = DeviceBenchmark(library, device, name, (0,), scale)
        else:
            continue
        with contextlib.suppress(GraphError):
            devices += place.device_rates()
        for type_name, number in wanted:
            with contextlib.suppress(GraphError):
                products += place.product_rates(type_name, number)
    return Bandwidths(tuple(devices), tuple(products))


class DeviceBenchmark:
    """A device and what can be timed there: the CPU with several numbers of threads, a GPU with
    the number 0."""

    def __init__(
        self, library: Any, device: int, name: str, n_threads: Sequence[int], scale: float
    ) -> None:
        self._library = library
        self._device = device
        self._name = name
        self._n_threads = tuple(n_threads)
        self._scale = scale
        self._is_gpu = name != CPU

    def _bench(self) -> GraphBenchmark:
        return GraphBenchmark(self._library, self._device)

    def _size(self, n_bytes: int) -> int:
        return max(MIB, int(n_bytes * self._scale))

    def _seconds(self, bench: GraphBenchmark, graph: int) -> list[float]:
        """Of one computation of a graph, for each number of threads."""
        found = []
        for n in self._n_threads:
            if n:
                bench.set_threads(n)
            found.append(best_seconds(lambda: bench.compute(graph), at_most_s=TIME_S))
        return found

    def device_rates(self) -> list[DeviceRates]:
        """For each number of threads. Raises GraphError where there is no room for it."""
        copies = self._copies() if self._is_gpu else (0.0, 0.0, 0.0)
        columns = zip(
            self._n_threads,
            self._read_rates(),
            self._node_seconds(),
            self._attention_rates(1),
            self._attention_rates(N_ATTENTION_BATCH),
            strict=True,
        )
        return [DeviceRates(self._name, *column, *copies) for column in columns]

    # ---- operations ----

    def product_rates(self, type_name: str, type_number: int) -> list[ProductRate]:
        """For each number of threads. Raises GraphError where such weights can't be multiplied.

        One token's products each read other experts, until all weights have been read once; a
        batch goes over the first experts alone, each with as many tokens.
        """
        n_tokens = max(N_EXPERTS, int(BATCH[self._is_gpu] * self._scale))
        with self._bench() as bench:
            weights = self._weights(bench, type_number)
            token = bench.tensor(F32, WIDTH[self._is_gpu], 1, 1)
            pairs = [bench.tensor(I32, N_USED, 1) for _ in range(N_EXPERTS // N_USED)]
            one = bench.graph(*(bench.expert_product(w, token, p) for w in weights for p in pairs))
            sizes = (N_EXPERTS // N_USED, FEW * N_EXPERTS // N_USED, n_tokens)
            batches = [EvenProduct(bench, weights[0], n, WIDTH[self._is_gpu]) for n in sizes]
            bench.allocate()
            for tensor in weights:
                bench.fill(tensor, WEIGHT_FILL)
            bench.fill(token, ACTIVATION_FILL)
            for batch in batches:
                batch.fill()
            for i, pair in enumerate(pairs):
                write_array(bench, pair, np.arange(i * N_USED, (i + 1) * N_USED, dtype=np.int32))
            n_bytes = sum(map(bench.n_bytes, weights))
            graphs = (one, *(batch.graph for batch in batches))
            seconds = zip(*(self._seconds(bench, graph) for graph in graphs), strict=True)
        a_token = 2 * WIDTH[self._is_gpu] * HEIGHT[self._is_gpu] * N_USED
        operations = [a_token * n for n in sizes]
        return [
            self._rate(n, type_name, n_bytes / one_s, operations, batch_s)
            for n, (one_s, *batch_s) in zip(self._n_threads, seconds, strict=True)
        ]

    def _rate(
        self,
        n_threads: int,
        type_name: str,
        bytes_per_s: float,
        operations: Sequence[float],
        seconds: Sequence[float],
    ) -> ProductRate:
        """`operations` and `seconds` are of one token for each expert, of few, and of many.

        Of the first two the weights are in a cache: what they differ by is the further tokens' own.
        """
        many = operations[2] / seconds[2]
        few = (operations[1] - operations[0]) / max(seconds[1] - seconds[0], 1e-9)
        few_flops = 0.0 if self._is_gpu else min(few, many)
        return ProductRate(self._name, n_threads, type_name, bytes_per_s, many, few_flops)

    def _weights(self, bench: GraphBenchmark, type_number: int) -> list[int]:
        """Experts of several layers, in all more than a cache holds."""
        shape = WIDTH[self._is_gpu], HEIGHT[self._is_gpu], N_EXPERTS
        weights = [bench.tensor(type_number, *shape)]
        n = self._size(WEIGHT_BYTES[self._is_gpu]) // bench.n_bytes(weights[0])
        return weights + [bench.tensor(type_number, *shape) for _ in range(1, n)]

    def _attention_rates(self, n_tokens: int) -> list[float]:
        """Values of K and V that heads meet in a second, all tokens together; 0 where the device
        has no such operation."""
        with contextlib.suppress(GraphError), self._bench() as bench:
            queries = bench.tensor(F32, HEAD_DIM, n_tokens, HEADS)
            keys, values = (bench.tensor(F16, HEAD_DIM, DEPTH, KV_HEADS) for _ in range(2))
            mask = bench.tensor(F16, DEPTH, n_tokens)
            graph = bench.graph(bench.attention(queries, keys, values, mask))
            bench.allocate()
            for tensor in (queries, keys, values, mask):
                bench.fill(tensor, 0)
            n_values = 2 * HEAD_DIM * DEPTH * HEADS * n_tokens
            return [n_values / seconds for seconds in self._seconds(bench, graph)]
        return [0.0] * len(self._n_threads)

    def _node_seconds(self) -> list[float]:
        with self._bench() as bench:
            first = last = bench.tensor(F32, 1024)
            for _ in range(N_NODES // 2):  # several of one kind become one kernel of CUDA's
                last = bench.product(bench.sum(last, first), first)
            graph = bench.graph(last)
            bench.allocate()
            bench.fill(first, ACTIVATION_FILL)
            return [s / N_NODES for s in self._seconds(bench, graph)]

    # ---- memory ----

    def _read_rates(self) -> list[float]:
        if not self._is_gpu:
            return ram_rates(self._n_threads, self._size(READ_BYTES))
        return [self._copy_rate()]

    def _copy_rate(self) -> float:
        """A copy within the device reads every byte and writes it."""
        n_bytes = self._size(COPY_BYTES)
        with self._bench() as bench:
            source, target = (bench.tensor(F32, n_bytes // 4) for _ in range(2))
            bench.allocate()
            bench.fill(source, ACTIVATION_FILL)
            seconds = best_seconds(lambda: bench.copy(source, target), at_most_s=TIME_S / 2)
        return 2 * n_bytes / seconds

    def _copies(self) -> tuple[float, float, float]:
        """From pinned memory, from ordinary memory, and the seconds of a round trip."""
        n_bytes = self._size(COPY_BYTES)
        with self._bench() as bench:
            target = bench.tensor(F32, n_bytes // 4)
            bench.allocate()
            ordinary = np.full(n_bytes, ACTIVATION_FILL, np.uint8)
            address = ordinary.ctypes.data

            def rate(source: int) -> float:
                work = best_seconds(
                    lambda: bench.write(target, source, n_bytes), at_most_s=TIME_S / 2
                )
                return n_bytes / work

            def there_and_back() -> None:
                bench.write(target, address, SMALL_BYTES)
                bench.read(target, address, SMALL_BYTES)

            pageable = rate(address)
            pinned = bench.pinned_memory(n_bytes)
            round_trip = best_seconds(there_and_back, at_most_s=TIME_S / 10)
            return rate(pinned) if pinned else pageable, pageable, round_trip


class EvenProduct:
    """A product of a layer's experts with some tokens, spread evenly over them."""

    def __init__(self, bench: GraphBenchmark, weights: int, n_tokens: int, width: int) -> None:
        self._bench = bench
        self._tokens = bench.tensor(F32, width, 1, n_tokens)
        self._experts = bench.tensor(I32, N_USED, n_tokens)
        self._numbers = np.arange(n_tokens * N_USED, dtype=np.int32) % N_EXPERTS
        self.graph = bench.graph(bench.expert_product(weights, self._tokens, self._experts))

    def fill(self) -> None:
        """Once there is room for the tensors."""
        self._bench.fill(self._tokens, ACTIVATION_FILL)
        write_array(self._bench, self._experts, self._numbers)


def write_array(bench: GraphBenchmark, tensor: int, values: npt.NDArray[Any]) -> None:
    """Copies an array to a tensor."""
    bench.write(tensor, values.ctypes.data, values.nbytes)


def ram_rates(n_threads: Iterable[int], n_bytes: int) -> list[float]:
    """Bytes a second that so many threads read from memory that no cache holds.

    An OR over whole words runs as fast as memory delivers, and without Python's lock.
    """
    words = np.ones(n_bytes // 8, np.uint64)
    return [
        words.nbytes / best_seconds(functools.partial(read_all, words, n), at_most_s=TIME_S)
        for n in n_threads
    ]


def read_all(words: npt.NDArray[np.uint64], n_threads: int) -> None:
    """Read an array, each thread a part."""
    threads = [
        threading.Thread(target=np.bitwise_or.reduce, args=(part,))
        for part in np.array_split(words, n_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
