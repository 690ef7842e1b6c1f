"""Where a model goes: from a machine, a model's metadata and a request to a Plan. Pure.

Nothing is probed, read or allocated here. Weights are summed from the tensor table, the cache is
computed, compute buffers and overhead come from `measured` where they were measured; every figure
says which. What a person fixed is kept and the rest is fitted around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..engine.protocol import Placement
from ..errors import DoesNotFit, gib
from ..models.meta import ModelMeta
from .fill import Layout, Rooms, lay_out, runs
from .hardware import Gpu, Machine
from .measured import Basis, Figure, Measured
from .request import PlanRequest
from .sizes import ALL_ON_GPU, CPU_ONLY, EXPERTS_IN_RAM, RAM, Sizes, overhead, sizes_of

DEFAULT_N_CTX = 4096
SMALLEST_N_CTX = 512
NOTHING = Figure(0, "formula")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a plan takes of one device, or of RAM, and what it may take.

    Of RAM's weights, `mapped_bytes` are pages of the file, `pinned_bytes` are locked for a GPU.
    """

    device: str
    budget_bytes: int
    weights: Figure
    kv: Figure
    compute: Figure
    overhead: Figure = NOTHING
    mapped_bytes: int = 0
    pinned_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        parts = (self.weights, self.kv, self.compute, self.overhead)
        return sum(part.n_bytes for part in parts)

    @property
    def missing_bytes(self) -> int:
        return max(0, self.total_bytes - self.budget_bytes)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Tokens per second that may be expected, and what that rests on."""

    prompt_tps: float
    generation_tps: float
    basis: Basis


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement, what it takes, and why; `rejected` says what would have been better and why it
    wasn't had. `forecast` is None where nothing was measured yet."""

    fits: bool
    kind: str
    placement: Placement
    memory: tuple[Memory, ...]
    reasons: tuple[str, ...]
    rejected: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    forecast: Forecast | None = None


def make_plan(machine: Machine, meta: ModelMeta, measured: Measured, request: PlanRequest) -> Plan:
    """Plan a model on a machine. Raises DoesNotFit with the numbers and the nearest that fits."""
    plan = best_plan(machine, meta, measured, request)
    if plan.fits:
        return plan
    short = max(plan.memory, key=lambda memory: memory.missing_bytes)
    nearest = list(nearest_fits(machine, meta, measured, request))
    hint = "Take a smaller quant, or close other programs."
    if nearest:
        hint = f"It would fit with {' or '.join(nearest)}."
    elif short.device == RAM and request.load_mode != "mmap":
        hint += " Slowly, from the disk: --load-mode mmap."
    raise DoesNotFit(
        f"{meta.name or meta.architecture} needs {gib(short.total_bytes)} of {short.device} "
        f"and may take {gib(short.budget_bytes)}.",
        hint,
    )


def best_plan(machine: Machine, meta: ModelMeta, measured: Measured, request: PlanRequest) -> Plan:
    """The plan with most of the model on the GPUs, whether it fits or not."""
    n_ctx, why_ctx = context_size(meta, request)
    sizes = sizes_of(meta, n_ctx, request)
    gpus = gpu_budgets(machine, request)
    rooms = Rooms(
        whole=tuple(sizes.room(gpu, budget, ALL_ON_GPU, measured) for gpu, budget in gpus),
        mixed=tuple(sizes.room(gpu, budget, EXPERTS_IN_RAM, measured) for gpu, budget in gpus),
    )
    layout = lay_out(sizes.layers, sizes.output_bytes, rooms, fixed_layers(meta, request, gpus))
    kind = kind_of(layout, sizes)
    on_gpus = [
        gpu_memory(gpu, budget, kind, run, sizes, layout, measured)
        for (gpu, budget), run in zip(gpus, runs(layout.split), strict=False)
    ]
    memory = (*on_gpus, ram_memory(machine, kind, sizes, layout, measured))
    checked = memory[:-1] if request.load_mode == "mmap" else memory
    return Plan(
        fits=not any(m.missing_bytes for m in checked),
        kind=kind,
        placement=placement_of(machine, sizes, layout),
        memory=memory,
        reasons=(why_ctx, *layout_reasons(meta, layout, gpus)),
        rejected=tuple(rejections(sizes, layout, rooms, gpus)),
    )


