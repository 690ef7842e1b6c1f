"""What a model's own timing on this CPU decides: threads, micro-batch, repacked copies. Pure, but
for the folder that keeps it.

Timed once for a machine, build and model
(engine/native/model_benchmark.py). What is decided differs from the
plain choice only where it is faster by more than such short timings are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.protocol import RepackMode
from ..engine.rates import MARGIN, RepackableLayer, Tuning

LIMIT_S = 4.0

BUSY_SHARE = 0.1
"""Where others took more of the processors' time, a number of threads can't be judged."""
MAX_TRIES = 3

UNTUNED = Tuning(0, 0, (), (), 0.0)
"""Kept where a model could not be timed."""


def threads_to_try(n_cores: int) -> tuple[int, ...]:
    """All physical cores first; fewer, where half of them are slow ones or memory is the limit."""
    return tuple(dict.fromkeys((n_cores, max(1, 3 * n_cores // 4), max(1, n_cores // 2))))


def best_threads(tuning: Tuning) -> int:
    """The number of threads that generates fastest; on a busy machine the first that was timed."""
    return tuning.times[0].n_threads if is_busy(tuning) else tuning.n_threads


def is_busy(tuning: Tuning) -> bool:
    """Whether other programs took too much of the CPU meanwhile."""
    return tuning.others_share > BUSY_SHARE


def best_ubatch(tuning: Tuning, smallest: int) -> int:
    """The micro-batch that computes prompts fastest."""
    per_token = {
        t.n_tokens: t.seconds / t.n_tokens
        for t in tuning.times
        if not t.repacked and t.n_tokens >= smallest
    }
    if smallest not in per_token or is_busy(tuning):
        return smallest
    best = min(per_token, key=lambda n: per_token[n])
    return best if per_token[smallest] > MARGIN * per_token[best] else smallest


def step_ratio(tuning: Tuning, n_tokens: int) -> float:
    """The time of a generating step with all weights repacked, over that with none.

    Between the numbers of tokens that were timed, and beyond the last, in proportion to none: the
    nearest larger one's counts, as the gain only falls. A busy machine says nothing.
    """
    mine = [t for t in tuning.times if t.n_threads == tuning.n_threads and not is_busy(tuning)]
    plain = {t.n_tokens: t.seconds for t in mine if not t.repacked}
    repacked = {t.n_tokens: t.seconds for t in mine if t.repacked}
    both = sorted(plain.keys() & repacked.keys())
    nearest = next((n for n in both if n >= n_tokens), None)
    return repacked[nearest] / plain[nearest] if nearest else 1.0


@dataclass(frozen=True, slots=True)
class RepackedCopies:
    """Repacked copies that a plan makes: of which matrices, of how many layers, their bytes."""

    mode: RepackMode = "off"
    n_layers: int = 0
    n_bytes: int = 0


def copies_within(
    layers: tuple[RepackableLayer, ...], mode: RepackMode, room_bytes: int
) -> RepackedCopies:
    """As many layers' copies as RAM has room for; outside of layers only when all of them fit."""
    n_bytes = n_layers = 0
    for layer in layers if mode != "off" else ():
        more = layer.expert_bytes + (layer.dense_bytes if mode == "all" else 0)
        if n_bytes + more > room_bytes:
            break
        n_bytes, n_layers = n_bytes + more, n_layers + 1
    return RepackedCopies(mode, n_layers, n_bytes) if n_bytes else RepackedCopies()


def repacked_ratio(
    tuning: Tuning, mode: RepackMode, n_layers: int, n_tokens: int, touched: float
) -> float:
    """The time of a generating step with these copies, over that with none. `touched` is the share
    of experts that so many tokens are routed to: what is read decides, not what there is."""

    def read_bytes(layers: tuple[RepackableLayer, ...], with_dense: bool) -> float:
        return sum(n.expert_bytes * touched + n.dense_bytes * with_dense for n in layers)

    whole = read_bytes(tuning.repackable, with_dense=True)
    if not whole or mode == "off":
        return 1.0
    read = read_bytes(tuning.repackable[:n_layers], with_dense=mode == "all")
    return 1.0 - read / whole * (1.0 - step_ratio(tuning, n_tokens))


@dataclass(frozen=True, slots=True)
class TuningRecord:
    """A timing, and how often it was tried: on a busy machine, or where it failed, once more at
    another time."""

    tuning: Tuning
    n_tries: int = 1

    @property
    def is_final(self) -> bool:
        """Whether the model need not be timed again."""
        is_good = bool(self.tuning.times) and not is_busy(self.tuning)
        return is_good or self.n_tries >= MAX_TRIES

    def or_better(self, newer: Tuning) -> TuningRecord:
        """The one that was less disturbed, and not the one that failed."""
        best = min(self.tuning, newer, key=lambda t: (not t.times, t.others_share))
        return TuningRecord(best, self.n_tries + 1)
