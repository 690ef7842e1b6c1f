"""Loads a model by its name and settings, and loads it again after its engine died.

This is the one place that wires catalog, planner, engine and prompt together. Where memory was the
reason for an engine's end, the next plan takes less.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .callbacks import LoadCallbacks
from .catalog.catalog import ModelSpec
from .catalog.model_name import ModelName
from .catalog.resolve import ModelResolver, ResolvedModel, check_runs
from .chat.chat import AnswerOptions, ChatModel
from .config.environment import engine_environment
from .config.settings import Settings
from .engine.client import EngineProcess, check_path
from .engine.protocol import Loaded, Placement, Request, Sampling
from .errors import EngineError, gib
from .gguf.model_meta import ModelMeta, read_meta
from .hardware.cpu import groups
from .hardware.system import SystemAccess, read_text
from .perf.calibration import SpeedLog
from .planner.measuring import MeasuringEngine
from .planner.plan import SMALLEST_N_CTX, Memory, Plan, pinned_spans
from .planner.planner import Planner
from .planner.request import BatchShape
from .planner.search import Workload
from .prompt.formats import (
    EFFORTS,
    TemplateFacts,
    TextFormat,
    no_template,
    prompt_format,
    thinking_variables,
)
from .prompt.messages import PromptFormat
from .prompt.reasoning import HarmonyMarkers, ReasoningMarkers, find_reasoning_markers

MAX_REPEAT_LAST_N = 1 << 16
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
    "could not make a context", "bad_alloc", "memoryerror", "cannot allocate memory",
    "memory ran out",
)  # fmt: skip
"""How llama.cpp, its backends and the end of its process say that memory ran out."""
ASKS_FOR_THINKING = re.compile(r"{[%{][^}]*\b(enable_thinking|thinking)\b")
QUICK_BYTES = 256 << 20
"""A smaller model is timed in less than a second."""
TAKEN_BYTES = 64 << 20
"""Less than this comes and goes with a desktop's windows."""


class OutOfMemory(EngineError):
    """A plan didn't fit after all."""


@dataclass(slots=True)
class OpenModel:
    """A model in a running engine, with the plan that it was loaded by. Close it."""

    meta: ModelMeta
    plan: Plan
    model: ChatModel
    engine: EngineProcess
    loaded: Loaded
    speed_log: SpeedLog
    spec: ModelSpec | None = None

    @property
    def load_s(self) -> float:
        """Seconds that loading took, in the engine."""
        return self.loaded.load_s

    def options(self, settings: Settings) -> AnswerOptions:
        """Returns how this model is to answer by some settings."""
        return answer_options(self.meta, settings, self.spec)

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_engine(
    name: str,
    settings: Settings,
    callbacks: LoadCallbacks | None = None,
    workload: Workload = "chat",
    n_prompt: int | None = None,
) -> OpenModel:
    """Find a model, fetch it where it isn't here, and load it by its plan. Raises LocalMoeError.

    `n_prompt` is about how many tokens a single prompt has.
    """
    callbacks = callbacks or LoadCallbacks()
    with ExitStack() as owned:
        with ModelResolver(settings, callbacks) as finder:
            found = finder.fetch(finder.find(name))
            measuring = finder.release_engine()
            owned.enter_context(closed_on_error(measuring))
        return load_found(
            found, settings, callbacks, workload, n_prompt=n_prompt, measuring=measuring
        )


def load_local(
    path: Path,
    settings: Settings,
    callbacks: LoadCallbacks | None = None,
    workload: Workload = "chat",
) -> OpenModel:
    """Load a file. Raises LocalMoeError."""
    found = ResolvedModel(ModelName(str(path), path=path), path, read_meta(path))
    return load_found(found, settings, callbacks or LoadCallbacks(), workload)


