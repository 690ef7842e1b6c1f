"""Times the first layers of a model on this CPU, with several thread counts and batches.

A decode is broken off behind the last of those layers, so that a model of any size takes no longer
than a small one, which is a few seconds. What differs between two ways of computing shows in any
layer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

from ..rates import MARGIN, RepackableLayer, StepTime, Tuning
from . import llama
from .repack import (
    GgmlTensor,
    RepackedWeights,
    is_wanted,
    layer_of,
    matrices,
    n_layers_of,
    size_of,
    twins,
)

LAYER_BYTES = 192 << 20
"""So much of the model is timed at least: more than a cache holds, little beside the model."""
FEW = (1, 4, 8, 16, 32)
"""Sequences that generate at once, with weights as they are and repacked."""
PROMPTS = (512, 1024)
N_CTX = 1024
WARM_UP = 32
"""Tokens that are computed before anything is timed: then the weights are in RAM."""
REPEATED_S, MOST_TRIES = 0.08, 9
"""Each time is the best of several within this; one is enough where it takes longer."""
FIRST_TOKEN, STRIDE = 300, 7919  # past control tokens and single bytes; a prime
LAYER_OUTPUT = "l_out-{layer}"  # cb(cur, "l_out", il) in src/models of llama.cpp


def tune(path: str, n_threads: Sequence[int], limit_s: float) -> Tuning:
    """Time a model. The first of `n_threads` is timed first; what `limit_s` leaves no time for
    is left out. Raises NativeError where it can't be loaded, or has no layers to stop behind."""
    model, others = llama.LlamaModel(path), CpuContention()
    try:
        names: set[bytes] = set()
        weights = matrices(model, names)
        n_layers = enough_layers(weights)
        if LAYER_OUTPUT.format(layer=n_layers - 1).encode() not in names:
            raise llama.NativeError("the layers of this model have no common end")
        stopwatch = Stopwatch(model, n_layers, time.perf_counter() + limit_s)
        for n in n_threads:
            stopwatch.time(n, 1)
        best = clearly_fastest(stopwatch.times)
        stopwatch.time(best, *FEW[1:])
        n_all = n_layers_of(weights)
        copies = RepackedWeights(
            list(twins(t for t in weights if is_wanted(t, "all", n_layers, n_all)))
        )
        started = time.perf_counter()
        copies.make_all(best)
        rate = copies.n_bytes / (time.perf_counter() - started)
        copies.use(True)
        stopwatch.time(best, *FEW, repacked=True)
        copies.use(False)
        copies.free()
        stopwatch.time(best, *PROMPTS)
        times = tuple(stopwatch.times)
        return Tuning(n_layers, best, times, repackable(weights), rate, others.share())
    finally:
        model.free()


def clearly_fastest(times: Sequence[StepTime]) -> int:
    """The first number of threads, unless another one is faster by more than chance."""
    best = min(times, key=lambda found: found.seconds)
    return best.n_threads if times[0].seconds > MARGIN * best.seconds else times[0].n_threads


def enough_layers(weights: Sequence[GgmlTensor]) -> int:
    """How many of the first layers have LAYER_BYTES; all of a small model's."""
    n_bytes, n_layers = 0, 1
    for tensor in weights:
        if n_bytes >= LAYER_BYTES:
            break
        n_bytes += size_of(tensor)
        n_layers = 1 + (layer_of(tensor) or 0)
    return n_layers


def repackable(weights: Sequence[GgmlTensor]) -> tuple[RepackableLayer, ...]:
    """What of each layer can be repacked; the last entry is what belongs to none."""
    found: dict[int, list[int]] = {}
    n_layers = n_layers_of(weights)
    for twin in twins(weights):
        layer = layer_of(twin.tensor)
        sums = found.setdefault(n_layers if layer is None else layer, [0, 0])
        is_expert = is_wanted(twin.tensor, "experts", n_layers + 1, n_layers)
        sums[0 if is_expert else 1] += twin.n_bytes
        twin.free()
    return tuple(RepackableLayer(*found.get(n, (0, 0))) for n in range(n_layers + 1))


class CpuContention:
    """What other programs do on this machine from now on."""

    def __init__(self) -> None:
        self._before, self._own = self._times(), time.process_time()

    def share(self) -> float:
        """Of the time of the processors that this process may use, 0 to 1: neither idle nor its
        own. Waiting for a disk counts as the others': such times say little either."""
        (spent, idle), own = self._times(), time.process_time() - self._own
        spent, idle = spent - self._before[0], idle - self._before[1]
        return max(0.0, 1 - (idle + own) / spent) if spent > 0 else 0.0

    def _times(self) -> tuple[float, float]:
        """All time that passed on them, and that in which they were idle."""
        found = psutil.cpu_times(percpu=True)
        allowed = getattr(os, "sched_getaffinity", lambda _: range(len(found)))(0)
        mine = [times for i, times in enumerate(found) if i in allowed]
        return sum(map(sum, mine)), sum(times.idle for times in mine)


@dataclass(slots=True)
class Stopwatch:
    """Times decodes that end behind the last of some layers."""

    model: llama.LlamaModel
    n_layers: int
    deadline: float
    times: list[StepTime] = field(default_factory=list)

    def time(self, n_threads: int, *n_tokens: int, repacked: bool = False) -> None:
        """Time batches of so many tokens each, until time is out."""
        last = LAYER_OUTPUT.format(layer=self.n_layers - 1).encode()

        def on_node(address: int, ask: bool) -> bool:
            return ask and GgmlTensor.from_address(address).name == last

        context = llama.LlamaContext(
            self.model, n_ctx=N_CTX, n_seq=1, n_batch=N_CTX, n_ubatch=max(n_tokens),
            n_threads=n_threads, kv_type="f16", flash_attention="auto", on_node=on_node,
        )  # fmt: skip
        batch = any_tokens(max(n_tokens), self.model.vocab.n_tokens)
        context.decode(batch, min(WARM_UP, max(n_tokens)))
        for n in n_tokens:
            if time.perf_counter() < self.deadline or not self.times:
                seconds = best_step_seconds(context, batch, n)
                self.times.append(StepTime(n_threads, n, repacked, seconds))
        context.free()


def any_tokens(n: int, n_vocab: int) -> llama.LlamaBatch:
    """A batch of different tokens, which are routed to different experts."""
    batch = llama.LlamaBatch(n)
    batch.positions[:] = np.arange(n)
    batch.tokens[:] = (FIRST_TOKEN + STRIDE * np.arange(n)) % n_vocab
    return batch


def best_step_seconds(context: llama.LlamaContext, batch: llama.LlamaBatch, n_tokens: int) -> float:
    """The shortest of some tries."""
    best, spent, n_tries = float("inf"), 0.0, 0
    while n_tries == 0 or (spent < REPEATED_S and n_tries < MOST_TRIES):
        context.remove(0, 0)
        started = time.perf_counter()
        if context.decode(batch, n_tokens) != llama.DECODE_OK:
            raise llama.NativeError("the model can't be computed with")
        seconds = time.perf_counter() - started
        best, spent, n_tries = min(best, seconds), spent + seconds, n_tries + 1
    return best
