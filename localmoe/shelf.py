"""What there is to run: the catalog beside what is installed, and what suits this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .choosing import in_order
from .config import config_folder, state_folder
from .models.catalog import ModelSpec, read_catalog
from .models.matching import is_meant, quant_here
from .models.names import parse_name
from .models.quants import Quant
from .models.remote import RemoteFile
from .models.store import Installed
from .obtain import Finder
from .placement.bandwidth import BandwidthStore
from .placement.forecast import likely_tps
from .placement.hardware import Machine
from .planning import key_of

BESIDE_WEIGHTS = 0.06
LEAST_BESIDE_BYTES = 512 << 20
"""What a model takes beside its weights, cache and buffers of a few thousand tokens: Mixtral 8x7B
1.2 GiB beside 26.5. A plan, which needs the header, says it exactly."""


@dataclass(frozen=True, slots=True)
class Suited:
    """The quant that suits this machine, and tokens per second that may be expected of it: by its
    size alone, before its header was read."""

    label: str
    n_bytes: int
    generation_tps: float | None


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
        return self.spec.path is not None or bool(self.installed)


def entries(finder: Finder) -> tuple[list[Entry], list[Installed]]:
    """The catalog's models in its order, and what else is in the cache."""
    catalog = read_catalog(config_folder())
    installed = finder.store.installed()
    machine = finder.planner.machine
    found: list[Entry] = []
    for key, spec in catalog.items():
        name = parse_name(key, catalog)
        here = tuple(m for m in installed if is_meant(m, name)) if spec.repo else ()
        quants = tuple(sized_quants(spec))
        choices = [quant_here(model) for model in here] or quants
        found.append(Entry(key, spec, quants, here, suited(spec, choices, machine)))
    known = {model.path for entry in found for model in entry.installed}
    return found, [model for model in installed if model.path not in known]


def sized_quants(spec: ModelSpec) -> Iterator[Quant]:
    """The quants of the catalog whose size it has."""
    for label, known in spec.quants.items():
        repo = known.repo or spec.repo
        if known.bytes and repo:
            file = RemoteFile(repo, known.revision or "", known.file, known.bytes, known.sha256)
            yield Quant(label, (file,), known.file)


def suited(spec: ModelSpec, quants: Sequence[Quant], machine: Machine) -> Suited | None:
    gpu_bytes = sum(gpu.free_bytes for gpu in machine.gpus)
    shared = any(gpu.unified for gpu in machine.gpus)
    memory = machine.ram_available_bytes + (0 if shared else gpu_bytes)
    for quant in in_order(quants):
        if quant.n_bytes + beside(quant.n_bytes) <= memory:
            speed = speed_of(spec, quant.n_bytes, machine, gpu_bytes)
            return Suited(quant.label, quant.n_bytes, speed)
    return None


def beside(n_bytes: int) -> int:
    return max(LEAST_BESIDE_BYTES, int(n_bytes * BESIDE_WEIGHTS))


def speed_of(spec: ModelSpec, n_bytes: int, machine: Machine, gpu_bytes: int) -> float | None:
    if not (spec.parameters and spec.active_parameters):
        return None
    store = BandwidthStore(state_folder() / "measured")
    active = spec.active_parameters / spec.parameters
    for_weights = max(0, gpu_bytes - beside(n_bytes)) if machine.gpus else 0
    bandwidths = store.read(key_of(machine, None))
    return likely_tps(n_bytes, active, bandwidths, machine.n_cores, for_weights)
