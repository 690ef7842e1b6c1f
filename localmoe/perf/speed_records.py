"""What runs really got beside what was forecast: kept on disk, and what the next forecast learns.

A record holds the speed by formula, not the corrected one that was shown, so that corrections
don't pile up. What was shown, and how wrong it was, follows from the records before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

SpeedKind = Literal["prompt", "generation"]

MAX_RECORDS = 200
LAST_RECORDS = 9
"""A correction is the median of so many: enough against outliers, few enough to follow a change."""
TOO_FAST = 1.5
"""On machines that were quiet, nothing was more than 1.25 times as fast as the formula."""
COMPARABLE = 8.0
"""Models whose speeds by formula are further apart teach nothing about each other."""
LEAST_SLOWNESS = 0.2
"""No CPU is so much faster than its rates: then the rest of the time was less, too."""
LARGEST_RATIO = 20.0
"""A run that was this far off was suspended, or shared its machine: it teaches nothing."""


@dataclass(frozen=True, slots=True)
class SpeedRecord:
    """One run's speed in tokens per second, by formula and in fact.

    `regime` says what the speed depended on (forecast.regime_of), `model` which model; `when` is
    in seconds since 1970. `host_share` is the CPU's share of the formula's time where it works
    beside a GPU: that is what forecasts are wrong about, and what a run corrects. Where one of them
    does all the work, it is 1.
    """

    kind: SpeedKind
    regime: str
    model: str
    formula_tps: float
    real_tps: float
    n_tokens: int
    when: float
    host_share: float = 1.0

    @property
    def ratio(self) -> float:
        """How many times as fast as by the formula."""
        return self.real_tps / self.formula_tps

    @property
    def slowness(self) -> float:
        """How many times as long as by formula the CPU's part took, if all else was right."""
        return max(LEAST_SLOWNESS, 1 + (1 / self.ratio - 1) / self.host_share)


@dataclass(frozen=True, slots=True)
class Correction:
    """A factor on a formula's speed. `error` is how far forecasts of this kind were off so far
    (0.1: by 10 %, the median), None where there was none; `n_runs` is what both rest on."""

    factor: float = 1.0
    error: float | None = None
    n_runs: int = 0


def correction(
    records: Sequence[SpeedRecord],
    kind: SpeedKind,
    regime: str,
    model: str,
    formula_tps: float | None = None,
    host_share: float = 1.0,
) -> Correction:
    """What earlier runs teach about one to come: of the nearest ones, the median.

    `formula_tps` is the speed to be corrected: other models teach only where theirs is comparable.
    `host_share` is the CPU's in its time.
    """
    mine = [
        record
        for record in records
        if record.kind == kind and (record.model == model or is_comparable(record, formula_tps))
    ]
    near = nearest(mine, regime, model)
    if not near:
        return Correction()
    return Correction(factor_of(near, host_share), median(past_errors(near)), len(near))


def is_comparable(record: SpeedRecord, formula_tps: float | None) -> bool:
    """A small model's time is fixed costs, a large one's is bytes: one says little of the other."""
    if formula_tps is None:
        return True
    return 1 / COMPARABLE <= record.formula_tps / formula_tps <= COMPARABLE


def nearest(records: Sequence[SpeedRecord], regime: str, model: str) -> list[SpeedRecord]:
    """The last records of the same regime and model; without any, of the regime; then of regimes
    of the same kind (its first word), such as experts in RAM, mapped or pinned."""
    kin = [record for record in records if kind_of(record.regime) == kind_of(regime)]
    same = [record for record in kin if record.regime == regime]
    for candidates in (same, kin):
        own = [record for record in candidates if record.model == model]
        if own or candidates:
            return (own or candidates)[-LAST_RECORDS:]
    return []


def kind_of(regime: str) -> str:
    """Returns the part of a regime that records must share."""
    return regime.split("/")[0]


def factor_of(records: Sequence[SpeedRecord], host_share: float = 1.0) -> float:
    """The factor on a speed of which the CPU has this share of the time."""
    slowness = median(record.slowness for record in records)
    return 1 / (1 + host_share * (slowness - 1))


def measured_too_slow(records: Sequence[SpeedRecord]) -> bool:
    """Whether runs are so much faster than the formula that the machine must have been busy while
    its rates were measured: then measure again, and forget these records, which rest on them."""
    return bool(records) and max(record.ratio for record in records[-LAST_RECORDS:]) > TOO_FAST


def past_errors(records: Sequence[SpeedRecord]) -> list[float]:
    """How far each run was from what those before it made of its formula; the first from that."""
    factors = [
        factor_of(records[:n], record.host_share) if n else 1.0 for n, record in enumerate(records)
    ]
    pairs = zip(records, factors, strict=True)
    return [abs(factor / record.ratio - 1) for record, factor in pairs]
