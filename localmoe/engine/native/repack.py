"""Repacks weights for a few tokens at a time, beside the order that the file has them in.

llama.cpp repacks a CPU's matrices while it loads (`use_extra_bufts`), or not at all. Repacked ones
generate up to 1.6 times as fast, and halve the speed of Mixture-of-Experts prompts: their product
with experts goes row by row (`forward_mul_mat_id`, ggml/src/ggml-cpu/repack.cpp). Here a matrix
can have both: the file stays mapped as it is, copies are made beside it, and before each step the
weights are pointed to one or the other. A backend looks at them only while it computes.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from ...gguf.tensors import is_merged_expert
from ..protocol import RepackMode
from . import llama
from .llama import ggml

REPACK_TYPE = b"CPU_REPACK"  # ggml_backend_cpu_repack_buffer_type_get_name (repack.cpp)
FILE_TYPES = (b"CPU", b"CPU_Mapped")  # names of buffers that hold weights as they are (llama-mmap)
EXPERT_PRODUCT = b"MUL_MAT_ID"
PRODUCTS = (b"MUL_MAT", EXPERT_PRODUCT)
F32 = 0  # enum ggml_type (ggml.h)
OBJECT_BYTES = 32  # struct ggml_object, which ggml_tensor_overhead counts too (ggml.c)
WEIGHTS_USAGE = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS (ggml-backend.h)
N_TRIED = 256  # tokens: the least that llama.cpp makes a context for
N_SOURCES = 10  # GGML_MAX_SRC (ggml.h)

_handle, _size = ctypes.c_void_p, ctypes.c_size_t


class GgmlTensor(ctypes.Structure):
    """struct ggml_tensor (ggml/include/ggml.h)."""

    _fields_ = [
        ("type", ctypes.c_int), ("buffer", _handle),
        ("ne", ctypes.c_int64 * 4), ("nb", _size * 4),
        ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
        ("src", _handle * N_SOURCES), ("view_src", _handle), ("view_offs", _size),
        ("data", _handle), ("name", ctypes.c_char * 64), ("extra", _handle),
        ("padding", ctypes.c_char * 8),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorStorage:
    """Where a tensor's bytes are, and by which kernels they are read."""

    buffer: int
    data: int
    extra: int | None

    @classmethod
    def of(cls, tensor: GgmlTensor) -> TensorStorage:
        """Returns where a tensor is stored."""
        return cls(tensor.buffer, tensor.data, tensor.extra)

    def give(self, tensor: GgmlTensor) -> None:
        """Makes a tensor read from here."""
        tensor.buffer, tensor.data, tensor.extra = self.buffer, self.data, self.extra


class RepackedWeight:
    """A matrix of the model and room for its repacked copy, which `fill` makes."""

    def __init__(self, tensor: GgmlTensor, buffer_type: int) -> None:
        self.tensor = tensor
        self.name: str = tensor.name.decode()
        self.n_bytes = size_of(tensor)
        self.file = TensorStorage.of(tensor)
        self._buffer = ggml.ggml_backend_buft_alloc_buffer(buffer_type, self.n_bytes)
        if not self._buffer:
            raise MemoryError
        ggml.ggml_backend_buffer_set_usage(self._buffer, WEIGHTS_USAGE)
        self._copy = GgmlTensor.from_buffer_copy(tensor)
        self._copy.buffer = self._copy.data = self._copy.extra = None
        base = ggml.ggml_backend_buffer_get_base(self._buffer)
        ggml.ggml_backend_tensor_alloc(self._buffer, ctypes.addressof(self._copy), base)
        self.repacked = TensorStorage.of(self._copy)

    @property
    def can_be(self) -> bool:
        """Whether there is another order for a matrix of this type and shape on this CPU."""
        return self.repacked.extra is not None

    def fill(self) -> None:
        """Repack. The call lets go of Python's lock, so several can go on at once."""
        copy = ctypes.addressof(self._copy)
        ggml.ggml_backend_tensor_set(copy, self.file.data, 0, self.n_bytes)

    def free(self) -> None:
        """Frees the copy; the tensor is read from the file again."""
        self.file.give(self.tensor)
        ggml.ggml_backend_buffer_free(self._buffer)


class RepackedWeights:
    """The copies of a model's matrices: made a few at a time, used when all are there."""

    def __init__(self, twins: Sequence[RepackedWeight] = ()) -> None:
        self._twins = list(twins)
        self._waiting = iter(self._twins)
        self.is_whole = not self._twins
        self._in_use = False
        self._made_bytes, self._made_s = 0, 0.0

    @property
    def left_s(self) -> float:
        """How long the rest takes at the pace so far; 0 where none was made yet."""
        pace = self._made_s / max(1, self._made_bytes)
        return pace * (self.n_bytes - self._made_bytes)

    @property
    def n_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(twin.n_bytes for twin in self._twins)

    def make_some(self, n_threads: int) -> None:
        """Make the copies of the next few matrices, one for each thread."""
        some = list(islice(self._waiting, n_threads))
        started = time.perf_counter()
        if some:
            with ThreadPoolExecutor(n_threads) as pool:
                list(pool.map(RepackedWeight.fill, some))
        self._made_s += time.perf_counter() - started
        self._made_bytes += sum(twin.n_bytes for twin in some)
        self.is_whole = len(some) < n_threads

    def make_all(self, n_threads: int) -> None:
        """Makes the copies that are missing."""
        while not self.is_whole:
            self.make_some(n_threads)

    def use(self, repacked: bool) -> None:
        """Let the model compute with the copies, or with the file's own weights."""
        wanted = repacked and self.is_whole
        if wanted == self._in_use:
            return
        self._in_use = wanted
        for twin in self._twins:
            (twin.repacked if wanted else twin.file).give(twin.tensor)

    def free(self) -> None:
        """Frees all copies."""
        for twin in self._twins:
            twin.free()
        self._twins.clear()


