"""The models in the Hugging Face cache: which are here, whether they are right, room for more.

Other tools share the cache, so what a model lies in is found by its layout alone, and removing one
says first what else goes with it (removal.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .cache_layout import (
    COMMIT,
    CachedFile,
    cached_files,
    entries,
    expected_sha256,
    link_target,
    repo_folders,
    repo_of,
    shard_names,
    walk,
)
from .partial_file import Leftover, leftovers
from .quants import quants_of
from .removal import Removal, plan_removal, remove_models
from .types import HubAccess, RemoteFile, RemoteRepo
from .verify import ExpectedHash, Stamps, Verdict, verify_file


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model in the cache: one GGUF or the shards of one, in order.

    `label` is its quant as quants.py reads it off the names. `missing` are names of shards that
    aren't here. `verified`: each file is as it was when its sha256 was found right.
    """

    repo: str
    commit: str
    label: str
    files: tuple[CachedFile, ...]
    missing: tuple[str, ...]
    verified: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its files in the repository."""
        return tuple(file.name for file in self.files)

    @property
    def n_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.n_bytes for file in self.files)

    @property
    def path(self) -> Path:
        """The first shard that is here; of a complete model the one to load."""
        return self.files[0].path

    @property
    def is_complete(self) -> bool:
        """Whether every shard is here."""
        return not self.missing

    @property
    def snapshot(self) -> Path:
        """The folder of its commit, where the names of its files begin."""
        return self.path.parents[self.names[0].count("/")]

    @property
    def missing_paths(self) -> tuple[Path, ...]:
        """Where the missing shards would lie."""
        return tuple(self.snapshot / name for name in self.missing)


@dataclass(frozen=True, slots=True)
class PartialDownload:
    """A download of ours that can go on: how much of a file of a repository is here."""

    repo: str
    left: Leftover


class InstalledModels:
    """The models of one cache. Looking never raises: what can't be read isn't there."""

    def __init__(self, access: HubAccess) -> None:
        self.access = access
        self.stamps = Stamps(access.stamps)

    # ---- what is here --------------------------------------------------------------------------

    def installed(self) -> tuple[InstalledModel, ...]:
        """Every model in the cache, by repository, commit and name; no model file is opened."""
        snapshots: dict[tuple[str, str], dict[str, CachedFile]] = defaultdict(dict)
        for file in cached_files(self.access.cache):
            if COMMIT.fullmatch(file.commit):
                snapshots[file.repo, file.commit][file.name] = file
        return tuple(
            model
            for (repo, commit), files in sorted(snapshots.items())
            for model in sorted(self._models(repo, commit, files), key=lambda model: model.names)
        )

    def _models(
        self, repo: str, commit: str, files: Mapping[str, CachedFile]
    ) -> Iterator[InstalledModel]:
        remote = (RemoteFile(repo, commit, f.name, f.n_bytes, None) for f in files.values())
        for quant in quants_of(RemoteRepo(repo, commit, tuple(remote))):
            here = tuple(files[file.name] for file in quant.files)
            names = shard_names(here[0].name)
            missing = tuple(names[i - 1] for i in quant.missing)
            verified = all(self.is_verified(file.path) for file in here)
            yield InstalledModel(repo, commit, quant.label, here, missing, verified)

    def unfinished(self) -> tuple[PartialDownload, ...]:
        """Downloads of ours that were broken off, or go on in another process right now."""
        found = []
        for folder in repo_folders(self.access.cache):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found += [
                    PartialDownload(repo_of(folder), left) for left in leftovers(folder / "blobs")
                ]
        return tuple(found)

    def lost(self) -> tuple[InstalledModel, ...]:
        """Models of which only links are left, their bytes gone: `missing` names all shards, and
        `files` are the links."""
        found: dict[tuple[str, str], dict[str, CachedFile]] = defaultdict(dict)
        for file in lost_files(self.access.cache):
            found[file.repo, file.commit][file.name] = file
        models = (
            replace(model, missing=shard_names(model.names[0]))
            for (repo, commit), files in sorted(found.items())
            for model in sorted(self._models(repo, commit, files), key=lambda model: model.names)
        )
        return tuple(
            model for model in models if not any(path.exists() for path in model.missing_paths)
        )

    # ---- right or wrong ------------------------------------------------------------------------

    def stamp(self, path: Path, sha256: str) -> None:
        """Keep that all of a file was read and has this hash."""
        self.stamps.write(path, sha256)

    def is_verified(self, path: Path, sha256: str | None = None) -> bool:
        """Whether a file is as it was when it was stamped, with the hash that it should have.

        Without `sha256` the one that the cache knows; where it knows none, any.
        """
        return self.stamps.holds(path, sha256 or expected_sha256(path))

    def verify(
        self,
        paths: Iterable[Path],
        expected: Mapping[Path, ExpectedHash] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Verdict, ...]:
        """Reads all of these files, in the cache or not, and stamps those that are right.

        What a file should be comes from `expected`, else from what the cache knows of it.
        `on_progress` is given the bytes read and those to read.
        """
        files = list(dict.fromkeys(paths))
        n_all, n_done, verdicts = sum(map(_size, files)), 0, list[Verdict]()
        for path in files:
            wanted = (expected or {}).get(path) or self.expected(path)
            tell = _from(n_done, n_all, on_progress) if on_progress else None
            verdicts.append(verify_file(path, wanted, self.stamps, tell))
            n_done += _size(path)
        return tuple(verdicts)

    def expected(self, path: Path) -> ExpectedHash | None:
        """What a file of the cache should be: by the name of its blob, else by the stamp of a file
        in a snapshot. None for any other."""
        stamp, sha256 = self.stamps.read(path), expected_sha256(path)
        if sha256:
            known = stamp is not None and stamp.sha256 == sha256
            return ExpectedHash(sha256, stamp.seen.n_bytes if stamp and known else None)
        # what lies in a snapshot never becomes another file; elsewhere a person may replace it
        in_cache = os.path.realpath(self.access.cache) + os.sep
        if stamp and os.path.realpath(path).startswith(in_cache):
            return ExpectedHash(stamp.sha256, stamp.seen.n_bytes)
        return None

    # ---- room ----------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Room on the disk of the cache, whose folder may not be there yet; 0 if nobody knows."""
        for place in (self.access.cache, *self.access.cache.absolute().parents):
            with contextlib.suppress(OSError):
                return shutil.disk_usage(place).free
        return 0

    def plan_removal(
        self, models: Iterable[InstalledModel], unfinished: Iterable[PartialDownload] = ()
    ) -> Removal:
        """What goes with these models and downloads, and what is shared. Changes nothing.

        Raises LocalMoeError where a model lies outside the cache, behind a link, and where a
        download goes on right now.
        """
        links = []
        for model in models:
            links += [file.path for file in model.files]  # and links of shards whose bytes are gone
            links += [path for path in model.missing_paths if path.is_symlink()]
        partials = [broken_off.left for broken_off in unfinished]
        return plan_removal(self.access.cache, links, self.stamps, partials)

    def remove(self, removal: Removal) -> int:
        """Deletes what was planned, but for what came to be needed since; gives the bytes freed.

        Raises LocalMoeError where something can't be deleted or is being downloaded.
        """
        return remove_models(self.access.cache, removal, self.stamps)


def lost_files(cache: Path) -> Iterator[CachedFile]:
    """Names in snapshots that link to blobs of their repositories which aren't there."""
    for folder in repo_folders(cache):
        for snapshot in entries(folder / "snapshots"):
            for path in walk(snapshot) if COMMIT.fullmatch(snapshot.name) else ():
                if path.is_symlink() and expected_sha256(path) and not path.exists():
                    name = path.relative_to(snapshot).as_posix()
                    blob = link_target(path)
                    yield CachedFile(repo_of(folder), snapshot.name, name, path, blob, 0)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _from(n_done: int, n_all: int, tell: Callable[[int, int], None]) -> Callable[[int], None]:
    return lambda n: tell(n_done + n, n_all)
