"""What was measured on a machine: kept as data, and on disk between runs.

Every measurement holds for one machine, driver, build of llama.cpp and model file; a file of
another key is not looked at. Nothing here decides anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Basis = Literal["measured", "interpolated", "formula"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of bytes, and how it came about."""

    n_bytes: int
    basis: Basis


@dataclass(frozen=True, slots=True)
class MeasurementKey:
    """What a measurement holds for; with another value in any of these, nothing is known."""

    machine: str
    build: str
    model: str

    @property
    def file_name(self) -> str:
        return hashlib.sha256("\0".join(asdict(self).values()).encode()).hexdigest()[:24] + ".json"


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
    `setback_bytes` is left empty beyond that since a plan of this model ran out of memory, and
    `proved` names plans that have run.
    """

    overhead_bytes: Mapping[str, int] = field(default_factory=dict)
    compute: tuple[ComputePoint, ...] = ()
    setback_bytes: int = 0
    proved: tuple[str, ...] = ()

    def with_points(self, points: tuple[ComputePoint, ...]) -> Measured:
        """These measurements and newer ones, which count where both say something."""
        places = {replace(p, n_bytes=0): p for p in (*self.compute, *points)}
        return replace(self, compute=tuple(places.values()))

    def with_overhead(self, device: str, n_bytes: int) -> Measured:
        return replace(self, overhead_bytes={**self.overhead_bytes, device: n_bytes})


NOTHING_MEASURED = Measured()


class MeasuredStore:
    """Measurements in a folder, a small JSON file for each key. A damaged file counts as none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: MeasurementKey) -> Measured:
        """What is known under a key."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            raw = json.loads((self._folder / key.file_name).read_text("utf-8"))
            points = tuple(_point(point) for point in raw["compute"])
            overhead = {name: _size(n) for name, n in raw["overhead_bytes"].items()}
            proved = tuple(str(name) for name in raw.get("proved", ()))
            return Measured(overhead, points, _size(raw.get("setback_bytes", 0)), proved)
        return NOTHING_MEASURED

    def write(self, key: MeasurementKey, measured: Measured) -> None:
        """Keep measurements; where that isn't possible, they are taken again next time."""
        text = json.dumps({"key": asdict(key), **asdict(measured)}, indent=1)
        write_beside(self._folder / key.file_name, text)


def write_beside(path: Path, text: str) -> None:
    """A small file, whole or as it was before; where it can't be written, nothing happens."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, delete=False
        ) as file:
            file.write(text)
        try:
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)


def _point(raw: Mapping[str, Any]) -> ComputePoint:
    names = "n_ctx", "n_ubatch", "n_bytes", "copied_bytes", "next_bytes"
    sizes = (_size(raw[name]) for name in names)
    return ComputePoint(str(raw["kind"]), str(raw["device"]), *sizes)


def _size(raw: object) -> int:
    if not isinstance(raw, int) or raw < 0:
        raise ValueError(f"not a size: {raw!r}")
    return raw
