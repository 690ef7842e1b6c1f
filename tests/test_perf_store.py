"""Measurements are kept under their key, and a damaged file counts as none."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localmoe.hardware.machine import Gpu, Machine
from localmoe.perf.figures import NOTHING_MEASURED, ComputePoint, Measured
from localmoe.perf.store import MeasurementKey, MeasurementStore, key_of

KEY = MeasurementKey("a machine", "a build", "a model")
POINT = ComputePoint("gpu/f16/1", "CUDA0", 4096, 512, 12345)
MEASURED = Measured({"CUDA0": 700, "CUDA1": 500}, (POINT, replace(POINT, n_ubatch=2048)))


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("[!.]*")
    return file


def test_what_was_written_is_read(tmp_path: Path) -> None:
    MeasurementStore(tmp_path / "new").update_buffers(KEY, lambda _: MEASURED)
    assert MeasurementStore(tmp_path / "new").buffers(KEY) == MEASURED


@pytest.mark.parametrize("field", ["machine", "build", "model"])
def test_another_key_knows_nothing(field: str, tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path)
    store.update_buffers(KEY, lambda _: MEASURED)
    assert store.buffers(replace(KEY, **{field: "another"})) == NOTHING_MEASURED


def test_keys_whose_parts_join_alike_are_kept_apart() -> None:
    assert MeasurementKey("ab", "c", "").file_name != MeasurementKey("a", "bc", "").file_name


def test_a_newer_point_replaces_an_older_one() -> None:
    newer = replace(POINT, n_bytes=99)
    assert MEASURED.with_points((newer,)).compute == (newer, replace(POINT, n_ubatch=2048))
    assert MEASURED.with_overhead("CUDA0", 1).overhead_bytes == {"CUDA0": 1, "CUDA1": 500}
    assert MEASURED.overhead_bytes["CUDA0"] == 700


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"compute": 1, "overhead_bytes": {}}',
        '{"compute": [], "overhead_bytes": []}',
        '{"compute": [], "overhead_bytes": {"CUDA0": "much"}}',
        '{"compute": [{"kind": "gpu"}], "overhead_bytes": {}}',
        '{"compute": [{"kind": "g", "device": "d", "n_ctx": "8", "n_ubatch": 1, "n_bytes": 1}], '
        '"overhead_bytes": {}}',
        '{"compute": [{"kind": "g", "device": "d", "n_ctx": 8, "n_ubatch": 1, "n_bytes": -1}], '
        '"overhead_bytes": {}}',
        '{"compute": [], "overhead_bytes": {"CUDA0": -5}}',
        "\\ud800",
    ],
)
def test_a_damaged_file_counts_as_none(text: str, tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path)
    store.update_buffers(KEY, lambda _: MEASURED)
    the_file(tmp_path).write_text(text, "utf-8")
    assert store.buffers(KEY) == NOTHING_MEASURED
    store.update_buffers(KEY, lambda _: MEASURED)
    assert store.buffers(KEY) == MEASURED


def test_a_file_of_noise_counts_as_none(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path)
    store.update_buffers(KEY, lambda _: MEASURED)
    the_file(tmp_path).write_bytes(bytes(range(256)) * 8)
    assert store.buffers(KEY) == NOTHING_MEASURED


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path)
    for n in range(3):
        store.update_buffers(KEY, lambda known, n=n: known.with_overhead("CUDA0", n))
    assert [path.suffix for path in tmp_path.glob("[!.]*")] == [".json"]


def test_where_nothing_can_be_written_measuring_goes_on(tmp_path: Path) -> None:
    """A file stands where the folder should be; then what stands where a file should be."""
    (tmp_path / "taken").write_text("")
    store = MeasurementStore(tmp_path / "taken")
    store.update_buffers(KEY, lambda _: MEASURED)
    assert store.buffers(KEY) == NOTHING_MEASURED
    store = MeasurementStore(tmp_path)
    os.mkdir(tmp_path / KEY.file_name)
    store.update_buffers(KEY, lambda _: MEASURED)
    assert store.buffers(KEY) == NOTHING_MEASURED
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"taken", KEY.file_name}


ADDING = """
import pathlib, sys
from dataclasses import replace
from localmoe.perf.store import MeasurementKey, MeasurementStore
store = MeasurementStore(pathlib.Path(sys.argv[1]))
for _ in range(100):
    store.update_buffers(
        MeasurementKey("a machine", "a build", "a model"),
        lambda known: replace(known, reserve_bytes=known.reserve_bytes + 1),
    )
"""


def test_no_update_of_two_processes_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ADDING, str(tmp_path)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert MeasurementStore(tmp_path).buffers(KEY).reserve_bytes == 200


@pytest.mark.parametrize(
    "other",
    [
        {"cpu": "another"}, {"cpu_features": frozenset({"avx512"})}, {"n_cores": 4},
        {"ram_total_bytes": 1 << 34}, {"gpus": (Gpu("CUDA0", "a card", 1 << 33, 1 << 33),)},
    ],
)  # fmt: skip
def test_another_machine_has_another_key(other: dict[str, Any]) -> None:
    here = Machine(1 << 35, 1 << 35, 2, cpu="a processor")
    assert key_of(replace(here, **other), None) != key_of(here, None)
    assert key_of(replace(here, ram_available_bytes=0), None) == key_of(here, None)
