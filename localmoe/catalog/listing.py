"""What there is to run: the catalog beside what is installed, and what suits this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ..config.environment import config_folder
from ..hardware.machine import Machine
from ..hub.installed import InstalledModel
from ..hub.quants import Quant, is_coarse
from ..planner.planner import plan_request
from ..planner.request import PlanRequest, gpu_budgets
from .candidates import filter_installed, newest_commits, quant_of_installed, sized_quants
from .catalog import ModelSpec, read_catalog
from .model_name import parse_name
from .resolve import ModelResolver
from .select_quant import (
    best_first,
    estimated_speed,
    free_bytes,
    in_order,
    much_faster,
    overhead_estimate,
)

LARGE_SHARE = 0.2
"""Of a model's parameters, those that a token meets: more in dense models and those of few large
experts (Mixtral 28 %), less in those of many small ones (Qwen3 30B A3B 11 %)."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """A machine, and what may be used of all its memory, and by its GPUs."""

    machine: Machine
    memory_bytes: int
    gpu_bytes: int


@dataclass(frozen=True, slots=True)
class SuitableQuant:
    """The quant that suits this machine, and tokens per second that may be expected of it: by its
    size alone, before its header was read. `is_poor`: it is known to lose much at this quant."""

    label: str
    n_bytes: int
    generation_tps: float | None
    is_poor: bool


@dataclass(frozen=True, slots=True)
class CatalogRow:
    """A model of the catalog; `best_quant` is None where no quant fits or no size is known."""

    key: str
    spec: ModelSpec
    quants: tuple[Quant, ...]
    installed: tuple[InstalledModel, ...]
    best_quant: SuitableQuant | None

    @property
    def is_here(self) -> bool:
        """Whether a file of it is on this machine."""
        return self.spec.path.is_file() if self.spec.path else bool(self.installed)


def catalog_rows(finder: ModelResolver) -> tuple[list[CatalogRow], list[InstalledModel]]:
    """The catalog's models in its order, and what else is in the cache."""
    catalog = read_catalog(config_folder())
    installed = finder.store.installed()
    room = memory_budget_of(finder.planner.machine, plan_request(finder.settings))
    found: list[CatalogRow] = []
    for key, spec in catalog.items():
        name = parse_name(key, catalog)
        here = (
            tuple(newest_commits(filter_installed(installed, name, whole=False)))
            if spec.repo
            else ()
        )
        whole = [quant_of_installed(model) for model in here if model.is_complete]
        quants = tuple(sized_quants(spec))
        choices = best_first(whole) if whole else in_order(quants)
        found.append(CatalogRow(key, spec, quants, here, best_quant(spec, choices, room)))
    known = {file.path for entry in found for model in entry.installed for file in model.files}
    return found, [model for model in installed if model.path not in known]


def memory_budget_of(machine: Machine, request: PlanRequest) -> MemoryBudget:
    """Returns what a request may use of a machine."""
    gpu_bytes = sum(n_bytes for _, n_bytes in gpu_budgets(machine, request))
    return MemoryBudget(machine, free_bytes(machine, request), gpu_bytes)


def best_quant(
    spec: ModelSpec, wanted: Sequence[Quant], room: MemoryBudget
) -> SuitableQuant | None:
    """The first that fits of quants in the order in which they are wanted."""
    speed = partial(estimated_speed, spec, room.machine, room.gpu_bytes)
    for quant in wanted:
        if quant.n_bytes + overhead_estimate(quant.n_bytes) <= room.memory_bytes:
            best = next(iter(much_faster(quant, wanted, speed)), quant)
            return SuitableQuant(best.label, best.n_bytes, speed(best), is_poor(spec, best.label))
    return None


def is_poor(spec: ModelSpec, label: str) -> bool:
    """Whether a quant is known to lose much of this model."""
    share = (spec.active_parameters or 0) / (spec.parameters or 1)
    return share > LARGE_SHARE and is_coarse(label)
