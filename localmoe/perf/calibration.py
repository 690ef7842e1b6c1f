"""What is known of this machine's speed: rates measured once, and what runs really got."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..engine.client import EngineProcess
from ..engine.protocol import Delta, Placement
from ..engine.rates import Tuning
from ..gguf.model_meta import ModelMeta
from .cost_model import CostModel, Speeds, cost_model_of, records_of
from .rates import threads_to_measure, types_to_measure
from .speed_records import measured_too_slow
from .store import MeasurementKey, MeasurementStore, unmeasured


@dataclass(frozen=True, slots=True)
class SpeedLog:
    """Where a loaded model's speeds are kept: tell it the last delta of each answer."""

    store: MeasurementStore
    key: MeasurementKey
    setting: CostModel

    def add(self, last: Delta) -> None:
        """Keep the speeds of an answer that had the engine to itself and was not stopped."""
        if last.usage and last.timings and last.finish_reason in ("stop", "length"):
            records = records_of(self.setting, last.usage, last.timings, time.time())
            self.store.add_speed_records(self.key, records)


class Calibration:
    """Rates and speed records of one machine and build."""

    def __init__(self, store: MeasurementStore, key: MeasurementKey) -> None:
        self._key = key
        self._store = store

    def speeds(
        self, meta: ModelMeta, n_threads: int, engine: EngineProcess | None = None
    ) -> Speeds:
        """Returns what forecasts for a model are made from.

        With an engine, what isn't known yet is measured in it: that takes a second, once.
        """
        known = self._store.rates(self._key)
        records = self._store.speed_records(self._key)
        if engine is None:
            return Speeds(known, records)
        wanted = threads_to_measure(n_threads), types_to_measure(meta)
        if measured_too_slow(records):  # the machine was busy then
            self._store.forget_speed_records(self._key)
            records, missing = (), wanted
        else:
            missing = unmeasured(known, *wanted)
        if missing[0]:
            known = known.with_newer(engine.bandwidths(*missing))
            self._store.write_rates(self._key, known)
        return Speeds(known, records)

    def log(
        self,
        meta: ModelMeta,
        placement: Placement,
        gpus: tuple[str, ...],
        tuning: Tuning | None = None,
    ) -> SpeedLog:
        """Returns where the speeds of a loaded model are kept."""
        known = self._store.rates(self._key)
        setting = cost_model_of(placement, meta, known, gpus, tuning=tuning)
        return SpeedLog(self._store, self._key, setting)
