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
from dataclasses import dataclass
from pathlib import Path

from .cache_layout import (
    COMMIT,
    CachedFile,
    cached_files,
    entries,
    expected_sha256,
    folder_of,
    repo_folders,
    repo_of,
    shard_names,
)
from .partial import Leftover, leftovers
from .quants import quants_of
from .remote import HubAccess, RemoteFile, RemoteRepo
from .removal import Removal, plan_removal, remove
from .stamps import Expected, Stamps, Verdict, verify_file


@dataclass(frozen=True, slots=True)
class Installed:
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
        return tuple(file.name for file in self.files)

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    @property
    def path(self) -> Path:
        """The first shard that is here; of a complete model the one to load."""
        return self.files[0].path

    @property
    def is_complete(self) -> bool:
        return not self.missing

    @property
    def last_used(self) -> float | None:
        """Seconds since 1970; None where the file system keeps no such time."""
        return max((file.last_read for file in self.files if file.last_read), default=None)


@dataclass(frozen=True, slots=True)
class BrokenOff:
    """A download of ours that can go on: how much of a file of a repository is here."""

    repo: str
    left: Leftover


class Store:
    """The models of one cache. Looking never raises: what can't be read isn't there."""

    def __init__(self, access: HubAccess) -> None:
        self.access = access
        self.stamps = Stamps(access.stamps)

    # ---- what is here --------------------------------------------------------------------------

    def installed(self) -> tuple[Installed, ...]:
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
    ) -> Iterator[Installed]:
        remote = (RemoteFile(repo, commit, f.name, f.n_bytes, None) for f in files.values())
        for quant in quants_of(RemoteRepo(repo, commit, tuple(remote))):
            here = tuple(files[file.name] for file in quant.files)
            names = shard_names(here[0].name)
            missing = tuple(names[i - 1] for i in quant.missing)
            verified = all(self.is_verified(file.path) for file in here)
            yield Installed(repo, commit, quant.label, here, missing, verified)

    def unfinished(self) -> tuple[BrokenOff, ...]:
        """Downloads of ours that were broken off, or go on in another process right now."""
        found = []
        for folder in repo_folders(self.access.cache):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found += [BrokenOff(repo_of(folder), left) for left in leftovers(folder / "blobs")]
        return tuple(found)

    def incomplete_bytes(self) -> int:
        """What the unfinished downloads of other tools take."""
        n_bytes = 0
        for folder in repo_folders(self.access.cache):
            for path in entries(folder / "blobs"):
                if path.name.endswith(".incomplete"):
                    n_bytes += _size(path)
        return n_bytes

    def find(self, repo: str, commit: str | None, name: str) -> Path | None:
        """A file's name in a snapshot, where its bytes are here.

        Without a commit, that of the branch `main`; else the snapshot that changed last.
        """
        folder, parts = folder_of(self.access.cache, repo), name.split("/")
        if not folder or {"", ".", ".."} & {*parts} or "\\" in name or "\0" in name:
            return None
        commits = _commits(folder) if commit is None else [commit]
        paths = (folder.joinpath("snapshots", c, *parts) for c in commits if COMMIT.fullmatch(c))
        return next((path for path in paths if os.path.isfile(path)), None)

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
        expected: Mapping[Path, Expected] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Verdict, ...]:
        """Reads all of these files, in the cache or not, and stamps those that are right.

        All shards of a model are looked at when one is named. What a file should be comes from
        `expected`, else from its blob's name, else from the stamp of a file in a snapshot.
        `on_progress` is given the bytes read and those to read.
        """
        every = (path.with_name(name) for path in paths for name in shard_names(path.name))
        files = list(dict.fromkeys(every))
        n_all, n_done, verdicts = sum(map(_size, files)), 0, list[Verdict]()
        for path in files:
            wanted = (expected or {}).get(path) or self._expected(path)
            tell = _from(n_done, n_all, on_progress) if on_progress else None
            verdicts.append(verify_file(path, wanted, self.stamps, tell))
            n_done += _size(path)
        return tuple(verdicts)

    def _expected(self, path: Path) -> Expected | None:
        stamp, sha256 = self.stamps.read(path), expected_sha256(path)
        if sha256:
            known = stamp is not None and stamp.sha256 == sha256
            return Expected(sha256, stamp.seen.n_bytes if stamp and known else None)
        # what lies in a snapshot never becomes another file; elsewhere a person may replace it
        in_cache = os.path.realpath(self.access.cache) + os.sep
        if stamp and os.path.realpath(path).startswith(in_cache):
            return Expected(stamp.sha256, stamp.seen.n_bytes)
        return None

    # ---- room ----------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Room on the disk of the cache, whose folder may not be there yet; 0 if nobody knows."""
        for place in (self.access.cache, *self.access.cache.absolute().parents):
            with contextlib.suppress(OSError):
                return shutil.disk_usage(place).free
        return 0

    def plan_removal(self, *models: Installed) -> Removal:
        """What goes when these models go, and what is shared. Changes nothing.

        Raises LocalMoeError where one lies outside the cache, behind a link.
        """
        links = [file.path for model in models for file in model.files]
        for model in models:  # links of shards whose bytes are gone
            snapshot = model.path.parents[model.names[0].count("/")]
            links += [snapshot / name for name in model.missing if (snapshot / name).is_symlink()]
        return plan_removal(self.access.cache, links, self.stamps)

    def remove(self, removal: Removal) -> int:
        """Deletes what was planned, but for what came to be needed since; gives the bytes freed.

        Raises LocalMoeError where something can't be deleted.
        """
        return remove(self.access.cache, removal, self.stamps)


def _commits(folder: Path) -> list[str]:
    found = [snapshot.name for snapshot in sorted(entries(folder / "snapshots"), key=_changed)]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found.append((folder / "refs" / "main").read_text("ascii").strip())
    return found[::-1]


def _changed(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _from(n_done: int, n_all: int, tell: Callable[[int, int], None]) -> Callable[[int], None]:
    return lambda n: tell(n_done + n, n_all)
