"""Plans for a machine that is here: wires hardware, what was measured, the fit and its engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..config.environment import engine_environment, state_folder
from ..config.settings import Settings
from ..engine.client import EngineProcess
from ..engine.protocol import Request, Sampling
from ..engine.rates import Tuning
from ..errors import DoesNotFit, EngineError, UsageError
from ..gguf.demo import DEMO
from ..gguf.model_meta import ModelMeta, read_meta
from ..hardware.detect import detect
from ..hardware.machine import Machine
from ..hardware.system import SystemAccess
from ..perf.calibration import Calibration, SpeedLog
from ..perf.cost_model import Speeds
from ..perf.cpu_tuning import (
    LIMIT_S,
    UNTUNED,
    TuningRecord,
    best_threads,
    best_ubatch,
    threads_to_try,
)
from ..perf.figures import NOTHING_MEASURED, Measured
from ..perf.store import MeasurementKey, MeasurementStore, key_of
from .buffers import can_hold_cache
from .fit import fit, overhead_bytes
from .measuring import MeasuringEngine
from .plan import Plan, make_plan
from .request import DEFAULT_UBATCH, BatchShape, PlanRequest, machine_like
from .search import (
    FreeParameters,
    Workload,
    fallbacks,
    job_of,
    promising_requests,
    requests_of,
    search,
)

CALIBRATION_TOKENS = 512
RESERVE_BYTES, RESERVE_SHARE = 256 << 20, 0.02
"""What a plan leaves more after one that ran out of memory."""
MAX_VERIFIED = 64
WORTH_TUNING_BYTES = 64 << 20
"""A smaller model answers sooner than it could be timed."""
TUNING_BYTES = 1 << 30
"""What timing a model may take of RAM beside its plan: some layers' copies, a small context."""


def plan_request(settings: Settings) -> PlanRequest:
    """Returns what settings ask of a plan."""
    return PlanRequest(
        n_ctx=settings.ctx_size,
        n_seq=settings.parallel,
        n_gpu_layers=settings.n_gpu_layers,
        n_cpu_moe=settings.n_cpu_moe,
        kv_type=settings.kv_type,
        n_ubatch=settings.ubatch_size or DEFAULT_UBATCH,
        n_threads=settings.threads,
        load_mode=settings.load_mode,
        vram_bytes=settings.vram,
        ram_bytes=settings.ram,
    )


