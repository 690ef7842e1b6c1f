"""The cache: what is found in it, what is verified, and that a removal takes just what it says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standin_hub import StandInHub

from localmoe.errors import LocalMoeError
from localmoe.hub.download import lock_of
from localmoe.hub.installed import InstalledModel, InstalledModels
from localmoe.hub.partial_file import Partial, leftovers
from localmoe.hub.removal import Removal
from localmoe.hub.types import HubAccess, RemoteFile
from localmoe.hub.verify import PIECE_BYTES, ExpectedHash

C1, C2 = "1" * 40, "2" * 40
REPO = "org/mixtral-GGUF"
SHARDS = tuple(f"big-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3))


class Cache:
    """Writes a cache as huggingface_hub does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def repo(self, repo: str = REPO) -> Path:
        return self.folder / f"models--{repo.replace('/', '--')}"

    def add(
        self, name: str, content: bytes, commit: str = C1, repo: str = REPO, ref: str = "main"
    ) -> Path:
        """A file in a snapshot that links to its blob."""
        blob = self.blob(content, repo)
        path = self.repo(repo) / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))
        (self.repo(repo) / "refs").mkdir(exist_ok=True)
        (self.repo(repo) / "refs" / ref).write_text(commit)
        return path

    def blob(self, content: bytes, repo: str = REPO) -> Path:
        blob = self.repo(repo) / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            blob.write_bytes(content)
        return blob

    def copy(self, name: str, content: bytes, commit: str = C1, repo: str = REPO) -> Path:
        """A file in a snapshot as it lies where links don't work."""
        path = self.repo(repo) / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


@pytest.fixture
def access(tmp_path: Path) -> HubAccess:
    return HubAccess("http://127.0.0.1:1", tmp_path / "hub", tmp_path / "h", tmp_path / "stamps")


@pytest.fixture
def cache(access: HubAccess) -> Cache:
    return Cache(access.cache)


@pytest.fixture
def store(access: HubAccess) -> InstalledModels:
    return InstalledModels(access)


def only(store: InstalledModels) -> InstalledModel:
    (model,) = store.installed()
    return model


def bytes_in(folder: Path) -> int:
    """What the files below a folder take, each once; refs of any kind are not counted."""
    found = {}
    for path in folder.rglob("*"):
        if (
            path.is_file()
            and not path.is_symlink()
            and not path.match("refs/*")
            and path.suffix != ".refs"
        ):
            at = path.stat()
            found[at.st_ino] = at.st_size
    return sum(found.values())


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- what is here --------------------------------------------------------------------------------


def test_models_are_listed_with_their_shards_together(store: InstalledModels, cache: Cache) -> None:
    cache.add("small-Q8_0.gguf", b"small", repo="an/other")
    for i, name in enumerate(SHARDS):
        cache.add(f"Q4_K_M/{name}", b"x" * (i + 1))
    cache.add("README.md", b"text")
    cache.add("mmproj-F16.gguf", b"projector")
    cache.add("mtp-Q8_0.gguf", b"drafts")
    small, big = store.installed()
    assert (small.repo, small.commit, small.names) == ("an/other", C1, ("small-Q8_0.gguf",))
    assert big.names == tuple(f"Q4_K_M/{name}" for name in SHARDS)
    assert (big.label, big.n_bytes, big.is_complete, big.verified) == ("Q4_K_M", 6, True, False)
    assert big.path == cache.repo() / "snapshots" / C1 / "Q4_K_M" / SHARDS[0]


def test_missing_shards_are_named_whether_their_link_is_there_or_not(
    store: InstalledModels, cache: Cache
) -> None:
    paths = [cache.add(name, name.encode()) for name in SHARDS]
    paths[0].resolve().unlink()
    paths[2].unlink()
    model = only(store)
    assert model.missing == (SHARDS[0], SHARDS[2])
    assert (model.names, model.is_complete) == ((SHARDS[1],), False)


