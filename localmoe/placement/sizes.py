"""The bytes of a model under a request: with each layer, and around them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.meta import ModelMeta
from .cache import cache_bytes_by_layer
from .compute import compute_bytes, copied_experts_bytes, estimated_bytes
from .fill import Layer
from .hardware import Gpu
from .measured import Figure, Measured
from .request import PlanRequest

OVERHEAD_BYTES = 512 << 20
"""A GPU's context and library pools where nobody measured: consumer cards take 110 to 550 MiB."""

RAM = "RAM"
# what compute buffers depend on: no GPU, all on GPUs, experts in RAM, layers in RAM
CPU_ONLY, ALL_ON_GPU, EXPERTS_IN_RAM = "cpu", "gpu", "experts"


@dataclass(frozen=True, slots=True)
class Sizes:
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

    def compute(self, kind: str, device: str, measured: Measured) -> Figure:
        """The compute buffer of a device: measured, interpolated or by formula."""
        wanted = (compute_kind(kind, self.request), device)
        points = [p for p in measured.compute if (p.kind, p.device) == wanted]
        n_ubatch, n_seq = self.request.n_ubatch, self.request.n_seq
        found = compute_bytes(points, self.n_ctx * n_seq, n_ubatch)
        if found:
            return found
        if device == RAM and kind == ALL_ON_GPU:
            return Figure(4 * n_ubatch * self.meta.n_embd, "formula")
        n_bytes = estimated_bytes(self.meta, self.n_ctx, n_ubatch, n_seq)
        if device != RAM and kind == EXPERTS_IN_RAM:
            n_bytes += copied_experts_bytes(self.meta)
        return Figure(n_bytes, "formula")

    def room(self, gpu: Gpu, budget_bytes: int, kind: str, measured: Measured) -> int:
        """What a GPU has left for weights and cache; less than 0 where not even that."""
        used = self.compute(kind, gpu.name, measured).n_bytes + overhead(gpu, measured).n_bytes
        return budget_bytes - used


def sizes_of(meta: ModelMeta, n_ctx: int, request: PlanRequest) -> Sizes:
    """A model's bytes for sequences of `n_ctx` tokens. Layers for drafting aren't loaded."""
    caches = cache_bytes_by_layer(meta, n_ctx, request.n_seq, request.kv_type)
    outside = [t for t in meta.tensors if t.layer is None]
    embedding = sum(t.n_bytes for t in outside if t.role == "embedding")
    output = sum(t.n_bytes for t in outside if t.role != "embedding")
    tied = not any(t.role == "output" for t in outside)
    n_moved = request.n_cpu_moe or 0
    return Sizes(
        meta=meta,
        request=request,
        n_ctx=n_ctx,
        layers=tuple(layer_of(meta, n, caches[n], request.n_cpu_moe) for n in range(meta.n_layers)),
        output_bytes=output + embedding if tied else output,
        output_in_ram_bytes=output,
        embedding_bytes=embedding,
        moved_bytes=sum(roles.get("experts", 0) for roles in meta.layer_bytes[:n_moved]),
    )


def layer_of(meta: ModelMeta, n: int, kv_bytes: int, n_cpu_moe: int | None) -> Layer:
    """A layer with the experts that the plan may move; none where the person said which stay."""
    roles = meta.layer_bytes[n]
    experts = roles.get("experts", 0)
    dense = sum(roles.values()) - experts
    if n_cpu_moe is not None:
        return Layer(n, dense if n < n_cpu_moe else dense + experts, kv_bytes)
    tensors = (t for t in meta.tensors if t.layer == n and t.role == "experts")
    return Layer(n, dense, kv_bytes, tuple((t.name, t.n_bytes) for t in tensors))


def compute_kind(kind: str, request: PlanRequest) -> str:
    """The name under which compute buffers of a kind of placement are kept."""
    return f"{kind}/{request.kv_type}/{request.n_seq}"


def overhead(gpu: Gpu, measured: Measured) -> Figure:
    """What a GPU loses to its context and its libraries."""
    if gpu.name in measured.overhead_bytes:
        return Figure(measured.overhead_bytes[gpu.name], "measured")
    return Figure(OVERHEAD_BYTES, "formula")
