"""Plans for a machine that is here: wires hardware, what was measured, the fit and its engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .config import Settings, engine_environment, state_folder
from .engine.client import Engine
from .engine.protocol import Request, Sampling
from .models.catalog import DEMO
from .models.meta import ModelMeta, read_meta
from .placement.fit import fit, overhead_bytes
from .placement.hardware import Machine, Sources, detect
from .placement.invented import machine_like
from .placement.measured import NOTHING_MEASURED, Measured, MeasuredStore, MeasurementKey
from .placement.plan import Plan, make_plan
from .placement.request import PlanRequest

CALIBRATION_TOKENS = 512


def plan_request(settings: Settings) -> PlanRequest:
    return PlanRequest(
        n_ctx=settings.ctx_size,
        n_gpu_layers=settings.n_gpu_layers,
        n_cpu_moe=settings.n_cpu_moe,
        kv_type=settings.kv_type,
        n_ubatch=settings.ubatch_size,
        n_threads=settings.threads,
        load_mode=settings.load_mode,
        vram_bytes=settings.vram,
        ram_bytes=settings.ram,
    )


def plan_to_load(
    path: Path,
    meta: ModelMeta,
    settings: Settings,
    engine: Engine,
    on_warning: Callable[[str], None] | None = None,
) -> Plan:
    """The plan to load a model by. Raises DoesNotFit.

    `on_warning` is told what is wrong with this machine, such as a GPU that lies idle.
    `engine` must not have been asked for anything yet. Where there is a GPU, the placement is
    measured in it; then it holds memory of the device, and another one has to load the model.
    """
    env = engine_environment()
    machine = detect(engine.devices, Sources(env=env))
    warn(machine, on_warning)
    request = plan_request(settings)
    if not machine.gpus or request.n_gpu_layers == 0:
        return make_plan(machine, meta, NOTHING_MEASURED, request)
    return fit_here(path, meta, machine, request, engine)


def warn(machine: Machine, on_warning: Callable[[str], None] | None) -> None:
    """Tell what is wrong with a machine, in sentences with the command that mends it."""
    for finding in machine.findings:
        if on_warning and finding.severity in ("warning", "error"):
            command = "" if finding.command in finding.how_to_mend else f" {finding.command}"
            on_warning(f"{finding.what} {finding.how_to_mend}{command}")


class Planner:
    """Plans of models for this machine, or for one with the memory that was asked for.

    Keeps an engine process to ask and measure with; close it, or use it as a context manager.
    """

    def __init__(self, settings: Settings, on_warning: Callable[[str], None] | None = None) -> None:
        env = engine_environment()
        self._request = plan_request(settings)
        self._engine = Engine(env)
        try:
            self._here = detect(self._engine.devices, Sources(env=env))
            warn(self._here, on_warning)
            self.machine = machine_like(self._here, self._request)
        except BaseException:
            self._engine.kill()
            raise

    def plan(self, path: Path, meta: ModelMeta) -> Plan:
        """The plan of a model, of which the header is enough. Raises DoesNotFit."""
        if self.machine != self._here:
            return make_plan(self.machine, meta, NOTHING_MEASURED, self._request)
        return fit_here(path, meta, self.machine, self._request, self._engine)

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fit_here(
    path: Path, meta: ModelMeta, machine: Machine, request: PlanRequest, prober: Engine
) -> Plan:
    """The plan by what was measured here before, and measured now where that says nothing."""
    store = MeasuredStore(state_folder() / "measured")
    overhead = measured_overhead(machine, store, prober)
    key = key_of(machine, meta)
    known = replace(store.read(key), overhead_bytes=overhead.overhead_bytes)
    fitted = fit(machine, meta, known, request, lambda place: prober.probe(str(path), place))
    if fitted.n_probes:
        store.write(key, fitted.measured)
    return fitted.plan


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