def load_found(
    found: ResolvedModel,
    settings: Settings,
    callbacks: LoadCallbacks,
    workload: Workload = "chat",
    batch_shape: BatchShape | None = None,
    n_prompt: int | None = None,
    measuring: MeasuringEngine | None = None,
) -> OpenModel:
    """Starts an engine with a model that is here. Raises LocalMoeError.

    A plan that runs out of a GPU's memory is followed, once, by one that leaves more of it empty.
    `measuring` is an engine that looked at this machine for the same command: loading closes it or
    goes on in it, instead of starting another.
    """
    with closed_on_error(measuring):
        check_runs(found.meta)
        check_path(str(found.meta.paths[0]))
        try:
            return load_once(found, settings, callbacks, workload, batch_shape, n_prompt, measuring)
        except OutOfMemory as error:
            if callbacks.warning:
                callbacks.warning(f"{error.message} Trying again with less on the GPU.")
            return load_once(found, settings, callbacks, workload, batch_shape, n_prompt)


def load_to_talk(
    found: ResolvedModel,
    settings: Settings,
    callbacks: LoadCallbacks,
    measuring: MeasuringEngine | None = None,
) -> OpenModel:
    """Loads a model for a conversation. Raises LocalMoeError, where it only continues text, too.

    `measuring` is as for `load_found`.
    """
    with closed_on_error(measuring):
        if isinstance(format_of(found.meta), TextFormat):
            raise no_template()
        return load_found(found, settings, callbacks, "chat", measuring=measuring)


@contextmanager
def closed_on_error(measuring: MeasuringEngine | None) -> Iterator[None]:
    """Ends an engine that was handed over, where loading fails."""
    try:
        yield
    except BaseException:
        if measuring is not None:
            measuring.close()
        raise


def load_once(
    found: ResolvedModel,
    settings: Settings,
    callbacks: LoadCallbacks,
    workload: Workload,
    batch_shape: BatchShape | None,
    n_prompt: int | None,
    measuring: MeasuringEngine | None = None,
) -> OpenModel:
    """Plans and loads. Raises OutOfMemory where a GPU had too little; the next plan knows it."""
    format = format_of(found.meta, think_of(settings))
    with ExitStack() as owned:
        if measuring is None or not measuring.process.is_alive:
            measuring = MeasuringEngine(callbacks.warning, callbacks.log)
        owned.callback(measuring.process.kill)
        planner = Planner(settings, workload, measuring, batch_shape, n_prompt)
        engine, plan = engine_for(found.meta, planner, measuring, callbacks)
        owned.callback(engine.kill)
        loaded = start(engine, planner, found.meta, plan, callbacks)
        opened = opened_model(found, settings, callbacks, planner, plan, engine, loaded, format)
        owned.pop_all()
    return opened


def engine_for(
    meta: ModelMeta, planner: Planner, measuring: MeasuringEngine, callbacks: LoadCallbacks
) -> tuple[EngineProcess, Plan]:
    """Plans, and returns the engine to load in: a new one where a GPU has a part."""
    note = callbacks.note if meta.file_bytes > QUICK_BYTES else None
    # llama.cpp wants the first shard, whichever was named
    plan = planner.plan_to_load(meta.paths[0], meta, on_note=note)
    if callbacks.warning and 0 < meta.context_length < plan.placement.n_ctx:
        callbacks.warning(
            f"The model was trained for {meta.context_length:,} tokens and is unreliable "
            f"beyond; the context has {plan.placement.n_ctx:,}."
        )
    if not plan.placement.n_gpu_layers:
        return measuring.process, plan
    measuring.close()
    check_nothing_was_taken(planner)
    return EngineProcess(environment_of(plan.placement), callbacks.log), plan


def opened_model(
    found: ResolvedModel,
    settings: Settings,
    callbacks: LoadCallbacks,
    planner: Planner,
    plan: Plan,
    engine: EngineProcess,
    loaded: Loaded,
    format: PromptFormat,
) -> OpenModel:
    """Returns a loaded model as its users see it, and notes what they can't have of it."""
    meta = found.meta
    log = planner.speed_log(meta, plan)
    reasoning_markers = find_reasoning_markers(special_tokens(meta), engine, meta.chat_template)
    remark = thinking_remark(settings.think, meta.chat_template, reasoning_markers)
    if remark and callbacks.note:
        callbacks.note(remark)
    model = ChatModel(engine, format, loaded.n_ctx, log.add, reasoning_markers)
    return OpenModel(meta, plan, model, engine, loaded, log, found.spec)


