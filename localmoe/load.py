"""From a name and settings to a loaded model: the one place that wires the rooms together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import Settings, engine_environment
from .engine.client import Engine
from .engine.protocol import Loaded, Placement, Request, Sampling
from .errors import EngineError, gib
from .learning import SpeedLog
from .models.catalog import ModelSpec
from .models.meta import ModelMeta, read_meta
from .models.names import ModelName
from .obtain import Finder, Found, Watch, check_runs
from .placement.crowd import Crowd
from .placement.pinned import pinned_spans
from .placement.plan import Plan
from .placement.search import Workload
from .planning import Planner
from .serving.chat import AnswerOptions, Model
from .serving.prompt import PromptFormat, TemplateFacts, prompt_format

# general.sampling.* of a header (llama.cpp, src/llama-arch.cpp) as fields of Sampling
HEADER_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
}


OUT_OF_MEMORY = (
    "out of memory", "failed to allocate", "unable to allocate", "cudamalloc", "was killed",
    "could not make a context",
)  # fmt: skip
"""How llama.cpp, its backends and the end of its process say that memory ran out."""
TAKEN_BYTES = 64 << 20
"""Less than this comes and goes with a desktop's windows."""


class OutOfMemory(EngineError):
    """A plan didn't fit after all."""


@dataclass(slots=True)
class LoadedModel:
    """A model in a running engine, with the plan that it was loaded by. Close it."""

    meta: ModelMeta
    plan: Plan
    model: Model
    engine: Engine
    loaded: Loaded
    speed_log: SpeedLog
    spec: ModelSpec | None = None

    @property
    def load_s(self) -> float:
        """Seconds that loading took, in the engine."""
        return self.loaded.load_s

    def options(self, settings: Settings) -> AnswerOptions:
        return answer_options(self.meta, settings, self.spec)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_model(
    name: str, settings: Settings, watch: Watch | None = None, workload: Workload = "chat"
) -> LoadedModel:
    """Find a model, fetch it where it isn't here, and load it by its plan. Raises LocalMoeError."""
    watch = watch or Watch()
    with Finder(settings, watch) as finder:
        found = finder.fetch(finder.find(name))
    return load_found(found, settings, watch, workload)


def load_local(
    path: Path, settings: Settings, watch: Watch | None = None, workload: Workload = "chat"
) -> LoadedModel:
    """Load a file. Raises LocalMoeError."""
    found = Found(ModelName(str(path), path=path), path, read_meta(path))
    return load_found(found, settings, watch or Watch(), workload)


def load_found(
    found: Found,
    settings: Settings,
    watch: Watch,
    workload: Workload = "chat",
    crowd: Crowd | None = None,
) -> LoadedModel:
    """Start an engine with a model that is here. Raises LocalMoeError.

    A plan that runs out of a GPU's memory is followed, once, by one that leaves more of it empty.
    """
    check_runs(found.meta)
    try:
        return load_once(found, settings, watch, workload, crowd)
    except OutOfMemory as error:
        if watch.warning:
            watch.warning(f"{error.message} Trying again with less on the GPU.")
        return load_once(found, settings, watch, workload, crowd)


def load_once(
    found: Found, settings: Settings, watch: Watch, workload: Workload, crowd: Crowd | None
) -> LoadedModel:
    """Plan and load. Raises OutOfMemory where a GPU had too little; the next plan knows it."""
    meta = found.meta
    path = meta.paths[0]  # llama.cpp wants the first shard, whichever was named
    format = format_of(meta)
    engine = Engine(engine_environment(), watch.log)
    try:
        planner = Planner(settings, workload, watch.warning, engine, crowd)
        plan = planner.plan_to_load(path, meta)
        if plan.placement.n_gpu_layers:
            engine.close()
            check_nothing_was_taken(planner)
            engine = Engine(engine_environment(), watch.log)
        loaded = start(engine, planner, meta, plan, watch)
    except BaseException:
        engine.kill()
        raise
    log = planner.speed_log(meta, plan)
    model = Model(engine, format, loaded.n_ctx, log.add)
    return LoadedModel(meta, plan, model, engine, loaded, log, found.spec)


