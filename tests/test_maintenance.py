"""Keeping house over a real HTTP server: what `verify` holds files against, what it mends, and
what `rm` takes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from standin_hub import StandInHub

from localmoe.catalog.resolve import ModelResolver
from localmoe.cli import run_command
from localmoe.config.settings import Settings
from localmoe.gguf.demo import DEMO
from localmoe.hub.client import file_of
from localmoe.hub.download import download, lock_of
from localmoe.hub.partial_file import Partial
from localmoe.hub.verify import PIECE_BYTES

REPO, OTHER = "maker/Small-GGUF", "copier/Small-GGUF"
NAME = "small.Q4_K_M.gguf"
SHARDS = tuple(f"big.Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3))
CONTENT = os.urandom(PIECE_BYTES * 2 + 77)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A Hub, a cache of our own, and nothing known before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("LOCALMOE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("LOCALMOE_CONFIG", str(tmp_path / "config"))
    with StandInHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


class House:
    """What a person types, and what is then said."""

    def __init__(self, hub: StandInHub, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.hub, self.capsys, self.folder = hub, capsys, folder
        self.finder = ModelResolver(Settings())

    def fetch(self, repo: str, *files: str) -> list[Path]:
        remote = self.finder.hub.repository(repo)
        wanted = [file_of(remote, name) for name in files]
        return list(download(self.finder.hub, wanted))

    def begin(self, repo: str, name: str) -> Path:
        """A download of it that stopped at 1 MiB; gives the blob."""
        file = file_of(self.finder.hub.repository(repo), name)
        blob = self.finder.hub.blob_path(file)
        partial = Partial(blob, file)
        partial.write(0, memoryview(CONTENT)[:PIECE_BYTES])
        partial.close()
        return blob

    def catalog(self, text: str) -> None:
        (self.folder / "config").mkdir(exist_ok=True)
        (self.folder / "config" / "models.yaml").write_text(text)

    def type(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """What came on stdout and stderr of a command that ends with this code."""
        self.capsys.readouterr()
        found = run_command(arguments)
        shown = self.capsys.readouterr()
        assert found == code, shown
        return shown.out, shown.err


@pytest.fixture
def house(hub: StandInHub, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[House]:
    house = House(hub, capsys, tmp_path)
    with house.finder:
        yield house


def entry(commit: str, content: bytes, name: str = NAME, repo: str = REPO) -> str:
    return (
        f"mine:\n  repo: {repo}\n  revision: '{commit}'\n  quants:\n    Q4_K_M:\n"
        f"      file: {name}\n      bytes: {len(content)}\n"
        f"      sha256: {hashlib.sha256(content).hexdigest()}\n"
    )


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes([path.read_bytes()[0] ^ 1]))


# ---- what a file is held against ----


def test_another_repositorys_file_of_the_same_name_is_held_to_its_own_hash(house: House) -> None:
    other = b"another model under a name that many have" * 9
    commit = house.hub.add_repo(REPO, {NAME: CONTENT})
    house.hub.add_repo(OTHER, {NAME: other})
    house.catalog(entry(commit, CONTENT))
    house.fetch(REPO, NAME)
    house.fetch(OTHER, NAME)
    out, _ = house.type("verify")
    assert out.splitlines() == [
        f"{OTHER}/{NAME}: All of its {len(other):,} bytes are right.",
        f"{REPO}/{NAME}: All of its {len(CONTENT):,} bytes are right.",
    ]


def test_another_commit_of_the_catalogs_repository_is_held_to_its_own_hash(house: House) -> None:
    old = house.hub.add_repo(REPO, {NAME: b"old" * 99})
    house.fetch(REPO, NAME)
    new = house.hub.add_repo(REPO, {NAME: CONTENT})
    house.fetch(REPO, NAME)
    house.catalog(entry(new, CONTENT))
    out, _ = house.type("verify")
    names = sorted(line.partition(":")[0] for line in out.splitlines())
    assert names == sorted(f"{REPO}@{commit[:7]}/{NAME}" for commit in (old, new))


def test_the_catalogs_hash_counts_for_its_own_file_whatever_the_cache_says(house: House) -> None:
    commit = house.hub.add_repo(REPO, {NAME: b"swapped" * 9})
    house.fetch(REPO, NAME)
    house.catalog(entry(commit, CONTENT))
    out, _ = house.type("verify", "--json", code=4)
    (document,) = json.loads(out)
    assert document["expected_sha256"] == hashlib.sha256(CONTENT).hexdigest()
    out, _ = house.type("verify", "--repair", code=4)
    assert "can't be mended: The Hub has another file under this name." in out


def test_a_file_of_a_persons_own_is_known_by_its_name(house: House, tmp_path: Path) -> None:
    house.catalog(entry("1" * 40, CONTENT))
    mine = tmp_path / NAME
    mine.write_bytes(CONTENT)
    out, _ = house.type("verify", f"./{NAME}")
    assert out == f"{mine}: All of its {len(CONTENT):,} bytes are right.\n"
    damage(mine)
    out, err = house.type("verify", str(mine), code=4)
    assert "Its sha256 is" in out
    assert "--repair" not in err  # nobody knows where it is from


def test_shards_of_a_persons_own_are_all_read(house: House, tmp_path: Path) -> None:
    (tmp_path / SHARDS[1]).write_bytes(b"one of three")
    out, _ = house.type("verify", f"./{SHARDS[1]}", code=4)
    assert [line.rpartition(": ")[2] for line in out.splitlines()][::2] == ["It is not here."] * 2


def test_a_name_that_the_catalog_has_twice_tells_nothing(house: House, tmp_path: Path) -> None:
    again = entry("2" * 40, CONTENT[1:]).replace("mine:", "other:")
    house.catalog(entry("1" * 40, CONTENT) + again)
    (tmp_path / NAME).write_bytes(CONTENT)
    out, _ = house.type("verify", f"./{NAME}")
    assert "No known sha256 to compare it with" in out


def test_a_path_into_the_cache_is_the_file_of_its_repository(house: House) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT})
    (path,) = house.fetch(REPO, NAME)
    out, _ = house.type("verify", str(path))
    assert out.startswith(f"{REPO}/{NAME}: All of its")
    out, _ = house.type("verify", str(path.resolve()))  # a blob has no name but its own
    assert out.startswith(f"{path.resolve()}: All of its")


def test_two_names_of_one_blob_are_read_once(house: House) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT})
    house.fetch(REPO, NAME)
    house.hub.add_repo(REPO, {NAME: CONTENT, "README.md": b"more"})
    house.fetch(REPO, NAME)
    assert len(house.finder.store.installed()) == 2
    out, _ = house.type("verify")
    assert len(out.splitlines()) == 1


def test_names_that_could_steer_a_terminal_are_shown_harmless(house: House) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT})
    (path,) = house.fetch(REPO, NAME)
    path.rename(path.with_name("a\x1b[2J\nb.Q4_K_M.gguf"))
    out, _ = house.type("verify")
    assert out.startswith(f"{REPO}/a?[2J?b.Q4_K_M.gguf: All of")
    assert len(out.splitlines()) == 1
    out, _ = house.type("rm", REPO, "-y")
    assert "\x1b" not in out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_that_says_how_far_it_is_names_the_file(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmoe.terminal.console.PROGRESS_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    house.hub.add_repo(REPO, {NAME: CONTENT})
    house.fetch(REPO, NAME)
    assert run_command(["verify"]) == 0
    assert f"Verifying {NAME}" in shown.getvalue()


# ---- repair ----


def test_repair_fetches_shards_whose_link_or_bytes_are_gone(house: House) -> None:
    contents = {name: os.urandom(5000 + i) for i, name in enumerate(SHARDS)}
    house.hub.add_repo(REPO, contents)
    first, second, third = house.fetch(REPO, *SHARDS)
    first.resolve().unlink()
    third.resolve().unlink()
    third.unlink()
    out, err = house.type("verify", REPO, code=4)
    assert out.count("It is not here.") == 2
    assert f"localmoe verify {REPO} --repair" in err
    sent = house.hub.bytes_sent()
    out, _ = house.type("verify", REPO, "--repair")
    assert out.count("bytes are right.") == 3
    assert house.hub.bytes_sent() - sent == 5000 + 5002
    assert [p.read_bytes() for p in (first, second, third)] == list(contents.values())


def test_a_model_of_which_only_the_link_is_left_is_missed_and_fetched(house: House) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT})
    (path,) = house.fetch(REPO, NAME)
    path.resolve().unlink()
    for names in ([], [REPO], [f"{REPO}:q4_k_m"], [f"{REPO}/{NAME}"]):
        out, _ = house.type("verify", *names, code=4)
        assert out == f"{REPO}/{NAME}: It is not here.\n"
    house.type("verify", "--repair")
    assert path.read_bytes() == CONTENT


def test_a_link_that_was_lost_costs_no_download(house: House) -> None:
    house.hub.add_repo(REPO, {name: name.encode() for name in SHARDS})
    house.fetch(REPO, *SHARDS)[1].unlink()
    sent = house.hub.bytes_sent()
    out, _ = house.type("verify", "--repair")
    assert out.count("bytes are right.") == 3
    assert house.hub.bytes_sent() == sent


def test_a_damaged_copy_becomes_a_link_to_what_is_right(house: House) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT})
    (path,) = house.fetch(REPO, NAME)
    blob = path.resolve()
    path.unlink()
    blob.rename(path)  # as it lies where links don't work
    house.finder.store.stamp(path, blob.name)
    damage(path)
    house.type("verify", code=4)
    house.type("verify", "--repair")
    assert path.read_bytes() == CONTENT
    assert path.resolve() == blob
    assert [p.name for p in path.parent.iterdir()] == [NAME]


def test_repair_goes_on_where_one_repository_is_gone(house: House) -> None:
    for repo in (OTHER, REPO):
        house.hub.add_repo(repo, {NAME: CONTENT})
        damage(house.fetch(repo, NAME)[0])
    del house.hub.repos[OTHER]
    out, err = house.type("verify", "--repair", code=4)
    gone, mended = out.splitlines()
    assert gone.startswith(f"{OTHER}/{NAME}: Its sha256 is")
    assert f"It can't be mended: The Hub has no model {OTHER}" in gone
    assert mended.endswith("bytes are right.")
    assert "Mend it" not in err


@pytest.mark.parametrize("how", ["option", "variable"])
def test_offline_repair_is_refused_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT})
    damage(house.fetch(REPO, NAME)[0])
    house.hub.requests.clear()
    if how == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    option = ["--offline"] if how == "option" else []
    out, err = house.type("verify", "--repair", *option, code=2)
    assert out == ""
    assert err.startswith("localmoe: What is damaged can't be fetched offline. Leave out")
    out, _ = house.type("verify", "--offline", code=4)
    assert "Its sha256 is" in out
    assert house.hub.requests == []


# ---- rm ----


def test_rm_takes_a_download_that_was_broken_off(house: House) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT, "small.Q8_0.gguf": CONTENT + b"8"})
    blob = house.begin(REPO, NAME)
    _, err = house.type("rm", f"{REPO}:Q8_0", "-y", code=2)
    assert "is not in the cache" in err
    house.type("rm", f"{REPO}@v9-nosuch", "-y", code=2)
    out, _ = house.type("rm", f"{REPO}:q4_k_m", "-y")
    assert out.splitlines() == [
        f"{REPO}/{NAME}: 1.0 MiB",
        f"The broken-off download of {NAME} goes: 1.0 MiB of 2.0 MiB are here.",
        "1.0 MiB are free again.",
    ]
    assert house.finder.store.unfinished() == ()
    assert not blob.parent.exists()


def test_rm_takes_models_and_downloads_of_a_repository_together(house: House) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT, "small.Q8_0.gguf": CONTENT + b"8"})
    house.hub.add_repo(OTHER, {NAME: CONTENT})
    house.fetch(REPO, "small.Q8_0.gguf")
    house.begin(REPO, NAME)
    house.begin(OTHER, NAME)
    out, _ = house.type("rm", REPO, "-y", "--json")
    document = json.loads(out)
    assert document["bytes_freed"] == PIECE_BYTES + len(CONTENT) + 1
    commit = house.hub.repos[REPO].refs["main"]
    assert document["removed"] == [
        {"repo": REPO, "revision": commit, "quant": "Q8_0", "files": ["small.Q8_0.gguf"]},
        {"repo": REPO, "revision": None, "quant": None, "files": [NAME]},
    ]
    assert [left.repo for left in house.finder.store.unfinished()] == [OTHER]


def test_rm_refuses_a_download_that_goes_on(house: House) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT})
    with lock_of(house.begin(REPO, NAME)):
        _, err = house.type("rm", REPO, "-y", code=1)
    assert err == f"localmoe: {NAME} is being downloaded right now. End that download first.\n"
    assert len(house.finder.store.unfinished()) == 1


def test_a_download_that_lost_its_journal_goes_with_its_repository(house: House) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT})
    blob = house.begin(REPO, NAME)
    blob.with_name(blob.name + ".localmoe-journal").unlink()
    house.type("rm", f"{REPO}:Q4_K_M", "-y", code=2)
    out, _ = house.type("rm", REPO, "-y")
    assert "The broken-off download of a file goes" in out
    assert house.finder.store.unfinished() == ()


def test_rm_of_a_name_of_the_catalog_leaves_copies_in_other_repositories(house: House) -> None:
    commit = house.hub.add_repo(REPO, {NAME: CONTENT})
    house.hub.add_repo(OTHER, {"theirs.Q4_K_M.gguf": CONTENT})
    house.catalog(entry(commit, CONTENT))
    (mine,) = house.fetch(REPO, NAME)
    (theirs,) = house.fetch(OTHER, "theirs.Q4_K_M.gguf")
    out, _ = house.type("rm", "mine", "-y")
    assert out.startswith(f"{REPO}:Q4_K_M: 2.0 MiB\n")
    assert not mine.exists()
    assert theirs.read_bytes() == CONTENT
    _, err = house.type("rm", "mine", "-y", code=2)
    assert "only the copy of another repository" in err
    assert f"localmoe rm {OTHER}:Q4_K_M" in err
    assert theirs.read_bytes() == CONTENT


def test_rm_of_a_name_of_the_catalog_takes_its_file_at_another_commit_too(house: House) -> None:
    pinned = house.hub.add_repo(REPO, {NAME: CONTENT})
    house.hub.add_repo(REPO, {NAME: CONTENT, "README.md": b"more"})
    (path,) = house.fetch(REPO, NAME)
    assert pinned not in str(path)
    house.catalog(entry(pinned, CONTENT))
    house.type("rm", "mine:q4_k_m", "-y")
    assert not path.exists()


def test_rm_of_an_unknown_revision_takes_nothing(house: House) -> None:
    commits = []
    for i in range(2):
        commits.append(house.hub.add_repo(REPO, {NAME: CONTENT[i:]}))
        house.fetch(REPO, NAME)
    for revision in ("v9-nosuch", "f" * 40, "1234567"):
        _, err = house.type("rm", f"{REPO}@{revision}", "-y", code=2)
        assert f"{REPO}@{revision} is not in the cache." in err
    assert len(house.finder.store.installed()) == 2
    house.type("rm", f"{REPO}@{commits[0]}", "-y")
    assert [model.commit for model in house.finder.store.installed()] == commits[1:]


def test_rm_of_what_is_no_part_of_the_cache(house: House, tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    _, err = house.type("rm", "./mine.gguf", "-y", code=2)
    assert "it is a file of yours" in err
    _, err = house.type("rm", "demo", "-y", code=2)
    assert err == "localmoe: demo ships with localmoe and can't be removed by itself.\n"
    assert DEMO.is_file()
    house.catalog(f"own:\n  path: {tmp_path / 'mine.gguf'}\n")
    _, err = house.type("rm", "own", "-y", code=2)
    assert "it is a file of yours" in err
    assert (tmp_path / "mine.gguf").exists()


@pytest.mark.parametrize(("answer", "code"), [("n\n", 130), ("\n", 130), ("", 130), ("y\n", 0)])
def test_rm_asks_and_says_that_nothing_went(
    house: House, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT})
    (path,) = house.fetch(REPO, NAME)
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    _, err = house.type("rm", REPO, code=code)
    assert path.exists() == ("Nothing was deleted." in err) == (code == 130)


def test_rm_with_json_says_what_it_asks_beside_its_document(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.hub.add_repo(REPO, {NAME: CONTENT})
    house.fetch(REPO, NAME)
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    out, err = house.type("rm", REPO, "--json")
    assert json.loads(out)["bytes_freed"] == len(CONTENT)
    assert "lose these files too" in err


# ---- pull ----


def test_pull_says_verified_only_of_what_was_hashed(house: House, tmp_path: Path) -> None:
    out, _ = house.type("pull", "demo")
    assert out.startswith("demo is here, ")
    (tmp_path / "mine.gguf").write_bytes(DEMO.read_bytes())
    out, _ = house.type("pull", "./mine.gguf")
    assert out.startswith("./mine.gguf is here, ")
    house.hub.add_repo(REPO, {NAME: DEMO})
    house.fetch(REPO, NAME)
    out, _ = house.type("pull", REPO)
    assert out.startswith(f"{REPO}:Q4_K_M is here and verified, ")
