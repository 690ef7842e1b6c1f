"""The bytes of a model under a request: with each layer, and around them. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable
from dataclasses import astuple, dataclass, replace

from ..engine.protocol import FLOATS, first_gpu_layer
from ..gguf.model_meta import ModelMeta
from ..gguf.tensors import TensorInfo
from ..hardware.machine import Gpu
from ..perf.figures import Figure, Measured
from .buffers import (
    MicroBatchShape,
    cache_bytes_by_layer,
    compute_bytes,
    copied_experts_bytes,
    estimated_bytes,
    input_bytes,
    logits_bytes,
    pipeline_bytes,
    scores_bytes,
)
from .expert_packing import Layer
from .request import PlanRequest

OVERHEAD_BYTES = 512 << 20
"""A GPU's context and library pools where nobody measured: consumer cards take 110 to 550 MiB."""

PINNED_PER_BYTE = 512
"""Bytes of RAM whose locking takes a byte of the GPU: 8 for each page of 4 KiB, for its page tables
(docs/notes/pinned-experts.md)."""

TRIP_BYTES = 20 << 20
"""What a CPU reads while a token's state goes from a GPU to RAM and back: 0.26 ms at 79 GB/s
(docs/notes/placement-speed.md)."""

GRAPHS_BYTES = 384 << 10
"""Beside a layer with experts in RAM a GPU's work ends and begins anew. CUDA keeps graphs of each
such piece; as the context fills up they take 10 MiB for 26 layers (docs/notes/gpu-memory.md)."""

ALIGNMENT = 32
"""Tensors start at multiples of it (TENSOR_ALIGNMENT, ggml-impl.h); CUDA's is 128, which makes a
difference of a few KiB."""

# llama.cpp makes these architectures' output before the embeddings that it copies (src/models),
# and then doesn't see that both could be one: they take the embeddings twice, in RAM too
EMBEDDINGS_TWICE = ("gemma3n", "gemma4")
MAX_SCORES_BYTES = 1 << 30
"""What all attention scores of a micro-batch may take: Mixtral's for 16,000 tokens of context."""

RAM = "RAM"
# what compute buffers depend on: no GPU, all on GPUs, some experts in RAM, some layers in RAM
CPU_ONLY, ALL_ON_GPU, EXPERTS_IN_RAM, LAYERS_IN_RAM = "cpu", "gpu", "experts", "layers"