class Planner:
    """Plans of models for a workload, on this machine or one with the memory that was asked for.

    Measures in the engine that it is given, which its caller closes, or in one of its own: close
    the planner then, or use it as a context manager. `batch_shape` is what a batch will ask,
    `n_prompt` how many tokens a single prompt has.
    """

    def __init__(
        self,
        settings: Settings,
        workload: Workload = "run",
        measuring: MeasuringEngine | None = None,
        batch_shape: BatchShape | None = None,
        n_prompt: int | None = None,
    ) -> None:
        self._request = plan_request(settings)
        self._may_tune = settings.tune
        self._batch_shape = batch_shape
        self._job = job_of(workload, n_prompt, settings.max_tokens)
        self._open = FreeParameters(
            n_ubatch=settings.ubatch_size is None,
            load_mode=settings.load_mode == "auto",
            kv_type="kv_type" not in settings.model_fields_set,
        )
        self._owns_engine = measuring is None
        self._measuring = measuring or MeasuringEngine()
        self._engine = self._measuring.process
        self.here = self._measuring.machine
        self.machine = machine_like(self.here, self._request)
        self._store = MeasurementStore(state_folder() / "measured")
        self.learned = Calibration(self._store, key_of(self.here, None))

    def plan(self, path: Path, meta: ModelMeta) -> Plan:
        """The plan of a model, of which the header is enough. Raises DoesNotFit.

        What isn't known yet of this machine and model is measured.
        """
        if self.machine != self.here:
            return self._searched(meta, self.machine, Speeds(), unmeasured_plan(self.machine, meta))
        return self._plan_here(path, meta, measure=True)

    def plan_to_load(
        self,
        path: Path,
        meta: ModelMeta,
        *,
        tune: bool = True,
        on_note: Callable[[str], None] | None = None,
    ) -> Plan:
        """The plan to load a model by, here and now. Raises DoesNotFit.

        Without a GPU to place anything on, the model itself is timed on the CPU, once, which takes
        seconds: `on_note` is told before. Not with `tune` False, as where only its header is here.
        """
        if self._may_use_gpus(self.here):
            return self._plan_here(path, meta, measure=True)
        plan = self._plan_here(path, meta, measure=False)
        ram = plan.memory[-1]
        has_room = ram.budget_bytes - ram.total_bytes >= TUNING_BYTES
        if not (tune and has_room and self._is_to_be_tuned(meta)):
            return plan
        if on_note:
            on_note("Timing this model on the CPU, once (--no-tune leaves that out).")
        self._tune(path, meta)
        return self._plan_here(path, meta, measure=False)

    def _is_to_be_tuned(self, meta: ModelMeta) -> bool:
        if not self._may_tune or meta.weights_bytes < WORTH_TUNING_BYTES:
            return False
        known = self._store.timing(self._tuning_key(meta))
        return known is None or not known.is_final

    def lost_bytes(self) -> int:
        """What other programs took of the GPUs since this planner looked at them."""
        now = {gpu.name: gpu.free_bytes for gpu in self._measuring.look_again().gpus}
        # of one that went away, all is lost
        lost = (gpu.free_bytes - now.get(gpu.name, 0) for gpu in self.here.gpus)
        return max(lost, default=0)

    def reserve_more(self, meta: ModelMeta) -> None:
        """Remembers that a plan of this model ran out of memory: the next ones leave more."""
        largest = max((gpu.total_bytes for gpu in self.here.gpus), default=0)
        more = max(RESERVE_BYTES, int(largest * RESERVE_SHARE))
        self._store.update_buffers(
            key_of(self.here, meta),
            lambda known: replace(known, reserve_bytes=known.reserve_bytes + more),
        )

    def is_verified(self, meta: ModelMeta, plan: Plan) -> bool:
        """Whether this very plan ran on this machine before."""
        return plan_name(plan) in self._store.buffers(key_of(self.here, meta)).verified_plans

    def mark_verified(self, meta: ModelMeta, plan: Plan) -> None:
        """Remembers that a plan was loaded and used here."""

        def with_plan(known: Measured) -> Measured:
            names = (*known.verified_plans, plan_name(plan))
            return replace(known, verified_plans=names[-MAX_VERIFIED:])

        self._store.update_buffers(key_of(self.here, meta), with_plan)

    def speed_log(self, meta: ModelMeta, plan: Plan) -> SpeedLog:
        """Returns where the speeds of a loaded model are kept."""
        tuning = self._tuning(meta)
        return self.learned.log(meta, plan.placement, gpu_names(self.here), tuning)

    def close(self) -> None:
        """Ends the engine, if it is the planner's own."""
        if self._owns_engine:
            self._measuring.close()

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _may_use_gpus(self, machine: Machine) -> bool:
        return bool(machine.gpus) and self._request.n_gpu_layers != 0

    def _tune(self, path: Path, meta: ModelMeta) -> None:
        """Time a model, in a process that may die of it."""
        key = self._tuning_key(meta)
        known = self._store.timing(key)
        wanted = self._request.n_threads
        n_threads = (wanted,) if wanted else threads_to_try(self.here.n_cores)
        try:
            with EngineProcess(engine_environment()) as engine:
                tuning = engine.tune(str(path), n_threads, LIMIT_S)
        except EngineError:
            tuning = UNTUNED
        self._store.write_timing(key, known.or_better(tuning) if known else TuningRecord(tuning))

    def _plan_here(self, path: Path, meta: ModelMeta, measure: bool) -> Plan:
        planned = self._measured_plan(path, meta) if measure else unmeasured_plan(self.here, meta)
        n_threads = self._request.n_threads or self.here.n_cores
        speeds = self.learned.speeds(meta, n_threads, self._engine if measure else None)
        if not self._may_use_gpus(self.here):
            speeds = replace(speeds, tuning=self._tuning(meta))
        return self._searched(meta, self.here, speeds, planned)

    def _tuning_key(self, meta: ModelMeta) -> MeasurementKey:
        """With a number of threads that a person fixed, nothing is learned for others."""
        key, wanted = key_of(self.here, meta), self._request.n_threads
        return replace(key, model=f"{key.model} -t {wanted}") if wanted else key

    def _tuning(self, meta: ModelMeta) -> Tuning | None:
        """What the model was timed with, if it was and that is wanted."""
        found = self._store.timing(self._tuning_key(meta)) if self._may_tune else None
        return found.tuning if found and found.tuning.times else None

    def _searched(
        self,
        meta: ModelMeta,
        machine: Machine,
        speeds: Speeds,
        planned: Callable[[PlanRequest], Plan],
    ) -> Plan:
        has_gpu = self._may_use_gpus(machine)
        request = tuned(
            self._request, speeds.tuning, self._open.n_ubatch and self._batch_shape is None
        )
        request = replace(request, batch_invariant=request.n_seq > 1 and not has_gpu)
        refusals: list[DoesNotFit] = []
        if not can_hold_cache(meta, request.kv_type):
            heads = f"heads of {meta.head_dim_k} values"
            raise UsageError(
                f"A KV cache of {request.kv_type} can't hold this model's {heads}.",
                "Leave -ctk out, or take f16.",
            )
        is_open = replace(self._open, kv_type=self._open.kv_type and can_hold_cache(meta, "q8_0"))
        for wish, why in fallbacks(request, is_open):
            wanted = self._batch_shape.requests(wish, has_gpu) if self._batch_shape else [wish]
            requests: Iterable[PlanRequest] = (
                r for w in wanted for r in requests_of(w, has_gpu, self._open, self._job.name)
            )
            asked = self._job, meta, gpu_names(machine), speeds
            if has_gpu:
                requests = promising_requests(requests, *asked, unmeasured_plan(machine, meta))
            try:
                plan = search(requests, *asked, planned)
            except DoesNotFit as error:
                refusals.append(error)
            else:
                return replace(plan, reasons=(*plan.reasons, why)) if why else plan
        raise refusals[0]

    def _measured_plan(self, path: Path, meta: ModelMeta) -> Callable[[PlanRequest], Plan]:
        """Plans by what was measured here before, and measured now where that says nothing."""
        overhead = measured_overhead(self.here, self._store, self._engine).overhead_bytes
        key = key_of(self.here, meta)
        stored = self._store.buffers(key)
        left = {name: n_bytes + stored.reserve_bytes for name, n_bytes in overhead.items()}
        known = replace(stored, overhead_bytes=left)

        def planned(request: PlanRequest) -> Plan:
            nonlocal known
            probe = partial(self._engine.probe, str(path))
            fitted = fit(self.here, meta, known, request, probe)
            if fitted.n_probes:
                known = fitted.measured
                points = fitted.measured.compute
                self._store.update_buffers(key, lambda now: now.with_points(points))
            return fitted.plan

        return planned


