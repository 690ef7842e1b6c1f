"""What was measured on a machine: kept as data, and on disk between runs.

Every measurement holds for one machine, driver, build of llama.cpp and model file; a file of
another key is not looked at. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Basis = Literal["measured", "interpolated", "formula"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of bytes, and how it came about."""

    n_bytes: int
    basis: Basis


@dataclass(frozen=True, slots=True)
class ComputePoint:
    """The compute buffer of a device at one context (of all sequences) and micro-batch.

    `kind` names what else it depends on: placement.sizes.compute_kind. `copied_bytes` is the
    largest tensor of experts in RAM, for whose copy the first GPU keeps room, and `next_bytes` the
    next smaller size of them, which some models have room for as well.
    """

    kind: str
    device: str
    n_ctx: int
    n_ubatch: int
    n_bytes: int
    copied_bytes: int = 0
    next_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements under one key; what is not there was not measured.

    `overhead_bytes` is what a device loses beside weights, cache and compute buffers.
    `reserve_bytes` is left empty beyond that since a plan of this model ran out of memory, and
    `verified_plans` names plans that have run.
    """

    overhead_bytes: Mapping[str, int] = field(default_factory=dict)
    compute: tuple[ComputePoint, ...] = ()
    reserve_bytes: int = 0
    verified_plans: tuple[str, ...] = ()

    def with_points(self, points: tuple[ComputePoint, ...]) -> Measured:
        """These measurements and newer ones, which count where both say something."""
        places = {replace(p, n_bytes=0): p for p in (*self.compute, *points)}
        return replace(self, compute=tuple(places.values()))

    def with_overhead(self, device: str, n_bytes: int) -> Measured:
        """These measurements with a device's overhead."""
        return replace(self, overhead_bytes={**self.overhead_bytes, device: n_bytes})


NOTHING_MEASURED = Measured()
