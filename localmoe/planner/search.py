"""Searches the placement that serves a workload best: plans candidates and forecasts each.

What a person fixed is the same in every candidate. What is left open varies: the micro-batch,
whether experts in RAM are pinned, whether the largest may be there, and whether matrices are copied
in repacked order. A large micro-batch makes prompts fast and takes room on the GPU that experts
could have, which makes answers slow: the workload says how much of which is wanted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..engine.protocol import Placement, RepackMode
from ..engine.rates import MARGIN, Tuning
from ..errors import DoesNotFit, gib
from ..gguf.model_meta import ModelMeta
from ..gguf.tensors import TensorInfo
from ..perf.cost_model import (
    Forecast,
    Speeds,
    Task,
    cost_model_of,
    forecast,
    offload_edge,
    touched_share,
    with_edge,
)
from ..perf.cpu_tuning import copies_within, repacked_ratio, step_ratio
from ..perf.figures import Figure
from .model_bytes import EXPERTS_IN_RAM, LAYERS_IN_RAM, RAM, aligned
from .plan import Plan
from .request import LoadMode, PlanRequest

Workload = Literal["run", "chat", "batch"]

UBATCHES = (512, 1024, 2048, 4096)
SHORT_UBATCHES = (128, 256)
"""For one short answer: a smaller compute buffer leaves room for another tensor of experts."""
SHORT_N_CTX = 2048
"""The least that a conversation can be had with."""
MANY, N_MEASURED = 16, 6
"""Beside a GPU each plan is measured, one or two for a request, a tenth of a second each: 56 took
9 s of a batch's start. Measured and drafted plans differ by some tensors at most."""
PIN_BYTES_PER_S = 25e9
"""At which pages of a mapped file are locked for a GPU (docs/notes/pinned-experts.md)."""
LOAD_BYTES_PER_S = 6e9
"""At which weights go from the page cache to a GPU while a model loads (same note)."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a workload typically asks of a loaded model; its time is what is made small.

    `loads` says how often a model is loaded for it.
    """

    name: Workload
    task: Task
    loads: float


JOBS: dict[Workload, Job] = {
    # a question and an answer, and the model is loaded for it alone
    "run": Job("run", Task(n_prompt=128, n_generated=256), loads=1.0),
    # a turn of conversation and one of programming, as people's are: 1,020 tokens in and 129 out,
    # 1,500 and 13 (medians of two services; Splitwise, arXiv 2311.18677, figure 3)
    "chat": Job("chat", Task(n_prompt=1020 + 1500, n_generated=129 + 13), loads=0.1),
    # as many tokens in as out; how many at once is the plan's
    "batch": Job("batch", Task(n_prompt=2048, n_generated=2048), loads=0.0),
}


def job_of(workload: Workload, n_prompt: int | None = None, n_generated: int | None = None) -> Job:
    """A workload's job; for a single answer, of the size that is known. Tokens."""
    job = JOBS[workload]
    if workload != "run":
        return job
    usual = job.task
    n_out = min(n_generated or usual.n_generated, usual.n_generated)
    task = replace(usual, n_prompt=n_prompt or usual.n_prompt, n_generated=n_out)
    return replace(job, task=task)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan with its forecast, and the seconds that the workload's job would take by it."""

    plan: Plan
    forecast: Forecast
    seconds: float


def search(
    requests: Iterable[PlanRequest],
    job: Job,
    meta: ModelMeta,
    gpus: Sequence[str],
    speeds: Speeds,
    planned: Callable[[PlanRequest], Plan],
) -> Plan:
    """The plan that does a job soonest, of those that requests leave open.

    `planned` plans a request. Raises DoesNotFit where none fits: what was said of the first.
    """
    refusals: list[DoesNotFit] = []
    found: list[Candidate] = []
    for request in requests:
        try:
            plans = list(plans_of(request, meta, planned))
        except DoesNotFit as error:
            refusals.append(error)
            continue
        for plan in plans:
            for variant in variants(plan, speeds.tuning, meta, job):
                found.append(candidate(variant, job, meta, gpus, speeds))
    if not found:
        raise refusals[0]
    best = min(found, key=lambda candidate: candidate.seconds)
    others = [other for other in found if other is not best]
    return replace(
        best.plan,
        forecast=best.forecast,
        reasons=(*best.plan.reasons, *reasons(best, others, job)),
        rejected=(*best.plan.rejected, *(sentence(c, job) for c in others)),
    )


