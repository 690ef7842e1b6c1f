"""The Hugging Face cache as it lies on disk: repositories, revisions, snapshots and their blobs.

Its layout is that of huggingface_hub (docs/source/en/guides/manage-cache.md):
models--org--name/{blobs,refs,snapshots/<commit>/<name>}, where a name links to a blob, whose own
name is the sha256 of large files. Without symbolic links (Windows) a snapshot holds the files
themselves. Newer versions may have a blob link on, to one store for all repositories, where names
are hashes of another kind.

Looking never raises and opens no file: what can't be read isn't there.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files import read_regular
from ..gguf.model_meta import SHARD_NAME

REPO_FOLDER = re.compile(r"models--[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_LINKS = 40  # on a path, as in Linux (path_resolution(7))


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A name in a snapshot. `path` is that name, `blob` what it links to, or itself."""

    repo: str
    commit: str
    name: str
    path: Path
    blob: Path
    n_bytes: int


def cached_files(cache: Path) -> Iterator[CachedFile]:
    """Every file of every snapshot whose bytes are here, models or not."""
    for folder in repo_folders(cache):
        for snapshot in entries(folder / "snapshots"):
            for path in walk(snapshot):
                with contextlib.suppress(OSError):
                    yield _cached_file(folder, snapshot, path)


def _cached_file(folder: Path, snapshot: Path, path: Path) -> CachedFile:
    found = path.stat()
    return CachedFile(
        repo_of(folder), snapshot.name, path.relative_to(snapshot).as_posix(), path,
        blob=link_target(path) if path.is_symlink() else path,
        n_bytes=found.st_size,
    )  # fmt: skip


def repo_folders(cache: Path) -> Iterator[Path]:
    """The folders of model repositories, by name."""
    return (path for path in entries(cache) if REPO_FOLDER.fullmatch(path.name))


def repo_of(folder: Path) -> str:
    """org/name of a repository's folder."""
    return folder.name.removeprefix("models--").replace("--", "/")


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is no folder. No link is followed, not even `folder`."""
    for path in [] if folder.is_symlink() else entries(folder):
        if path.is_dir() and not path.is_symlink():
            yield from walk(path)
        else:
            yield path


def link_target(link: Path) -> Path:
    """What a link names: one step, in the folder where that really lies. Raises OSError."""
    named = link.parent / os.readlink(link)
    return Path(os.path.realpath(named.parent), named.name)


def expected_sha256(path: Path) -> str | None:
    """The sha256 that a file in a cache should have, by the name of the blob that it links to."""
    with contextlib.suppress(OSError):
        for _ in range(MAX_LINKS):
            if path.parent.name == "blobs" and REPO_FOLDER.fullmatch(path.parent.parent.name):
                return path.name if SHA256.fullmatch(path.name) else None
            if not path.is_symlink():
                return None
            path = link_target(path)
    return None


def shard_names(name: str) -> tuple[str, ...]:
    """The names of all shards of a model, any of which may be given; of one file its own."""
    match = SHARD_NAME.search(name)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        return (name,)
    stem, count = name[: match.start()], int(match[2])
    return tuple(f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1))


COMMIT_BEGINNING = re.compile(r"[0-9a-f]{7,40}")
"""Fewer digits than git shows are the name of a branch."""


def commit_here(folder: Path, revision: str) -> str | None:
    """The commit of a branch or tag when it was last pulled, of a commit's first digits where a
    snapshot has them, or the commit itself. None for what isn't known here."""
    if COMMIT.fullmatch(revision):
        return revision
    if commit := read_ref(folder, revision):
        return commit
    if COMMIT_BEGINNING.fullmatch(revision):
        found = [commit for commit in snapshots(folder) if commit.startswith(revision)]
        return found[0] if len(found) == 1 else None
    return None


def commits_here(folder: Path) -> list[str]:
    """The commits that the cache has files of: that of the branch main, then the newest first."""
    main = read_ref(folder, "main")
    return sorted(snapshots(folder), key=lambda commit: commit != main)


def read_ref(folder: Path, revision: str) -> str | None:
    """What refs/<branch> says."""
    try:
        commit = read_regular(folder / "refs" / revision).decode("utf-8").strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def snapshots(folder: Path) -> list[str]:
    """The commits with a snapshot, the one that changed last before the others."""
    found = [path for path in entries(folder / "snapshots") if COMMIT.fullmatch(path.name)]
    return [path.name for path in sorted(found, key=_changed, reverse=True)]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
