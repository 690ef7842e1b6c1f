"""Plans for a machine that is here: wires hardware, what was measured, the fit and its engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from .config import Settings, engine_environment, state_folder
from .engine.client import Engine
from .engine.protocol import DeviceList, Request, Sampling
from .learning import Learned, SpeedLog
from .models.catalog import DEMO
from .models.meta import ModelMeta, read_meta
from .placement.crowd import Crowd
from .placement.fit import fit, overhead_bytes
from .placement.hardware import Machine, Sources, detect
from .placement.invented import machine_like
from .placement.measured import NOTHING_MEASURED, Measured, MeasuredStore, MeasurementKey
from .placement.plan import Plan, make_plan
from .placement.request import DEFAULT_UBATCH, PlanRequest
from .placement.search import Open, Speeds, Workload, requests_of, search

CALIBRATION_TOKENS = 512
SETBACK_BYTES, SETBACK_SHARE = 256 << 20, 0.02
"""What a plan leaves more after one that ran out of memory."""
MAX_PROVED = 64


def plan_request(settings: Settings) -> PlanRequest:
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

    Asks and measures in an engine process: its own, or one that is lent and has not been asked for
    anything yet. Where there is a GPU, that process then holds memory of it, and another one has to
    load the model. Close it, or use it as a context manager. `on_warning` is told what is wrong
    with this machine, such as a GPU that lies idle; `crowd` is what a batch will ask.
    """

    def __init__(
        self,
        settings: Settings,
        workload: Workload = "run",
        on_warning: Callable[[str], None] | None = None,
        engine: Engine | None = None,
        crowd: Crowd | None = None,
    ) -> None:
        self._request = plan_request(settings)
        self._crowd = crowd
        self._open = Open(settings.ubatch_size is None, settings.load_mode == "auto")
        self._workload: Workload = workload
        self._engine, self._owns_engine = engine or Engine(engine_environment()), engine is None
        self._devices: DeviceList | None = None
        try:
            self.here = self._look()
        except BaseException:
            self._engine.kill()
            raise
        warn(self.here, on_warning)
        self.machine = machine_like(self.here, self._request)
        self._store = MeasuredStore(state_folder() / "measured")
        self.learned = Learned(state_folder() / "measured", key_of(self.here, None))

    def plan(self, path: Path, meta: ModelMeta) -> Plan:
        """The plan of a model, of which the header is enough. Raises DoesNotFit.

        What isn't known yet of this machine and model is measured.
        """
        if self.machine != self.here:
            return self._searched(meta, self.machine, Speeds(), unmeasured_plan(self.machine, meta))
        return self._plan_here(path, meta, measure=True)

    def plan_to_load(self, path: Path, meta: ModelMeta) -> Plan:
        """The plan to load a model by, here and now. Raises DoesNotFit.

        Without a GPU to place anything on nothing is measured, so that the start is not held up.
        """
        return self._plan_here(path, meta, measure=self._may_use_gpus(self.here))

    def lost_bytes(self) -> int:
        """What other programs took of the GPUs since this planner looked at them."""
        now = {gpu.name: gpu.free_bytes for gpu in self._look().gpus}
        return max((gpu.free_bytes - now[gpu.name] for gpu in self.here.gpus), default=0)

    def set_back(self, meta: ModelMeta) -> None:
        """Remember that a plan of this model ran out of memory here: the next ones leave more."""
        key = key_of(self.here, meta)
        known = self._store.read(key)
        largest = max((gpu.total_bytes for gpu in self.here.gpus), default=0)
        more = max(SETBACK_BYTES, int(largest * SETBACK_SHARE))
        self._store.write(key, replace(known, setback_bytes=known.setback_bytes + more))

    def is_proved(self, meta: ModelMeta, plan: Plan) -> bool:
        """Whether this very plan ran on this machine before."""
        return plan_name(plan) in self._store.read(key_of(self.here, meta)).proved

    def prove(self, meta: ModelMeta, plan: Plan) -> None:
        """Remember that a plan was loaded and used here."""
        key = key_of(self.here, meta)
        known = self._store.read(key)
        proved = (*known.proved, plan_name(plan))[-MAX_PROVED:]
        self._store.write(key, replace(known, proved=proved))

    def speed_log(self, meta: ModelMeta, plan: Plan) -> SpeedLog:
        return self.learned.log(meta, plan.placement, gpu_names(self.here))

    def close(self) -> None:
        if self._owns_engine:
            self._engine.close()

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _may_use_gpus(self, machine: Machine) -> bool:
        return bool(machine.gpus) and self._request.n_gpu_layers != 0

    def _plan_here(self, path: Path, meta: ModelMeta, measure: bool) -> Plan:
        planned = self._measured_plan(path, meta) if measure else unmeasured_plan(self.here, meta)
        n_threads = self._request.n_threads or self.here.n_cores
        speeds = self.learned.speeds(meta, n_threads, self._engine if measure else None)
        return self._searched(meta, self.here, speeds, planned)

    def _look(self) -> Machine:
        """The machine now. The engine is asked the first time, and after the drivers: from then on
        it holds memory of every GPU."""
        return detect(self._asked_devices, Sources(env=engine_environment()))

    def _asked_devices(self) -> DeviceList:
        if self._devices is None:
            self._devices = self._engine.devices()
        return self._devices

    def _searched(
        self,
        meta: ModelMeta,
        machine: Machine,
        speeds: Speeds,
        planned: Callable[[PlanRequest], Plan],
    ) -> Plan:
        wanted = self._crowd.requests(self._request) if self._crowd else [self._request]
        requests = (
            r for w in wanted for r in requests_of(w, self._may_use_gpus(machine), self._open)
        )
        return search(requests, self._workload, meta, gpu_names(machine), speeds, planned)

    def _measured_plan(self, path: Path, meta: ModelMeta) -> Callable[[PlanRequest], Plan]:
        """Plans by what was measured here before, and measured now where that says nothing."""
        overhead = measured_overhead(self.here, self._store, self._engine).overhead_bytes
        key = key_of(self.here, meta)
        stored = self._store.read(key)
        left = {name: n_bytes + stored.setback_bytes for name, n_bytes in overhead.items()}
        known = replace(stored, overhead_bytes=left)

        def planned(request: PlanRequest) -> Plan:
            nonlocal known
            probe = partial(self._engine.probe, str(path))
            fitted = fit(self.here, meta, known, request, probe)
            if fitted.n_probes:
                known = fitted.measured
                self._store.write(key, replace(known, overhead_bytes={}))
            return fitted.plan

        return planned


