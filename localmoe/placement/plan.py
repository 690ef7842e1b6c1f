"""Where a model goes: from a machine, a model's metadata and a request to a Plan. Pure.

The simplest honest plan: everything on one GPU where all of it fits there with room to spare,
else everything on the CPU where it fits in RAM, else a refusal with the numbers. What a person
fixed is kept. Nothing is allocated, probed or read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..engine.protocol import KvType, Placement
from ..errors import DoesNotFit
from ..models.meta import ModelMeta
from .hardware import Gpu, Machine
from .measured import Basis, Figure, Measured

DEFAULT_N_CTX = 4096
CELL_PADDING = 256
"""The KV cache is allocated in steps of so many tokens (llama.cpp, src/llama-context.cpp)."""

SPARE_BYTES = 512 << 20
"""Kept free on a GPU: pools of its libraries, and what other programs take in the meantime."""

# Bytes of an element; quantized types store a block of 32 (ggml/src/ggml-common.h)
KV_BYTES: dict[KvType, float] = {
    "f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32,
    "q4_1": 20 / 32, "q4_0": 18 / 32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is wanted; None and "auto" leave the choice to the plan. Sizes are bytes."""

    n_ctx: int | None = None
    n_seq: int = 1
    n_gpu_layers: int | Literal["auto", "all"] = "auto"
    n_cpu_moe: int | None = None
    kv_type: KvType = "f16"
    n_ubatch: int = 512
    n_threads: int | None = None
    load_mode: Literal["auto", "mmap", "pinned"] = "auto"
    vram_bytes: tuple[int, ...] | None = None
    ram_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What a plan takes of one device, or of RAM, and what there is. `budget_bytes` is a limit."""

    device: str
    budget_bytes: int
    weights: Figure
    kv: Figure
    compute: Figure
    overhead: Figure

    @property
    def total_bytes(self) -> int:
        parts = (self.weights, self.kv, self.compute, self.overhead)
        return sum(part.n_bytes for part in parts)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Tokens per second that may be expected, and what that rests on."""

    prompt_tps: float
    generation_tps: float
    basis: Basis


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement, what it takes, and why. `forecast` is None where nothing was measured yet."""

    fits: bool
    placement: Placement
    memory: tuple[Memory, ...]
    reasons: tuple[str, ...]
    alternatives: tuple[str, ...] = ()
    forecast: Forecast | None = None


def make_plan(machine: Machine, meta: ModelMeta, measured: Measured, request: PlanRequest) -> Plan:
    """Plan a model on a machine. Raises DoesNotFit, with the numbers and what would fit.

    What the person fixed (layers, experts, context, KV type, threads) is kept.
    """
    n_ctx, why_ctx = context_size(meta, request)
    kv_bytes = kv_cache_bytes(meta, n_ctx * request.n_seq, request.kv_type)
    compute_bytes = compute_buffer_bytes(meta, request)
    need = meta.weights_bytes + kv_bytes + compute_bytes
    gpu = roomiest(machine, request)
    on_gpu, why_device = choose_device(gpu, need, meta, request)
    placement = Placement(
        n_threads=request.n_threads or machine.n_cores,
        n_gpu_layers=on_gpu,
        cpu_expert_layers=tuple(range(min(request.n_cpu_moe or 0, meta.n_layers))),
        tensor_split=only(gpu, machine) if on_gpu and gpu else (),
        n_ctx=n_ctx,
        n_seq=request.n_seq,
        kv_type=request.kv_type,
        n_batch=request.n_ubatch,
        n_ubatch=request.n_ubatch,
        load_mode="pinned" if request.load_mode == "pinned" else "mmap",
        flash_attention="auto" if request.kv_type in ("f32", "f16", "bf16") else "on",
    )
    memory = memory_of(machine, gpu if on_gpu else None, meta, kv_bytes, compute_bytes, request)
    check_ram(memory, meta, request)
    return Plan(fits=True, placement=placement, memory=memory, reasons=(why_ctx, why_device))


def context_size(meta: ModelMeta, request: PlanRequest) -> tuple[int, str]:
    """The context of one sequence in tokens, and why."""
    trained = meta.context_length
    if request.n_ctx is None:
        n_ctx = min(trained or DEFAULT_N_CTX, DEFAULT_N_CTX)
        return n_ctx, f"context {n_ctx}: the default; the model was trained for {trained}"
    if trained and request.n_ctx > trained:
        return request.n_ctx, (
            f"context {request.n_ctx}: as asked, though the model was trained for {trained} "
            "and may lose the thread beyond"
        )
    return request.n_ctx, f"context {request.n_ctx}: as asked"


def kv_cache_bytes(meta: ModelMeta, n_cells: int, kv_type: KvType) -> int:
    """Size of the KV cache: cells x heads x head sizes over all layers with attention
    (llama.cpp, src/llama-kv-cache.cpp)."""
    cells = -(-n_cells // CELL_PADDING) * CELL_PADDING
    per_cell = sum(n * (meta.head_dim_k + meta.head_dim_v) for n in meta.n_kv_heads)
    return int(cells * per_cell * KV_BYTES[kv_type])


def compute_buffer_bytes(meta: ModelMeta, request: PlanRequest) -> int:
    """An estimate of what a micro-batch is computed in: hidden states, the experts' inner
    states, and the logits of a token for each sequence, in 32-bit floats."""
    per_token = 8 * meta.n_embd + 2 * meta.n_ff_expert * max(1, meta.n_experts_used)
    n_logits = meta.tokenizer.n_vocab * request.n_seq
    return 4 * (request.n_ubatch * per_token + n_logits)


def roomiest(machine: Machine, request: PlanRequest) -> Gpu | None:
    """The GPU with the most memory, within the budgets that the person gave."""
    budgets = request.vram_bytes or tuple(gpu.free_bytes for gpu in machine.gpus)
    gpus = [
        Gpu(gpu.name, gpu.description, gpu.total_bytes, min(budget, gpu.free_bytes))
        for gpu, budget in zip(machine.gpus, budgets, strict=False)
    ]
    return max(gpus, key=lambda gpu: gpu.free_bytes, default=None)


def only(gpu: Gpu, machine: Machine) -> tuple[float, ...]:
    """A tensor split that gives everything to one of several GPUs."""
    if len(machine.gpus) < 2:
        return ()
    return tuple(float(other.name == gpu.name) for other in machine.gpus)


def choose_device(
    gpu: Gpu | None, need: int, meta: ModelMeta, request: PlanRequest
) -> tuple[int, str]:
    """How many layers go to the GPU (all or none, unless a number is asked for), and why."""
    n_all = meta.n_layers + 1
    if request.n_gpu_layers not in ("auto", "all"):
        return int(request.n_gpu_layers), f"{request.n_gpu_layers} layers on the GPU: as asked"
    if gpu is None:
        if request.n_gpu_layers == "all":
            raise DoesNotFit(
                "All layers are wanted on a GPU, and llama.cpp sees none here.",
                "Leave -ngl out, or install a build for your GPU (README, 'Install').",
            )
        return 0, "everything on the CPU: llama.cpp sees no GPU here"
    room = gpu.free_bytes - SPARE_BYTES
    if need <= room or request.n_gpu_layers == "all":
        return n_all, f"everything on {gpu.description}: {need} of {gpu.free_bytes} free bytes"
    return 0, (
        f"everything on the CPU: {need} bytes are needed and {gpu.description} has {room} "
        "with room to spare"
    )


def memory_of(
    machine: Machine,
    gpu: Gpu | None,
    meta: ModelMeta,
    kv_bytes: int,
    compute_bytes: int,
    request: PlanRequest,
) -> tuple[Memory, ...]:
    """What RAM holds, and the GPU where everything is on one; there, only the embeddings stay."""
    formula = "formula"
    nothing = Figure(0, formula)
    kv, compute = Figure(kv_bytes, formula), Figure(compute_bytes, formula)
    limit = min(machine.ram_available_bytes, request.ram_bytes or machine.ram_available_bytes)
    if gpu is None:
        weights = Figure(meta.weights_bytes, formula)
        return (Memory("RAM", limit, weights, kv, compute, nothing),)
    embedding = meta.bytes_of_role("embedding")
    on_gpu = Figure(meta.weights_bytes - embedding, formula)
    return (
        Memory(gpu.name, gpu.free_bytes, on_gpu, kv, compute, nothing),
        Memory("RAM", limit, Figure(embedding, formula), nothing, nothing, nothing),
    )


def check_ram(memory: tuple[Memory, ...], meta: ModelMeta, request: PlanRequest) -> None:
    """Refuse what RAM can't hold, unless running from the disk is asked for."""
    ram = memory[-1]
    if ram.total_bytes <= ram.budget_bytes or request.load_mode == "mmap":
        return
    raise DoesNotFit(
        f"{meta.name} needs {ram.total_bytes / 2**30:.1f} GiB of RAM; "
        f"{ram.budget_bytes / 2**30:.1f} GiB are free.",
        "Try a smaller quant or a smaller -c, close other programs, or let it run slowly from the "
        "disk with --load-mode mmap.",
    )
