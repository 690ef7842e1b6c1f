"""Plans where a model goes: from a machine, a model's metadata and a request to a Plan. Pure.

Nothing is probed, read or allocated here. Weights are summed from the tensor table, the cache is
computed, and compute buffers and overhead come from `measured` where they were measured; every
figure says which. What a person fixed is kept, and the rest is fitted around it. The plan's
placement is in llama.cpp's own counting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..engine.protocol import FLOATS, FileSpan, Placement
from ..engine.rates import CPU
from ..errors import DoesNotFit, gib
from ..gguf.model_meta import ModelMeta
from ..hardware.machine import Gpu, Machine
from ..perf.cost_model import Forecast, device_of, layer_devices
from ..perf.figures import Figure, Measured
from .buffers import can_hold_cache
from .expert_packing import (
    GpuCapacity,
    Layer,
    LayerPlacement,
    fill_most,
    place_layers,
    placement_with,
    runs,
)
from .explain import context_size, layout_reasons, rejections
from .model_bytes import (
    ALL_ON_GPU,
    CPU_ONLY,
    EXPERTS_IN_RAM,
    LAYERS_IN_RAM,
    RAM,
    HostResidue,
    ModelBytes,
    model_bytes,
    overhead,
)
from .request import PlanRequest, fixed_layers, gpu_budgets, ram_budget

SMALLEST_BYTES = 1 << 20
"""Smaller tensors (norms, biases) aren't worth a registration."""


def pinned_spans(meta: ModelMeta, placement: Placement) -> tuple[FileSpan, ...]:
    """The weights of layers in RAM that a GPU copies for large batches; the token embeddings are
    read row by row and stay as they are."""
    if placement.load_mode != "pinned" or not placement.n_gpu_layers:
        return ()
    homes = layer_devices(placement, meta, ("GPU",))
    return tuple(
        FileSpan(str(meta.paths[t.shard]), t.offset, t.n_bytes)
        for t in meta.tensors
        if t.layer is not None
        and t.layer < meta.n_layers
        and t.n_bytes >= SMALLEST_BYTES
        and device_of(t, placement, homes) == CPU
    )


def placement_of(machine: Machine, sizes: ModelBytes, layout: LayerPlacement) -> Placement:
    """The explicit values that an engine loads by."""
    request = sizes.request
    cpu_layers, cpu_tensors = cpu_experts_of(sizes, layout)
    return Placement(
        n_threads=request.n_threads or machine.n_cores,
        n_gpu_layers=native_layers(sizes, layout),
        cpu_expert_layers=cpu_layers,
        cpu_expert_tensors=cpu_tensors,
        tensor_split=tensor_split(sizes, layout) if len(machine.gpus) > 1 else (),
        n_ctx=sizes.n_ctx,
        n_seq=request.n_seq,
        kv_unified=request.n_cells > 0,
        n_cells=request.n_cells,
        kv_type=request.kv_type,
        n_batch=request.n_ubatch,
        n_ubatch=request.n_ubatch,
        load_mode="pinned" if request.load_mode == "pinned" else "mmap",
        flash_attention=flash_attention(sizes),
        batch_invariant=sizes.is_batch_invariant,
    )


def flash_attention(sizes: ModelBytes) -> Literal["auto", "on", "off"]:
    """A quantized cache needs it. Where answers are to be alike it may not choose its kernel by the
    number of tokens, which llama.cpp's does on the CPU for other caches."""
    if sizes.request.kv_type not in FLOATS:
        return "on"
    return "off" if sizes.is_batch_invariant else "auto"