def test_the_same_file_at_two_commits_is_two_models(store: InstalledModels, cache: Cache) -> None:
    cache.add("a-Q4_0.gguf", b"a")
    cache.add("a-Q4_0.gguf", b"a", C2)
    assert [model.commit for model in store.installed()] == [C1, C2]


def test_what_does_not_belong_in_a_cache_is_passed_over(
    store: InstalledModels, cache: Cache
) -> None:
    cache.add("a-Q4_0.gguf", b"a")
    cache.add("gone-Q4_0.gguf", b"gone").resolve().unlink()
    snapshots = cache.repo() / "snapshots"
    (snapshots / C1 / "loop").symlink_to(snapshots)
    (snapshots / C1 / "self-Q4_0.gguf").symlink_to("self-Q4_0.gguf")
    (snapshots / C1 / "folder-Q4_0.gguf").mkdir()
    (snapshots / "file").write_text("a file where a commit should be")
    (snapshots / "not-a-commit").mkdir()
    (snapshots / "not-a-commit" / "b-Q4_0.gguf").write_bytes(b"b")
    for name in ("models--", "datasets--org--d", "blobs", ".locks", "models--a--b\nc", "x"):
        (cache.folder / name / "snapshots" / C1).mkdir(parents=True)
        (cache.folder / name / "snapshots" / C1 / "c-Q4_0.gguf").write_bytes(b"c")
    (cache.folder / "models--a--file").write_text("no folder")
    assert only(store).names == ("a-Q4_0.gguf",)


def test_a_cache_that_is_not_there_has_nothing(store: InstalledModels) -> None:
    assert store.installed() == store.unfinished() == ()
    assert store.lost() == ()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_may_not_be_read_is_passed_over(store: InstalledModels, cache: Cache) -> None:
    cache.add("a-Q4_0.gguf", b"a")
    cache.add("b-Q4_0.gguf", b"b", repo="an/other")
    cache.repo("an/other").chmod(0)
    try:
        assert only(store).repo == REPO
    finally:
        cache.repo("an/other").chmod(0o700)


def test_copies_in_place_of_links_are_models_too(store: InstalledModels, cache: Cache) -> None:
    path = cache.copy("a-Q4_0.gguf", b"a")
    assert only(store).path == only(store).files[0].blob == path


def test_downloads_that_broke_off_are_listed_with_what_is_here(
    store: InstalledModels, cache: Cache
) -> None:
    broken_off(cache, "a-Q4_0.gguf")
    (begun,) = store.unfinished()
    assert (begun.repo, begun.left.name) == (REPO, "a-Q4_0.gguf")
    assert begun.left.n_bytes == PIECE_BYTES + 5
    assert begun.left.n_bytes_here == PIECE_BYTES
    assert store.installed() == ()


def test_models_whose_bytes_are_gone_are_known_by_their_links(
    store: InstalledModels, cache: Cache
) -> None:
    paths = [cache.add(f"q/{name}", name.encode()) for name in SHARDS]
    alone = cache.add("a-Q4_0.gguf", b"a")
    (alone.parent / "self-Q4_0.gguf").symlink_to("self-Q4_0.gguf")
    (alone.parent / "out-Q4_0.gguf").symlink_to(cache.folder / "not there")
    assert store.lost() == ()
    alone.resolve().unlink()
    paths[0].resolve().unlink()  # the others still tell of it
    (lost,) = store.lost()
    assert (lost.repo, lost.commit, lost.names) == (REPO, C1, ("a-Q4_0.gguf",))
    assert (lost.missing, lost.n_bytes, lost.verified) == (("a-Q4_0.gguf",), 0, False)
    paths[1].resolve().unlink()
    paths[2].unlink()
    assert store.installed() == ()
    assert [model.missing for model in store.lost()] == [
        ("a-Q4_0.gguf",), tuple(f"q/{name}" for name in SHARDS)
    ]  # fmt: skip
    assert store.remove(store.plan_removal(store.lost())) == 0
    left = sorted(path.name for path in alone.parent.iterdir())
    assert left == ["out-Q4_0.gguf", "self-Q4_0.gguf"]


# ---- stamps --------------------------------------------------------------------------------------


