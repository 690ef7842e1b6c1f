"""ggml's C API: the signatures that the engine calls, and small graphs to time operations.

llama_cpp declares the functions of llama.cpp alone, so `declare` adds those of ggml.h,
ggml-backend.h and ggml-alloc.h to the library handle that llama.py loads. `GraphBenchmark` times
products and attention on one device. Nothing here imports llama_cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

_handle = ctypes.c_void_p
_int, _size, _float = ctypes.c_int, ctypes.c_size_t, ctypes.c_float


_long, _sizes = ctypes.c_int64, ctypes.POINTER(_size)


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", _size), ("mem_buffer", _handle), ("no_alloc", ctypes.c_bool)]


SIGNATURES: tuple[tuple[str, Any, list[Any]], ...] = (
    ("ggml_init", _handle, [InitParams]),
    ("ggml_free", None, [_handle]),
    ("ggml_type_name", ctypes.c_char_p, [_int]),
    ("ggml_is_quantized", ctypes.c_bool, [_int]),
    ("ggml_nbytes", _size, [_handle]),
    ("ggml_op_name", ctypes.c_char_p, [_int]),
    ("ggml_tensor_overhead", _size, []),
    ("ggml_graph_overhead_custom", _size, [_size, ctypes.c_bool]),
    ("ggml_new_tensor_4d", _handle, [_handle, _int, _long, _long, _long, _long]),
    ("ggml_add", _handle, [_handle] * 3),
    ("ggml_mul", _handle, [_handle] * 3),
    ("ggml_mul_mat_id", _handle, [_handle] * 4),
    ("ggml_flash_attn_ext", _handle, [_handle] * 5 + [_float] * 3),
    ("ggml_new_graph_custom", _handle, [_handle, _size, ctypes.c_bool]),
    ("ggml_build_forward_expand", None, [_handle, _handle]),
    ("ggml_backend_dev_count", _size, []),
    ("ggml_backend_dev_get", _handle, [_size]),
    ("ggml_backend_dev_by_type", _handle, [_int]),
    ("ggml_backend_dev_name", ctypes.c_char_p, [_handle]),
    ("ggml_backend_dev_description", ctypes.c_char_p, [_handle]),
    ("ggml_backend_dev_type", _int, [_handle]),
    ("ggml_backend_dev_memory", None, [_handle, _sizes, _sizes]),
    ("ggml_backend_dev_init", _handle, [_handle, ctypes.c_char_p]),
    ("ggml_backend_dev_supports_op", ctypes.c_bool, [_handle, _handle]),
    ("ggml_backend_dev_host_buffer_type", _handle, [_handle]),
    ("ggml_backend_dev_backend_reg", _handle, [_handle]),
    ("ggml_backend_reg_get_proc_address", _handle, [_handle, ctypes.c_char_p]),
    ("ggml_backend_free", None, [_handle]),
    ("ggml_backend_alloc_ctx_tensors", _handle, [_handle, _handle]),
    ("ggml_backend_cpu_buffer_type", _handle, []),
    ("ggml_backend_buft_name", ctypes.c_char_p, [_handle]),
    ("ggml_backend_buft_alloc_buffer", _handle, [_handle, _size]),
    ("ggml_backend_buffer_name", ctypes.c_char_p, [_handle]),
    ("ggml_backend_buffer_get_base", _handle, [_handle]),
    ("ggml_backend_buffer_set_usage", None, [_handle, _int]),
    ("ggml_backend_buffer_free", None, [_handle]),
    ("ggml_backend_graph_compute", _int, [_handle, _handle]),
    ("ggml_backend_synchronize", None, [_handle]),
    ("ggml_backend_tensor_alloc", _int, [_handle] * 3),
    ("ggml_backend_tensor_memset", None, [_handle, ctypes.c_uint8, _size, _size]),
    ("ggml_backend_tensor_set", None, [_handle, _handle, _size, _size]),
    ("ggml_backend_tensor_get", None, [_handle, _handle, _size, _size]),
    ("ggml_backend_tensor_copy", None, [_handle, _handle]),
)


def declare(library: Any) -> Any:
    """Tell ctypes all of them; gives the library."""
    for name, result, arguments in SIGNATURES:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


N_TYPES = 43  # GGML_TYPE_COUNT (ggml.h)
F32, F16, I32, BF16 = 0, 1, 26, 30  # enum ggml_type
NEVER_WEIGHTS = ("Q8_1", "Q8_K")
"""Types that activations are quantized to. A CPU says that it multiplies with them, and aborts."""
# Bytes that weights and activations are filled with: as the scale of any quant a small normal
# number, as a 32-bit float 0.75. Zeros would be read as fast and multiplied faster on some cards.
WEIGHT_FILL, ACTIVATION_FILL = 0x11, 0x3F
MAX_NODES = 2048


class GraphError(Exception):
    """A device can't do what was to be timed, or has no memory for it."""


def weight_types(library: Any) -> dict[str, int]:
    """The types that matrices can have, by the names that model files are described with."""
    names: dict[str, int] = {}
    for number in range(N_TYPES):
        if number in (F32, F16, BF16) or library.ggml_is_quantized(number):
            names[library.ggml_type_name(number).decode().upper()] = number
    return {name: number for name, number in names.items() if name not in NEVER_WEIGHTS}


