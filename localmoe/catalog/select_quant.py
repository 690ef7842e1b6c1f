"""What a model of the catalog likely takes and gives on this machine, before a header was read.

Which quant of a model: the best one that suits this machine, and why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config.environment import state_folder
from ..errors import DoesNotFit, LocalMoeError, ModelFileError, gib
from ..hardware.machine import Machine
from ..hub.quants import Quant, base_label, rank
from ..perf.cost_model import likely_tps
from ..perf.store import MeasurementStore, key_of
from ..planner.request import PlanRequest, gpu_budgets, ram_budget
from .catalog import ModelSpec

BESIDE_WEIGHTS = 0.06
LEAST_BESIDE_BYTES = 512 << 20
"""What a model takes beside its weights, cache and buffers of a few thousand tokens: Mixtral 8x7B
1.2 GiB beside 26.5. A plan, which needs the header, says it exactly."""


def overhead_estimate(n_bytes: int) -> int:
    """Bytes beside weights of so many."""
    return max(LEAST_BESIDE_BYTES, int(n_bytes * BESIDE_WEIGHTS))


def estimated_speed(
    spec: ModelSpec, machine: Machine, gpu_bytes: int, quant: Quant
) -> float | None:
    """Tokens per second of an answer, where GPUs may be used up to `gpu_bytes`; None where the
    catalog doesn't say how large the model is."""
    if not (spec.parameters and spec.active_parameters):
        return None
    bandwidths = MeasurementStore(state_folder() / "measured").rates(key_of(machine, None))
    active = spec.active_parameters / spec.parameters
    for_weights = max(0, gpu_bytes - overhead_estimate(quant.n_bytes))
    return likely_tps(quant.n_bytes, active, bandwidths, machine.n_cores, for_weights)


def estimated_speed_for(
    spec: ModelSpec | None, machine: Machine, request: PlanRequest, quant: Quant
) -> float | None:
    """The same within what a request leaves of the GPUs."""
    gpu_bytes = sum(n_bytes for _, n_bytes in gpu_budgets(machine, request))
    return estimated_speed(spec, machine, gpu_bytes, quant) if spec else None


RECOMMENDED = "Q4_K_M"
"""Mixtral's perplexity at it is 1.5 % above that at 8 bits, and 0.9 points more are gained by a
sixth more bytes to fetch, to hold and to read for each token (hub/quants.py has the table)."""
LOWEST_NEAR = "IQ4_XS"
"""Down to here a quant is preferred to one above the recommended: it loses a point or two more."""


MUCH_FASTER = 1.5
"""How much more speed is worth a point or two: as where a quant a little below fits on a GPU whole
and the recommended one doesn't. Fewer bytes alone give a fifth more at most."""

Speed = Callable[[Quant], "float | None"]


