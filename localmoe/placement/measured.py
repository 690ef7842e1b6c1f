"""What was measured on a machine, and where a figure comes from.

A plan marks each figure by its basis, so that a person sees what was computed and what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Basis = Literal["measured", "interpolated", "formula"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of bytes, and how it came about."""

    n_bytes: int
    basis: Basis


@dataclass(frozen=True, slots=True)
class MeasurementKey:
    """What a measurement holds for; anything else may differ."""

    machine: str
    driver: str
    build: str
    model: str


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second that a run really had, with the placement's name it had them with."""

    prompt_tps: float
    generation_tps: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of one machine, driver, build and file; what is not there was not measured.

    `overhead_bytes` and `bandwidth_bytes_per_s` are by device; `compute_bytes` by device and then
    by (n_ctx_total, n_ubatch); `speeds` by the placement they were had with.
    """

    overhead_bytes: dict[str, int] = field(default_factory=dict)
    bandwidth_bytes_per_s: dict[str, float] = field(default_factory=dict)
    compute_bytes: dict[str, dict[tuple[int, int], int]] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)


NOTHING_MEASURED = Measured()