def unmeasured_plan(machine: Machine, meta: ModelMeta) -> Callable[[PlanRequest], Plan]:
    """Plans by formula: for a machine that isn't here, or where there is nothing to measure."""
    return lambda request: make_plan(machine, meta, NOTHING_MEASURED, request)


def gpu_names(machine: Machine) -> tuple[str, ...]:
    return tuple(gpu.name for gpu in machine.gpus)


def plan_name(plan: Plan) -> str:
    """The same for plans that place everything alike."""
    return hashlib.sha256(repr(plan.placement).encode()).hexdigest()[:16]


def warn(machine: Machine, on_warning: Callable[[str], None] | None) -> None:
    """Tell what is wrong with a machine, in sentences with the command that mends it."""
    for finding in machine.findings:
        if on_warning and finding.severity in ("warning", "error"):
            command = "" if finding.command in finding.how_to_mend else f" {finding.command}"
            on_warning(f"{finding.what} {finding.how_to_mend}{command}")


def measured_overhead(machine: Machine, store: MeasuredStore, prober: Engine) -> Measured:
    """What this machine's GPUs lose to contexts and libraries; measured once, on the demo model.

    The demo model runs on the GPUs for a moment, and the driver says how much more than its
    weights, cache and buffers is gone. `machine` was looked at with nothing of ours running.
    """
    key = key_of(machine, None)
    known = store.read(key)
    if all(gpu.name in known.overhead_bytes or gpu.free_from != "driver" for gpu in machine.gpus):
        return known
    meta = read_meta(DEMO)
    request = PlanRequest(n_gpu_layers="all", n_ctx=2 * CALIBRATION_TOKENS)
    plan = fit(machine, meta, known, request, lambda place: prober.probe(str(DEMO), place)).plan
    during = machine_while_running(DEMO, plan, prober)
    for device, n_bytes in overhead_bytes(machine, during, plan).items():
        known = known.with_overhead(device, n_bytes)
    store.write(key, known)
    return known


def machine_while_running(path: Path, plan: Plan, engine: Engine) -> Machine:
    """The machine with a plan loaded and used for a whole micro-batch and some tokens."""
    engine.load(str(path), plan.placement)
    prompt = tuple(range(300, 300 + CALIBRATION_TOKENS))
    for _ in engine.generate(Request(prompt, Sampling(temperature=0), max_tokens=4)):
        pass
    return detect(engine.devices, Sources(env=engine_environment()))


def key_of(machine: Machine, meta: ModelMeta | None) -> MeasurementKey:
    """What measurements hold for: a machine, a build, and a model where one is concerned."""
    gpus = [f"{g.name} {g.description} {g.total_bytes} {g.driver_version}" for g in machine.gpus]
    build = f"{machine.build.version} {sorted(machine.build.backends)}"
    model = ""
    if meta is not None:
        shape = (meta.architecture, meta.file_bytes, len(meta.tensors), meta.weights_bytes)
        model = f"{meta.name} {shape}"
    return MeasurementKey(f"{gpus} {machine.n_cores}", build, model)