def nearest_fits(
    machine: Machine, meta: ModelMeta, measured: Measured, request: PlanRequest
) -> Iterator[str]:
    """What a person could change a little so that the model fits, in options of the command."""
    if request.kv_type in ("f16", "bf16", "f32"):
        smaller = replace(request, kv_type="q8_0")
        if best_plan(machine, meta, measured, smaller).fits:
            yield "-ctk q8_0"
    n_ctx = context_size(meta, request)[0] // 2
    while n_ctx >= SMALLEST_N_CTX:
        if best_plan(machine, meta, measured, replace(request, n_ctx=n_ctx)).fits:
            yield f"-c {n_ctx}"
            return
        n_ctx //= 2


# ---- what was asked ----


def context_size(meta: ModelMeta, request: PlanRequest) -> tuple[int, str]:
    """The context of one sequence in tokens, and why."""
    trained = meta.context_length
    if request.n_ctx is None:
        n_ctx = min(trained or DEFAULT_N_CTX, DEFAULT_N_CTX)
        return n_ctx, f"context of {n_ctx} tokens: the default; the model was trained for {trained}"
    if trained and request.n_ctx > trained:
        why = f"as asked, but the model was trained for {trained} and loses the thread beyond"
        return request.n_ctx, f"context of {request.n_ctx} tokens: {why}"
    return request.n_ctx, f"context of {request.n_ctx} tokens: as asked"


def gpu_budgets(machine: Machine, request: PlanRequest) -> list[tuple[Gpu, int]]:
    """Each GPU with the bytes that may be used of it, never more than are free."""
    if request.n_gpu_layers == 0:
        return []
    asked = request.vram_bytes or tuple(gpu.free_bytes for gpu in machine.gpus)
    pairs = zip(machine.gpus, asked, strict=False)
    return [(gpu, min(budget, gpu.free_bytes)) for gpu, budget in pairs]


def fixed_layers(meta: ModelMeta, request: PlanRequest, gpus: list[tuple[Gpu, int]]) -> int | None:
    """The number of layers that a person wants on GPUs; None where the plan is to say."""
    if request.n_gpu_layers == "auto":
        return None
    n = meta.n_layers + 1 if request.n_gpu_layers == "all" else request.n_gpu_layers
    if n and not gpus:
        raise DoesNotFit(
            f"{n} layers are wanted on a GPU, and llama.cpp sees none here.",
            "Leave -ngl out, or install a build for your GPU (README, Install).",
        )
    return min(n, meta.n_layers + 1)


# ---- what it comes to ----


def kind_of(layout: Layout, sizes: Sizes) -> str:
    if layout.n_gpu_layers == 0:
        return CPU_ONLY
    everything = layout.n_gpu_layers == len(sizes.layers) + 1
    return ALL_ON_GPU if everything and not ram_experts(layout, sizes) else EXPERTS_IN_RAM


def ram_experts(layout: Layout, sizes: Sizes) -> int:
    """Bytes of experts that stay in RAM although their layer's dense part is on a GPU."""
    names = layout.cpu_experts
    on_gpu = sizes.layers[len(sizes.layers) + 1 - layout.n_gpu_layers :]
    in_ram = sum(n for layer in on_gpu for name, n in layer.experts if name in names)
    return in_ram + sizes.moved_bytes


def gpu_memory(
    gpu: Gpu,
    budget_bytes: int,
    kind: str,
    run: tuple[int, int],
    sizes: Sizes,
    layout: Layout,
    measured: Measured,
) -> Memory:
    """What one GPU holds: its run of layers, their cache, perhaps the output."""
    first = len(sizes.layers) + 1 - layout.n_gpu_layers
    start, end = run
    mine = sizes.layers[first + start : first + end]
    weights = sum(layer.dense_bytes for layer in mine)
    weights += sum(
        n for layer in mine for name, n in layer.experts if name not in layout.cpu_experts
    )
    if end == layout.n_gpu_layers and end > start:
        weights += sizes.output_bytes
    return Memory(
        device=gpu.name,
        budget_bytes=budget_bytes,
        weights=Figure(weights, "formula"),
        kv=Figure(sum(layer.kv_bytes for layer in mine), "formula"),
        compute=sizes.compute(kind, gpu.name, measured) if end > start else NOTHING,
        overhead=overhead(gpu, measured) if end > start else NOTHING,
    )


