"""The child side of the process boundary: takes messages from stdin, answers on stdout.

Started by client.CHILD_PROGRAM. One thread reads, so that a cancel reaches a
decode that is under way and the end of the parent ends this process; the main thread computes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from .. import client
from ..native import llama
from ..native.device_benchmark import measure
from ..native.llama import devices
from ..native.model_benchmark import tune
from ..protocol import (
    BandwidthsMeasured,
    Cancel,
    Detokenize,
    Detokenized,
    DeviceList,
    Failed,
    FromEngine,
    Generate,
    ListDevices,
    Load,
    Loaded,
    LoadProgress,
    MeasureBandwidth,
    Message,
    Probe,
    Probed,
    RestoreState,
    SaveState,
    StateRestored,
    StateSaved,
    Tokenize,
    Tokenized,
    Tune,
    Tuned,
)
from .memory_probe import probe
from .model import ModelError, NativeModel
from .scheduler import RequestRefused, Scheduler

if sys.platform != "win32":
    import resource

PROGRESS_STEP = 0.01
"""Loading is reported each time that this much more of a model is there."""

N_REASONS = 20
Thing = TypeVar("Thing")


def main() -> None:
    """Serve the parent at the other end of stdin and stdout."""
    limit_damage()
    reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # whatever else prints here, llama.cpp or Python, belongs to the log
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    Worker(reader, writer).run()


def limit_damage() -> None:
    """No core file of a whole model; where memory runs out, this process goes first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to interpret
    if sys.platform != "win32":
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


class Worker:
    """One engine: a model at most, its scheduler, and the two ends of the connection."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader = reader
        self._writer = writer
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._vocab: llama.Vocab | None = None
        self._model: NativeModel | None = None
        self._scheduler: Scheduler | None = None
        self._reasons: list[str] = []

    def run(self) -> None:
        """Serve until the process is ended from outside or by the end of its input."""
        llama.log_to(self._log)
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            self._handle_waiting()
            if self._scheduler and not self._scheduler.idle:
                self._send(self._step(self._scheduler))

    # ---- messages ----

    def _listen(self) -> None:
        with contextlib.suppress(client.ProtocolError, OSError):
            while (message := client.read(self._reader)) is not None:
                self._inbox.put(message)
                if isinstance(message, Cancel) and not message.only_waiting and self._scheduler:
                    self._scheduler.interrupt(message.id)
        # the parent is gone: nobody waits for what is being computed, and llama.cpp can't be asked
        os._exit(0)

    def _handle_waiting(self) -> None:
        """Handle what has come in; wait for something where there is nothing to compute."""
        idle = self._scheduler is None or self._scheduler.idle
        while idle and self._model and self._model.lacks_copies and self._inbox.empty():
            self._model.make_copies()
        with contextlib.suppress(queue.Empty):
            while True:
                self._send(self._answer(self._inbox.get(block=idle)))
                idle = False

    def _answer(self, message: Message) -> list[FromEngine]:
        try:
            return self._dispatch(message)
        except (ModelError, llama.NativeError) as error:
            return [Failed(message.id, self._reason() or str(error))]
        except RequestRefused as error:
            return [Failed(message.id, str(error), error.hint)]

    def _dispatch(self, message: Message) -> list[FromEngine]:
        match message:
            case Load():
                return [self._load(message)]
            case Probe(id, path, placement):
                return [Probed(id, probe(path, placement))]
            case Tokenize(id, pieces):
                vocab = loaded(self._vocab)
                tokens = tuple(tuple(vocab.tokenize(p.text, p.special)) for p in pieces)
                return [Tokenized(id, tokens)]
            case Detokenize(id, wanted):
                vocab = loaded(self._vocab)
                raw = b"".join(vocab.spell(token, special=True) for token in wanted)
                return [Detokenized(id, raw.decode("utf-8", "replace"))]
            case Generate(id, request):
                loaded(self._scheduler).add(id, request)
                return []
            case Cancel(id, only_waiting):
                scheduler = self._scheduler
                return [*scheduler.cancel(id, only_waiting=only_waiting)] if scheduler else []
            case MeasureBandwidth(id, n_threads, types):
                return [BandwidthsMeasured(id, measure(llama.ggml, n_threads, types))]
            case Tune(id, path, n_threads, limit_s):
                return [Tuned(id, tune(path, n_threads, limit_s))]
            case SaveState(id, path, key, tokens, room_bytes):
                states = loaded(self._scheduler).states
                return [StateSaved(id, *states.save(Path(path), key, tokens, room_bytes))]
            case RestoreState(id, path, key):
                states = loaded(self._scheduler).states
                return [StateRestored(id, *states.restore(Path(path), key))]
            case ListDevices(id):
                return [DeviceList(id, devices(), llama.system_info())]
            case _:
                raise RequestRefused(f"The engine can't be asked for {message.type!r}.")

    def _send(self, messages: list[FromEngine]) -> None:
        if messages:
            self._writer.write(b"".join(map(client.encode, messages)))
            self._writer.flush()

    # ---- work ----

    def _load(self, load: Load) -> Loaded:
        started = time.perf_counter()
        self._reasons.clear()
        if self._model is not None:
            self._scheduler = self._vocab = None
            self._model.free()
            self._model = None
        if load.vocab_only:
            vocab = self._vocab = llama.LlamaModel(load.path, vocab_only=True).vocab
            return Loaded(load.id, vocab.facts, 0, time.perf_counter() - started)
        report = self._progress_of(load.id)
        model = self._model = NativeModel(load.path, load.placement, load.pinned, report)
        self._vocab, self._scheduler = model.vocab, Scheduler(model)
        took_s = time.perf_counter() - started
        return Loaded(load.id, model.facts(), model.n_ctx, took_s, model.n_pinned_bytes)

    def _progress_of(self, id: int) -> Callable[[float], None]:
        reported = 0.0

        def report(fraction: float) -> None:
            nonlocal reported
            if fraction - reported >= PROGRESS_STEP or fraction >= 1.0 > reported:
                reported = fraction
                self._send([LoadProgress(id, fraction)])

        return report

    def _step(self, scheduler: Scheduler) -> list[FromEngine]:
        self._reasons.clear()
        try:
            return [*scheduler.step()]
        except ModelError as error:
            return [*scheduler.fail_all(self._reason() or str(error))]

    # ---- llama.cpp's own words ----

    def _log(self, level: int, text: str) -> None:
        sys.stderr.write(text)
        if level == llama.LOG_ERROR and len(self._reasons) < N_REASONS:
            self._reasons.append(text.strip())

    def _reason(self) -> str:
        """What llama.cpp said went wrong: its first error is the cause, others follow."""
        return next((without_function(text) for text in self._reasons if text), "")


def without_function(line: str) -> str:
    """A line of llama.cpp's log without the names of the functions that it starts with."""
    return re.sub(r"^(?:\w+: )+(?:error loading model: )?", "", line)


def loaded(thing: Thing | None) -> Thing:
    """Returns a thing that only a load makes. Raises RequestRefused before one."""
    if thing is None:
        raise RequestRefused("No model is loaded for that.")
    return thing


if __name__ == "__main__":
    main()
