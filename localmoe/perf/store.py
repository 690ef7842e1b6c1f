"""Measurements of this machine on disk: rates, buffers, speeds and timings, by their key."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ..engine.rates import CPU, Bandwidths, StepTime
from ..gguf.model_meta import ModelMeta
from ..hardware.machine import Machine
from .cpu_tuning import TuningRecord
from .figures import NOTHING_MEASURED, ComputePoint, Measured
from .rates import NO_BANDWIDTHS
from .speed_records import LARGEST_RATIO, MAX_RECORDS, SpeedRecord


@dataclass(frozen=True, slots=True)
class MeasurementKey:
    """What a measurement holds for; with another value in any of these, nothing is known."""

    machine: str
    build: str
    model: str

    @property
    def file_name(self) -> str:
        return hashlib.sha256("\0".join(asdict(self).values()).encode()).hexdigest()[:24] + ".json"


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


_bandwidths_codec: TypeAdapter[Bandwidths] = TypeAdapter(Bandwidths)


# ---- between runs ----


class BandwidthStore:
    """Rates in a folder, a small JSON file for each machine and build. A damaged one is none.

    The key's model plays no part: rates are the machine's own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: MeasurementKey) -> Bandwidths:
        """What is known of a machine."""
        with contextlib.suppress(OSError, ValueError):
            return parse_bandwidths(self._path(key).read_bytes())
        return NO_BANDWIDTHS

    def write(self, key: MeasurementKey, bandwidths: Bandwidths) -> None:
        """Keep rates; where that isn't possible, they are measured again next time."""
        write_beside(self._path(key), json.dumps(asdict(bandwidths), indent=1))

    def _path(self, key: MeasurementKey) -> Path:
        machine = MeasurementKey(key.machine, key.build, "bandwidths")
        return self._folder / machine.file_name


def unmeasured(
    bandwidths: Bandwidths, n_threads: Iterable[int], types: Iterable[str]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Numbers of threads and tensor types that are still to be measured: all of both, or none."""
    wanted_threads, wanted_types = tuple(n_threads), tuple(types)
    devices = {d.n_threads for d in bandwidths.devices if d.device == CPU}
    products = {(p.n_threads, p.type) for p in bandwidths.products if p.device == CPU}
    pairs = {(n, type) for n in wanted_threads for type in wanted_types}
    if devices >= set(wanted_threads) and products >= pairs:
        return (), ()
    return wanted_threads, wanted_types


def parse_bandwidths(text: bytes) -> Bandwidths:
    """The text of a file. Raises ValueError where it isn't one, or has a rate that can't be."""
    found = _bandwidths_codec.validate_json(text, strict=True)
    rates = asdict(found)
    for rate in (*rates["devices"], *rates["products"]):
        numbers = [value for value in rate.values() if not isinstance(value, str)]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError(f"not rates: {rate}")
    return found


class TuningStore:
    """Timings in a folder, a small JSON file for each machine, build and model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: MeasurementKey) -> TuningRecord | None:
        """What was timed; None where nothing was, or the file is damaged."""
        with contextlib.suppress(OSError, ValueError):
            found = _tuning_codec.validate_json(self._path(key).read_bytes(), strict=True)
            return found if is_sound(found.tuning.times) else None
        return None

    def write(self, key: MeasurementKey, kept: TuningRecord) -> None:
        write_beside(self._path(key), json.dumps(asdict(kept)))

    def _path(self, key: MeasurementKey) -> Path:
        return (
            self._folder / MeasurementKey(key.machine, key.build, f"tuning {key.model}").file_name
        )


def is_sound(times: Iterable[StepTime]) -> bool:
    """Whether these are times of something: a step of one token first."""
    known = list(times)
    return not known or (known[0].n_tokens == 1 and all(0 < t.seconds < 1e6 for t in known))


_tuning_codec: TypeAdapter[TuningRecord] = TypeAdapter(TuningRecord)


_record_codec: TypeAdapter[SpeedRecord] = TypeAdapter(SpeedRecord)


class SpeedStore:
    """Records in a folder, a file of lines for each machine and build. Damaged lines are none.

    A line is appended whole, so runs that end at once don't harm each other's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: MeasurementKey) -> tuple[SpeedRecord, ...]:
        """The last records of a machine, oldest first."""
        lines: list[bytes] = []
        with contextlib.suppress(OSError):
            lines = self._path(key).read_bytes().splitlines()
        found = (parse_record(line) for line in lines)
        return tuple(record for record in found if record)[-MAX_RECORDS:]

    def add(self, key: MeasurementKey, records: Iterable[SpeedRecord]) -> None:
        """Keep records; where that isn't possible, nothing was learned."""
        text = "".join(json.dumps(asdict(record)) + "\n" for record in records if sound(record))
        if not text:
            return
        path = self._path(key)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(file, (b"\n" if torn else b"") + text.encode())
            finally:
                os.close(file)
            self._shorten(path)

    def forget(self, key: MeasurementKey) -> None:
        """Of a machine that is measured anew, what rested on the old rates."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _shorten(self, path: Path) -> None:
        """Twice as many lines as count are cut back, written beside and renamed."""
        lines = path.read_bytes().splitlines(keepends=True)
        if len(lines) <= 2 * MAX_RECORDS:
            return
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_bytes(b"".join(lines[-MAX_RECORDS:]))
        os.replace(beside, path)

    def _path(self, key: MeasurementKey) -> Path:
        machine = MeasurementKey(key.machine, key.build, "speeds")
        return (self._folder / machine.file_name).with_suffix(".jsonl")


def parse_record(line: bytes) -> SpeedRecord | None:
    """A line of the file; None where it is damaged or says something absurd."""
    with contextlib.suppress(ValueError):
        record = _record_codec.validate_json(line, strict=True)
        return record if sound(record) else None
    return None


def sound(record: SpeedRecord) -> bool:
    speeds = (record.formula_tps, record.real_tps)
    if not all(math.isfinite(tps) and tps > 0 for tps in speeds):
        return False
    return 1 / LARGEST_RATIO <= record.ratio <= LARGEST_RATIO


def key_of(machine: Machine, meta: ModelMeta | None) -> MeasurementKey:
    """What measurements hold for: a machine, a build, and a model where one is concerned."""
    gpus = [f"{g.name} {g.description} {g.total_bytes} {g.driver_version}" for g in machine.gpus]
    build = f"{machine.build.version} {sorted(machine.build.backends)}"
    model = ""
    if meta is not None:
        shape = (meta.architecture, meta.file_bytes, len(meta.tensors), meta.weights_bytes)
        model = f"{meta.name} {shape}"
    return MeasurementKey(f"{gpus} {machine.n_cores}", build, model)
