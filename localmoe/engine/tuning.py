"""Times a model on this CPU in a few seconds: its first layers, with other threads and batches.

A decode is broken off behind the last of those layers, so that a model of any size takes no longer
than a small one; what differs between two ways of computing shows in any layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

from . import bindings
from .rates import RepackableLayer, StepTime, Tuning
from .repacking import Repacked, Tensor, is_wanted, layer_of, matrices, size_of, twins

LAYER_BYTES = 192 << 20
"""So much of the model is timed at least: more than a cache holds, little beside the model."""
FEW = (1, 4, 8, 16, 32)
"""Sequences that generate at once, with weights as they are and repacked."""
PROMPTS = (512, 1024)
N_CTX = 1024
REPEATED_S, MOST_TRIES = 0.08, 9
"""Each time is the best of several within this; one is enough where it takes longer."""
FIRST_TOKEN, STRIDE = 300, 7919  # past control tokens and single bytes; a prime
LAYER_OUTPUT = "l_out-{layer}"  # cb(cur, "l_out", il) in src/models of llama.cpp


def tune(path: str, n_threads: Sequence[int], limit_s: float) -> Tuning:
    """Time a model. The first of `n_threads` is timed first; what `limit_s` leaves no time for
    is left out. Raises NativeError where it can't be loaded."""
    model, others = bindings.Model(path), Others()
    try:
        weights = matrices(model)
        n_layers = enough_layers(weights)
        deadline = time.perf_counter() + limit_s
        stopwatch = Stopwatch(model, n_layers, deadline)
        for n in n_threads:
            stopwatch.time(n, 1)
        best = min(stopwatch.times, key=lambda found: found.seconds).n_threads
        stopwatch.time(best, *FEW[1:])
        copies = Repacked(list(twins(t for t in weights if is_wanted(t, "all", n_layers))))
        started = time.perf_counter()
        copies.make_all(best)
        rate = copies.n_bytes / (time.perf_counter() - started)
        copies.use(True)
        stopwatch.time(best, *FEW, repacked=True)
        copies.use(False)
        copies.free()
        stopwatch.time(best, *PROMPTS)
        times = tuple(stopwatch.times)
        return Tuning(n_layers, times, repackable(weights), rate, others.share())
    finally:
        model.free()


def enough_layers(weights: Sequence[Tensor]) -> int:
    """How many of the first layers have LAYER_BYTES; all of a small model's."""
    n_bytes, n_layers = 0, 1
    for tensor in weights:
        if n_bytes >= LAYER_BYTES:
            break
        n_bytes += size_of(tensor)
        n_layers = 1 + (layer_of(tensor) or 0)
    return n_layers


def repackable(weights: Sequence[Tensor]) -> tuple[RepackableLayer, ...]:
    """What of each layer can be repacked; the last entry is what belongs to none."""
    found: dict[int, list[int]] = {}
    n_layers = 1 + max((n for t in weights if (n := layer_of(t)) is not None), default=-1)
    for twin in twins(weights):
        layer = layer_of(twin.tensor)
        sums = found.setdefault(n_layers if layer is None else layer, [0, 0])
        sums[0 if is_wanted(twin.tensor, "experts", n_layers + 1) else 1] += twin.n_bytes
        twin.free()
    return tuple(RepackableLayer(*found.get(n, (0, 0))) for n in range(n_layers + 1))


class Others:
    """What other programs do on this machine from now on."""

    def __init__(self) -> None:
        self._all, self._own = psutil.cpu_times(), time.process_time()

    def share(self) -> float:
        """Of all processors' time, 0 to 1: neither idle nor this process's."""
        now, own = psutil.cpu_times(), time.process_time() - self._own
        spent = sum(now) - sum(self._all)
        idle = sum(
            getattr(now, name, 0.0) - getattr(self._all, name, 0.0) for name in ("idle", "iowait")
        )
        return max(0.0, 1 - (idle + own) / spent) if spent > 0 else 0.0


@dataclass(slots=True)
class Stopwatch:
    """Times decodes that end behind the last of some layers."""

    model: bindings.Model
    n_layers: int
    deadline: float
    times: list[StepTime] = field(default_factory=list)

    def time(self, n_threads: int, *n_tokens: int, repacked: bool = False) -> None:
        """Time batches of so many tokens each, until time is out."""
        last = LAYER_OUTPUT.format(layer=self.n_layers - 1).encode()

        def on_node(address: int, ask: bool) -> bool:
            return ask and Tensor.from_address(address).name == last

        context = bindings.Context(
            self.model, n_ctx=N_CTX, n_seq=1, n_batch=N_CTX, n_ubatch=max(n_tokens),
            n_threads=n_threads, kv_type="f16", flash_attention="auto", on_node=on_node,
        )  # fmt: skip
        batch = any_tokens(max(n_tokens), self.model.vocab.n_tokens)
        for n in n_tokens:
            if time.perf_counter() < self.deadline or not self.times:
                seconds = best_seconds(context, batch, n)
                self.times.append(StepTime(n_threads, n, repacked, seconds))
        context.free()


def any_tokens(n: int, n_vocab: int) -> bindings.Batch:
    """A batch of different tokens, which are routed to different experts."""
    batch = bindings.Batch(n)
    batch.positions[:] = np.arange(n)
    batch.tokens[:] = (FIRST_TOKEN + STRIDE * np.arange(n)) % n_vocab
    return batch


def best_seconds(context: bindings.Context, batch: bindings.Batch, n_tokens: int) -> float:
    """The shortest of some tries, after one for warming up where that is short."""
    best, spent, n_tries = float("inf"), 0.0, 0
    while n_tries == 0 or (spent < REPEATED_S and n_tries < MOST_TRIES):
        context.remove(0, 0)
        started = time.perf_counter()
        context.decode(batch, n_tokens)
        seconds = time.perf_counter() - started
        best, spent, n_tries = min(best, seconds), spent + seconds, n_tries + 1
    return best