def check_nothing_was_taken(planner: Planner) -> None:
    """Raises OutOfMemory where another program took memory of a GPU since it was planned."""
    lost = planner.lost_bytes()
    if lost > TAKEN_BYTES:
        raise OutOfMemory(f"Another program took {gib(lost)} of the GPU meanwhile.")


def start(engine: Engine, planner: Planner, meta: ModelMeta, plan: Plan, watch: Watch) -> Loaded:
    """Load by a plan; on a GPU, the first time, use it once as hard as it will ever be used."""
    place, spans = plan.placement, pinned_spans(meta, plan.placement)
    path = str(meta.paths[0])
    try:
        loaded = engine.load(path, place, pinned=spans, on_progress=watch.loading)
        if place.n_gpu_layers and not planner.is_proved(meta, plan):
            try_out(engine, meta, place)
            planner.prove(meta, plan)
    except EngineError as error:
        if not (place.n_gpu_layers and says_out_of_memory(error, engine.log)):
            raise
        planner.set_back(meta)
        raise OutOfMemory(f"The GPU ran out of memory: {error.message}") from None
    return loaded


def try_out(engine: Engine, meta: ModelMeta, place: Placement) -> None:
    """A whole micro-batch of random tokens, which meets every expert."""
    n_tokens = min(place.n_ubatch, place.n_ctx - 2)
    tokens = random.Random(0).choices(range(meta.tokenizer.n_vocab), k=n_tokens)
    for _ in engine.generate(Request(tuple(tokens), Sampling(temperature=0), max_tokens=1)):
        pass


def says_out_of_memory(error: EngineError, log: Sequence[str]) -> bool:
    text = "\n".join((error.message, *log)).lower()
    return any(sign in text for sign in OUT_OF_MEMORY)


def open_vocabulary(path: Path) -> Engine:
    """An engine with a model's vocabulary alone: enough to encode, at once and small."""
    engine = Engine(engine_environment())
    try:
        engine.load(str(path), Placement(n_threads=1), vocab_only=True)
        return engine
    except BaseException:
        engine.kill()
        raise


def format_of(meta: ModelMeta) -> PromptFormat:
    """The prompt format of a model."""
    words = meta.tokenizer
    facts = TemplateFacts(
        architecture=meta.architecture,
        tokenizer_model=words.model,
        name=f"{meta.name} {title(meta)}",
        chat_template=meta.chat_template or None,
        bos=words.bos_id,
        eos=words.eos_id,
        bos_text=words.bos_text,
        eos_text=words.eos_text,
        add_bos=words.model == "llama" if words.add_bos is None else words.add_bos,
        add_space_prefix=words.add_space_prefix,
        control_tokens=frozenset(words.control_tokens),
        user_tokens=frozenset(words.user_tokens),
    )
    return prompt_format(facts, env=engine_environment())


def title(meta: ModelMeta) -> str:
    """What to call a model: its own name, or that of its file."""
    return meta.name or (meta.paths[0].stem if meta.paths else "the model")


def answer_options(
    meta: ModelMeta, settings: Settings, spec: ModelSpec | None = None
) -> AnswerOptions:
    """How to answer: what the person set, else what the model's header says, else the catalog,
    else our defaults."""
    fields = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
    said = {name: getattr(settings, name) for name in fields}
    chosen: dict[str, Any] = spec.sampling.model_dump(exclude_none=True) if spec else {}
    chosen |= {
        name: meta.sampling[key] for key, name in HEADER_SAMPLING.items() if key in meta.sampling
    }
    chosen.update({name: value for name, value in said.items() if value is not None})
    sampling = replace(
        Sampling(**chosen),
        seed=settings.seed,
        json_schema=settings.json_schema,
        grammar=settings.grammar,
    )
    return AnswerOptions(sampling, settings.max_tokens, settings.stop)
