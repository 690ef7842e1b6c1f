"""From a name to an answer, over a real HTTP server: find, choose, fetch, verify, remove."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from make_model import SHAPES, make_model
from standin_hub import Fault, RequestRecord, StandInHub

from localmoe.callbacks import DownloadProgress
from localmoe.cli import run_command
from localmoe.gguf.demo import PACKAGE
from localmoe.terminal.progress import download_line

REPO = "maker/Small-GGUF"
DEMO = PACKAGE / "models" / "demo" / "demo.gguf"
NAME = "small.Q4_K_M.gguf"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A Hub with one repository, a cache of our own, and nothing known before."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("LOCALMOE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("LOCALMOE_CONFIG", str(tmp_path / "config"))
    with StandInHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add_repo(REPO, {NAME: DEMO})
        yield hub


def catalog(tmp_path: Path, text: str) -> None:
    (tmp_path / "config").mkdir(exist_ok=True)
    (tmp_path / "config" / "models.yaml").write_text(text)


def refused(
    arguments: list[str], code: int, *parts: str, capsys: pytest.CaptureFixture[str]
) -> str:
    """That a command ends with a code and one line that has these parts."""
    assert run_command(arguments) == code
    err = capsys.readouterr().err
    line = err.strip().splitlines()[-1]
    assert line.startswith("localmoe: ")
    assert all(part in line for part in parts), line
    return line


# ---- from nothing to an answer ----


def test_run_on_an_empty_machine_fetches_verifies_and_answers(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["run", REPO, "Hi!", "--temp", "0", "-n", "8"]) == 0
    first = capsys.readouterr()
    assert first.out.strip()
    assert f"{REPO}:Q4_K_M is not here yet" in first.err
    sent = hub.bytes_sent()
    assert DEMO.stat().st_size <= sent <= DEMO.stat().st_size + 2**21
    requests = len(hub.requests)
    assert run_command(["run", REPO, "Hi!", "--temp", "0", "-n", "8", "-q"]) == 0
    assert capsys.readouterr().out == first.out
    assert len(hub.requests) == requests  # what is here needs no network


def test_plan_show_and_prompt_need_the_header_alone(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    big = tmp_path / "big.Q4_K_M.gguf"
    make_model(big, SHAPES["mixtral-8x7b"], "Q4_K", header_only=True)
    hub.add_repo("maker/Big-GGUF", {big.name: big}, sha256={big.name: "ab" * 32})
    assert run_command(["plan", "maker/Big-GGUF:Q4_K_M", "--json", "--ram", "64GiB"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True
    assert hub.bytes_sent() < 4 * 2**20
    sent = hub.bytes_sent()
    assert run_command(["show", "maker/Big-GGUF:Q4_K_M", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_experts"] == 8
    assert run_command(["prompt", "maker/Big-GGUF:Q4_K_M", "Hello", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]
    assert hub.bytes_sent() == sent  # the header came once
    assert not (tmp_path / "hf").exists()  # and nothing of it is in the cache


# ---- which quant ----


def test_the_recommended_quant_is_chosen_and_why_is_said(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("m.Q8_0.gguf", "m.Q4_K_M.gguf", "m.Q2_K.gguf")
    hub.add_repo("maker/Many-GGUF", dict.fromkeys(names, DEMO))
    assert run_command(["pull", "maker/Many-GGUF", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "maker/Many-GGUF:Q4_K_M"
    assert run_command(["pull", "maker/Many-GGUF"]) == 0
    assert "is here and verified" in capsys.readouterr().out


def test_where_the_recommended_one_is_too_large_the_best_that_fits_is_chosen(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    huge = tmp_path / "m.Q4_K_M.gguf"
    make_model(huge, SHAPES["mixtral-8x22b"], "Q4_K", header_only=True)
    files = {huge.name: huge, "m.Q3_K_M.gguf": DEMO, "m.IQ1_S.gguf": DEMO}
    hub.add_repo("maker/Many-GGUF", files, sha256={huge.name: "ab" * 32})
    assert run_command(["plan", "maker/Many-GGUF", "--ram", "16GiB"]) == 0
    shown = capsys.readouterr().err
    assert "Q3_K_M" in shown
    assert "the best that fits" in shown


def test_a_quant_that_is_here_is_preferred(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("m.Q4_K_M.gguf", "m.Q2_K.gguf")
    hub.add_repo("maker/Many-GGUF", dict.fromkeys(names, DEMO))
    assert run_command(["pull", "maker/many-gguf:q2_k".replace("many-gguf", "Many-GGUF")]) == 0
    requests = len(hub.requests)
    assert run_command(["pull", "maker/Many-GGUF", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("\n", 1)[1])["model"].endswith(":Q2_K")
    assert len(hub.requests) == requests + 1  # whether there is a newer one
    assert run_command(["show", "maker/Many-GGUF", "--json"]) == 0
    assert len(hub.requests) == requests + 1


def test_of_several_that_are_here_the_best_is_taken(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("m.Q6_K.gguf", "m.Q4_K_M.gguf", "m.IQ1_S.gguf")
    hub.add_repo("maker/Many-GGUF", dict.fromkeys(names, DEMO))
    for label in ("Q6_K", "IQ1_S"):
        assert run_command(["pull", f"maker/Many-GGUF:{label}", "-q"]) == 0
    assert run_command(["pull", "maker/Many-GGUF"]) == 0
    shown = capsys.readouterr()
    assert "maker/Many-GGUF:Q6_K is here" in shown.out
    assert "Q6_K (9.8 MiB) is the best of those that are here." in shown.err


def test_without_the_recommended_quant_no_poor_one_is_taken(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("m.Q8_0.gguf", "m.Q5_K_M.gguf", "m.IQ1_S.gguf")
    hub.add_repo("maker/Many-GGUF", dict.fromkeys(names, DEMO))
    assert run_command(["pull", "maker/Many-GGUF"]) == 0
    shown = capsys.readouterr()
    assert "maker/Many-GGUF:Q5_K_M is here and verified" in shown.out
    assert shown.err.count("there is no Q4_K_M") == 1
    assert "is not here yet: fetching 9.8 MiB." in shown.err


def test_without_a_fit_it_can_be_looked_at_and_fetched(
    hub: StandInHub,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("m.Q4_K_M.gguf", "m.Q2_K.gguf")
    hub.add_repo("maker/Many-GGUF", dict.fromkeys(names, DEMO))
    monkeypatch.setenv("LOCALMOE_RAM", "4MiB")
    monkeypatch.setenv("LOCALMOE_N_GPU_LAYERS", "0")
    refused(["pull", "maker/Many-GGUF"], 3, "No quant of it fits here", "Q4_K_M", capsys=capsys)
    assert run_command(["show", "maker/Many-GGUF", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    commit = hub.repos["maker/Many-GGUF"].refs["main"]
    assert (shown["repo"], shown["revision"], shown["files"]) == ("maker/Many-GGUF", commit, [])
    assert run_command(["prompt", "maker/Many-GGUF", "Hello", "--json"]) == 0
    assert capsys.readouterr().out
    assert run_command(["pull", "maker/Many-GGUF", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "maker/Many-GGUF:Q4_K_M"


# ---- which commit ----


def other_content() -> bytes:
    """The demo model with other weights."""
    content = bytearray(DEMO.read_bytes())
    content[-1] ^= 1
    return bytes(content)


def test_a_revision_is_the_one_that_runs(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    def pulled(name: str) -> str:
        assert run_command(["pull", name, "--json"]) == 0
        shown = capsys.readouterr()
        assert name == REPO or "newer" not in shown.err
        return json.loads(shown.out)["files"][0].split("/snapshots/")[1].split("/")[0]

    old = pulled(REPO)
    new = hub.add_repo(REPO, {NAME: other_content()})
    assert pulled(REPO) == old
    assert pulled(f"{REPO}@{new}") == new
    assert pulled(f"{REPO}@{old}") == old
    assert pulled(f"{REPO}@{old[:8]}") == old
    assert pulled(f"{REPO}@main") == new  # asked of the Hub: refs/main was the old one
    assert pulled(REPO) == new
    refused(["pull", f"{REPO}@v9"], 2, "has no revision v9", capsys=capsys)
    hub.requests.clear()
    assert run_command(["show", f"{REPO}@main", "--offline", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["revision"] == new
    assert run_command(["show", f"{REPO}@{old}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["revision"] == old
    assert hub.requests == []


def test_pull_says_that_there_is_a_newer_one(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old = hub.repos[REPO].refs["main"]
    assert run_command(["pull", REPO]) == 0
    assert "newer" not in capsys.readouterr().err
    hub.add_repo(REPO, {NAME: DEMO, "README.md": b"hello"})
    assert run_command(["pull", REPO]) == 0
    assert "newer" not in capsys.readouterr().err  # the same file
    new = hub.add_repo(REPO, {NAME: other_content()})
    assert run_command(["pull", REPO]) == 0
    command = f"pull {REPO}@{new}:Q4_K_M"
    assert f"A newer commit is on the Hub: localmoe {command}" in capsys.readouterr().err
    catalog(tmp_path, f"mine:\n  repo: {REPO}\n  revision: {old}\n")
    assert run_command(["pull", "mine"]) == 0
    assert "newer" not in capsys.readouterr().err
    assert run_command(command.split()) == 0
    assert f"{REPO}@{new}:Q4_K_M is here" in capsys.readouterr().out


def test_a_poor_quant_is_warned_of(hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add_repo("maker/Many-GGUF", {"m.IQ1_M.gguf": DEMO})
    assert run_command(["plan", "maker/Many-GGUF:IQ1_M"]) == 0
    assert "IQ1_M is poor in a model of few large experts" in capsys.readouterr().err


def test_the_catalog_of_a_person(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    catalog(tmp_path, f"mine:\n  repo: {REPO}\n  sampling: {{temperature: 0}}\n")
    assert run_command(["run", "mine:q4_k_m", "Hi!", "-n", "4"]) == 0
    assert capsys.readouterr().out
    assert run_command(["list", "--installed", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [e["name"] for e in listed["catalog"] if e["installed"]] == ["mine"]
    assert all(e["installed"][0]["verified"] for e in listed["catalog"] if e["installed"])


# ---- refused before it is fetched ----


def nothing_was_fetched(hub: StandInHub) -> bool:
    return hub.bytes_sent() <= 2**21


def test_an_early_layout_is_refused(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    early = tmp_path / "early.Q8_0.gguf"
    make_model(early, SHAPES["tiny"], "Q8_0", split_experts=True)
    hub.add_repo("maker/Early-GGUF", {early.name: early})
    refused(["pull", "maker/Early-GGUF"], 1, "early layout", capsys=capsys)
    assert nothing_was_fetched(hub)


def test_of_early_files_a_newer_one_is_named(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = [f"mixtral-8x7b-instruct-v0.1.{label}.gguf" for label in ("Q4_K_M", "Q2_K")]
    for name, quant in zip(names, ("Q4_K_M", "Q2_K"), strict=True):
        shape = SHAPES["mixtral-8x7b"]
        make_model(tmp_path / name, shape, quant, header_only=True, split_experts=True)
    files = {name: tmp_path / name for name in names}
    hub.add_repo("TheBloke/Mixtral-GGUF", files, sha256={n: "ab" * 32 for n in names})
    for name in ("TheBloke/Mixtral-GGUF", "TheBloke/Mixtral-GGUF:Q4_K_M"):
        line = refused(["pull", name, "--force"], 1, "early layout", capsys=capsys)
        assert line.endswith("Take a newer one: localmoe pull mixtral:Q4_K_M")
    assert run_command(["show", "TheBloke/Mixtral-GGUF"]) == 0
    assert "localmoe pull mixtral:Q4_K_M" in capsys.readouterr().out


def test_an_early_file_that_is_here_can_be_converted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "e f.gguf", SHAPES["tiny"], "Q8_0", split_experts=True)
    line = refused(["run", "./e f.gguf", "Hi"], 1, "early layout", capsys=capsys)
    assert f"localmoe convert '{tmp_path}/e f.gguf'" in line
    folder = tmp_path / ("a" * 100)  # too long to be said in a line
    folder.mkdir()
    make_model(folder / "e.gguf", SHAPES["tiny"], "Q8_0", split_experts=True)
    line = refused(["run", f"{folder}/e.gguf", "Hi"], 1, "early layout", capsys=capsys)
    assert "localmoe convert FILE, or take a newer one: localmoe list" in line
    assert len(line) <= 200 + len("localmoe: ")


def test_an_unknown_architecture_is_refused(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    key = b"general.architecture"
    content = DEMO.read_bytes()
    where = content.index(key) + len(key) + 4 + 8  # behind the value's type and length
    content = content[:where] + b"zlama" + content[where + 5 :]
    hub.add_repo("maker/New-GGUF", {"new.Q4_K_M.gguf": content})
    refused(["pull", "maker/New-GGUF"], 1, "zlama", capsys=capsys)
    assert nothing_was_fetched(hub)


def test_a_missing_shard_is_refused(hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add_repo("maker/Cut-GGUF", {"cut.Q4_K_M-00001-of-00002.gguf": DEMO})
    refused(["pull", "maker/Cut-GGUF:Q4_K_M"], 1, "1 of 2 shards", "missing: 2", capsys=capsys)
    assert nothing_was_fetched(hub)


def test_where_all_lack_shards_one_is_named(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("cut.Q4_K_M-00001-of-00002.gguf", "cut.Q2_K-00002-of-00003.gguf")
    hub.add_repo("maker/Cut-GGUF", dict.fromkeys(names, DEMO))
    refused(["pull", "maker/Cut-GGUF"], 1, "shards of Q4_K_M; missing: 2", capsys=capsys)


def test_offline_a_lost_shard_is_named(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = make_model(tmp_path / "m.Q8_0.gguf", SHAPES["tiny"], "Q8_0", shards=2)
    hub.add_repo("maker/Two-GGUF", {path.name: path for path in paths})
    assert run_command(["pull", "maker/Two-GGUF", "--json", "--force"]) == 0
    first, second = json.loads(capsys.readouterr().out)["files"]
    Path(second).unlink()
    line = refused(["run", "maker/Two-GGUF", "Hi", "--offline"], 4, "lacks 1 of 2", capsys=capsys)
    assert Path(second).name in line
    assert run_command(["list"]) == 0
    assert "1 shard missing" in capsys.readouterr().out


def test_what_is_not_gguf_is_refused(hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add_repo("maker/Not-GGUF", {"not.Q4_K_M.gguf": b"PK\x03\x04" + bytes(5000)})
    refused(["pull", "maker/Not-GGUF"], 1, "not GGUF", capsys=capsys)
    hub.add_repo("maker/None-GGUF", {"README.md": b"hello"})
    refused(["pull", "maker/None-GGUF"], 1, "no GGUF model", capsys=capsys)


def test_what_does_not_fit_memory_is_refused(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    big = tmp_path / "big.Q4_K_M.gguf"
    make_model(big, SHAPES["mixtral-8x22b"], "Q4_K", header_only=True)
    hub.add_repo("maker/Big-GGUF", {big.name: big}, sha256={big.name: "ab" * 32})
    refused(["pull", "maker/Big-GGUF"], 3, "GiB", capsys=capsys)
    assert nothing_was_fetched(hub)


def test_what_does_not_fit_the_disk_is_refused(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    free = shutil.disk_usage(tmp_path).free
    big = tmp_path / "big.Q4_K_M.gguf"
    make_model(big, SHAPES["mixtral-8x22b"], "Q4_K", header_only=True)
    os.truncate(big, max(big.stat().st_size, free + 2**30))
    hub.add_repo("maker/Big-GGUF", {big.name: big}, sha256={big.name: "ab" * 32})
    refused(["pull", "maker/Big-GGUF", "--force"], 4, "of disk", "HF_HUB_CACHE", capsys=capsys)
    assert nothing_was_fetched(hub)


@pytest.mark.parametrize(
    ("name", "code", "parts"),
    [
        ("maker/Smal-GGUF", 2, ("no model maker/Smal-GGUF", "Did you mean maker/Small-GGUF")),
        (f"{REPO}:Q3_K_M", 2, ("has no quant Q3_K_M", "Q4_K_M")),
        (f"{REPO}/small.Q4_K_S.gguf", 2, ("no model file", "Did you mean small.Q4_K_M.gguf")),
        (f"{REPO}@nobranch", 2, ("no revision nobranch",)),
        ("maker", 2, ("No model is called maker",)),
    ],
)
def test_names_that_are_not_there(
    hub: StandInHub,
    capsys: pytest.CaptureFixture[str],
    name: str,
    code: int,
    parts: tuple[str, ...],
) -> None:
    refused(["pull", name], code, *parts, capsys=capsys)


def test_a_gated_repository(hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add_repo("maker/Gated-GGUF", {NAME: DEMO}, gated=True)
    refused(["pull", "maker/Gated-GGUF"], 4, "gated", "hf auth login", capsys=capsys)


def test_offline_what_is_not_here_is_said(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(["run", REPO, "Hi", "--offline"], 4, "offline", capsys=capsys)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(["run", REPO, "Hi"], 4, "offline", capsys=capsys)
    assert hub.requests == []


def test_offline_what_is_here_runs(hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["pull", REPO, "-q"]) == 0
    hub.requests.clear()
    assert run_command(["run", f"{REPO}:Q4_K_M", "Hi!", "-n", "4", "--offline"]) == 0
    assert run_command(["run", f"{REPO}/{NAME}", "Hi!", "-n", "4", "--offline"]) == 0
    assert hub.requests == []
    assert capsys.readouterr().out


def test_offline_the_header_is_enough_to_look(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["show", REPO, "--json"]) == 0
    online = json.loads(capsys.readouterr().out)
    hub.requests.clear()
    assert run_command(["show", REPO, "--json", "--offline"]) == 0
    assert json.loads(capsys.readouterr().out) == online
    assert run_command(["plan", f"{REPO}:q4_k_m", "--offline", "--print-flags"]) == 0
    assert f"llama-server -hf {REPO} -hff {NAME} -fit off" in capsys.readouterr().out
    assert hub.requests == []


def test_an_odd_file_name_spoils_nothing_else(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_repo("maker/Odd-GGUF", {NAME: DEMO, "a\x1b[2Jb.gguf": b"", "a\u3000b.Q2_K.gguf": b""})
    assert run_command(["pull", "maker/Odd-GGUF"]) == 0
    assert "maker/Odd-GGUF:Q4_K_M is here" in capsys.readouterr().out


def test_a_state_folder_that_cannot_be_written_to(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "headers").write_text("a file in its place")
    refused(["pull", REPO], 4, "can't be kept in", "LOCALMOE_STATE", capsys=capsys)


class Starts:
    """Counts engines from where Python itself tells of new processes."""

    def __init__(self) -> None:
        self.n: int | None = None
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.n is not None and event == "subprocess.Popen" and "engine" in str(arguments[1]):
            self.n += 1


def test_planning_for_28_gb_takes_a_header_and_one_engine(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    big = tmp_path / "big.Q4_K_M.gguf"
    make_model(big, SHAPES["mixtral-8x7b"], "Q4_K_M", header_only=True)
    assert big.stat().st_size > 25 * 2**30
    hub.add_repo("maker/Big-GGUF", {big.name: big}, sha256={big.name: "ab" * 32})
    starts = Starts()
    starts.n = 0
    try:
        assert run_command(["plan", "maker/Big-GGUF", "--ram", "64GiB"]) == 0
    finally:
        n_started, starts.n = starts.n, None
    assert n_started == 1
    assert hub.bytes_sent() <= 4 * 2**20
    assert capsys.readouterr().out


# ---- keeping house ----


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_header_is_mended_by_a_command(
    damage: str, hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["pull", REPO, "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["files"][0])
    if damage == "cut":
        os.truncate(path, 5_000_000)
    else:
        with path.open("r+b") as file:
            file.write(bytes(1000))
    for command in (["pull", REPO], ["show", REPO], ["run", REPO, "Hi"]):
        line = refused(command, 1, NAME, capsys=capsys)
        assert line.endswith(f"Mend it with: localmoe verify {REPO}:Q4_K_M --repair")
    assert run_command(["verify", f"{REPO}:Q4_K_M", "--repair"]) == 0
    assert path.read_bytes() == DEMO.read_bytes()


def test_verify_names_what_is_wrong_and_repair_fetches_just_that(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["pull", REPO, "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["files"][0])
    assert run_command(["verify"]) == 0
    assert "bytes are right" in capsys.readouterr().out
    with path.open("r+b") as file:
        file.seek(5_000_000)
        byte = file.read(1)
        file.seek(5_000_000)
        file.write(bytes([byte[0] ^ 1]))
    assert run_command(["verify", REPO]) == 4
    assert "small.Q4_K_M.gguf" in capsys.readouterr().out
    refused(["run", REPO, "Hi"], 4, "not as it should be", "--repair", capsys=capsys)
    sent = hub.bytes_sent()
    assert run_command(["verify", REPO, "--repair", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["outcome"] == "ok"
    assert 0 < hub.bytes_sent() - sent <= 2 * 2**20
    assert path.read_bytes() == DEMO.read_bytes()


def test_a_file_that_the_catalog_knows_is_refused_when_it_differs(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its hash is the catalog's, whatever the Hub says today."""
    commit = hub.repos[REPO].refs["main"]
    catalog(
        tmp_path,
        f"mine:\n  repo: {REPO}\n  revision: {commit}\n  quants:\n    Q4_K_M:\n"
        f"      file: {NAME}\n      bytes: {DEMO.stat().st_size}\n      sha256: {'ab' * 32}\n",
    )
    assert run_command(["pull", "mine"]) == 4
    assert "not the file that the catalog knows" in capsys.readouterr().err
    assert nothing_was_fetched(hub)
    assert run_command(["list", "--installed", "--json"]) == 0
    assert not [e for e in json.loads(capsys.readouterr().out)["catalog"] if e["installed"]]


