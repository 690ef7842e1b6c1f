"""What a model of the catalog likely takes and gives on this machine, before a header was read."""

from __future__ import annotations

from .config.environment import state_folder
from .hardware.machine import Machine
from .hub.quants import Quant
from .models.catalog import ModelSpec
from .perf.cost_model import likely_tps
from .perf.store import BandwidthStore, key_of
from .planner.request import PlanRequest, gpu_budgets

BESIDE_WEIGHTS = 0.06
LEAST_BESIDE_BYTES = 512 << 20
"""What a model takes beside its weights, cache and buffers of a few thousand tokens: Mixtral 8x7B
1.2 GiB beside 26.5. A plan, which needs the header, says it exactly."""


def beside(n_bytes: int) -> int:
    """Bytes beside weights of so many."""
    return max(LEAST_BESIDE_BYTES, int(n_bytes * BESIDE_WEIGHTS))


def speed_of(spec: ModelSpec, machine: Machine, gpu_bytes: int, quant: Quant) -> float | None:
    """Tokens per second of an answer, where GPUs may be used up to `gpu_bytes`; None where the
    catalog doesn't say how large the model is."""
    if not (spec.parameters and spec.active_parameters):
        return None
    bandwidths = BandwidthStore(state_folder() / "measured").read(key_of(machine, None))
    active = spec.active_parameters / spec.parameters
    for_weights = max(0, gpu_bytes - beside(quant.n_bytes))
    return likely_tps(quant.n_bytes, active, bandwidths, machine.n_cores, for_weights)


def speed_for(
    spec: ModelSpec | None, machine: Machine, request: PlanRequest, quant: Quant
) -> float | None:
    """The same within what a request leaves of the GPUs."""
    gpu_bytes = sum(n_bytes for _, n_bytes in gpu_budgets(machine, request))
    return speed_of(spec, machine, gpu_bytes, quant) if spec else None