def environment_of(place: Placement) -> dict[str, str]:
    """The environment of the engine that a plan is loaded in; what a person set there stays."""
    if not place.offload_min_batch:
        return engine_environment()
    return engine_environment(
        # read when a backend registers (ggml-cuda.cu)
        GGML_OP_OFFLOAD_MIN_BATCH=str(place.offload_min_batch),
        # threads sleep while the GPU does its part of a layer, if they may, and wake up slowly
        # (docs/notes/busy-machine.md); this is GCC's own default
        GOMP_SPINCOUNT="300000",
    )


def check_nothing_was_taken(planner: Planner) -> None:
    """Raises OutOfMemory where another program took memory of a GPU since it was planned."""
    lost = planner.lost_bytes()
    if lost > TAKEN_BYTES:
        raise OutOfMemory(f"Another program took {gib(lost)} of the GPU meanwhile.")


def start(
    engine: EngineProcess, planner: Planner, meta: ModelMeta, plan: Plan, callbacks: LoadCallbacks
) -> Loaded:
    """Load by a plan; on a GPU, the first time, use it once as hard as it will ever be used."""
    place, spans = plan.placement, pinned_spans(meta, plan.placement)
    path = str(meta.paths[0])
    try:
        loaded = engine.load(path, place, pinned=spans, on_progress=callbacks.loading)
        if place.n_gpu_layers and not planner.is_verified(meta, plan):
            try_out(engine, meta, place)
            planner.mark_verified(meta, plan)
    except EngineError as error:
        if not (place.n_gpu_layers and says_out_of_memory(error, engine.log)):
            raise
        planner.reserve_more(meta)
        raise OutOfMemory(f"The GPU ran out of memory: {error.message}") from None
    return loaded


def try_out(engine: EngineProcess, meta: ModelMeta, place: Placement) -> None:
    """A whole micro-batch of random tokens, which meets every expert."""
    n_tokens = min(place.n_ubatch, place.n_ctx - 2)
    tokens = random.Random(0).choices(range(meta.tokenizer.n_vocab), k=n_tokens)
    for _ in engine.generate(Request(tuple(tokens), Sampling(temperature=0), max_tokens=1)):
        pass


def says_out_of_memory(error: EngineError, log: Sequence[str]) -> bool:
    """Whether an error or the log before it says that memory ran out."""
    text = "\n".join((error.message, *log)).lower()
    return any(sign in text for sign in OUT_OF_MEMORY)


def open_vocabulary(path: Path) -> EngineProcess:
    """An engine with a model's vocabulary alone: enough to encode, at once and small."""
    engine = EngineProcess(engine_environment())
    try:
        engine.load(str(path), Placement(n_threads=1), vocab_only=True)
        return engine
    except BaseException:
        engine.kill()
        raise


def think_of(settings: Settings) -> str | None:
    """Returns how a model is to think. A grammar's text begins at once, so nothing comes before."""
    is_bound = settings.grammar is not None or settings.json_schema is not None
    return "off" if is_bound else settings.think


def format_of(meta: ModelMeta, think: str | None = None) -> PromptFormat:
    """Returns the prompt format of a model that is told to think like that, if it can be told."""
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
    return prompt_format(facts, env=engine_environment(), variables=thinking_variables(think))


def special_tokens(meta: ModelMeta) -> frozenset[str]:
    """Returns the texts of all control and user-defined tokens."""
    return frozenset(meta.tokenizer.control_tokens).union(meta.tokenizer.user_tokens)