def promising_requests(
    requests: Iterable[PlanRequest],
    job: Job,
    meta: ModelMeta,
    gpus: Sequence[str],
    speeds: Speeds,
    drafted: Callable[[PlanRequest], Plan],
) -> list[PlanRequest]:
    """Of many requests the few that are worth measuring: those that do a job soonest by a plan that
    measures nothing; what such a plan refuses comes last."""
    wanted = list(requests)
    if len(wanted) <= MANY:
        return wanted

    def seconds(request: PlanRequest) -> float:
        try:
            return candidate(drafted(request), job, meta, gpus, speeds).seconds
        except DoesNotFit:
            return math.inf

    return sorted(wanted, key=seconds)[:N_MEASURED]


def plans_of(
    request: PlanRequest, meta: ModelMeta, planned: Callable[[PlanRequest], Plan]
) -> Iterator[Plan]:
    """The plan of a request, and where a file's experts are of several sizes (most "_M" mixes) one
    that keeps the larger ones off RAM: the GPU needs room to copy the largest one there.

    Raises DoesNotFit for the first.
    """
    plan = planned(request)
    yield plan
    if plan.kind != EXPERTS_IN_RAM or request.n_cpu_moe is not None:
        return
    sizes = {aligned(t) for t in experts_of(meta)}
    limit = max((size for size in sizes if size < plan.left.copied_bytes), default=0)
    if limit and least_on_gpus(meta, limit) <= bytes_on_gpus(plan):
        with contextlib.suppress(DoesNotFit):
            other = planned(replace(request, largest_in_ram=limit))
            # with fewer layers on GPUs the others would be in RAM, the larger experts with them
            if other.kind == plan.kind and other.left.copied_bytes <= limit:
                yield other


def experts_of(meta: ModelMeta) -> Iterator[TensorInfo]:
    """Without those of layers for drafting, which aren't loaded."""
    return (t for t in meta.tensors if t.role == "experts" and (t.layer or 0) < meta.n_layers)


def least_on_gpus(meta: ModelMeta, largest_in_ram: int) -> int:
    """Bytes of the dense parts and of the experts that are larger than what may be in RAM."""
    dense = meta.weights_bytes - sum(
        t.n_bytes for t in meta.tensors if t.role in ("embedding", "experts")
    )
    return dense + sum(t.n_bytes for t in experts_of(meta) if aligned(t) > largest_in_ram)


def bytes_on_gpus(plan: Plan) -> int:
    """Bytes of weights on GPUs."""
    return sum(m.weights.n_bytes for m in plan.memory if m.device != RAM)


def variants(plan: Plan, tuning: Tuning | None, meta: ModelMeta, job: Job) -> Iterator[Plan]:
    """A plan, and one with repacked copies where these may help. For a conversation they are made
    between questions: a single answer's and a batch's time is reckoned with them from the start."""
    yield plan
    if tuning and (other := with_copies(plan, tuning, meta, in_idle=job.name == "chat")):
        yield other


def candidate(
    plan: Plan, job: Job, meta: ModelMeta, gpus: Sequence[str], speeds: Speeds
) -> Candidate:
    """Forecasts a plan and the time of its job."""
    setting = cost_model_of(plan.placement, meta, speeds.bandwidths, gpus, tuning=speeds.tuning)
    if plan.kind in (EXPERTS_IN_RAM, LAYERS_IN_RAM):
        setting = with_edge(setting, offload_edge(setting))
        plan = replace(plan, placement=setting.placement)
    task = replace(within(job.task, plan.placement.n_ctx), n_at_once=plan.placement.n_seq)
    expected = forecast(setting, speeds.records, task)
    loading = load_seconds(plan) + repack_seconds(plan, speeds.tuning)
    seconds = job.loads * loading + task_seconds(expected, task)
    return Candidate(plan, expected, seconds)


def reasons(best: Candidate, others: Sequence[Candidate], job: Job) -> Iterator[str]:
    """Why these values of what was left open."""
    if others:
        why = f"soonest done by forecast with {job.task.n_prompt} tokens in, as for {job.name}"
        yield f"{values(best.plan)}: {why}"


def sentence(candidate: Candidate, job: Job) -> str:
    """A candidate that wasn't taken, with its forecast."""
    expected = candidate.forecast
    return (
        f"{values(candidate.plan)}: {expected.prompt_tps:.0f} tok/s in and "
        f"{expected.generation_tps:.1f} out by forecast, {candidate.seconds:.1f} s for {job.name}"
    )


