"""Why a plan is as it is, what it would have needed to be better, and what else fits: sentences."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import gib
from ..gguf.model_meta import ModelMeta
from ..hardware.machine import Gpu
from .expert_packing import GpuCapacity, LayerPlacement
from .model_bytes import ModelBytes
from .request import PlanRequest

DEFAULT_N_CTX = 4096


def context_size(meta: ModelMeta, request: PlanRequest) -> tuple[int, str]:
    """The context of one sequence in tokens, and why."""
    trained = meta.context_length
    if request.n_ctx is None:
        n_ctx = min(trained or DEFAULT_N_CTX, DEFAULT_N_CTX)
        return n_ctx, f"context of {n_ctx} tokens: the default; the model was trained for {trained}"
    if request.n_ctx == 0:
        n_ctx = trained or DEFAULT_N_CTX
        return n_ctx, f"context of {n_ctx} tokens: all that the model was trained for, as asked"
    if trained and request.n_ctx > trained:
        why = f"as asked, but the model was trained for {trained} and is unreliable beyond"
        return request.n_ctx, f"context of {request.n_ctx} tokens: {why}"
    return request.n_ctx, f"context of {request.n_ctx} tokens: as asked"


def layout_reasons(
    sizes: ModelBytes, layout: LayerPlacement, gpus: list[tuple[Gpu, int]]
) -> Iterator[str]:
    """Why the layers and experts are where they are."""
    asked, n_layers = sizes.request.n_gpu_layers, len(sizes.layers)
    where = "the GPU" if len(gpus) < 2 else "the GPUs"
    if layout.n_gpu_layers == 0:
        yield f"everything on the CPU: {why_cpu(sizes.request, gpus)}"
        return
    if layout.n_gpu_layers == n_layers + 1:
        why = "as asked" if asked != "auto" else "there is room for every layer's dense part"
        yield f"all layers on {where}: {why}"
    else:
        why = "as asked" if asked != "auto" else "as many as there is room for"
        on_gpu = f"the last {layout.n_gpu_layers - 1} of {n_layers} layers and the output"
        yield f"{on_gpu} on {where}: {why}"
    yield from expert_reasons(sizes, layout, where)
    if any(gpu.unified for gpu, _ in gpus):
        yield f"{where} and RAM are the same memory: what one takes, the other doesn't have"


def why_cpu(request: PlanRequest, gpus: list[tuple[Gpu, int]]) -> str:
    """Says why nothing is on a GPU."""
    if request.n_gpu_layers == 0:
        return "as asked"
    if not gpus:
        return "there is no GPU to use"
    if any(gpu.unified for gpu, _ in gpus):
        return "a GPU would take more of the memory that it shares with RAM"
    return "the GPUs have too little room for one layer"


def expert_reasons(sizes: ModelBytes, layout: LayerPlacement, where: str) -> Iterator[str]:
    """Says which experts are in RAM, and why."""
    moved = sizes.request.n_cpu_moe
    if moved is not None:
        yield f"the experts of the first {min(moved, len(sizes.layers))} layers in RAM: as asked"
        return
    n_experts = sizes.n_experts().total()
    on_gpus = n_experts - len(layout.cpu_experts)
    if n_experts and not layout.cpu_experts:
        yield f"all experts on {where}: there is room for all {n_experts} tensors"
    elif n_experts:
        yield f"{on_gpus} of {n_experts} expert tensors on {where}: no more fit beside that"


def rejections(
    sizes: ModelBytes, layout: LayerPlacement, rooms: GpuCapacity, gpus: list[tuple[Gpu, int]]
) -> Iterator[str]:
    """What would be faster, and the room that it would need on the GPUs."""
    if not gpus:
        return
    dense = sum(layer.fixed_bytes for layer in sizes.layers) + sizes.output_bytes
    whole = dense + sum(layer.expert_bytes for layer in sizes.layers)
    some_layers = layout.n_gpu_layers <= len(sizes.layers)
    if (layout.cpu_experts or some_layers) and not sizes.moved_bytes:
        yield f"everything on {needs(whole, rooms.whole)}"
    if some_layers:
        yield f"every layer's dense part on {needs(dense, rooms.mixed)}"


def needs(n_bytes: int, rooms: tuple[int, ...]) -> str:
    """Beside compute buffers and overhead: what weights and cache would take, and their room."""
    room = gib(max(0, sum(max(0, room) for room in rooms)))
    if len(rooms) == 1:
        return f"the GPU: {gib(n_bytes)} of weights and cache, room for {room}"
    together = f"room for {room} on {len(rooms)} GPUs, a whole layer at a time"
    return f"the GPUs: {gib(n_bytes)} of weights and cache, {together}"