@dataclass(frozen=True, slots=True)
class HostResidue:
    """What stays in RAM and takes room on GPUs: the largest tensor of experts that is copied there
    to compute with, and the next smaller size of them; what is pinned; and in how many layers of
    GPUs there are experts in RAM."""

    copied_bytes: int = 0
    next_bytes: int = 0
    pinned_bytes: int = 0
    n_layers: int = 0

    def covers(self, other: HostResidue) -> bool:
        """Whether this asks for at least as much room as another."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return all(mine >= theirs for mine, theirs in pairs)


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """A model in bytes. `output_bytes` goes with the output matrix to the last GPU (a copy of the
    embeddings where they are tied), `output_in_ram_bytes` is what it takes where there is none.
    `embedding_bytes` stay in RAM, and so do `moved_bytes`: experts that the person put there.
    """

    meta: ModelMeta
    request: PlanRequest
    n_ctx: int
    layers: tuple[Layer, ...]
    output_bytes: int
    output_in_ram_bytes: int
    embedding_bytes: int
    moved_bytes: int

    def compute(
        self,
        kind: str,
        device: str,
        measured: Measured,
        place: int,
        n_gpus: int,
        left: HostResidue,
    ) -> Figure:
        """The compute buffer of a device: measured, interpolated or by formula.

        `place` is a GPU's among the `n_gpus` that are used.
        """
        wanted = (compute_kind(kind, self.request), device)
        points = [p for p in measured.compute if (p.kind, p.device) == wanted]
        copied = left.copied_bytes, left.next_bytes
        same = [p for p in points if (p.copied_bytes, p.next_bytes) == copied]
        if found := compute_bytes(same, self.n_cells, self.request.n_ubatch):
            return found
        here = (self.n_cells, self.request.n_ubatch)
        is_copied_here = device != RAM and place == 0
        others = [
            p.n_bytes + (left.copied_bytes - p.copied_bytes if is_copied_here else 0)
            for p in points
            if (p.n_ctx, p.n_ubatch) == here
        ]
        if others:
            return Figure(max(0, *others), "interpolated")
        n_ctx = self.request.n_cells or self.n_ctx
        work = MicroBatchShape(n_ctx, self.request.n_ubatch, self.request.n_seq, self.has_scores)
        if device == RAM:
            return Figure(ram_compute_bytes(self.meta, work, kind, n_gpus), "formula")
        n_bytes = gpu_compute_bytes(self.meta, work, kind, place, n_gpus, left.copied_bytes)
        return Figure(n_bytes, "formula")

    def room(
        self,
        gpu: Gpu,
        budget_bytes: int,
        kind: str,
        measured: Measured,
        place: int,
        n_gpus: int,
        left: HostResidue,
    ) -> int:
        """What a GPU has for weights and cache; less than 0 where not even that."""
        compute = self.compute(kind, gpu.name, measured, place, n_gpus, left)
        lost = overhead(gpu, self, measured, left)
        return budget_bytes - compute.n_bytes - lost.n_bytes

    def expert_sizes(
        self, names: Container[str] | None = None, n_layers: int = 0
    ) -> tuple[int, int]:
        """The two largest sizes of tensors of experts: of those that may be in RAM, or of these and
        those of the first layers; 0 where there is none."""
        limit = self.request.largest_in_ram if names is None else None
        sizes = {
            aligned(t) for t in self.meta.tensors
            if t.role == "experts"
            and (t.layer or 0) < len(self.layers)
            and (names is None or t.name in names or (t.layer or 0) < n_layers)
            and (limit is None or aligned(t) <= limit)
        }  # fmt: skip
        largest, following, *_ = (*sorted(sizes, reverse=True), 0, 0)
        return largest, following

    def with_largest_in_ram(self, n_bytes: int) -> ModelBytes:
        """The same, where larger tensors of experts are kept off RAM."""
        return model_bytes(self.meta, self.n_ctx, replace(self.request, largest_in_ram=n_bytes))

    def first_on_gpu(self, n_gpu_layers: int) -> int:
        """Returns the first of `layers` that is on a GPU; their number where none is."""
        return min(len(self.layers), first_gpu_layer(len(self.layers), n_gpu_layers))

    def n_experts(self) -> Counter[int]:
        """How many matrices of experts each layer has."""
        layers = {n: matrices(tensors) for n, tensors in tensors_by_layer(self.meta).items()}
        return Counter({n: len(found) for n, found in layers.items() if n < len(self.layers)})

    def tensors_of(self, names: Container[str]) -> tuple[str, ...]:
        """The names of these matrices of experts, and of their biases and scales."""
        experts = [t.name for t in self.meta.tensors if t.role == "experts"]
        wanted = {matrix_of(name) for name in experts if name in names}
        return tuple(name for name in experts if matrix_of(name) in wanted)

    @property
    def is_batch_invariant(self) -> bool:
        """Whether answers can be made not to depend on those beside them, where that is wanted.

        On the CPU llama.cpp's flash attention takes another kernel for 64 tokens or more, but for
        quantized caches (ggml/src/ggml-cpu/ops.cpp): it is left out where there is room for that.
        """
        request = self.request
        if not request.batch_invariant or request.n_ubatch < max(2, request.n_seq):
            return False
        n_bytes = scores_bytes(self.meta, self.n_ctx) * request.n_ubatch
        return request.kv_type not in FLOATS or n_bytes <= MAX_SCORES_BYTES

    @property
    def has_scores(self) -> bool:
        """Whether the scores of all tokens are in memory at once: without flash attention."""
        return self.is_batch_invariant and self.request.kv_type in FLOATS

    @property
    def n_cells(self) -> int:
        """Tokens that the cache holds, of all sequences."""
        return self.request.n_cells or self.n_ctx * self.request.n_seq

    @property
    def pinnable_bytes(self) -> int:
        """What may come to be pinned at most, where that was asked for."""
        if self.request.load_mode != "pinned":
            return 0
        return sum(layer.dense_bytes + layer.expert_bytes for layer in self.layers)


def gpu_compute_bytes(
    meta: ModelMeta, work: MicroBatchShape, kind: str, place: int, n_gpus: int, copied_bytes: int
) -> int:
    """A GPU's compute buffer by formula. What is in RAM is computed on the first GPU."""
    n_bytes = estimated_bytes(meta, work, on_gpu=True)
    if kind == ALL_ON_GPU and n_gpus > 1:
        return n_bytes + pipeline_bytes(meta, work, is_first=place == 0)
    if kind != ALL_ON_GPU and place == 0:
        return n_bytes + copied_experts_bytes(meta, n_gpus, copied_bytes)
    return n_bytes


def ram_compute_bytes(meta: ModelMeta, work: MicroBatchShape, kind: str, n_gpus: int) -> int:
    """RAM's compute buffer and logits by formula.

    Layers in RAM count as computed there: not every backend takes large batches of them over.
    """
    logits = logits_bytes(meta, work.n_seq)
    if kind in (CPU_ONLY, LAYERS_IN_RAM):
        return estimated_bytes(meta, work) + logits
    if kind == ALL_ON_GPU and n_gpus > 1:
        logits += pipeline_bytes(meta, work, is_first=True)
    return input_bytes(meta, work) + logits