def test_rm_says_what_goes_and_asks(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(["pull", REPO, "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["files"][0])
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    refused(["rm", REPO], 2, "no terminal to ask on", "--yes", capsys=capsys)
    assert path.is_file()
    assert run_command(["rm", REPO, "--yes"]) == 0
    shown = capsys.readouterr().out
    assert "transformers" in shown
    assert "9.8 MiB are free again" in shown
    assert not path.exists()
    refused(["rm", REPO, "--yes"], 2, "is not in the cache", capsys=capsys)
    refused(["rm", str(DEMO), "--yes"], 2, "a file of yours", capsys=capsys)


@pytest.mark.parametrize("doing", [("pull", REPO), ("run", REPO, "Hi")])
def test_ctrl_c_keeps_what_is_there_and_says_how_to_go_on(
    doing: tuple[str, ...], hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(request: RequestRecord) -> Fault | None:
        return Fault(bytes_per_s=1_500_000) if request.is_bytes else None

    hub.fault = slow
    command = [sys.executable, "-m", "localmoe", *doing]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while hub.bytes_sent() < 7 * 2**20:
        assert process.poll() is None
    process.send_signal(2)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"Go on with: localmoe pull {REPO}:Q4_K_M" in err
    hub.fault = None
    before = hub.bytes_sent()
    assert run_command(["list", "--json"]) == 0
    capsys.readouterr()
    assert run_command(["pull", REPO]) == 0
    assert " MiB that are missing." in capsys.readouterr().err
    assert hub.bytes_sent() - before < DEMO.stat().st_size - 2**20


def test_the_list_shows_what_is_here_and_what_was_broken_off(
    hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["list"]) == 0
    shown = capsys.readouterr().out
    assert "mixtral" in shown
    assert "0 downloaded" in shown
    assert run_command(["pull", REPO, "-q"]) == 0
    assert run_command(["list", "--installed"]) == 0
    shown = capsys.readouterr().out
    assert REPO in shown
    assert "1 downloaded, 9.8 MiB in all" in shown


# ---- what is seen of it ----


def test_a_line_of_80_columns_says_what_matters() -> None:
    name = "Mixtral-8x7B-Instruct-v0.1.Q4_K_M-00001-of-00003.gguf"
    progress = DownloadProgress(3 << 30, 26 << 30, 11.3 * 2**20, 2280, 0, 3, name, "downloading")
    line = download_line(progress)
    start = "Downloading  12%, 11.3 MiB/s, 38 min left, 3.00 of 26.00 GiB: …"
    assert line.startswith(start)
    assert line.endswith("-00003.gguf")
    assert len(line) <= 79
    short = download_line(replace(progress, n_bytes_done=100 << 20, file_name="m.gguf"))
    assert "0.10 of 26.00 GiB: m.gguf" in short
    assert "no answer" in download_line(replace(progress, trouble="no answer"))


@pytest.mark.parametrize("command", ["run", "chat", "pull"])
def test_help_says_what_a_model_is_called(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "MODEL is a name of `localmoe list`, with a quant like mixtral:Q5_K_M" in shown
    assert "user/repo/file.gguf" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of its own")
def test_on_a_terminal_one_sees_that_the_hub_is_asked(hub: StandInHub) -> None:
    import pty

    hub.fault = lambda request: Fault(stall_after=10, stall_s=1.0) if hub_is_new(hub) else None
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "localmoe", "show", REPO]
    process = subprocess.Popen(command, stderr=end, stdout=subprocess.DEVNULL)
    os.close(end)
    assert process.wait(timeout=30) == 0
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert f"Asking the Hub for {REPO}…" in shown
    assert shown.endswith("\r\x1b[K")  # and it is gone afterwards


def hub_is_new(hub: StandInHub) -> bool:
    return len(hub.requests) == 1


def test_a_copy_without_a_hash_is_read_once(
    hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where there are no symbolic links, snapshots hold files that no name says the hash of."""
    folder = tmp_path / "hf/hub/models--some--Copy-GGUF/snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    shutil.copy(DEMO, folder / "copy.Q4_K_M.gguf")
    stamps = tmp_path / "state" / "verified"
    for _ in range(2):
        assert run_command(["run", "some/Copy-GGUF", "Hi!", "-n", "2", "-q"]) == 0
    (stamp,) = (path for path in stamps.iterdir() if path.suffix == ".json")
    before = stamp.stat().st_mtime_ns
    assert run_command(["run", "some/Copy-GGUF", "Hi!", "-n", "2", "-q"]) == 0
    assert stamp.stat().st_mtime_ns == before
    assert capsys.readouterr().out