@dataclass(frozen=True, slots=True)
class QuantChoice:
    """A quant and why it is the one, in a sentence; "" where there was nothing to choose."""

    quant: Quant
    why: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A quant that does not run here, and why."""

    quant: Quant
    error: DoesNotFit | ModelFileError


def choose_quant(
    quants: Sequence[Quant],
    check: Callable[[Quant], None],
    *,
    are_here: bool,
    speed: Speed = lambda _: None,
) -> QuantChoice:
    """The first quant, in the order in which they are wanted, that `check` lets through; one a
    little below it, where that is much faster by a first forecast (`speed`, tokens per second).

    `check` raises DoesNotFit or ModelFileError. What is no smaller than one that does not fit isn't
    looked at. Raises DoesNotFit where none fits, and where none of them runs at all the
    ModelFileError of the first.
    """
    refusals: list[Refused] = []
    for quant in best_first(quants) if are_here else in_order(quants):
        if any(is_too_large(quant, refused) for refused in refusals):
            continue
        try:
            check(quant)
        except (DoesNotFit, ModelFileError) as error:
            refusals.append(Refused(quant, error))
            continue
        choice = QuantChoice(quant, reason(quant, refusals, are_here))
        return choice if are_here else faster(choice, quants, check, speed)
    raise refusal_of_all(refusals)


def faster(
    choice: QuantChoice, quants: Sequence[Quant], check: Callable[[Quant], None], speed: Speed
) -> QuantChoice:
    """The first of the much faster ones that runs here, else the choice as it is."""
    for quant in much_faster(choice.quant, quants, speed):
        with contextlib.suppress(DoesNotFit, ModelFileError):
            check(quant)
            named = f"{quant.label} ({gib(quant.n_bytes)})"
            usual = f"{choice.quant.label} gives {speed(choice.quant):.0f}"
            why = f"by forecast {speed(quant):.0f} tok/s where {usual}"
            return QuantChoice(quant, f"{named}: {why}, for a point or two of quality.")
    return choice


def much_faster(usual: Quant, quants: Sequence[Quant], speed: Speed) -> list[Quant]:
    """Those a little below a quant that likely answer much faster, the best first."""
    usual_tps = speed(usual)
    if not usual_tps or preference(usual)[0] != 0:
        return []
    near = [q for q in in_order(quants) if preference(q)[0] == 0 and q.n_bytes < usual.n_bytes]
    return [quant for quant in near if (speed(quant) or 0) >= MUCH_FASTER * usual_tps]


def is_too_large(quant: Quant, refused: Refused) -> bool:
    """Whether a quant needs no check: a smaller one did not fit."""
    return isinstance(refused.error, DoesNotFit) and quant.n_bytes >= refused.quant.n_bytes


def refusal_of_all(refusals: Sequence[Refused]) -> LocalMoeError:
    """The error where no quant runs here; of too large ones, that of the smallest."""
    too_large = [refused for refused in refusals if isinstance(refused.error, DoesNotFit)]
    if not too_large:
        return refusals[0].error
    least = min(too_large, key=lambda refused: refused.quant.n_bytes)
    what = f"No quant of it fits here; of the smallest, {least.quant.label}: {least.error.message}"
    return DoesNotFit(what, "See: localmoe list")


# ---- the order in which they are wanted ----


def in_order(quants: Sequence[Quant]) -> list[Quant]:
    """The recommended one and those a little below it, best first; those above, smallest first;
    poorer ones, best first; and at last those whose names say nothing.

    With an importance matrix (i1) one counts as the same, and comes behind what stands before it.
    """
    return sorted(quants, key=preference)


def preference(quant: Quant) -> tuple[int, float, float]:
    """Which of the four groups, and the place within it; less is better."""
    quality, limit = rank(quant.label), rank(RECOMMENDED)
    if not quality:
        return 3, quant.n_bytes, 0
    if quality >= limit + 1:
        return 1, quant.n_bytes, quality
    return 0 if quality >= rank(LOWEST_NEAR) else 2, -min(quality, limit), 0


def best_first(quants: Sequence[Quant]) -> list[Quant]:
    """Of those that are here, and cost nothing to fetch, the best; unknown ones last."""
    return sorted(quants, key=lambda quant: (-rank(quant.label), quant.n_bytes))


# ---- why ----


def reason(quant: Quant, refused: Sequence[Refused], are_here: bool) -> str:
    """Says why a quant was chosen, in a sentence."""
    named = f"{quant.label} ({gib(quant.n_bytes)})"
    if refused:
        first = refused[0]
        failed = "does not fit" if isinstance(first.error, DoesNotFit) else "does not run"
        better = f"{first.quant.label} {failed}: {first.error.message}"
        return f"{named} is the best that fits; {better}"
    if are_here:
        return f"{named} is the best of those that are here."
    if base_label(quant.label) == RECOMMENDED:
        return f"{named}: a larger one would gain little and cost speed."
    group = preference(quant)[0]
    return (
        named
        + (
            f": the nearest below {RECOMMENDED}, which is not there.",
            f": the smallest that is not poor; there is no {RECOMMENDED}.",
            ": the best there is.",
            ": the names of the files say no quant, and this is the smallest.",
        )[group]
    )


# ---- memory ----


def free_bytes(machine: Machine, request: PlanRequest) -> int:
    """What may be used of RAM and of GPUs with memory of their own, within what was asked for."""
    on_gpus = sum(n for gpu, n in gpu_budgets(machine, request) if not gpu.unified)
    return ram_budget(machine, request) + on_gpus


def check_bytes(n_bytes: int, memory_bytes: int) -> None:
    """Raises DoesNotFit where weights alone are more than all memory: no header is needed then."""
    if n_bytes > memory_bytes:
        what = f"Its weights take {gib(n_bytes)}"
        raise DoesNotFit(f"{what}; {gib(memory_bytes)} of memory are free.")
