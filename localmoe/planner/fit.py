"""The loop for a machine that is here: plan, let the engine measure that placement, correct.

A probe lays a placement out without allocating anything
(engine/worker/memory_probe.py), in tens of milliseconds;
what it finds is kept, so that the next plan of this model on this machine needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..engine.protocol import BufferSizes, Placement
from ..gguf.model_meta import ModelMeta
from ..hardware.machine import Machine
from ..perf.figures import ComputePoint, Figure, Measured
from .model_bytes import RAM, compute_kind
from .plan import Plan, best_plan, make_plan
from .request import PlanRequest

MAX_PROBES = 5
CACHE_ROUNDING_BYTES = 64 << 10
"""llama.cpp's log rounds each of its caches to 0.01 MiB."""

Probe = Callable[[Placement], BufferSizes]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A plan, what is known by now, and how many probes that took."""

    plan: Plan
    measured: Measured
    n_probes: int


def fit(
    machine: Machine, meta: ModelMeta, measured: Measured, request: PlanRequest, probe: Probe
) -> Fitted:
    """Plan until every compute buffer of the plan was measured. Raises DoesNotFit.

    Each round measures the placement that the last one came to; a placement that changes kind
    (from all experts on the GPU to some in RAM, say) is measured again.
    """
    n_probes = 0
    while n_probes < MAX_PROBES:
        plan = best_plan(machine, meta, measured, request)
        if all(is_measured(memory.compute) for memory in plan.memory):
            break
        measured = measured.with_points(points_of(plan, request, probe(plan.placement)))
        n_probes += 1
    return Fitted(make_plan(machine, meta, measured, request), measured, n_probes)


def is_measured(figure: Figure) -> bool:
    """Whether a figure needs no probe."""
    return figure.basis == "measured" or figure.n_bytes == 0


def points_of(plan: Plan, request: PlanRequest, sizes: BufferSizes) -> tuple[ComputePoint, ...]:
    """What a probe says of a plan's devices; what isn't on one of its GPUs is in RAM."""
    gpus = {memory.device for memory in plan.memory} - {RAM}
    by_device = dict.fromkeys((memory.device for memory in plan.memory), 0)
    for found in (sizes.compute_bytes, sizes.output_bytes):
        for name, n_bytes in found.items():
            by_device[name if name in gpus else RAM] += n_bytes
    for device, n_bytes in cache_excess(plan, sizes.cache_bytes).items():
        by_device[device] += n_bytes
    place = plan.placement
    kind = compute_kind(plan.kind, request)
    copied = plan.left.copied_bytes, plan.left.next_bytes
    return tuple(
        ComputePoint(kind, device, place.n_ctx_total, place.n_ubatch, n_bytes, *copied)
        for device, n_bytes in by_device.items()
    )


def cache_excess(plan: Plan, cache_bytes: int) -> dict[str, int]:
    """What llama.cpp's caches take beyond the formula, by device: nothing, for what is known.

    For an architecture with a cache of its own kind the difference is counted with the compute
    buffers, where each device has its share of the cache, so that the totals are right.
    """
    planned = sum(memory.kv.n_bytes for memory in plan.memory)
    excess = cache_bytes - planned
    if excess <= CACHE_ROUNDING_BYTES:
        return {}
    shares = {memory.device: memory.kv.n_bytes / planned for memory in plan.memory if planned}
    return {device: round(excess * share) for device, share in (shares or {RAM: 1.0}).items()}


def overhead_bytes(before: Machine, during: Machine, plan: Plan) -> dict[str, int]:
    """What each GPU lost beside the plan's weights, cache and buffers while it ran.

    `before` is the machine with nothing of ours running, `during` with the plan loaded and used.
    """
    free_during = {gpu.name: gpu.free_bytes for gpu in during.gpus}
    known = {memory.device: memory.total_bytes - memory.overhead.n_bytes for memory in plan.memory}
    return {
        gpu.name: max(0, gpu.free_bytes - free_during[gpu.name] - known.get(gpu.name, 0))
        for gpu in before.gpus
        if gpu.free_from == "driver" and gpu.name in free_during
    }