def model_bytes(meta: ModelMeta, n_ctx: int, request: PlanRequest) -> ModelBytes:
    """A model's bytes for sequences of `n_ctx` tokens. Layers for drafting aren't loaded."""
    caches = cache_bytes_by_layer(meta, n_ctx, request.n_seq, request.kv_type, request.n_cells)
    outside = [t for t in meta.tensors if t.layer is None]
    embedding = sum(aligned(t) for t in outside if t.role == "embedding")
    output = sum(aligned(t) for t in outside if t.role != "embedding")
    tied = not any(t.role == "output" for t in outside)
    copied = sum(aligned(t) for t in outside if tied and t.name == "token_embd.weight")
    in_layers, trip = tensors_by_layer(meta), trip_bytes(meta)
    n_moved = min(request.n_cpu_moe or 0, meta.n_layers)
    return ModelBytes(
        meta=meta,
        request=request,
        n_ctx=n_ctx,
        layers=tuple(
            layer_of(n, in_layers[n], caches[n], request, trip) for n in range(meta.n_layers)
        ),
        output_bytes=output + copied,
        output_in_ram_bytes=output + (copied if meta.architecture in EMBEDDINGS_TWICE else 0),
        embedding_bytes=embedding,
        moved_bytes=sum(
            aligned(t) for n in range(n_moved) for t in in_layers[n] if t.role == "experts"
        ),
    )


def aligned(tensor: TensorInfo) -> int:
    """A tensor's bytes with what keeps the next one aligned."""
    return -(-tensor.n_bytes // ALIGNMENT) * ALIGNMENT


def tensors_by_layer(meta: ModelMeta) -> dict[int, list[TensorInfo]]:
    """Returns the tensors of each layer."""
    layers: dict[int, list[TensorInfo]] = defaultdict(list)
    for tensor in meta.tensors:
        if tensor.layer is not None:
            layers[tensor.layer].append(tensor)
    return layers


def trip_bytes(meta: ModelMeta) -> int:
    """Experts in RAM, used or not, of which a token's share is read during a trip there."""
    return TRIP_BYTES * meta.n_experts // max(1, meta.n_experts_used)


def layer_of(
    n: int, tensors: list[TensorInfo], kv_bytes: int, request: PlanRequest, trip_bytes: int
) -> Layer:
    """A layer with the experts that the plan may move: none where the person said which stay."""
    experts = matrices(tensors)
    dense = sum(aligned(t) for t in tensors if t.role != "experts")
    if request.n_cpu_moe is not None:
        on_gpu = 0 if n < request.n_cpu_moe else sum(n_bytes for _, n_bytes in experts)
        return Layer(n, dense + on_gpu, kv_bytes)
    limit = request.largest_in_ram
    small = {t.name for t in tensors if limit is None or aligned(t) <= limit}
    may_move = tuple(e for e in experts if e[0] in small)
    stay = sum(n for _, n in experts) - sum(n for _, n in may_move)
    return Layer(n, dense + stay, kv_bytes, may_move, trip_bytes)


def matrices(tensors: Iterable[TensorInfo]) -> tuple[tuple[str, int], ...]:
    """Experts by matrix: its name, and bytes with the biases and scales that go where it goes.

    `up` comes first, so that it is left in RAM before others where a layer is divided: llama.cpp
    multiplies with `gate`, then `up`, then `down` (build_moe_ffn, src/llama-graph.cpp). With `gate`
    and `down` in RAM, and `up` on the GPU between them, a token would go to RAM twice.
    """
    found: dict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in tensors:
        if tensor.role == "experts":
            found[matrix_of(tensor.name)].append(tensor)
    ordered = sorted(found.values(), key=lambda some: "_up_" not in some[0].name)
    return tuple(
        (max(some, key=lambda t: t.n_bytes).name, sum(map(aligned, some))) for some in ordered
    )


def matrix_of(name: str) -> str:
    """A tensor's name without what it is of its matrix: its weight, bias or scale."""
    return name.rpartition(".")[0]


def compute_kind(kind: str, request: PlanRequest) -> str:
    """The name under which compute buffers of a kind of placement are kept."""
    shared = "/unified" if request.n_cells else "/alike" if request.batch_invariant else ""
    return f"{kind}/{request.kv_type}/{request.n_seq}{shared}"


def overhead(gpu: Gpu, sizes: ModelBytes, measured: Measured, left: HostResidue) -> Figure:
    """What a GPU loses to its context, its libraries, the pages of RAM that it has mapped, and what
    it remembers of its work between two trips to RAM.

    It was measured on a model without size; this one's own micro-batch comes on top.
    """
    tables = left.pinned_bytes // PINNED_PER_BYTE + left.n_layers * GRAPHS_BYTES
    if gpu.name in measured.overhead_bytes:
        pool = pool_bytes(sizes.meta, sizes.request.n_ubatch)
        return Figure(measured.overhead_bytes[gpu.name] + pool + tables, "interpolated")
    return Figure(OVERHEAD_BYTES + tables, "formula")


def pool_bytes(meta: ModelMeta, n_ubatch: int) -> int:
    """What a CUDA product takes beside the compute buffer: its input, quantized to blocks of 32
    values in 36 bytes (block_q8_1, ggml/src/ggml-cuda/mmq.cu). The widest is that of the experts'
    last matrix."""
    width = max(meta.n_embd, meta.n_ff, meta.n_experts_used * meta.n_ff_expert)
    return n_ubatch * width * 36 // 32
