"""What a person fixed, on a machine: its budgets, and the layers that are to be on GPUs. Pure."""

from __future__ import annotations

from ..errors import DoesNotFit
from ..gguf.model_meta import ModelMeta
from .gpus import Gpu
from .hardware import Machine
from .request import PlanRequest


def gpu_budgets(machine: Machine, request: PlanRequest) -> list[tuple[Gpu, int]]:
    """Each GPU with the bytes that may be used of it, never more than are free."""
    if request.n_gpu_layers == 0:
        return []
    asked = request.vram_bytes or tuple(gpu.free_bytes for gpu in machine.gpus)
    pairs = zip(machine.gpus, asked, strict=False)
    return [(gpu, min(budget, gpu.free_bytes)) for gpu, budget in pairs]


def ram_budget(machine: Machine, request: PlanRequest) -> int:
    available = machine.ram_available_bytes
    return available if request.ram_bytes is None else min(available, request.ram_bytes)


def fixed_layers(meta: ModelMeta, request: PlanRequest, gpus: list[tuple[Gpu, int]]) -> int | None:
    """The number of layers that a person wants on GPUs; None where the plan is to say.

    llama.cpp counts a model's layers for drafting too, behind the others, and loads nothing for
    them: of -ngl N so many don't matter.
    """
    if request.n_gpu_layers == "auto":
        return None
    everything = meta.n_layers + 1
    n = everything if request.n_gpu_layers == "all" else request.n_gpu_layers
    if n and not gpus:
        raise DoesNotFit(
            f"{n} layers are wanted on a GPU, and llama.cpp sees none here.",
            "Leave -ngl out, or install a build for your GPU (README, Install).",
        )
    if request.n_gpu_layers != "all" and n:
        n = max(1, n - meta.n_nextn_layers)
    return min(n, everything)
