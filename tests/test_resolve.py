"""Which models of the cache a name means, and what to type for just that one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from localmoe.catalog.candidates import (
    exact_name,
    filter_installed,
    newest_commits,
    quant_of_installed,
    sized_quants,
)
from localmoe.catalog.catalog import ModelSpec, QuantSpec
from localmoe.catalog.model_name import parse_name
from localmoe.hub.installed import InstalledModel, InstalledModels
from localmoe.hub.quants import Quant, quants_of
from localmoe.hub.types import HubAccess, RemoteFile, RemoteRepo

REPO, OTHER = "maker/Model-GGUF", "copier/Model-GGUF"
OLD, NEW, THIRD = "a" * 40, "b" * 40, "ab12345" + "c" * 33


class Cache:
    """A cache as other tools leave it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = InstalledModels(
            HubAccess("http://127.0.0.1:9", folder, folder / "h", folder / "s")
        )
        self.clock = 1_000_000

    def put(self, repo: str, commit: str, *names: str, ref: str = "") -> None:
        root = self.folder / f"models--{repo.replace('/', '--')}"
        for name in names:
            content = name.encode()
            blob = root / "blobs" / hashlib.sha256(content).hexdigest()
            link = root / "snapshots" / commit / name
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link.symlink_to(os.path.relpath(blob, link.parent))
        self.clock += 1
        os.utime(root / "snapshots" / commit, (self.clock, self.clock))
        if ref:
            (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (root / "refs" / ref).write_text(commit)

    def meant(self, text: str, **options: bool) -> list[InstalledModel]:
        return filter_installed(self.store.installed(), parse_name(text, {}), **options)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.chdir(tmp_path)
    return Cache(tmp_path)


def commits(models: list[InstalledModel]) -> list[str]:
    return [model.commit for model in models]


def test_a_revision_is_held_to(cache: Cache) -> None:
    cache.put(REPO, OLD, "m.Q4_K_M.gguf", ref="v1")
    cache.put(REPO, THIRD, "m.Q4_K_M.gguf")
    assert commits(cache.meant(f"{REPO}@{OLD}")) == [OLD]
    assert commits(cache.meant(f"{REPO}@v1")) == [OLD]
    assert commits(cache.meant(f"{REPO}@{THIRD[:7]}:q4_k_m")) == [THIRD]
    for unknown in (NEW, "main", "v2", "bbbbbbb", THIRD[:6]):
        assert cache.meant(f"{REPO}@{unknown}") == []


def test_main_comes_first_then_the_newest(cache: Cache) -> None:
    cache.put(REPO, OLD, "m.Q4_K_M.gguf", "m.Q2_K.gguf", ref="main")
    cache.put(REPO, NEW, "m.Q4_K_M.gguf")
    cache.put(REPO, THIRD, "m.Q8_0.gguf", "m.Q4_K_M.gguf")
    assert commits(cache.meant(f"{REPO}:Q4_K_M")) == [OLD, THIRD, NEW]
    kept = newest_commits(cache.meant(REPO))
    assert {(model.label, model.commit) for model in kept} == {
        ("Q4_K_M", OLD), ("Q2_K", OLD), ("Q8_0", THIRD),
    }  # fmt: skip


def test_labels_mean_here_what_they_mean_on_the_hub(cache: Cache) -> None:
    cache.put(REPO, OLD, "m.Q4_K_M.gguf", "m.UD-Q4_K_M.gguf", "m.i1-IQ2_M.gguf", "Plain.gguf")
    names = {
        "q4_k_m": ["m.Q4_K_M.gguf"],  # and not the one with a prefix, which rm would delete too
        "ud-q4_k_m": ["m.UD-Q4_K_M.gguf"],
        "IQ2_M": ["m.i1-IQ2_M.gguf"],
        "plain": ["Plain.gguf"],
        "Q8_0": [],
    }
    for label, wanted in names.items():
        assert [m.names[0] for m in cache.meant(f"{REPO}:{label}")] == wanted
    assert [m.names[0] for m in cache.meant(f"{REPO}/Plain.gguf")] == ["Plain.gguf"]


def test_a_copy_with_the_catalogs_hash_counts_wherever_it_lies(cache: Cache) -> None:
    cache.put(OTHER, OLD, "m.Q4_K_M.gguf")
    sha256 = hashlib.sha256(b"m.Q4_K_M.gguf").hexdigest()
    known = QuantSpec(file="m.Q4_K_M.gguf", bytes=13 << 20, sha256=sha256)
    spec = ModelSpec(repo=REPO, revision=NEW, quants={"Q4_K_M": known})
    (model,) = cache.store.installed()
    for text in ("mine", "mine:q4_k_m"):
        name = parse_name(text, {"mine": spec})
        assert filter_installed([model], name) == [model]
        assert not filter_installed(
            [model], name, copies=False
        )  # nothing of another repository goes
    assert filter_installed([model], parse_name("mine:Q8_0", {"mine": spec})) == []


def test_a_model_with_a_lost_shard_is_meant_where_that_is_asked_for(cache: Cache) -> None:
    cache.put(REPO, OLD, "m.Q2_K-00001-of-00002.gguf")
    assert cache.meant(REPO) == []
    assert [m.missing for m in cache.meant(REPO, whole=False)] == [("m.Q2_K-00002-of-00002.gguf",)]


def remote(*names: str) -> tuple[Quant, ...]:
    files = tuple(RemoteFile(REPO, OLD, name, 1000, None) for name in names)
    return quants_of(RemoteRepo(REPO, OLD, files))


@pytest.mark.parametrize(
    ("text", "names", "wanted"),
    [
        (REPO, "m.Q4_K_M.gguf", f"{REPO}:Q4_K_M"),
        (f"{REPO}:q4_k_m", "m.UD-Q4_K_M.gguf", f"{REPO}:UD-Q4_K_M"),
        (f"{REPO}@v1", "m.Q4_K_M.gguf", f"{REPO}@v1:Q4_K_M"),
        (f"{REPO}@{OLD}", "m.Q4_K_M.gguf", f"{REPO}@{OLD}:Q4_K_M"),
        (f"{REPO}@aaaaaaa", "m.Q4_K_M.gguf", f"{REPO}@{OLD}:Q4_K_M"),
        (f"{REPO}/m.Q4_K_M.gguf", "m.Q4_K_M.gguf", f"{REPO}/m.Q4_K_M.gguf"),
        (REPO, "one.Q4_K_M.gguf two.Q4_K_M.gguf", f"{REPO}/one.Q4_K_M.gguf"),
        (f"{REPO}:one.Q4_K_M", "one.Q4_K_M.gguf", f"{REPO}/one.Q4_K_M.gguf"),
        (REPO, "deep/model.gguf", f"{REPO}/deep/model.gguf"),
        (REPO, "a/m.Q4_K_M-00001-of-00002.gguf a/m.Q4_K_M-00002-of-00002.gguf", f"{REPO}:Q4_K_M"),
        (f"https://hf.co/{REPO}/tree/refs%2Fpr%2F4", "m.Q4_K_M.gguf", f"{REPO}@{OLD}:Q4_K_M"),
        ("mine", "m.Q4_K_M.gguf", "mine:Q4_K_M"),
        ("mine", "one.gguf", f"{REPO}@{OLD}/one.gguf"),
    ],
)
def test_what_to_type_means_the_same_again(
    text: str, names: str, wanted: str, cache: Cache
) -> None:
    catalog = {"mine": ModelSpec(repo=REPO, revision=OLD)}
    quants = remote(*names.split())
    assert exact_name(parse_name(text, catalog), quants[0], quants) == wanted
    cache.put(REPO, OLD, *names.split(), ref="v1")
    again = filter_installed(cache.store.installed(), parse_name(wanted, catalog))
    assert [quant_of_installed(model).files[0].name for model in again] == [quants[0].files[0].name]


def test_sizes_of_the_catalog() -> None:
    spec = ModelSpec(repo=REPO, quants={"Q2_K": QuantSpec(file="m.gguf", bytes=9 << 20)})
    (quant,) = sized_quants(spec)
    assert (quant.label, quant.repo, quant.n_bytes) == ("Q2_K", REPO, 9 << 20)
