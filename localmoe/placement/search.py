"""Which placement serves a workload best: candidates are planned, timed by forecast, one is taken.

What a person fixed is the same in every candidate; what is left open varies: the micro-batch, and
whether experts in RAM are pinned. A large micro-batch makes prompts fast and takes room on the GPU
that experts could have, which makes answers slow: how much of which is wanted decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import DoesNotFit
from ..models.meta import ModelMeta
from .bandwidth import Bandwidths
from .fit import Fitted
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
    # something long to read, talked about for a few turns: what a person waits for is its reading
    "chat": Job(Task(n_prompt=4096, n_generated=512), loads=0.1),
    "batch": Job(Task(n_prompt=4096, n_generated=4096, n_at_once=32), loads=0.0),
}


@dataclass(frozen=True, slots=True)
class Speeds:
    """What forecasts are made from: this machine's rates, and what earlier runs really got."""

    bandwidths: Bandwidths
    records: Sequence[SpeedRecord] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan with its forecast, and the seconds that the workload's job would take by it."""

    fitted: Fitted
    forecast: Forecast
    seconds: float


def search(
    requests: Sequence[PlanRequest],
    workload: Workload,
    meta: ModelMeta,
    gpus: Sequence[str],
    speeds: Speeds,
    fitted: Callable[[PlanRequest], Fitted],
) -> Candidate:
    """The candidate whose plan does the workload's job soonest. Raises DoesNotFit where none fits.

    `fitted` plans a request; the first request is the one whose refusal is told.
    """
    refusal: DoesNotFit | None = None
    best: Candidate | None = None
    for request in requests:
        try:
            found = candidate(fitted(request), workload, meta, gpus, speeds)
        except DoesNotFit as error:
            refusal = refusal or error
            continue
        if best is None or found.seconds < best.seconds:
            best = found
    if best is None:
        assert refusal is not None
        raise refusal
    return best


def candidate(
    fitted: Fitted, workload: Workload, meta: ModelMeta, gpus: Sequence[str], speeds: Speeds
) -> Candidate:
    job, plan = JOBS[workload], fitted.plan
    setting = setting_of(plan.placement, meta, speeds.bandwidths, gpus)
    task = within(job.task, plan.placement.n_ctx)
    expected = forecast(setting, speeds.records, task)
    seconds = job.loads * load_seconds(plan) + task_seconds(expected, task)
    return Candidate(fitted, expected, seconds)


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
    pinned = sum(m.pinned_bytes for m in plan.memory)
    return on_gpus / LOAD_BYTES_PER_S + pinned / PIN_BYTES_PER_S


def requests_of(request: PlanRequest, has_gpu: bool, free_ubatch: bool) -> Iterator[PlanRequest]:
    """The candidates that a request leaves open, the plainest first."""
    ubatches = UBATCHES if has_gpu and free_ubatch else (request.n_ubatch,)
    is_open = has_gpu and request.load_mode == "auto"
    modes: tuple[LoadMode, ...] = ("mmap", "pinned") if is_open else (request.load_mode,)
    for n_ubatch in ubatches:
        for load_mode in modes:
            yield replace(request, n_ubatch=n_ubatch, load_mode=load_mode)
