"""Which placement serves a workload best: candidates are planned, timed by forecast, one is taken.

What a person fixed is the same in every candidate; what is left open varies: the micro-batch, and
whether experts in RAM are pinned. A large micro-batch makes prompts fast and takes room on the GPU
that experts could have, which makes answers slow: how much of which is wanted decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..engine.protocol import Placement
from ..errors import DoesNotFit
from ..models.meta import ModelMeta
from .bandwidth import Bandwidths
from .forecast import Forecast, Task, forecast, setting_of
from .plan import Plan
from .request import LoadMode, PlanRequest
from .sizes import RAM
from .speeds import SpeedRecord

Workload = Literal["run", "chat", "batch"]

UBATCHES = (512, 1024, 2048, 4096)
PIN_BYTES_PER_S = 25e9
"""At which pages of a mapped file are locked for a GPU (docs/notes/pinned-experts.md)."""
LOAD_BYTES_PER_S = 6e9
"""At which weights go from the page cache to a GPU while a model loads (same note)."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a workload typically asks of a loaded model; its time is what is made small.

    `loads` says how often a model is loaded for it.
    """

    task: Task
    loads: float


JOBS: dict[Workload, Job] = {
    # a question and an answer, and the model is loaded for it alone
    "run": Job(Task(n_prompt=128, n_generated=256), loads=1.0),
    # a turn of conversation and one of programming, as people's are: 1,020 tokens in and 129 out,
    # 1,500 and 13 (medians of two services; Splitwise, arXiv 2311.18677, figure 3)
    "chat": Job(Task(n_prompt=1020 + 1500, n_generated=129 + 13), loads=0.1),
    # as many tokens in as out; how many at once is the plan's
    "batch": Job(Task(n_prompt=2048, n_generated=2048), loads=0.0),
}


@dataclass(frozen=True, slots=True)
class Speeds:
    """What forecasts are made from: this machine's rates, and what earlier runs really got."""

    bandwidths: Bandwidths = Bandwidths()
    records: Sequence[SpeedRecord] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan with its forecast, and the seconds that the workload's job would take by it."""

    plan: Plan
    forecast: Forecast
    seconds: float


def search(
    requests: Iterable[PlanRequest],
    workload: Workload,
    meta: ModelMeta,
    gpus: Sequence[str],
    speeds: Speeds,
    planned: Callable[[PlanRequest], Plan],
) -> Plan:
    """The plan that does the workload's job soonest, of those that requests leave open.

    `planned` plans a request. Raises DoesNotFit where none fits: what was said of the first.
    """
    refusals: list[DoesNotFit] = []
    found: list[Candidate] = []
    for request in requests:
        try:
            found.append(candidate(planned(request), workload, meta, gpus, speeds))
        except DoesNotFit as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    best = min(found, key=lambda candidate: candidate.seconds)
    others = [other for other in found if other is not best]
    return replace(
        best.plan,
        forecast=best.forecast,
        reasons=(*best.plan.reasons, *reasons(best, others, workload)),
        rejected=(*best.plan.rejected, *(sentence(c, workload) for c in others)),
    )


def candidate(
    plan: Plan, workload: Workload, meta: ModelMeta, gpus: Sequence[str], speeds: Speeds
) -> Candidate:
    job = JOBS[workload]
    setting = setting_of(plan.placement, meta, speeds.bandwidths, gpus)
    task = replace(within(job.task, plan.placement.n_ctx), n_at_once=plan.placement.n_seq)
    expected = forecast(setting, speeds.records, task)
    seconds = job.loads * load_seconds(plan) + task_seconds(expected, task)
    return Candidate(plan, expected, seconds)


def reasons(best: Candidate, others: Sequence[Candidate], workload: Workload) -> Iterator[str]:
    """Why these values of what was left open."""
    if others:
        place, n_prompt = best.plan.placement, JOBS[workload].task.n_prompt
        why = f"soonest done by forecast with {n_prompt} tokens in, as for {workload}"
        pinned = ", experts in RAM pinned" if pinned_bytes(best.plan) else ""
        yield f"{at_once(place)}micro-batch {place.n_ubatch}{pinned}: {why}"


def sentence(candidate: Candidate, workload: Workload) -> str:
    """A candidate that wasn't taken, with its forecast."""
    place, expected = candidate.plan.placement, candidate.forecast
    pinned = "pinned" if pinned_bytes(candidate.plan) else "mapped"
    return (
        f"{at_once(place)}micro-batch {place.n_ubatch}, {pinned}: "
        f"{expected.prompt_tps:.0f} tok/s in and "
        f"{expected.generation_tps:.1f} out by forecast, {candidate.seconds:.1f} s for {workload}"
    )


def at_once(place: Placement) -> str:
    return f"{place.n_seq} requests at once, " if place.n_seq > 1 else ""


def pinned_bytes(plan: Plan) -> int:
    return sum(memory.pinned_bytes for memory in plan.memory)


def within(task: Task, n_ctx: int) -> Task:
    """A task cut to what a context holds, in the same proportions."""
    share = min(1.0, n_ctx / (task.n_prompt + task.n_generated))
    return replace(
        task,
        n_prompt=max(1, int(task.n_prompt * share)),
        n_generated=max(1, int(task.n_generated * share)),
    )


def task_seconds(expected: Forecast, task: Task) -> float:
    return task.n_prompt / expected.prompt_tps + task.n_generated / expected.generation_tps


def load_seconds(plan: Plan) -> float:
    on_gpus = sum(m.weights.n_bytes for m in plan.memory if m.device != RAM)
    return on_gpus / LOAD_BYTES_PER_S + pinned_bytes(plan) / PIN_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class Open:
    """What a person left open."""

    n_ubatch: bool = True
    load_mode: bool = True


def requests_of(request: PlanRequest, has_gpu: bool, is_open: Open) -> Iterator[PlanRequest]:
    """The candidates that a request leaves open, the plainest first."""
    ubatches = UBATCHES if has_gpu and is_open.n_ubatch else (request.n_ubatch,)
    both: tuple[LoadMode, ...] = ("auto", "pinned")  # "mmap" would be a wish to map over all RAM
    modes = both if has_gpu and is_open.load_mode else (request.load_mode,)
    for n_ubatch in ubatches:
        for load_mode in modes:
            yield replace(request, n_ubatch=n_ubatch, load_mode=load_mode)