def tuned(request: PlanRequest, tuning: Tuning | None, is_ubatch_open: bool) -> PlanRequest:
    """A request with threads and micro-batch as a model's own timing says, where they are open.

    A larger micro-batch is not for several sequences: their answers would depend on each other
    from half the context on (planner/model_bytes.py).
    """
    if tuning is None:
        return request
    n_threads = request.n_threads or best_threads(tuning)
    is_open = is_ubatch_open and request.n_seq == 1
    n_ubatch = best_ubatch(tuning, request.n_ubatch) if is_open else request.n_ubatch
    return replace(request, n_threads=n_threads, n_ubatch=n_ubatch)


def unmeasured_plan(machine: Machine, meta: ModelMeta) -> Callable[[PlanRequest], Plan]:
    """Plans by formula: for a machine that isn't here, or where there is nothing to measure."""
    return lambda request: make_plan(machine, meta, NOTHING_MEASURED, request)


def gpu_names(machine: Machine) -> tuple[str, ...]:
    """Returns the names of a machine's GPUs."""
    return tuple(gpu.name for gpu in machine.gpus)


def plan_name(plan: Plan) -> str:
    """The same for plans that place everything alike."""
    return hashlib.sha256(repr(plan.placement).encode()).hexdigest()[:16]


def measured_overhead(machine: Machine, store: MeasurementStore, prober: EngineProcess) -> Measured:
    """What this machine's GPUs lose to contexts and libraries; measured once, on the demo model.

    The demo model runs on the GPUs for a moment, and the driver says how much more than its
    weights, cache and buffers is gone. `machine` was looked at with nothing of ours running.
    """
    key = key_of(machine, None)
    known = store.buffers(key)
    if all(gpu.name in known.overhead_bytes or gpu.free_from != "driver" for gpu in machine.gpus):
        return known
    meta = read_meta(DEMO)
    request = PlanRequest(n_gpu_layers="all", n_ctx=2 * CALIBRATION_TOKENS)
    plan = fit(machine, meta, known, request, lambda place: prober.probe(str(DEMO), place)).plan
    during = machine_while_running(DEMO, plan, prober)
    lost = overhead_bytes(machine, during, plan)
    return store.update_buffers(
        key, lambda now: replace(now, overhead_bytes={**now.overhead_bytes, **lost})
    )


def machine_while_running(path: Path, plan: Plan, engine: EngineProcess) -> Machine:
    """The machine with a plan loaded and used for a whole micro-batch and some tokens."""
    engine.load(str(path), plan.placement)
    prompt = tuple(range(300, 300 + CALIBRATION_TOKENS))
    for _ in engine.generate(Request(prompt, Sampling(temperature=0), max_tokens=4)):
        pass
    return detect(engine.devices, SystemAccess(env=engine_environment()))
