"""Measurements are kept under their key, and a damaged file counts as none."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from localmoe.perf.figures import NOTHING_MEASURED, ComputePoint, Measured
from localmoe.perf.store import MeasuredStore, MeasurementKey

KEY = MeasurementKey("a machine", "a build", "a model")
POINT = ComputePoint("gpu/f16/1", "CUDA0", 4096, 512, 12345)
MEASURED = Measured({"CUDA0": 700, "CUDA1": 500}, (POINT, replace(POINT, n_ubatch=2048)))


def the_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_what_was_written_is_read(tmp_path: Path) -> None:
    MeasuredStore(tmp_path / "new").write(KEY, MEASURED)
    assert MeasuredStore(tmp_path / "new").read(KEY) == MEASURED


@pytest.mark.parametrize("field", ["machine", "build", "model"])
def test_another_key_knows_nothing(field: str, tmp_path: Path) -> None:
    store = MeasuredStore(tmp_path)
    store.write(KEY, MEASURED)
    assert store.read(replace(KEY, **{field: "another"})) == NOTHING_MEASURED


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
    store = MeasuredStore(tmp_path)
    store.write(KEY, MEASURED)
    the_file(tmp_path).write_text(text, "utf-8")
    assert store.read(KEY) == NOTHING_MEASURED
    store.write(KEY, MEASURED)
    assert store.read(KEY) == MEASURED


def test_a_file_of_noise_counts_as_none(tmp_path: Path) -> None:
    store = MeasuredStore(tmp_path)
    store.write(KEY, MEASURED)
    the_file(tmp_path).write_bytes(bytes(range(256)) * 8)
    assert store.read(KEY) == NOTHING_MEASURED


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    store = MeasuredStore(tmp_path)
    for n in range(3):
        store.write(KEY, MEASURED.with_overhead("CUDA0", n))
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_where_nothing_can_be_written_measuring_goes_on(tmp_path: Path) -> None:
    """A file stands where the folder should be; then what stands where a file should be."""
    (tmp_path / "taken").write_text("")
    store = MeasuredStore(tmp_path / "taken")
    store.write(KEY, MEASURED)
    assert store.read(KEY) == NOTHING_MEASURED
    store = MeasuredStore(tmp_path)
    os.mkdir(tmp_path / KEY.file_name)
    store.write(KEY, MEASURED)
    assert store.read(KEY) == NOTHING_MEASURED
    assert {path.name for path in tmp_path.iterdir()} == {"taken", KEY.file_name}