def repacked(model: llama.LlamaModel, mode: RepackMode, n_layers: int) -> RepackedWeights:
    """Room for copies of the matrices of a model's first layers; what is outside of layers counts
    as one more. Nothing where RAM has no room."""
    if mode == "off" or repack_type() is None:
        return RepackedWeights()
    weights = matrices(model)
    n_all = n_layers_of(weights)
    wanted = [tensor for tensor in weights if is_wanted(tensor, mode, n_layers, n_all)]
    made: list[RepackedWeight] = []
    try:
        for twin in twins(wanted):
            made.append(twin)
    except MemoryError:
        for twin in made:
            twin.free()
        return RepackedWeights()
    return RepackedWeights(made)


def size_of(tensor: GgmlTensor) -> int:
    """A tensor's bytes."""
    return int(ggml.ggml_nbytes(ctypes.addressof(tensor)))


def is_wanted(tensor: GgmlTensor, mode: RepackMode, n_layers: int, n_all: int) -> bool:
    """Whether a matrix is to be copied; those outside of the `n_all` layers count as one more."""
    layer = layer_of(tensor)
    if mode == "experts" and not is_merged_expert(tensor.name.decode()):
        return False
    return (n_all if layer is None else layer) < n_layers


def n_layers_of(weights: Iterable[GgmlTensor]) -> int:
    """Returns how many layers some weights belong to."""
    return 1 + max((n for t in weights if (n := layer_of(t)) is not None), default=-1)


def layer_of(tensor: GgmlTensor) -> int | None:
    """The layer of a weight called `blk.N.`; None outside of layers."""
    parts = tensor.name.decode().split(".")
    return int(parts[1]) if parts[0] == "blk" and parts[1].isdigit() else None


def twins(tensors: Iterable[GgmlTensor]) -> Iterator[RepackedWeight]:
    """Those that can be repacked. Their memory is taken from the system when they are filled."""
    buffer_type = repack_type()
    for tensor in tensors if buffer_type else ():
        assert buffer_type
        twin = RepackedWeight(tensor, buffer_type)
        if twin.can_be:
            yield twin
        else:
            twin.free()


def repack_type() -> int | None:
    """The kind of buffer that repacks what is written to it; None where this build has none.

    There may be others: for AMX, which isn't used here (docs/notes/repacking.md).
    """
    if ggml.ggml_tensor_overhead() != ctypes.sizeof(GgmlTensor) + OBJECT_BYTES:
        return None  # another version's struct
    device = ggml.ggml_backend_dev_by_type(0)  # GGML_BACKEND_DEVICE_TYPE_CPU
    found = ggml.ggml_backend_reg_get_proc_address(
        ggml.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
    )
    types = ctypes.CFUNCTYPE(ctypes.POINTER(_handle), _handle)(found)(device) if found else None
    i = 0
    while types and types[i]:
        if ggml.ggml_backend_buft_name(types[i]) == REPACK_TYPE:
            return int(types[i])
        i += 1
    return None


def matrices(model: llama.LlamaModel, names: set[bytes] | None = None) -> list[GgmlTensor]:
    """Weights in RAM that are multiplied with and used for nothing else, in their order.

    The graph of one token has them all; it is laid out and shown, and its computation given up.
    `names` is given the names of its nodes.
    """
    products: dict[int, GgmlTensor] = {}
    others: set[int] = set()

    def note(address: int, _: bool) -> bool:
        node = GgmlTensor.from_address(address)
        if names is not None:
            names.add(node.name)
        for i, source in enumerate(node.src):
            if source and i == 0 and is_plain_product(node):
                products.setdefault(source, GgmlTensor.from_address(source))
            elif source:
                others.add(source)
        return False

    context = llama.LlamaContext(
        model, n_ctx=N_TRIED, n_seq=1, n_batch=N_TRIED, n_ubatch=N_TRIED, n_threads=1,
        kv_type="f16", flash_attention="auto", on_node=note,
    )  # fmt: skip
    context.abort()
    context.decode(llama.LlamaBatch(1), 1)
    context.free()
    return [t for at, t in products.items() if at not in others and is_file_weight(t)]


def is_plain_product(node: GgmlTensor) -> bool:
    """A product that repacked weights have a kernel for: of one matrix, or of one for each expert
    (supports_op, ggml/src/ggml-cpu/repack.cpp; it asserts on others)."""
    kind = ggml.ggml_op_name(node.op)
    if kind not in PRODUCTS or not node.src[0] or not node.src[1]:
        return False
    weights, tokens = (GgmlTensor.from_address(node.src[i]) for i in (0, 1))
    n_matrices = weights.ne[3] if kind == EXPERT_PRODUCT else weights.ne[2] * weights.ne[3]
    return bool(n_matrices == 1 and tokens.type == F32)


def is_file_weight(tensor: GgmlTensor) -> bool:
    """Whether a tensor is a weight in the file's own order."""
    name = tensor.buffer and ggml.ggml_backend_buffer_name(tensor.buffer)
    return name in FILE_TYPES and bytes(tensor.name).endswith(b".weight")