def test_a_stamp_survives_a_restart_and_counts_for_every_name_of_the_file(
    access: HubAccess, cache: Cache
) -> None:
    path = cache.add("a-Q4_0.gguf", b"a")
    InstalledModels(access).stamp(path, path.resolve().name)
    again = InstalledModels(access)
    assert again.is_verified(path)
    assert again.is_verified(path.resolve(), path.resolve().name)
    assert again.is_verified(cache.add("a-Q4_0.gguf", b"a", C2))
    assert [model.verified for model in again.installed()] == [True, True]


def test_a_stamp_is_void_with_another_time_size_or_inode(
    store: InstalledModels, tmp_path: Path
) -> None:
    path, sha256 = tmp_path / "a.gguf", hashlib.sha256(b"abc").hexdigest()

    def stamped() -> os.stat_result:
        path.write_bytes(b"abc")
        store.stamp(path, sha256)
        assert store.is_verified(path, sha256)
        return path.stat()

    at = stamped()
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns + 1))
    assert not store.is_verified(path)
    at = stamped()
    path.write_bytes(b"abcd")
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
    assert not store.is_verified(path)
    at = stamped()
    other = tmp_path / "other"
    other.write_bytes(b"abX")
    os.utime(other, ns=(at.st_atime_ns, at.st_mtime_ns))
    other.replace(path)
    assert not store.is_verified(path)
    path.unlink()
    assert not store.is_verified(path)


def test_a_stamp_of_another_hash_is_none(store: InstalledModels, cache: Cache) -> None:
    path = cache.add("a-Q4_0.gguf", b"a")
    store.stamp(path, "0" * 64)
    assert not store.is_verified(path)  # its blob's name says otherwise
    assert not store.is_verified(path, path.resolve().name)
    assert store.is_verified(path, "0" * 64)


@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=40) | st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["sha256", "seen", "inode", "n_bytes", "x"]), inner),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_a_damaged_stamp_is_none(store: InstalledModels, tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"a")
    store.stamp(path, hashlib.sha256(b"a").hexdigest())
    (stamp,) = tmp_path.joinpath("stamps").glob("*.json")
    stamp.write_bytes(damage)
    assert not store.is_verified(path)