def thinking_remark(
    think: str | None, template: str, reasoning_markers: ReasoningMarkers | None
) -> str:
    """Returns what to tell a person whose wish about thinking a template can't pass on; or ""."""
    if think in EFFORTS and "reasoning_effort" not in template:
        return f"This model's prompt template knows no levels of thinking: {think} is on for it."
    if think != "off":
        return ""
    if isinstance(reasoning_markers, HarmonyMarkers):
        return "This model always thinks; its reasoning effort is set to low instead."
    if reasoning_markers is None or "think" not in template or ASKS_FOR_THINKING.search(template):
        return ""
    return "This model's prompt template has no way to turn its thinking off."


def title(meta: ModelMeta) -> str:
    """What to call a model: its own name, or that of its file."""
    return meta.name or (meta.paths[0].stem if meta.paths else "the model")


def is_sampling_value(name: str, value: object) -> bool:
    """Whether a value of a header is within the bounds of what a person may set."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if name == "repeat_last_n":
        return isinstance(value, int) and 0 <= value <= MAX_REPEAT_LAST_N
    try:
        Settings.model_validate({name: value})
    except ValueError:  # pydantic's ValidationError
        return False
    return True


def answer_options(
    meta: ModelMeta, settings: Settings, spec: ModelSpec | None = None
) -> AnswerOptions:
    """How to answer: what the person set, else what the model's header says, else the catalog,
    else our defaults. A value of a header that no person could set is a slip of who made the file,
    and says nothing."""
    fields = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repeat_penalty",
        "presence_penalty",
        "frequency_penalty",
    )
    said = {name: getattr(settings, name) for name in fields}
    chosen: dict[str, Any] = spec.sampling.model_dump(exclude_none=True) if spec else {}
    chosen |= {
        name: meta.sampling[key]
        for key, name in HEADER_SAMPLING.items()
        if key in meta.sampling and is_sampling_value(name, meta.sampling[key])
    }
    chosen.update({name: value for name, value in said.items() if value is not None})
    sampling = replace(
        Sampling(**chosen),
        seed=settings.seed,
        json_schema=settings.json_schema,
        grammar=settings.grammar,
    )
    return AnswerOptions(sampling, settings.max_tokens, settings.stop)


KILLED = "was killed"
"""How engine.exits says SIGKILL, which the kernel sends where memory runs out, and people too."""
N_LAST_LINES = 20
"""Of the log: further up, llama.cpp may tell of memory that it could do without."""
SMALLEST_UBATCH, UBATCH_STEP = 64, 4
WORTH = 4
"""A step back is enough if it frees one in so many of the bytes that only swap could take."""


@dataclass(slots=True)
class EngineReloader:
    """Loads a model again whose engine died; `loaded` then holds the new engine and its plan.

    Called with the error, it gives the model to go on with. Raises LocalMoeError where it can't be
    loaded any more. The file is the one that was loaded: nothing is looked up or fetched.
    Threads whose common engine died take turns (`lock`): the first loads it again for all.
    """

    loaded: OpenModel
    settings: Settings
    callbacks: LoadCallbacks = field(default_factory=LoadCallbacks)
    workload: Workload = "chat"
    lock: threading.RLock = field(default_factory=threading.RLock, init=False)
    _n_oom_kills: int | None = field(default=None, init=False)
    _was_killed: bool = field(default=False, init=False)
    _told: EngineError | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._n_oom_kills = oom_kills(sources())

    def __call__(self, error: EngineError) -> ChatModel:
        with self.lock:
            if self.loaded.engine.is_alive and self._told is error:
                return self.loaded.model  # another thread was told of the same death
            model = self._load_again(error)
            self._told = error
            return model

    def _load_again(self, error: EngineError) -> ChatModel:
        loaded = self.loaded
        loaded.engine.kill()
        loaded.engine.close()
        measuring = self._step_back(error) if self._wants_less(error) else None
        path = loaded.meta.paths[0]
        found = ResolvedModel(ModelName(str(path), path=path), path, loaded.meta)
        fresh = load_found(found, self.settings, self.callbacks, self.workload, measuring=measuring)
        # the format tells the time of the conversation's beginning, and no other
        model = replace(fresh.model, format=loaded.model.format)
        loaded.plan, loaded.loaded = fresh.plan, fresh.loaded
        loaded.engine, loaded.model, loaded.speed_log = fresh.engine, model, fresh.speed_log
        self._n_oom_kills = oom_kills(sources())
        return model

    def _wants_less(self, error: EngineError) -> bool:
        """Whether memory was the reason.

        A process that was killed says nothing. Where the kernel counts those that it killed for
        their memory, one that isn't among them was killed by somebody: once.
        """
        if KILLED not in error.message:
            return says_out_of_memory(error, self.loaded.engine.log[-N_LAST_LINES:])
        before, now, again = self._n_oom_kills, oom_kills(sources()), self._was_killed
        self._was_killed = True
        return again or before is None or now is None or now > before

    def _step_back(self, error: EngineError) -> MeasuringEngine | None:
        """Sees to it that the next plan takes less; returns the engine that this started."""
        on_gpu = self.loaded.plan.placement.n_gpu_layers > 0
        if on_gpu and KILLED not in error.message:
            measuring = MeasuringEngine(self.callbacks.warning, self.callbacks.log)
            with closed_on_error(measuring):
                Planner(self.settings, self.workload, measuring).reserve_more(self.loaded.meta)
            return measuring
        self.settings = safer(self.settings, self.loaded.plan)
        return None


def safer(settings: Settings, plan: Plan) -> Settings:
    """Settings for a plan that takes less of RAM.

    Mapped weights can be dropped and read again, so they kill nobody. What can is the cache, the
    compute buffers, repacked copies and pinned pages. First goes what costs a conversation only
    speed: copies, pinned pages, most of the micro-batch. Where that frees too little, half of the
    context does too.
    """
    ram, place = plan.memory[-1], plan.placement
    n_ubatch = min(place.n_ubatch, max(SMALLEST_UBATCH, place.n_ubatch // UBATCH_STEP))
    changes: dict[str, object] = {"tune": False, "ubatch_size": n_ubatch, "load_mode": "mmap"}
    freed = freed_bytes(ram, place, n_ubatch)
    if freed * WORTH <= kept_bytes(ram):
        changes["ctx_size"] = min(place.n_ctx, max(SMALLEST_N_CTX, place.n_ctx // 2))
    return settings.model_copy(update=changes)


def kept_bytes(ram: Memory) -> int:
    """What of a plan's RAM can't be read again from the file."""
    parts = (ram.kv, ram.compute, ram.overhead, ram.repacked)
    return ram.pinned_bytes + sum(part.n_bytes for part in parts)


def freed_bytes(ram: Memory, place: Placement, n_ubatch: int) -> int:
    """What a smaller micro-batch, no copies and no pinned pages give back."""
    less_compute = ram.compute.n_bytes * (place.n_ubatch - n_ubatch) // place.n_ubatch
    return less_compute + ram.repacked.n_bytes + ram.pinned_bytes


def sources() -> SystemAccess:
    """Returns access to the machine that this runs on."""
    return SystemAccess(env=engine_environment())


def oom_kills(sources: SystemAccess) -> int | None:
    """How many processes the kernel has killed so far where memory ran out, in this machine and its
    control groups; None where it doesn't say (Linux alone does)."""
    events = [group / "memory.events" for group in groups(sources, "memory")]
    controls = [group / "memory.oom_control" for group in groups(sources, "memory")]
    texts = [read_text(path) for path in (sources.proc / "vmstat", *events, *controls)]
    counts = [n for text in texts if (n := count_of("oom_kill", text.splitlines())) is not None]
    return sum(counts) if counts else None


def count_of(name: str, lines: Sequence[str]) -> int | None:
    """Returns the number behind a word at the beginning of a line."""
    for line in lines:
        word, _, number = line.partition(" ")
        if word == name and number.strip().isdecimal():
            return int(number)
    return None
