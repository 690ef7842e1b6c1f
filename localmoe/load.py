"""From a name and settings to a loaded model: the one place that wires the rooms together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .config import Settings, engine_environment
from .engine.client import Engine
from .engine.protocol import Placement, Sampling
from .errors import ModelFileError
from .models.catalog import resolve
from .models.meta import ModelMeta, read_meta
from .placement.hardware import GPU_KINDS, Gpu, this_machine
from .placement.measured import NOTHING_MEASURED
from .placement.plan import Plan, PlanRequest, make_plan
from .serving.chat import AnswerOptions, Model
from .serving.prompt import PromptFormat, prompt_format


@dataclass(slots=True)
class LoadedModel:
    """A model in a running engine, with the plan that it was loaded by. Close it."""

    meta: ModelMeta
    plan: Plan
    model: Model
    engine: Engine
    load_s: float

    def options(self, settings: Settings) -> AnswerOptions:
        return answer_options(self.meta, settings)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_model(
    name: str,
    settings: Settings,
    on_progress: Callable[[float], None] | None = None,
    on_log: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Start an engine and load a model by its plan. Raises LocalMoeError.

    `on_progress` is given 0 to 1 while the model loads, `on_log` llama.cpp's log lines.
    """
    path = resolve(name)
    meta = readable_meta(path)
    format = format_of(meta)
    engine = Engine(engine_environment(), on_log)
    try:
        plan = plan_here(meta, settings, engine)
        loaded = engine.load(str(path), plan.placement, on_progress=on_progress)
    except BaseException:
        engine.kill()
        raise
    return LoadedModel(meta, plan, Model(engine, format, loaded.n_ctx), engine, loaded.load_s)


def plan_here(meta: ModelMeta, settings: Settings, engine: Engine) -> Plan:
    """A plan for this machine, with the devices that the engine sees."""
    gpus = [
        Gpu(device.name, device.description, device.total_bytes, device.free_bytes)
        for device in engine.devices().devices
        if device.kind in GPU_KINDS
    ]
    return make_plan(this_machine(gpus), meta, NOTHING_MEASURED, plan_request(settings))


def open_vocabulary(path: Path) -> Engine:
    """An engine with a model's vocabulary alone: enough to encode, at once and small."""
    engine = Engine(engine_environment())
    try:
        engine.load(str(path), Placement(n_threads=1), vocab_only=True)
        return engine
    except BaseException:
        engine.kill()
        raise


def readable_meta(path: Path) -> ModelMeta:
    """The metadata of a file that can be run. Raises ModelFileError on an early layout."""
    meta = read_meta(path)
    if meta.legacy_split_experts:
        raise ModelFileError(
            f"{path.name} has one tensor per expert, a layout of early 2024 that llama.cpp no "
            "longer reads.",
            "Fetch a newer file of this model.",
        )
    return meta


def format_of(meta: ModelMeta) -> PromptFormat:
    """The prompt format of a model."""
    raise NotImplementedError


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


def answer_options(meta: ModelMeta, settings: Settings) -> AnswerOptions:
    """How to answer: what the person set, else what the model's header says, else our defaults."""
    fields = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
    said = {name: getattr(settings, name) for name in fields}
    header = {name: getattr(meta.sampling, name) for name in fields}
    chosen = {
        name: said[name] if said[name] is not None else header[name]
        for name in fields
        if said[name] is not None or header[name] is not None
    }
    sampling = replace(
        Sampling(**chosen),
        seed=settings.seed,
        json_schema=settings.json_schema,
        grammar=settings.grammar,
    )
    return AnswerOptions(sampling, settings.max_tokens, settings.stop)