def test_stamps_that_cannot_be_kept_are_no_error(access: HubAccess, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = InstalledModels(replace(access, stamps=tmp_path / "file" / "stamps"))
    path = tmp_path / "a.gguf"
    path.write_bytes(b"a")
    store.stamp(path, hashlib.sha256(b"a").hexdigest())
    assert not store.is_verified(path)
    (verdict,) = store.verify([path], {path: ExpectedHash(hashlib.sha256(b"a").hexdigest())})
    assert verdict.is_ok


# ---- verify --------------------------------------------------------------------------------------


def test_verify_reads_all_files_stamps_them_and_tells_how_far_it_is(
    store: InstalledModels, cache: Cache
) -> None:
    paths = [cache.add(name, os.urandom(1000 + i)) for i, name in enumerate(SHARDS)]
    told: list[tuple[int, int]] = []
    verdicts = store.verify(paths, on_progress=lambda n, n_all: told.append((n, n_all)))
    assert [(v.path, v.outcome) for v in verdicts] == [(path, "ok") for path in paths]
    assert told[-1] == (3003, 3003)
    assert told == sorted(told)
    assert only(store).verified


def test_verify_reads_no_more_than_it_is_given(store: InstalledModels, cache: Cache) -> None:
    """A start hashes the shard that has no stamp, and not the others again."""
    first, second, third = (cache.add(name, name.encode()) for name in SHARDS)
    third.resolve().unlink()
    verdicts = store.verify([second, third])
    assert [(v.path, v.outcome) for v in verdicts] == [(second, "ok"), (third, "missing")]
    assert verdicts[1].why == "It is not here."
    assert not store.is_verified(first)


def test_a_flipped_byte_is_found_and_its_range_named(store: InstalledModels, cache: Cache) -> None:
    content = os.urandom(3 * PIECE_BYTES + 100)
    path = cache.add("a-Q4_0.gguf", content)
    assert store.verify([path])[0].is_ok
    before = path.stat()
    for at in (PIECE_BYTES + 7, 3 * PIECE_BYTES + 99):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([content[at] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a bad disk would
    (verdict,) = store.verify([path])
    assert verdict.outcome == "wrong hash"
    end = 3 * PIECE_BYTES + 100
    assert verdict.damaged == ((PIECE_BYTES, 2 * PIECE_BYTES), (3 * PIECE_BYTES, end))
    assert "in 2 places are damaged" in verdict.why
    assert not store.is_verified(path)


def test_without_checksums_the_hash_alone_is_told(store: InstalledModels, cache: Cache) -> None:
    path = cache.add("a-Q4_0.gguf", b"right")
    path.resolve().write_bytes(b"wrong")
    (verdict,) = store.verify([path])
    assert (verdict.outcome, verdict.damaged) == ("wrong hash", ())
    found = hashlib.sha256(b"wrong").hexdigest()
    assert verdict.why == f"Its sha256 is {found[:12]}…, not {path.resolve().name[:12]}…."


def test_a_cut_file_is_of_the_wrong_length(store: InstalledModels, cache: Cache) -> None:
    content = os.urandom(2 * PIECE_BYTES)
    path = cache.add("a-Q4_0.gguf", content)
    assert store.verify([path])[0].is_ok
    os.truncate(path, PIECE_BYTES)
    (verdict,) = store.verify([path])
    assert (verdict.outcome, verdict.n_bytes) == ("wrong length", PIECE_BYTES)
    assert verdict.why == f"It has {PIECE_BYTES:,} bytes, not {2 * PIECE_BYTES:,}."
    assert verdict.damaged == ((PIECE_BYTES, 2 * PIECE_BYTES),)


def test_a_file_anywhere_is_held_against_the_hash_that_is_given(
    store: InstalledModels, tmp_path: Path
) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"mine")
    sha256 = hashlib.sha256(b"mine").hexdigest()
    (verdict,) = store.verify([path])
    assert (verdict.outcome, verdict.sha256) == ("unknown hash", sha256)
    assert verdict.why == f"No known sha256 to compare it with; its sha256 is {sha256}."
    assert not store.is_verified(path)
    assert store.verify([path], {path: ExpectedHash(sha256)})[0].is_ok
    assert store.is_verified(path)
    path.write_bytes(b"another model under the same name")
    assert store.verify([path])[0].outcome == "unknown hash"  # no stamp holds a person to it
    (verdict,) = store.verify([path], {path: ExpectedHash(sha256, 4)})
    assert (verdict.outcome, verdict.why) == ("wrong length", "It has 33 bytes, not 4.")


def test_a_copy_is_read_once_though_nothing_says_what_it_should_be(
    access: HubAccess, cache: Cache
) -> None:
    path = cache.copy("a-Q4_0.gguf", b"as it came")
    (verdict,) = InstalledModels(access).verify([path])
    assert verdict.outcome == "unknown hash"
    assert not InstalledModels(access).is_verified(path)
    assert verdict.sha256
    InstalledModels(access).stamp(path, verdict.sha256)
    assert InstalledModels(access).is_verified(path)
    assert only(InstalledModels(access)).verified
    path.write_bytes(b"as it came to be")
    assert not InstalledModels(access).is_verified(path)
    assert InstalledModels(access).verify([path])[0].outcome == "wrong length"


def test_a_copy_in_a_snapshot_is_held_to_what_it_was(store: InstalledModels, cache: Cache) -> None:
    path = cache.copy("a-Q4_0.gguf", b"right")
    sha256 = hashlib.sha256(b"right").hexdigest()
    assert store.verify([path])[0].outcome == "unknown hash"
    assert store.verify([path], {path: ExpectedHash(sha256)})[0].is_ok
    assert only(store).verified
    assert store.verify([path])[0].is_ok
    path.write_bytes(b"wrong")
    assert not only(store).verified
    for _ in range(2):  # it is known what it should be, however often it was found wrong
        (verdict,) = store.verify([path])
        assert (verdict.outcome, verdict.expected) == ("wrong hash", ExpectedHash(sha256, 5))
        assert not only(store).verified


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_what_is_no_file_is_not_read(store: InstalledModels, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path, tmp_path / "pipe.gguf"):
        (verdict,) = store.verify([path])
        assert (verdict.outcome, verdict.why) == ("unreadable", "It is not a file.")


# ---- removal -------------------------------------------------------------------------------------


def removed(store: InstalledModels, *models: InstalledModel) -> Removal:
    """Removes models, and holds what was said against what the disk got back."""
    removal = store.plan_removal(models)
    before = bytes_in(store.access.cache)
    assert store.remove(removal) == removal.n_bytes_freed
    assert before - bytes_in(store.access.cache) == removal.n_bytes_freed
    assert not any(os.path.lexists(path) for path in removal.files)
    return removal


def test_the_only_model_goes_with_its_repository(store: InstalledModels, cache: Cache) -> None:
    paths = [cache.add(name, name.encode()) for name in SHARDS]
    store.verify(paths)
    note = cache.repo() / ".no_exist" / C1 / "config.json"
    note.parent.mkdir(parents=True)
    note.touch()
    removal = removed(store, only(store))
    assert set(removal.links) == set(paths)
    assert removal.n_bytes_freed == sum(map(len, SHARDS))
    assert tree(cache.folder) == set()
    assert list(store.access.stamps.iterdir()) == []
    assert removal.shared == (
        f"Other tools that use {cache.folder} (transformers, vLLM, llama.cpp) lose these files "
        "too.",
    )


def test_the_other_revision_stays_loadable(store: InstalledModels, cache: Cache) -> None:
    cache.add("a-Q4_0.gguf", b"same")
    cache.add("b-Q8_0.gguf", b"first only")
    other = cache.add("a-Q4_0.gguf", b"same", C2, ref="next")
    first_a, first_b, second = store.installed()
    removal = removed(store, first_a)
    assert (removal.blobs, removal.n_bytes_freed) == ((), 0)
    assert f"Commit 2222222 of {REPO} has 1 file of these too: 0.0 MiB stay." in removal.shared
    assert f"{REPO} keeps 1 file more: 0.0 MiB." in removal.shared
    assert (cache.repo() / "refs" / "main").is_file()
    assert removed(store, first_b).n_bytes_freed == len(b"first only")
    assert other.read_bytes() == b"same"
    assert [path.name for path in (cache.repo() / "refs").iterdir()] == ["next"]
    assert removed(store, second).n_bytes_freed == 4
    assert tree(cache.folder) == set()


def test_both_revisions_at_once_free_what_they_share(store: InstalledModels, cache: Cache) -> None:
    cache.add("a-Q4_0.gguf", b"same")
    cache.add("a-Q4_0.gguf", b"same", C2)
    assert removed(store, *store.installed()).n_bytes_freed == 4


def test_what_was_linked_since_the_plan_stays(store: InstalledModels, cache: Cache) -> None:
    cache.add("a-Q4_0.gguf", b"same")
    removal = store.plan_removal([only(store)])
    late = cache.add("a-Q4_0.gguf", b"same", C2)
    assert store.remove(removal) == 0
    assert late.read_bytes() == b"same"


def test_a_link_out_of_the_cache_goes_and_its_target_stays(
    store: InstalledModels, cache: Cache, tmp_path: Path
) -> None:
    outside = tmp_path / "mine.gguf"
    outside.write_bytes(b"mine")
    path = cache.repo() / "snapshots" / C1 / "a-Q4_0.gguf"
    path.parent.mkdir(parents=True)
    path.symlink_to(outside)
    removal = removed(store, only(store))
    assert removal.files == (path,)
    assert removal.n_bytes_freed == 0
    assert f"a-Q4_0.gguf only links to {outside}, which stays." in removal.shared
    assert outside.read_bytes() == b"mine"


@pytest.mark.parametrize("at", ["blobs", "snapshots", "."])
def test_folders_that_lead_out_of_the_cache_lose_no_file(
    store: InstalledModels, cache: Cache, tmp_path: Path, at: str
) -> None:
    cache.add("a-Q4_0.gguf", b"a")
    inside, outside = cache.repo() / at, tmp_path / "outside"
    shutil.move(inside, outside)
    inside.symlink_to(outside)
    before = tree(outside)
    if at == "blobs":
        assert removed(store, only(store)).n_bytes_freed == 0
    else:
        for model in store.installed():
            with pytest.raises(LocalMoeError, match="lies outside the cache"):
                store.plan_removal([model])
    assert tree(outside) == before


def test_a_link_to_a_file_of_another_repository_takes_nothing_of_it(
    store: InstalledModels, cache: Cache
) -> None:
    """Whoever can write links must not be able to have other files deleted by them."""
    victim = cache.add("a-Q4_0.gguf", b"a", repo="an/other").resolve()
    path = cache.repo() / "snapshots" / C1 / "b-Q4_0.gguf"
    path.parent.mkdir(parents=True)
    for target in (victim, cache.repo("an/other") / "refs" / "main"):
        path.symlink_to(target)
        (model,) = (model for model in store.installed() if model.repo == REPO)
        removal = store.plan_removal([model])
        assert (removal.files, removal.n_bytes_freed) == ((path,), 0)
        store.remove(removal)
        assert target.is_file()
        path.parent.mkdir(parents=True)


def test_a_removal_that_names_other_files_is_refused(
    store: InstalledModels, cache: Cache, tmp_path: Path
) -> None:
    blob = cache.add("a-Q4_0.gguf", b"a").resolve()
    outside = tmp_path / "mine"
    outside.write_text("mine")
    ref = cache.repo() / "refs" / "main"
    assert store.remove(Removal((), (outside, ref, blob), 0, ())) == 0
    partial = tmp_path / "elsewhere" / "blobs" / "a.localmoe-partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"abc")
    (left,) = leftovers(partial.parent)
    assert store.remove(Removal((), (), 0, (), (left,))) == 0
    assert partial.exists()
    for path in (outside, ref, blob, cache.repo() / "blobs" / ".." / "refs" / "main"):
        with pytest.raises(LocalMoeError, match="lies outside the cache"):
            store.remove(Removal((path,), (), 0, ()))
    assert outside.exists()
    assert ref.exists()
    assert blob.exists()


def test_a_cache_that_is_itself_a_link_can_be_cleared(
    access: HubAccess, cache: Cache, tmp_path: Path
) -> None:
    cache.add("a-Q4_0.gguf", b"abc")
    link = tmp_path / "link"
    link.symlink_to(cache.folder)
    store = InstalledModels(replace(access, cache=link))
    assert removed(store, only(store)).n_bytes_freed == 3
    assert tree(cache.folder) == set()


def test_links_of_missing_shards_go_too(store: InstalledModels, cache: Cache) -> None:
    paths = [cache.add(f"q/{name}", name.encode()) for name in SHARDS]
    paths[0].resolve().unlink()
    removed(store, only(store))
    assert tree(cache.folder) == set()


def test_a_copy_goes_with_the_blob_that_it_was_made_from(
    store: InstalledModels, cache: Cache
) -> None:
    path, blob = cache.copy("a-Q4_0.gguf", b"abc"), cache.blob(b"abc")
    store.stamp(path, blob.name)
    assert removed(store, only(store)).n_bytes_freed == 6
    assert tree(cache.folder) == set()


def test_a_blob_with_another_hard_link_frees_nothing(
    store: InstalledModels, cache: Cache, tmp_path: Path
) -> None:
    blob = cache.add("a-Q4_0.gguf", b"abc").resolve()
    (tmp_path / "mine.gguf").hardlink_to(blob)
    removal = store.plan_removal([only(store)])
    assert removal.n_bytes_freed == 0
    assert any("(a hard link)" in sentence for sentence in removal.shared)
    assert store.remove(removal) == 0
    assert (tmp_path / "mine.gguf").read_bytes() == b"abc"


def shared_payload(cache: Cache, path: Path) -> Path:
    """Moves a blob to the store of all repositories, as newer huggingface_hub does."""
    blob, xet = path.resolve(), "ab" + "c" * 62
    payload = cache.folder / "blobs" / "ab" / xet
    payload.parent.mkdir(parents=True, exist_ok=True)
    (cache.folder / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    with payload.with_name(xet + ".refs").open("a") as refs:
        refs.write(f"{blob.relative_to(cache.folder)}\n")
    blob.replace(payload)
    blob.symlink_to(os.path.relpath(payload, blob.parent))
    return payload


def test_the_store_of_all_repositories_keeps_what_another_one_uses(
    store: InstalledModels, cache: Cache
) -> None:
    paths = [cache.add("a-Q4_0.gguf", b"abc", repo=repo) for repo in (REPO, "an/other")]
    payload = [shared_payload(cache, path) for path in paths][0]
    assert store.verify(paths)[0].is_ok  # by the first link's name, not the last one's
    other, mine = store.installed()
    removal = removed(store, mine)
    assert removal.n_bytes_freed == 0
    assert "Other repositories use the bytes of a-Q4_0.gguf too: 0.0 MiB stay." in removal.shared
    assert paths[1].read_bytes() == b"abc"
    assert only(store).verified
    removal = removed(store, other)
    assert (removal.n_bytes_freed, payload in removal.blobs) == (3, True)
    assert not payload.with_name(payload.name + ".refs").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't tell")
def test_a_file_in_use_is_said_to_be(store: InstalledModels, cache: Cache) -> None:
    path = cache.add("a-Q4_0.gguf", b"abc" * 5000)
    program = (
        "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, "
        "access=mmap.ACCESS_READ); f.close(); print('ready', flush=True); sys.stdin.read()"
    )
    args = [sys.executable, "-c", program, str(path), "localmoe"]
    with subprocess.Popen(
        args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        said = store.plan_removal([only(store)]).shared
        process.communicate("")
    expected = f"Process {process.pid} uses it right now; its bytes stay until it ends."
    assert expected in said
    assert len(store.plan_removal([only(store)]).shared) == 1


def test_what_cannot_be_deleted_is_told_and_can_be_removed_later(
    store: InstalledModels, cache: Cache
) -> None:
    first, second, third = (cache.add(name, name.encode()) for name in SHARDS)
    removal = store.plan_removal([only(store)])
    blob = removal.blobs[1]
    kept = blob.read_bytes()
    blob.unlink()
    blob.mkdir()  # can't be unlinked, by root neither
    with pytest.raises(LocalMoeError, match=f"{blob.name} can't be deleted: ") as error:
        store.remove(removal)
    assert error.value.hint
    assert all(path.is_symlink() for path in (first, second, third))
    blob.rmdir()
    blob.write_bytes(kept)
    removed(store, only(store))
    assert tree(cache.folder) == set()


def broken_off(cache: Cache, name: str, repo: str = REPO) -> Path:
    """A download with one of its two pieces here; gives the blob that it would become."""
    content = os.urandom(PIECE_BYTES + 5)
    blob = cache.blob(content, repo)
    blob.unlink()
    partial = Partial(blob, RemoteFile(repo, C1, name, len(content), blob.name))
    partial.write(0, memoryview(content)[:PIECE_BYTES])
    partial.close()
    return blob


def test_a_broken_off_download_goes_and_leaves_no_trace(
    store: InstalledModels, cache: Cache
) -> None:
    broken_off(cache, "a-Q4_0.gguf")
    removal = store.plan_removal([], store.unfinished())
    assert removal.n_bytes_freed == PIECE_BYTES
    assert removal.shared == (
        "The broken-off download of a-Q4_0.gguf goes: 1.0 MiB of 1.0 MiB are here.",
    )
    assert store.remove(removal) == PIECE_BYTES
    assert store.unfinished() == ()
    assert not cache.repo().exists()


def test_a_download_that_goes_on_is_refused_and_nothing_goes(
    store: InstalledModels, cache: Cache
) -> None:
    path = cache.add("b-Q8_0.gguf", b"whole")
    blob = broken_off(cache, "a-Q4_0.gguf")
    removal = store.plan_removal(store.installed(), store.unfinished())
    with lock_of(blob):
        with pytest.raises(LocalMoeError, match=r"a-Q4_0\.gguf is being downloaded right now"):
            store.plan_removal(store.installed(), store.unfinished())
        with pytest.raises(LocalMoeError, match="is being downloaded right now"):
            store.remove(removal)
    assert path.read_bytes() == b"whole"
    assert len(store.unfinished()) == 1
    assert store.remove(removal) == PIECE_BYTES + 5
    assert not cache.repo().exists()


@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["org/a", "org/b"]),
            st.sampled_from([C1, C2]),
            st.sampled_from(["a-Q4_0.gguf", "b-Q8_0.gguf", "q/c-Q6_K.gguf", "README.md"]),
            st.sampled_from([b"one", b"three", b"fifteen bytes.."]),
            st.sampled_from(["link", "copy"]),
        ),
        unique_by=lambda file: file[:3],
        min_size=1,
    ),
    st.data(),
)
def test_removal_frees_what_it_says_and_leaves_the_rest(
    access: HubAccess, files: list[tuple[str, str, str, bytes, str]], data: st.DataObject
) -> None:
    shutil.rmtree(access.cache, ignore_errors=True)
    cache, store = Cache(access.cache), InstalledModels(access)
    contents = {}
    for repo, commit, name, content, kind in files:
        if kind == "link":
            contents[cache.add(name, content, commit, repo)] = content
        else:
            contents[cache.copy(name, content, commit, repo)] = content
    models = store.installed()
    chosen = data.draw(st.sets(st.sampled_from(models)) if models else st.just(set()))
    removal = removed(store, *chosen)
    gone = {model.path for model in chosen}
    assert set(removal.links) == gone
    assert {path: path.read_bytes() for path in contents if path.exists()} == {
        path: content for path, content in contents.items() if path not in gone
    }
    if len(gone) == len(contents):
        assert tree(access.cache) == set()


