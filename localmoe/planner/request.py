"""What is asked of a plan: budgets, layers that a person fixed, and requests at once. Pure.

A budget larger than the machine's memory stands for a machine that one might buy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ..engine.protocol import KvType
from ..errors import DoesNotFit
from ..gguf.model_meta import ModelMeta
from ..hardware.machine import Gpu, Machine

DEFAULT_UBATCH = 512
LoadMode = Literal["auto", "mmap", "pinned"]


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a person fixed; None and "auto" leave the choice to the plan. Sizes are bytes.

    `vram_bytes` has a budget for each GPU; budgets never exceed what the machine has free.
    `batch_invariant` asks that answers don't depend on the requests beside
    them (engine/worker/batch_builder.py).
    `n_cells` above 0 asks for one cache of so many tokens that all sequences share; else each has
    room for its own `n_ctx`. Tensors of experts above `largest_in_ram` are kept off RAM.
    """

    n_ctx: int | None = None
    n_seq: int = 1
    n_cells: int = 0
    batch_invariant: bool = False
    n_gpu_layers: int | Literal["auto", "all"] = "auto"
    n_cpu_moe: int | None = None
    largest_in_ram: int | None = None
    kv_type: KvType = "f16"
    n_ubatch: int = DEFAULT_UBATCH
    n_threads: int | None = None
    load_mode: LoadMode = "auto"
    vram_bytes: tuple[int, ...] | None = None
    ram_bytes: int | None = None


def gpu_budgets(machine: Machine, request: PlanRequest) -> list[tuple[Gpu, int]]:
    """Each GPU with the bytes that may be used of it, never more than are free."""
    if request.n_gpu_layers == 0:
        return []
    asked = request.vram_bytes or tuple(gpu.free_bytes for gpu in machine.gpus)
    pairs = zip(machine.gpus, asked, strict=False)
    return [(gpu, min(budget, gpu.free_bytes)) for gpu, budget in pairs]


def ram_budget(machine: Machine, request: PlanRequest) -> int:
    """Returns how much RAM a plan may use."""
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


def machine_like(machine: Machine, request: PlanRequest) -> Machine:
    """The machine itself where the budgets are within what it has, else one that has them."""
    asked = request.vram_bytes or ()
    has_cards = len(asked) <= len(machine.gpus) and all(
        budget <= gpu.total_bytes for budget, gpu in zip(asked, machine.gpus, strict=False)
    )
    if not has_cards:
        cards = [Gpu(f"GPU{n}", "a card to be bought", size, size) for n, size in enumerate(asked)]
        machine = replace(machine, gpus=tuple(cards))
    ram = request.ram_bytes
    if ram and ram > machine.ram_total_bytes:
        machine = replace(machine, ram_total_bytes=ram, ram_available_bytes=ram)
    return machine


AT_ONCE = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of sequences that are tried; llama.cpp takes 256 at most (LLAMA_MAX_SEQ)."""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Requests that are known before a model is loaded.

    `n_at_once` are the numbers to choose from, `n_ctx` the tokens of the longest, its answer
    included. `n_cells` has, for a number of sequences, the cells of a cache that they share because
    they begin alike; for others each has room of its own. `is_open`: the number is not a person's.
    """

    n_at_once: tuple[int, ...]
    n_ctx: int
    n_cells: Mapping[int, int] = field(default_factory=dict)
    is_open: bool = True

    def requests(self, request: PlanRequest, has_gpu: bool) -> Iterator[PlanRequest]:
        """The request for each number, the largest first.

        On the CPU each has room of its own: that is no slower there, and lets answers be the same
        whatever is beside them. So does a single one, as long as there is room for a second.
        """
        n_ctx = min(self.n_ctx, request.n_ctx or self.n_ctx)
        wanted = {*self.n_at_once, *((2,) if self.is_open and not has_gpu else ())}
        for n in sorted(wanted, reverse=True):
            n_cells = max(self.n_cells[n], n_ctx) if has_gpu and n in self.n_cells else 0
            batch_invariant = n > 1 and not has_gpu
            yield replace(
                request, n_ctx=n_ctx, n_seq=n, n_cells=n_cells, batch_invariant=batch_invariant
            )


def numbers(n_requests: int, wanted: int | None = None) -> tuple[int, ...]:
    """The numbers to choose from: the one that is wanted, else up to all of the requests."""
    if wanted is not None:
        return (wanted,)
    enough = next((n for n in AT_ONCE if n >= n_requests), AT_ONCE[-1])
    return tuple(n for n in AT_ONCE if n <= enough)
