"""After an engine died: its model in a new one, by a safer plan where memory was the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .callbacks import LoadCallbacks
from .config.environment import engine_environment
from .config.settings import Settings
from .engine.protocol import Placement
from .errors import EngineError
from .hardware.cpu import groups
from .hardware.system import SystemAccess, read_text
from .load import LoadedModel, load_found, says_out_of_memory
from .models.names import ModelName
from .obtain import Found
from .planner.plan import SMALLEST_N_CTX, Memory, Plan
from .planner.planner import Planner
from .planner.search import Workload
from .serving.chat import Model

KILLED = "was killed"
"""How engine.exits says SIGKILL, which the kernel sends where memory runs out, and people too."""
N_LAST_LINES = 20
"""Of the log: further up, llama.cpp may tell of memory that it could do without."""
SMALLEST_UBATCH, UBATCH_STEP = 64, 4
WORTH = 4
"""A step back is enough if it frees one in so many of the bytes that only swap could take."""


@dataclass(slots=True)
class Revival:
    """Loads a model again whose engine died; `loaded` then holds the new engine and its plan.

    Called with the error, it gives the model to go on with. Raises LocalMoeError where it can't be
    loaded any more. The file is the one that was loaded: nothing is looked up or fetched.
    """

    loaded: LoadedModel
    settings: Settings
    watch: LoadCallbacks = field(default_factory=LoadCallbacks)
    workload: Workload = "chat"
    _n_oom_kills: int | None = field(default=None, init=False)
    _was_killed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._n_oom_kills = oom_kills(sources())

    def __call__(self, error: EngineError) -> Model:
        loaded = self.loaded
        loaded.engine.kill()
        loaded.engine.close()
        if self._wants_less(error):
            self._step_back(error)
        path = loaded.meta.paths[0]
        found = Found(ModelName(str(path), path=path), path, loaded.meta)
        fresh = load_found(found, self.settings, self.watch, self.workload)
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

    def _step_back(self, error: EngineError) -> None:
        on_gpu = self.loaded.plan.placement.n_gpu_layers > 0
        if on_gpu and KILLED not in error.message:
            with Planner(self.settings, self.workload) as planner:
                planner.set_back(self.loaded.meta)
            return
        self.settings = safer(self.settings, self.loaded.plan)


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
    for line in lines:
        word, _, number = line.partition(" ")
        if word == name and number.strip().isdecimal():
            return int(number)
    return None