class GraphBenchmark:
    """A device to time operations on. A context manager: what it holds is freed at its end.

    First come tensors and operations on them, then `allocate`, then fills, timing and copies.
    """

    def __init__(self, library: Any, device: int) -> None:
        self._lib = library
        self._device = device
        room = library.ggml_tensor_overhead() * MAX_NODES
        room += library.ggml_graph_overhead_custom(MAX_NODES, False)
        self._cleanup = contextlib.ExitStack()
        self._backend = self._owned(
            library.ggml_backend_dev_init(device, None), library.ggml_backend_free
        )
        self._context = self._owned(
            library.ggml_init(InitParams(room, None, True)), library.ggml_free
        )

    def __enter__(self) -> GraphBenchmark:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def _owned(self, handle: int | None, free: Callable[[int], None]) -> int:
        if not handle:
            self._cleanup.close()
            raise GraphError("the device has no room for a measurement")
        self._cleanup.callback(free, handle)
        return handle

    def set_threads(self, n_threads: int) -> None:
        """Compute with so many threads from now on; of no effect but on the CPU."""
        registry = self._lib.ggml_backend_dev_backend_reg(self._device)
        found = self._lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        if found:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(found)(self._backend, n_threads)

    # ---- tensors and operations ----

    def tensor(self, type: int, *shape: int) -> int:
        """A tensor, row length first. Not to be used before `allocate`."""
        sizes = (*shape, 1, 1, 1)[:4]
        return int(self._lib.ggml_new_tensor_4d(self._context, type, *sizes))

    def n_bytes(self, tensor: int) -> int:
        """A tensor's bytes."""
        return int(self._lib.ggml_nbytes(tensor))

    def sum(self, a: int, b: int) -> int:
        """An operation that a CPU's threads all take part in, however little there is to do."""
        return int(self._lib.ggml_add(self._context, a, b))

    def product(self, a: int, b: int) -> int:
        """The same, of another kind: element by element."""
        return int(self._lib.ggml_mul(self._context, a, b))

    def expert_product(self, experts: int, tokens: int, chosen: int) -> int:
        """Experts' matrices times tokens, each token with the experts that `chosen` says."""
        return int(self._lib.ggml_mul_mat_id(self._context, experts, tokens, chosen))

    def attention(self, queries: int, keys: int, values: int, mask: int) -> int:
        """Adds flash attention to the graph; returns its result."""
        inputs = (queries, keys, values, mask)
        return int(self._lib.ggml_flash_attn_ext(self._context, *inputs, 1.0, 0.0, 0.0))

    def graph(self, *results: int) -> int:
        """A graph that computes these. Raises GraphError where the device can't."""
        graph = self._lib.ggml_new_graph_custom(self._context, MAX_NODES, False)
        for result in results:
            if not self._lib.ggml_backend_dev_supports_op(self._device, result):
                raise GraphError("the device has no such operation")
            self._lib.ggml_build_forward_expand(graph, result)
        return int(graph)

    # ---- memory ----

    def allocate(self) -> None:
        """Give every tensor its memory. Raises GraphError where there isn't enough."""
        buffer = self._lib.ggml_backend_alloc_ctx_tensors(self._context, self._backend)
        self._owned(buffer, self._lib.ggml_backend_buffer_free)

    def fill(self, tensor: int, byte: int) -> None:
        """Sets every byte of a tensor."""
        self._lib.ggml_backend_tensor_memset(tensor, byte, 0, self.n_bytes(tensor))

    def write(self, tensor: int, address: int, n_bytes: int) -> None:
        """From RAM to a tensor; is through when it returns."""
        self._lib.ggml_backend_tensor_set(tensor, address, 0, n_bytes)

    def read(self, tensor: int, address: int, n_bytes: int) -> None:
        """Copies a tensor's bytes to memory."""
        self._lib.ggml_backend_tensor_get(tensor, address, 0, n_bytes)

    def copy(self, source: int, target: int) -> None:
        """Within the device; is through when it returns."""
        self._lib.ggml_backend_tensor_copy(source, target)
        self._lib.ggml_backend_synchronize(self._backend)

    def pinned_memory(self, n_bytes: int) -> int | None:
        """The address of pinned memory; None where the device has none, or RAM can't be pinned."""
        kind = self._lib.ggml_backend_dev_host_buffer_type(self._device)
        buffer = kind and self._lib.ggml_backend_buft_alloc_buffer(kind, n_bytes)
        if not buffer:
            return None
        self._cleanup.callback(self._lib.ggml_backend_buffer_free, buffer)
        return int(self._lib.ggml_backend_buffer_get_base(buffer))

    def compute(self, graph: int) -> None:
        """Compute a graph to its end. Raises GraphError."""
        if self._lib.ggml_backend_graph_compute(self._backend, graph) != 0:
            raise GraphError("the device failed in a measurement")


def best_seconds(work: Callable[[], None], *, at_most_s: float, at_least: int = 2) -> float:
    """The shortest time of one call, after a first one for warming up.

    The shortest is what the machine can do; anything longer is what else it was doing.
    """
    work()
    best, spent, n = float("inf"), 0.0, 0
    while n < at_least or spent < at_most_s:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        best, spent, n = min(best, seconds), spent + seconds, n + 1
    return best


def devices_of(library: Any) -> Iterator[tuple[int, str, int]]:
    """Handle, name and kind (enum ggml_backend_dev_type) of every device."""
    for i in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(i)
        name = library.ggml_backend_dev_name(device).decode("utf-8", "replace")
        yield device, name, library.ggml_backend_dev_type(device)
