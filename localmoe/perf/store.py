"""Measurements of this machine on disk: rates, buffers, speeds and timings, by their key.

All of them lie in one folder, which can be deleted at any time. A damaged file counts as none, and
what can't be written is measured again: nothing here fails a command.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from ..engine.rates import CPU, Bandwidths, StepTime
from ..files import make_private_folder, read_regular, write_atomically
from ..gguf.model_meta import ModelMeta
from ..hardware.machine import Machine
from .cpu_tuning import TuningRecord
from .figures import NOTHING_MEASURED, ComputePoint, Measured
from .rates import NO_BANDWIDTHS
from .speed_records import LARGEST_RATIO, MAX_RECORDS, SpeedRecord

LOCK_NAME = ".lock"
LOCK_S = 5.0
"""How long a process waits for another that keeps a measurement; that takes milliseconds."""

_RATES: TypeAdapter[Bandwidths] = TypeAdapter(Bandwidths)
_TIMING: TypeAdapter[TuningRecord] = TypeAdapter(TuningRecord)
_SPEED_RECORD: TypeAdapter[SpeedRecord] = TypeAdapter(SpeedRecord)


@dataclass(frozen=True, slots=True)
class MeasurementKey:
    """What a measurement holds for; with another value in any of these, nothing is known."""

    machine: str
    build: str
    model: str

    @property
    def file_name(self) -> str:
        """The name of the file with the buffers that were measured under this key."""
        return hashlib.sha256("\0".join(asdict(self).values()).encode()).hexdigest()[:24] + ".json"


def key_of(machine: Machine, meta: ModelMeta | None) -> MeasurementKey:
    """What measurements hold for: a machine, a build, and a model where one is concerned.

    The machine is its processor, features, cores, memory and cards: a folder that several hosts
    share, or a container that moves, must not mix their figures.
    """
    gpus = [f"{g.name} {g.description} {g.total_bytes} {g.driver_version}" for g in machine.gpus]
    cpu = f"{machine.cpu} {sorted(machine.cpu_features)} {machine.n_cores}"
    build = f"{machine.build.version} {sorted(machine.build.backends)}"
    model = ""
    if meta is not None:
        shape = (meta.architecture, meta.file_bytes, len(meta.tensors), meta.weights_bytes)
        model = f"{meta.name} {shape}"
    return MeasurementKey(f"{cpu} {machine.ram_total_bytes} {gpus}", build, model)


class MeasurementStore:
    """Measurements in a folder, shared by all processes of a person.

    Buffers belong to a machine, build and model; rates and speed records to a machine and build;
    a timing to all three. Records are lines that are appended whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    # ---- buffers ----

    def buffers(self, key: MeasurementKey) -> Measured:
        """Returns the buffers, overheads and reserve that are known under a key."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            raw = json.loads(read_regular(self._path(key)))
            points = tuple(_point(point) for point in raw["compute"])
            overhead = {name: _size(n) for name, n in raw["overhead_bytes"].items()}
            verified = tuple(str(name) for name in raw.get("verified_plans", ()))
            return Measured(overhead, points, _size(raw.get("reserve_bytes", 0)), verified)
        return NOTHING_MEASURED

    def update_buffers(
        self, key: MeasurementKey, change: Callable[[Measured], Measured]
    ) -> Measured:
        """Changes what is known under a key, as it is now; returns the outcome.

        No other process writes in between: a reserve that was raised after a plan ran out of
        memory must not get lost.
        """
        with self._locked():
            measured = change(self.buffers(key))
            self._write(key, {"key": asdict(key), **asdict(measured)})
        return measured

    # ---- rates ----

    def rates(self, key: MeasurementKey) -> Bandwidths:
        """Returns what is known of a machine's devices, whatever the model."""
        with contextlib.suppress(OSError, ValueError):
            return parse_bandwidths(read_regular(self._path(_of_machine(key, "bandwidths"))))
        return NO_BANDWIDTHS

    def write_rates(self, key: MeasurementKey, rates: Bandwidths) -> None:
        """Keeps a machine's rates."""
        with self._locked():
            self._write(_of_machine(key, "bandwidths"), asdict(rates))

    # ---- timings ----

    def timing(self, key: MeasurementKey) -> TuningRecord | None:
        """Returns how the CPU was timed on a model; None where it wasn't."""
        with contextlib.suppress(OSError, ValueError):
            raw = read_regular(self._path(_of_timing(key)))
            found = _TIMING.validate_json(raw, strict=True)
            return found if is_sound(found.tuning.times) else None
        return None

    def write_timing(self, key: MeasurementKey, record: TuningRecord) -> None:
        """Keeps a timing."""
        with self._locked():
            self._write(_of_timing(key), asdict(record))

    # ---- speed records ----

    def speed_records(self, key: MeasurementKey) -> tuple[SpeedRecord, ...]:
        """Returns the last records of a machine, oldest first. Damaged lines are none."""
        lines: list[bytes] = []
        with contextlib.suppress(OSError):
            lines = read_regular(self._records_path(key)).splitlines()
        found = (parse_record(line) for line in lines)
        return tuple(record for record in found if record)[-MAX_RECORDS:]

    def add_speed_records(self, key: MeasurementKey, records: Iterable[SpeedRecord]) -> None:
        """Keeps records of a machine; twice as many as count are cut back to those that do."""
        text = "".join(json.dumps(asdict(record)) + "\n" for record in records if sound(record))
        if not text:
            return
        path = self._records_path(key)
        with self._locked(), contextlib.suppress(OSError):
            old = read_regular(path) if path.exists() else b""
            torn = b"" if old.endswith(b"\n") or not old else b"\n"
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(file, torn + text.encode())
            finally:
                os.close(file)
            lines = read_regular(path).splitlines(keepends=True)
            if len(lines) > 2 * MAX_RECORDS:
                write_atomically(path, b"".join(lines[-MAX_RECORDS:]), durable=False, mode=0o600)

    def forget_speed_records(self, key: MeasurementKey) -> None:
        """Drops the records of a machine whose rates are measured anew."""
        with contextlib.suppress(OSError):
            self._records_path(key).unlink(missing_ok=True)

    # ---- files ----

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes out; goes on without a lock where the folder can't hold one."""
        lock = FileLock(self._folder / LOCK_NAME, timeout=LOCK_S)
        with contextlib.suppress(OSError, Timeout):
            make_private_folder(self._folder)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _write(self, key: MeasurementKey, content: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            text = json.dumps(content, indent=1).encode()
            write_atomically(self._path(key), text, durable=False, mode=0o600)

    def _path(self, key: MeasurementKey) -> Path:
        return self._folder / key.file_name

    def _records_path(self, key: MeasurementKey) -> Path:
        return self._path(_of_machine(key, "speeds")).with_suffix(".jsonl")


def _of_machine(key: MeasurementKey, kind: str) -> MeasurementKey:
    return replace(key, model=kind)


def _of_timing(key: MeasurementKey) -> MeasurementKey:
    return replace(key, model=f"tuning {key.model}")


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
    found = _RATES.validate_json(text, strict=True)
    rates = asdict(found)
    for rate in (*rates["devices"], *rates["products"]):
        numbers = [value for value in rate.values() if not isinstance(value, str)]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError(f"not rates: {rate}")
    return found


def is_sound(times: Iterable[StepTime]) -> bool:
    """Whether these are times of something: a step of one token first."""
    known = list(times)
    return not known or (known[0].n_tokens == 1 and all(0 < t.seconds < 1e6 for t in known))


def parse_record(line: bytes) -> SpeedRecord | None:
    """A line of the file; None where it is damaged or says something absurd."""
    with contextlib.suppress(ValueError):
        record = _SPEED_RECORD.validate_json(line, strict=True)
        return record if sound(record) else None
    return None


def sound(record: SpeedRecord) -> bool:
    """Whether a record holds speeds that can be."""
    speeds = (record.formula_tps, record.real_tps)
    if not all(math.isfinite(tps) and tps > 0 for tps in speeds):
        return False
    return 1 / LARGEST_RATIO <= record.ratio <= LARGEST_RATIO


def _point(raw: Mapping[str, Any]) -> ComputePoint:
    names = "n_ctx", "n_ubatch", "n_bytes", "copied_bytes", "next_bytes"
    sizes = (_size(raw[name]) for name in names)
    return ComputePoint(str(raw["kind"]), str(raw["device"]), *sizes)


def _size(raw: object) -> int:
    if not isinstance(raw, int) or raw < 0:
        raise ValueError(f"not a size: {raw!r}")
    return raw