def values(plan: Plan) -> str:
    """What candidates differ in."""
    place = plan.placement
    parts = [f"{at_once(place)}micro-batch {place.n_ubatch}"]
    if place.n_gpu_layers:
        how = "pinned" if pinned_bytes(plan) else "mapped"
        parts.append(f"{gib(plan.memory[-1].weights.n_bytes)} in RAM {how}")
    if place.repack != "off":
        parts.append("repacked copies")
    if place.offload_min_batch:
        parts.append(f"copied to the GPU from {place.offload_min_batch} tokens on")
    return ", ".join(parts)


def at_once(place: Placement) -> str:
    """Says how many requests are answered at once, where there are several."""
    return f"{place.n_seq} requests at once, " if place.n_seq > 1 else ""


def pinned_bytes(plan: Plan) -> int:
    """Bytes of RAM that a plan pins."""
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
    """Seconds that a task takes by a forecast."""
    return task.n_prompt / expected.prompt_tps + task.n_generated / expected.generation_tps


def load_seconds(plan: Plan) -> float:
    """Seconds that loading takes."""
    return bytes_on_gpus(plan) / LOAD_BYTES_PER_S + pinned_bytes(plan) / PIN_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class FreeParameters:
    """What a person left open."""

    n_ubatch: bool = True
    load_mode: bool = True
    kv_type: bool = True


def requests_of(
    request: PlanRequest, has_gpu: bool, is_open: FreeParameters, workload: Workload = "chat"
) -> Iterator[PlanRequest]:
    """The candidates that a request leaves open, the plainest first."""
    some = UBATCHES + SHORT_UBATCHES if workload == "run" else UBATCHES
    ubatches = some if has_gpu and is_open.n_ubatch else (request.n_ubatch,)
    both: tuple[LoadMode, ...] = ("auto", "pinned")  # "mmap" would be a wish to map over all RAM
    modes = both if has_gpu and is_open.load_mode else (request.load_mode,)
    for n_ubatch in ubatches:
        for load_mode in modes:
            yield replace(request, n_ubatch=n_ubatch, load_mode=load_mode)


def fallbacks(request: PlanRequest, is_open: FreeParameters) -> Iterator[tuple[PlanRequest, str]]:
    """What is wanted, and what is made do with where that doesn't fit: with the reason to tell."""
    yield request, ""
    if is_open.kv_type and request.kv_type == "f16":
        less = replace(request, kv_type="q8_0")
        yield less, "KV cache q8_0: at f16 nothing fits"
        if request.n_ctx is None:
            why = "context of 2,048 tokens and KV cache q8_0: with more nothing fits"
            yield replace(less, n_ctx=SHORT_N_CTX), why


RESERVE_BYTES, RESERVE_SHARE = 1 << 30, 0.05
"""What copies leave of RAM: they can't be given back like the pages of a file."""


def with_copies(plan: Plan, tuning: Tuning, meta: ModelMeta, in_idle: bool = False) -> Plan | None:
    """A plan for the CPU with as many repacked copies as RAM has room for; None where there are
    none to be had, or they don't make this many sequences faster. `in_idle` they are made while
    nobody asks, rather than before an answer, where they take long.

    Several sequences generate with experts' copies alone: a dense matrix takes other sums from
    four rows on than below (gemm and gemv in ggml/src/ggml-cpu/repack.cpp), and an answer should
    not depend on how many others are generated beside it.
    """
    place, ram = plan.placement, plan.memory[-1]
    if place.n_gpu_layers or step_ratio(tuning, place.n_seq) > 1 / MARGIN:
        return None
    mode: RepackMode = "all" if place.n_seq == 1 else "experts"
    reserve = max(RESERVE_BYTES, int(RESERVE_SHARE * ram.budget_bytes))
    room = ram.budget_bytes - ram.total_bytes - reserve
    copies = copies_within(tuning.repackable, mode, room)
    if not copies.n_bytes:
        return None
    repacked = Figure(copies.n_bytes, "measured")
    touched = touched_share(meta, place.n_seq)
    faster = 1 / repacked_ratio(tuning, mode, copies.n_layers, place.n_seq, touched)
    why = f"generating with repacked copies, about {faster:.1f} times as fast by a timing here"
    return replace(
        plan,
        placement=replace(
            place, repack=mode, n_repacked_layers=copies.n_layers, repack_in_idle=in_idle
        ),
        memory=(*plan.memory[:-1], replace(ram, repacked=repacked)),
        reasons=(*plan.reasons, f"{gib(copies.n_bytes)} of RAM for {why}"),
    )


def repack_seconds(plan: Plan, tuning: Tuning | None) -> float:
    """How long making a plan's copies takes."""
    n_bytes = plan.memory[-1].repacked.n_bytes
    return n_bytes / tuning.repack_bytes_per_s if tuning and n_bytes else 0.0