# ---- room ----------------------------------------------------------------------------------------


def test_room_is_that_of_the_nearest_folder_there_is(store: InstalledModels) -> None:
    assert not store.access.cache.exists()
    assert store.free_bytes() > 0


# ---- the real client -----------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with StandInHub() as hub:
        yield hub


def test_what_the_real_client_fetched_is_found_verified_and_removed(
    hub: StandInHub, access: HubAccess, store: InstalledModels
) -> None:
    content = os.urandom(5000)
    files = {"a-Q4_K_M.gguf": content, "b-Q8_0.gguf": b"b" * 99, "config.json": b"{}"}
    old = hub.add_repo(REPO, files)
    new = hub.add_repo(REPO, {**files, "b-Q8_0.gguf": b"c" * 77})

    def fetch(name: str, revision: str) -> Path:
        api = huggingface_hub.HfApi(endpoint=hub.endpoint, token=False)
        return Path(api.hf_hub_download(REPO, name, revision=revision, cache_dir=access.cache))

    for name in files:
        assert fetch(name, old) != fetch(name, "main")
    found = {(model.names[0], model.commit): model for model in store.installed()}
    assert set(found) == {(n, c) for n in ("a-Q4_K_M.gguf", "b-Q8_0.gguf") for c in (old, new)}
    assert {v.outcome for v in store.verify(model.path for model in found.values())} == {"ok"}
    assert removed(store, found["a-Q4_K_M.gguf", old]).n_bytes_freed == 0
    assert removed(store, found["b-Q8_0.gguf", old]).n_bytes_freed == 99
    assert fetch("a-Q4_K_M.gguf", new).read_bytes() == content
    assert removed(store, found["a-Q4_K_M.gguf", new]).n_bytes_freed == 5000
    assert huggingface_hub.scan_cache_dir(access.cache).warnings == []
    assert fetch("a-Q4_K_M.gguf", "main").read_bytes() == content
