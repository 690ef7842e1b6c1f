"""What is wanted of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..engine.protocol import KvType

DEFAULT_UBATCH = 512
LoadMode = Literal["auto", "mmap", "pinned"]


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a person fixed; None and "auto" leave the choice to the plan. Sizes are bytes.

    `vram_bytes` has a budget for each GPU; budgets never exceed what the machine has free.
    `alike` asks that answers don't depend on the requests beside them (engine/laying.py).
    `n_cells` above 0 asks for one cache of so many tokens that all sequences share; else each has
    room for its own `n_ctx`. Tensors of experts above `largest_in_ram` are kept off RAM.
    """

    n_ctx: int | None = None
    n_seq: int = 1
    n_cells: int = 0
    alike: bool = False
    n_gpu_layers: int | Literal["auto", "all"] = "auto"
    n_cpu_moe: int | None = None
    largest_in_ram: int | None = None
    kv_type: KvType = "f16"
    n_ubatch: int = DEFAULT_UBATCH
    n_threads: int | None = None
    load_mode: LoadMode = "auto"
    vram_bytes: tuple[int, ...] | None = None
    ram_bytes: int | None = None