def ram_memory(
    machine: Machine, kind: str, sizes: Sizes, layout: Layout, measured: Measured
) -> Memory:
    """What stays in RAM: the embeddings, the first layers, experts."""
    n_first = min(len(sizes.layers), len(sizes.layers) + 1 - layout.n_gpu_layers)
    mine = sizes.layers[:n_first]
    weights = sizes.embedding_bytes + ram_experts(layout, sizes)
    weights += sum(layer.dense_bytes + layer.expert_bytes for layer in mine)
    if layout.n_gpu_layers == 0:
        weights += sizes.output_in_ram_bytes
    pinned = sizes.request.load_mode == "pinned" and bool(machine.gpus)
    budget = machine.ram_available_bytes
    return Memory(
        device=RAM,
        budget_bytes=min(budget, sizes.request.ram_bytes or budget),
        weights=Figure(weights, "formula"),
        kv=Figure(sum(layer.kv_bytes for layer in mine), "formula"),
        compute=sizes.compute(kind, RAM, measured),
        mapped_bytes=0 if sizes.request.load_mode == "pinned" else weights,
        pinned_bytes=weights if pinned else 0,
    )


def placement_of(machine: Machine, sizes: Sizes, layout: Layout) -> Placement:
    """The explicit values that an engine loads by."""
    request = sizes.request
    first = len(sizes.layers) + 1 - layout.n_gpu_layers
    on_gpu = sizes.layers[first:] if layout.n_gpu_layers else ()
    in_ram = layout.cpu_experts
    whole = [n.index for n in on_gpu if n.experts and all(name in in_ram for name, _ in n.experts)]
    single = [
        name for n in on_gpu if n.index not in whole for name, _ in n.experts if name in in_ram
    ]
    if request.n_cpu_moe is not None and on_gpu:
        whole = list(range(min(request.n_cpu_moe, len(sizes.layers))))
    return Placement(
        n_threads=request.n_threads or machine.n_cores,
        n_gpu_layers=layout.n_gpu_layers,
        cpu_expert_layers=tuple(whole),
        cpu_expert_tensors=tuple(single),
        tensor_split=tuple(map(float, layout.split)) if len(machine.gpus) > 1 else (),
        n_ctx=sizes.n_ctx,
        n_seq=request.n_seq,
        kv_type=request.kv_type,
        n_batch=request.n_ubatch,
        n_ubatch=request.n_ubatch,
        load_mode="pinned" if request.load_mode == "pinned" else "mmap",
        flash_attention="auto" if request.kv_type in ("f32", "f16", "bf16") else "on",
    )


# ---- why ----


def layout_reasons(meta: ModelMeta, layout: Layout, gpus: list[tuple[Gpu, int]]) -> Iterator[str]:
    """Why the layers and experts are where they are."""
    if layout.n_gpu_layers == 0:
        yield "everything on the CPU: " + (
            "the GPUs have too little room" if gpus else "there is no GPU to use"
        )
    elif layout.n_gpu_layers == meta.n_layers + 1:
        yield "all layers on the GPU: it holds every layer's dense part"
    else:
        yield f"the last {layout.n_gpu_layers - 1} of {meta.n_layers} layers and the output on the GPU"
    n_experts = sum(t.role == "experts" for t in meta.tensors)
    if layout.n_gpu_layers and n_experts:
        kept = n_experts - len(layout.cpu_experts)
        yield f"{kept} of {n_experts} expert tensors on the GPU: as many as fit beside that"


def rejections(
    sizes: Sizes, layout: Layout, rooms: Rooms, gpus: list[tuple[Gpu, int]]
) -> Iterator[str]:
    """What would have been faster, and what it would have needed."""
    if not gpus:
        return
    dense = sum(layer.fixed_bytes for layer in sizes.layers) + sizes.output_bytes
    whole = dense + sum(layer.expert_bytes for layer in sizes.layers)
    if layout.cpu_experts or layout.n_gpu_layers <= len(sizes.layers):
        yield f"everything on the GPU: {gib(whole)} of {gib(max(0, sum(rooms.whole)))} room"
    if layout.n_gpu_layers <= len(sizes.layers):
        yield f"every dense part on the GPU: {gib(dense)} of {gib(max(0, sum(rooms.mixed)))} room"