def cpu_experts_of(
    sizes: ModelBytes, layout: LayerPlacement
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Layers whose experts all stay in RAM though the layer doesn't, and single such tensors."""
    if not layout.n_gpu_layers:
        return (), ()
    if sizes.request.n_cpu_moe is not None:
        return tuple(range(min(sizes.request.n_cpu_moe, len(sizes.layers)))), ()
    on_gpu = sizes.layers[sizes.first_on_gpu(layout.n_gpu_layers) :]
    in_ram = {
        n.index: [name for name, _ in n.experts if name in layout.cpu_experts] for n in on_gpu
    }
    n_experts = sizes.n_experts()
    whole = tuple(n for n, names in in_ram.items() if names and len(names) == n_experts[n])
    single = [name for n, names in in_ram.items() if n not in whole for name in names]
    return whole, sizes.tensors_of(single)


def native_layers(sizes: ModelBytes, layout: LayerPlacement) -> int:
    """n_gpu_layers as llama.cpp counts: layers for drafting stand before the output."""
    asked, n = sizes.request.n_gpu_layers, layout.n_gpu_layers
    if n == 0:
        return 0
    n_all = n + sizes.meta.n_nextn_layers
    return min(asked, n_all) if isinstance(asked, int) else n_all


def tensor_split(sizes: ModelBytes, layout: LayerPlacement) -> tuple[float, ...]:
    """Shares of the layers for llama.cpp: of those on GPUs, number i of n goes to the first GPU
    whose cumulated share is above i/n (upper_bound in load_tensors, src/llama-model.cpp)."""
    split = list(map(float, layout.split))
    if split:
        last = max(i for i, n in enumerate(split) if n)
        split[last] += native_layers(sizes, layout) - layout.n_gpu_layers
    return tuple(split)


SMALLEST_N_CTX = 512
NOTHING = Figure(0, "formula")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a plan takes of one device, or of RAM, and what it may take.

    Of RAM's weights, `mapped_bytes` are pages of the file and `pinned_bytes` are locked for a GPU;
    `repacked` are second copies in another order, to generate with.
    """

    device: str
    budget_bytes: int
    weights: Figure
    kv: Figure
    compute: Figure
    overhead: Figure = NOTHING
    mapped_bytes: int = 0
    pinned_bytes: int = 0
    repacked: Figure = NOTHING

    @property
    def total_bytes(self) -> int:
        """All that the plan takes of it."""
        parts = (self.weights, self.kv, self.compute, self.overhead, self.repacked)
        return sum(part.n_bytes for part in parts)

    @property
    def missing_bytes(self) -> int:
        """What the plan takes beyond the budget."""
        return max(0, self.total_bytes - self.budget_bytes)


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement, what it takes, and why; `rejected` says what would have been better and why it
    wasn't had, `alternatives` what fits as well. `forecast` is None until search.py made one.

    `kind` and `left` are what its compute buffers depend on (measured.ComputePoint).
    """

    fits: bool
    kind: str
    placement: Placement
    memory: tuple[Memory, ...]
    reasons: tuple[str, ...]
    rejected: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    forecast: Forecast | None = None
    left: HostResidue = HostResidue()


@dataclass(frozen=True, slots=True)
class Situation:
    """What a plan is made from. `gpus` are those to use, each with its budget in bytes."""

    machine: Machine
    measured: Measured
    sizes: ModelBytes
    gpus: list[tuple[Gpu, int]]

    @property
    def is_mapped_anyway(self) -> bool:
        """Whether a file larger than RAM is wanted: then RAM refuses nothing."""
        return self.sizes.request.load_mode == "mmap"


def make_plan(machine: Machine, meta: ModelMeta, measured: Measured, request: PlanRequest) -> Plan:
    """Plans a model on a machine. Raises DoesNotFit with the numbers and the nearest that fits."""
    plan = best_plan(machine, meta, measured, request)
    if plan.fits:
        return replace(plan, alternatives=tuple(alternatives(machine, meta, measured, request)))
    raise does_not_fit(plan, machine, meta, measured, request)


def best_plan(machine: Machine, meta: ModelMeta, measured: Measured, request: PlanRequest) -> Plan:
    """The plan that leaves least of the model in RAM, whether it fits or not."""
    n_ctx, why_ctx = context_size(meta, request)
    at = Situation(
        machine, measured, model_bytes(meta, n_ctx, request), gpu_budgets(machine, request)
    )
    layout, rooms = closest(at, fixed_layers(meta, request, at.gpus))
    return Plan(
        fits=fits(at, layout),
        kind=kind_of(layout, at.sizes),
        left=left_in_ram(at, layout),
        placement=placement_of(machine, at.sizes, layout),
        memory=memory_of(at, layout),
        reasons=(why_ctx, *layout_reasons(at.sizes, layout, at.gpus)),
        rejected=tuple(rejections(at.sizes, layout, rooms, at.gpus)),
    )


# ---- the choice ----


def closest(at: Situation, n_gpu_layers: int | None) -> tuple[LayerPlacement, GpuCapacity]:
    """The layout, with the rooms that it was made for.

    What stays in RAM decides how much room is kept for it on a GPU, and so what stays: first all is
    expected there, then what is there by that layout and nothing larger, as long as that comes to
    less.
    """
    largest, following = at.sizes.expert_sizes()
    left = HostResidue(largest, following, at.sizes.pinnable_bytes, len(at.sizes.layers))
    rooms = rooms_of(at, left)
    layout = choose_placement(at, rooms, n_gpu_layers)
    while (less := left_in_ram(at, layout)) != left and left.covers(less) and less.copied_bytes:
        more = rooms_of(at, less)
        nothing_larger = replace(at, sizes=at.sizes.with_largest_in_ram(less.copied_bytes))
        other = choose_placement(nothing_larger, more, n_gpu_layers)
        if not less.covers(left_in_ram(at, other)):
            return (layout, rooms) if fits(at, layout) else (other, more)
        layout, rooms, left = other, more, less
    return layout, rooms


def left_in_ram(at: Situation, layout: LayerPlacement) -> HostResidue:
    """Of all GPUs."""
    sizes = at.sizes
    if kind_of(layout, sizes) in (CPU_ONLY, ALL_ON_GPU):
        return HostResidue()
    n_first = sizes.first_on_gpu(layout.n_gpu_layers)
    largest, following = sizes.expert_sizes(
        layout.cpu_experts, max(n_first, sizes.request.n_cpu_moe or 0)
    )
    pinned, n_layers = pinned_bytes(at, layout), n_with_trips(sizes, layout, sizes.layers[n_first:])
    return HostResidue(largest, following, pinned, n_layers)


def n_with_trips(sizes: ModelBytes, layout: LayerPlacement, on_gpu: Sequence[Layer]) -> int:
    """How many of some layers on GPUs have experts in RAM."""
    n_moved = sizes.request.n_cpu_moe or 0
    has_experts = sizes.n_experts() if n_moved else {}
    return sum(
        any(name in layout.cpu_experts for name, _ in layer.experts)
        or (layer.index < n_moved and bool(has_experts.get(layer.index)))
        for layer in on_gpu
    )


def rooms_of(at: Situation, left: HostResidue) -> GpuCapacity:
    """What each GPU has for weights and cache; experts that a person keeps in RAM need copying."""

    def rooms(kind: str) -> tuple[int, ...]:
        here = HostResidue() if kind == ALL_ON_GPU else left
        return tuple(
            at.sizes.room(gpu, budget, kind, at.measured, place, len(at.gpus), here)
            for place, (gpu, budget) in enumerate(at.gpus)
        )

    experts = rooms(EXPERTS_IN_RAM)
    whole = experts if at.sizes.moved_bytes else rooms(ALL_ON_GPU)
    mixed = tuple(map(min, experts, whole))
    return GpuCapacity(whole, mixed, tuple(map(min, rooms(LAYERS_IN_RAM), mixed)))


def choose_placement(at: Situation, rooms: GpuCapacity, n_gpu_layers: int | None) -> LayerPlacement:
    """The layout with dense parts first; where RAM lacks room then, one that leaves it less.

    The second search is what makes a machine with more memory never worse than one with less.
    """
    sizes = at.sizes
    layout = place_layers(sizes.layers, sizes.output_bytes, rooms, n_gpu_layers)
    if fits(at, layout):
        return layout
    wanted = [n_gpu_layers] if n_gpu_layers is not None else range(len(sizes.layers) + 1, -1, -1)
    for n in wanted:
        other = placement_with(sizes.layers, sizes.output_bytes, rooms, n, fill_most)
        if n == 0:
            other = place_layers(sizes.layers, sizes.output_bytes, rooms, 0)
        if other and fits(at, other):
            return other
    return layout


def fits(at: Situation, layout: LayerPlacement) -> bool:
    """Whether a layout keeps every budget."""
    memory = memory_of(at, layout)
    checked = memory[:-1] if at.is_mapped_anyway else memory
    return not any(m.missing_bytes for m in checked)


def kind_of(layout: LayerPlacement, sizes: ModelBytes) -> str:
    """What a placement's compute buffers depend on."""
    if layout.n_gpu_layers == 0:
        return CPU_ONLY
    if layout.n_gpu_layers <= len(sizes.layers):
        return LAYERS_IN_RAM
    return EXPERTS_IN_RAM if ram_experts(layout, sizes) else ALL_ON_GPU


def ram_experts(layout: LayerPlacement, sizes: ModelBytes) -> int:
    """Bytes of experts that stay in RAM although their layer's dense part is on a GPU."""
    names = layout.cpu_experts
    on_gpu = sizes.layers[sizes.first_on_gpu(layout.n_gpu_layers) :]
    in_ram = sum(n for layer in on_gpu for name, n in layer.experts if name in names)
    return in_ram + sizes.moved_bytes


# ---- what it comes to ----


def memory_of(at: Situation, layout: LayerPlacement) -> tuple[Memory, ...]:
    """Every GPU's memory, and RAM's at the end. A unified GPU's share is gone from RAM's budget."""
    left = left_in_ram(at, layout)
    on_gpus = tuple(
        gpu_memory(at, layout, left, place, run)
        for place, run in zip(range(len(at.gpus)), runs(layout.split), strict=False)
    )
    pairs = zip(on_gpus, at.gpus, strict=False)
    shared = sum(memory.total_bytes for memory, (gpu, _) in pairs if gpu.unified)
    return (*on_gpus, ram_memory(at, layout, left, shared))


def gpu_memory(
    at: Situation, layout: LayerPlacement, left: HostResidue, place: int, run: tuple[int, int]
) -> Memory:
    """What one GPU holds: its run of layers, their cache, perhaps the output."""
    sizes, (gpu, budget), (start, end) = at.sizes, at.gpus[place], run
    first = sizes.first_on_gpu(layout.n_gpu_layers)
    mine = sizes.layers[first + start : first + end]
    experts = [tensor for layer in mine for tensor in layer.experts]
    weights = sum(layer.dense_bytes for layer in mine)
    weights += sum(n for name, n in experts if name not in layout.cpu_experts)
    if end == layout.n_gpu_layers and end > start:
        weights += sizes.output_bytes
    if end == start:
        return Memory(gpu.name, budget, NOTHING, NOTHING, NOTHING)
    kind = kind_of(layout, sizes)
    mine_alone = replace(left, n_layers=n_with_trips(sizes, layout, mine))
    return Memory(
        device=gpu.name,
        budget_bytes=budget,
        weights=Figure(weights, "formula"),
        kv=Figure(sum(layer.kv_bytes for layer in mine), "formula"),
        compute=sizes.compute(kind, gpu.name, at.measured, place, len(at.gpus), left),
        overhead=overhead(gpu, sizes, at.measured, mine_alone),
    )


def ram_memory(
    at: Situation, layout: LayerPlacement, left: HostResidue, shared_bytes: int
) -> Memory:
    """What stays in RAM: the embeddings, the first layers, experts."""
    sizes = at.sizes
    n_first = sizes.first_on_gpu(layout.n_gpu_layers)
    mine = sizes.layers[:n_first]
    weights = sizes.embedding_bytes + ram_experts(layout, sizes)
    weights += sum(layer.dense_bytes + layer.expert_bytes for layer in mine)
    if layout.n_gpu_layers == 0:
        weights += sizes.output_in_ram_bytes
    return Memory(
        device=RAM,
        budget_bytes=max(0, ram_budget(at.machine, sizes.request) - shared_bytes),
        weights=Figure(weights, "formula"),
        kv=Figure(sum(layer.kv_bytes for layer in mine), "formula"),
        compute=sizes.compute(kind_of(layout, sizes), RAM, at.measured, 0, len(at.gpus), left),
        mapped_bytes=weights - left.pinned_bytes,
        pinned_bytes=left.pinned_bytes,
    )


def pinned_bytes(at: Situation, layout: LayerPlacement) -> int:
    """Of the weights in RAM what a GPU copies, where that was asked to be pinned."""
    sizes = at.sizes
    if sizes.request.load_mode != "pinned" or not layout.n_gpu_layers:
        return 0
    n_first = sizes.first_on_gpu(layout.n_gpu_layers)
    first = sum(layer.dense_bytes + layer.expert_bytes for layer in sizes.layers[:n_first])
    return first + ram_experts(layout, sizes)


# ---- what else fits ----


def does_not_fit(
    plan: Plan, machine: Machine, meta: ModelMeta, measured: Measured, request: PlanRequest
) -> DoesNotFit:
    """What is missing where, and the nearest plans that fit."""
    short = max(plan.memory, key=lambda memory: memory.missing_bytes)
    weights = sum(memory.weights.n_bytes for memory in plan.memory)
    nearest = list(nearest_fits(machine, meta, measured, request))
    if nearest:
        hint = f"It fits with {' or '.join(nearest)}."
    elif weights > short.missing_bytes:
        hint = f"Take a quant of at most {gib(weights - short.missing_bytes)}, or free some memory."
    else:
        hint = "Take a smaller model, or free some memory."
    if not nearest and short.device == RAM and request.load_mode != "mmap":
        hint += " Slowly, from the disk: --load-mode mmap."
    return DoesNotFit(f"{meta.name or meta.architecture} needs {too_much(plan, machine)}.", hint)


def too_much(plan: Plan, machine: Machine) -> str:
    """Which memory is short, what it would take and what it may take."""
    short = max(plan.memory, key=lambda memory: memory.missing_bytes)
    unified = {gpu.name for gpu in machine.gpus if gpu.unified}
    sharing = [memory for memory in plan.memory if memory.device in unified]
    where, needed, budget = short.device, short.total_bytes, short.budget_bytes
    if short.device == RAM and sharing:
        shared = sum(memory.total_bytes for memory in sharing)
        where = f"the memory that {' and '.join(m.device for m in sharing)} and RAM share"
        # its budget here is what the GPUs leave of it
        needed, budget = needed + shared, plan.memory[-1].budget_bytes + shared
    return f"{gib(needed)} of {where} and may take {gib(budget)}"


def nearest_fits(
    machine: Machine, meta: ModelMeta, measured: Measured, request: PlanRequest
) -> Iterator[str]:
    """What a person could change a little so that the model fits, in options of the command."""
    if request.n_gpu_layers != "auto" or request.n_cpu_moe is not None:
        free = replace(request, n_gpu_layers="auto", n_cpu_moe=None)
        found = best_plan(machine, meta, measured, free)
        if found.fits:
            without = "" if request.n_cpu_moe is None else " and no -ncmoe"
            yield f"-ngl auto{without} (that is {found.placement.n_gpu_layers} layers)"
    batch = replace(request, n_ubatch=512)
    if request.n_ubatch > 512 and best_plan(machine, meta, measured, batch).fits:
        yield "-ub 512"
    smaller = replace(request, kv_type="q8_0")
    wide = request.kv_type in ("f16", "bf16", "f32")
    if wide and can_hold_cache(meta, "q8_0") and best_plan(machine, meta, measured, smaller).fits:
        yield "-ctk q8_0"
    n_ctx = context_size(meta, request)[0] // 2
    while n_ctx >= SMALLEST_N_CTX:
        if best_plan(machine, meta, measured, replace(request, n_ctx=n_ctx)).fits:
            yield f"-c {n_ctx}"
            return
        n_ctx //= 2


def alternatives(
    machine: Machine, meta: ModelMeta, measured: Measured, request: PlanRequest
) -> Iterator[str]:
    """What fits as well: a longer context, as long as the model was trained for."""
    n_ctx = context_size(meta, request)[0] * 2
    longest = 0
    while n_ctx <= meta.context_length:
        if not best_plan(machine, meta, measured, replace(request, n_ctx=n_ctx)).fits:
            break
        longest, n_ctx = n_ctx, n_ctx * 2
    if longest:
        yield f"-c {longest} fits too; the longer the context, the less of the model on the GPU"
