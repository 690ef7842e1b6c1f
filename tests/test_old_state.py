"""Files of version 0.1.0 still serve, or are measured anew without a word of error."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from localmoe.gguf.demo import DEMO

OLD = Path(__file__).parent / "data/state_0_1_0"
SHA256 = "2e300926ca856821f62cc246d51941b9d04dd4dccce40f0ac1fe48cffc6c4006"
REPO = "maker/Small-GGUF"
COMMIT = "10e5ed47dac2aa5822b0569867b53903ce608d21"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with all of it, as if this program had written it here."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    blob = folder / f"hf/hub/models--maker--Small-GGUF/blobs/{SHA256}"
    link = blob.parents[1] / f"snapshots/{COMMIT}/small.Q4_K_M.gguf"
    ref = blob.parents[1] / "refs/main"
    for path in (blob, link, ref):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(DEMO, blob)
    link.symlink_to(os.path.relpath(blob, link.parent))
    ref.write_text(COMMIT)
    stamp = folder / "state/verified/stamp.json"
    seen = blob.stat()
    text = stamp.read_text().replace('"BLOB"', json.dumps(str(blob)))
    text = text.replace("INODE", str(seen.st_ino)).replace("CHANGED", str(seen.st_mtime_ns))
    name = hashlib.sha256(os.fsencode(os.path.realpath(blob))).hexdigest()[:32]
    (stamp.parent / f"{name}.json").write_text(text)
    stamp.unlink()
    for manifest in (folder / "work").glob("*.manifest.json"):
        text = manifest.read_text().replace("CHANGED", str(DEMO.stat().st_mtime_ns))
        manifest.write_text(text)
    return folder


def localmoe(old: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a command on the old state; it must end well, and without a word on stderr."""
    env = {
        **os.environ,
        "LOCALMOE_STATE": str(old / "state"),
        "LOCALMOE_CONFIG": str(old / "config"),
        "HF_HOME": str(old / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "localmoe", *arguments],
        cwd=old / "work", env=env, input=text, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for word in ("error", "damaged", "can't", "Something unforeseen", "warning"):
        assert word not in result.stderr
    return result


def test_an_old_session_goes_on(old: Path) -> None:
    listed = json.loads(localmoe(old, "sessions", "list", "--json").stdout)
    assert [session["name"] for session in listed] == ["old"]
    before = (old / "state/sessions/old.jsonl").read_bytes()
    shown = localmoe(old, "sessions", "show", "old").stdout
    assert "What do you study?" in shown
    localmoe(old, "chat", "demo", "--session", "old", "-q", text="Is it hard?\n")
    after = (old / "state/sessions/old.jsonl").read_bytes()
    assert after.startswith(before)
    assert b"Is it hard?" in after[len(before) :]


def test_a_verified_model_is_not_hashed_again(old: Path) -> None:
    listed = json.loads(localmoe(old, "list", "--installed", "--json").stdout)
    assert REPO in json.dumps(listed)
    (stamp,) = (old / "state/verified").glob("*.json")
    written_ns = stamp.stat().st_mtime_ns
    assert localmoe(old, "run", REPO, "Hi!").stdout.strip()
    assert list((old / "state/verified").glob("*.json")) == [stamp]
    assert stamp.stat().st_mtime_ns == written_ns
    localmoe(old, "verify", REPO)


def test_a_finished_batch_has_nothing_left_to_do(old: Path) -> None:
    before = (old / "work/out.jsonl").read_bytes()
    localmoe(old, "batch", "demo", "-i", "in.jsonl", "-o", "out.jsonl")
    assert (old / "work/out.jsonl").read_bytes() == before


def test_a_batch_that_was_cut_short_goes_on_where_it_was(old: Path) -> None:
    path = old / "work/cut.jsonl"
    whole_lines = path.read_bytes().splitlines(keepends=True)[:3]
    localmoe(old, "batch", "demo", "-i", "in.jsonl", "-o", "cut.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[:3] == whole_lines
    names = [json.loads(line)["custom_id"] for line in lines]
    assert sorted(names) == ["r1", "r2", "r3", "r4", "r5", "r6"]


def test_settings_count_as_they_did(old: Path) -> None:
    shown = localmoe(old, "config", "show", "demo").stdout.splitlines()
    rows = {line.split()[0]: line for line in shown if line.strip()}
    assert rows["max_tokens"].split()[1] == "12"
    assert rows["seed"].split()[1] == "3"
    localmoe(old, "doctor")


COMMANDS: Sequence[Sequence[str]] = (("plan", "demo", "--json"), ("run", "demo", "Hi!", "-n", "2"))


def kind_of(path: Path) -> str:
    """Tells rates ("devices") from buffers ("compute") by a field that both versions have."""
    fields = json.loads(path.read_bytes())
    return next((name for name in ("devices", "compute") if name in fields), "another kind")


@pytest.fixture(scope="module")
def measured_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The measurements that this version takes on this machine, under the names that it reads."""
    new = tmp_path_factory.mktemp("new")
    (new / "work").mkdir()
    for command in COMMANDS:
        localmoe(new, *command)
    return new / "state/measured"


@pytest.mark.parametrize("how", ["of version 0.1.0", "torn", "empty", "of another version"])
def test_old_measurements_break_no_command(old: Path, measured_here: Path, how: str) -> None:
    from_0_1_0 = {kind_of(path): path.read_bytes() for path in (OLD / "state/measured").iterdir()}
    put: dict[Path, bytes] = {}
    for path in measured_here.glob("*.json"):
        kind, content = kind_of(path), path.read_bytes()
        if kind not in from_0_1_0:
            continue
        put[old / "state/measured" / path.name] = {
            "of version 0.1.0": from_0_1_0[kind], "torn": content[: len(content) // 2],
            "empty": b"", "of another version": b'{"version": 99, "rates": []}',
        }[how]  # fmt: skip
    assert len(put) == len(from_0_1_0) == 2
    for path, content in put.items():
        path.write_bytes(content)
    for command in COMMANDS:
        assert localmoe(old, *command).stdout.strip()
    # what can't be read was measured anew
    assert {kind_of(path) for path in put} == set(from_0_1_0)
