"""What there is to run: the catalog beside what is installed, and what suits this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .choosing import best_first, free_bytes, in_order
from .config import config_folder, state_folder
from .models.catalog import ModelSpec, read_catalog
from .models.matching import models_meant, newest, quant_here, sized_quants
from .models.names import parse_name
from .models.quants import Quant, is_coarse
from .models.store import Installed
from .obtain import Finder
from .placement.bandwidth import BandwidthStore
from .placement.forecast import likely_tps
from .placement.hardware import Machine
from .placement.plan import gpu_budgets
from .placement.request import PlanRequest
from .planning import key_of, plan_request

BESIDE_WEIGHTS = 0.06
LEAST_BESIDE_BYTES = 512 << 20
"""What a model takes beside its weights, cache and buffers of a few thousand tokens: Mixtral 8x7B
1.2 GiB beside 26.5. A plan, which needs the header, says it exactly."""
LARGE_SHARE = 0.2
"""Of a model's parameters, those that a token meets: more in dense models and those of few large
experts (Mixtral 28 %), less in those of many small ones (Qwen3 30B A3B 11 %)."""


@dataclass(frozen=True, slots=True)
class Room:
    """A machine, and what may be used of all its memory, and by its GPUs."""

    machine: Machine
    memory_bytes: int
    gpu_bytes: int


@dataclass(frozen=True, slots=True)
class Suited:
    """The quant that suits this machine, and tokens per second that may be expected of it: by its
    size alone, before its header was read. `is_poor`: it is known to lose much at this quant."""

    label: str
    n_bytes: int
    generation_tps: float | None
    is_poor: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalog. `suited` None: none of the known quants fits, or no size is known."""

    key: str
    spec: ModelSpec
    quants: tuple[Quant, ...]
    installed: tuple[Installed, ...]
    suited: Suited | None

    @property
    def is_here(self) -> bool:
        return self.spec.path.is_file() if self.spec.path else bool(self.installed)


def entries(finder: Finder) -> tuple[list[Entry], list[Installed]]:
    """The catalog's models in its order, and what else is in the cache."""
    catalog = read_catalog(config_folder())
    installed = finder.store.installed()
    room = room_of(finder.planner.machine, plan_request(finder.settings))
    found: list[Entry] = []
    for key, spec in catalog.items():
        name = parse_name(key, catalog)
        here = tuple(newest(models_meant(installed, name, whole=False))) if spec.repo else ()
        whole = [quant_here(model) for model in here if model.is_complete]
        quants = tuple(sized_quants(spec))
        choices = best_first(whole) if whole else in_order(quants)
        found.append(Entry(key, spec, quants, here, suited(spec, choices, room)))
    known = {file.path for entry in found for model in entry.installed for file in model.files}
    return found, [model for model in installed if model.path not in known]


def room_of(machine: Machine, request: PlanRequest) -> Room:
    gpu_bytes = sum(n_bytes for _, n_bytes in gpu_budgets(machine, request))
    return Room(machine, free_bytes(machine, request), gpu_bytes)


def suited(spec: ModelSpec, wanted: Sequence[Quant], room: Room) -> Suited | None:
    """The first that fits of quants in the order in which they are wanted."""
    for quant in wanted:
        if quant.n_bytes + beside(quant.n_bytes) <= room.memory_bytes:
            speed = speed_of(spec, quant.n_bytes, room)
            return Suited(quant.label, quant.n_bytes, speed, is_poor(spec, quant.label))
    return None


def is_poor(spec: ModelSpec, label: str) -> bool:
    share = (spec.active_parameters or 0) / (spec.parameters or 1)
    return share > LARGE_SHARE and is_coarse(label)


def beside(n_bytes: int) -> int:
    return max(LEAST_BESIDE_BYTES, int(n_bytes * BESIDE_WEIGHTS))


def speed_of(spec: ModelSpec, n_bytes: int, room: Room) -> float | None:
    if not (spec.parameters and spec.active_parameters):
        return None
    store = BandwidthStore(state_folder() / "measured")
    active = spec.active_parameters / spec.parameters
    for_weights = max(0, room.gpu_bytes - beside(n_bytes))
    bandwidths = store.read(key_of(room.machine, None))
    return likely_tps(n_bytes, active, bandwidths, room.machine.n_cores, for_weights)
