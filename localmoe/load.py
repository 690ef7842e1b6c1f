"""From a name and settings to a loaded model: the one place that wires the rooms together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import Settings, engine_environment
from .engine.client import Engine
from .engine.protocol import Placement, Sampling
from .models.catalog import ModelSpec
from .models.meta import ModelMeta
from .obtain import Finder, Found, Watch, check_runs
from .placement.plan import Plan
from .planning import plan_to_load
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


@dataclass(slots=True)
class LoadedModel:
    """A model in a running engine, with the plan that it was loaded by. Close it."""

    meta: ModelMeta
    plan: Plan
    model: Model
    engine: Engine
    load_s: float
    spec: ModelSpec | None = None

    def options(self, settings: Settings) -> AnswerOptions:
        return answer_options(self.meta, settings, self.spec)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_model(name: str, settings: Settings, watch: Watch | None = None) -> LoadedModel:
    """Find a model, fetch it where it isn't here, and load it by its plan. Raises LocalMoeError."""
    watch = watch or Watch()
    with Finder(settings, watch) as finder:
        found = finder.fetch(finder.find(name))
    return load_found(found, settings, watch)


def load_found(found: Found, settings: Settings, watch: Watch) -> LoadedModel:
    """Start an engine with a model that is here. Raises LocalMoeError."""
    meta = found.meta
    check_runs(meta)
    path = meta.paths[0]  # llama.cpp wants the first shard, whichever was named
    format = format_of(meta)
    engine = Engine(engine_environment(), watch.log)
    try:
        plan = plan_to_load(path, meta, settings, engine, watch.warning)
        if plan.placement.n_gpu_layers:
            engine.close()
            engine = Engine(engine_environment(), watch.log)
        loaded = engine.load(str(path), plan.placement, on_progress=watch.loading)
    except BaseException:
        engine.kill()
        raise
    model = Model(engine, format, loaded.n_ctx)
    return LoadedModel(meta, plan, model, engine, loaded.load_s, found.spec)


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
