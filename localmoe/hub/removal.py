"""Taking models out of a cache that other tools use too: what goes, what stays, what is shared.

Only names inside the cache are ever deleted. No link is followed to do it: a link that leads out
goes, and what it leads to stays.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ..errors import LocalMoeError, gib, printable
from ..files import read_regular
from .cache_layout import REPO_FOLDER, SHA256, CachedFile, cached_files, entries, link_target, walk
from .download import lock_of
from .partial_file import Leftover, remove_leftover
from .verify import Stamps

SHARED_STORE_MARK = ".huggingface-shared-blobs"  # huggingface_hub, utils/_shared_blobs.py
OTHER_TOOLS = "transformers, vLLM, llama.cpp"


@dataclass(frozen=True, slots=True)
class Removal:
    """What goes: names in snapshots, blobs that no other name links to, broken-off downloads.

    `n_bytes_freed` counts only what the disk gets back. `shared` are sentences for the person who
    is asked: who else loses the files, and why bytes stay.
    """

    links: tuple[Path, ...]
    blobs: tuple[Path, ...]
    n_bytes_freed: int
    shared: tuple[str, ...]
    partials: tuple[Leftover, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that go."""
        return (*self.links, *self.blobs)


def plan_removal(
    cache: Path, links: Sequence[Path], stamps: Stamps, partials: Sequence[Leftover] = ()
) -> Removal:
    """What goes with these names in snapshots, and what is shared. Changes nothing.

    Raises LocalMoeError where a name lies outside the cache, and where a download goes on.
    """
    for left in partials:
        with _broken_off(left):
            pass
    links = tuple(dict.fromkeys(links))
    folders = {link: _repo_folder(cache, link) for link in links}
    files = list(cached_files(cache))
    leaving = [file for file in files if file.path in folders]
    staying = [file for file in files if file.path not in folders]
    kept = {file.blob for file in staying}
    found = [blob for file in leaving for blob in _blobs_of(file, folders[file.path], stamps)]
    blobs = tuple(dict.fromkeys(blob for blob in found if blob not in kept))
    payloads = tuple(dict.fromkeys(_unused_payloads(cache, blobs)))
    doomed = (*links, *blobs, *payloads)
    sentences = [*_shared_names(leaving, staying), *_staying_bytes(cache, leaving, doomed, kept)]
    sentences += [*map(_begun, partials), *_in_use(file.path for file in leaving)]
    return Removal(
        links,
        (*blobs, *payloads),
        _freed(doomed) + sum(left.n_bytes_here for left in partials),
        (_others(cache), *sentences) if links else tuple(sentences),
        tuple(partials),
    )


def remove_models(cache: Path, removal: Removal, stamps: Stamps) -> int:
    """Deletes what was planned, but for blobs that were linked since; gives the bytes freed.

    Bytes go before the names that lead to them: what fails halfway is still listed and can be
    removed again. Raises LocalMoeError.
    """
    folders = {_repo_folder(cache, link) for link in removal.links}
    partials = [left for left in removal.partials if _is_blob(cache, _real(left.blob))]
    folders |= {_real(left.blob).parent.parent for left in partials}
    kept = {file.blob for file in cached_files(cache) if file.path not in removal.links}
    freed = sum(map(_delete_partial, partials))
    for blob in removal.blobs:
        if _is_payload(cache, blob):
            freed += _delete_payload(cache, blob, stamps)
        elif _is_blob(cache, blob) and blob not in kept:
            if not blob.is_symlink():
                stamps.drop(blob)
            stamps.forget_content(blob.name)
            freed += _delete(blob)
    for link in removal.links:
        if not link.is_symlink():
            stamps.drop(link)
        freed += _delete(link)
    for folder in folders:
        _tidy(folder)
    return freed


# ---- what belongs to a name ----------------------------------------------------------------------


def _root(cache: Path) -> Path:
    return Path(os.path.realpath(cache))


def _repo_folder(cache: Path, link: Path) -> Path:
    """The repository that a name in a snapshot lies in, as it really lies."""
    root, parent = _root(cache), Path(os.path.realpath(link.parent))
    parts = parent.relative_to(root).parts if parent.is_relative_to(root) else ()
    if len(parts) < 3 or parts[1] != "snapshots" or not REPO_FOLDER.fullmatch(parts[0]):
        raise LocalMoeError(
            f"{printable(str(link))} lies outside the cache {cache}, so it isn't removed.",
            "Delete it by hand where it lies: " + printable(str(parent)),
        )
    return root / parts[0]


def _real(path: Path) -> Path:
    """A name in the folder where it really lies."""
    return Path(os.path.realpath(path.parent), path.name)


def _is_blob(cache: Path, path: Path) -> bool:
    """Whether a path is that of a blob of a repository in the cache."""
    folder = path.parent
    in_repo = folder.parent.parent == _root(cache) and REPO_FOLDER.fullmatch(folder.parent.name)
    return folder.name == "blobs" and bool(in_repo) and os.path.realpath(folder) == str(folder)


def _is_payload(cache: Path, path: Path) -> bool:
    """Whether a path is in the store that blobs of several repositories link to."""
    store, folder = _root(cache) / "blobs", path.parent
    if folder.parent != store or not SHA256.fullmatch(path.name) or folder.name != path.name[:2]:
        return False
    return os.path.realpath(folder) == str(folder) and (store / SHARED_STORE_MARK).is_file()


def _blobs_of(file: CachedFile, folder: Path, stamps: Stamps) -> Iterator[Path]:
    """The blob of a name, if it is its repository's own."""
    if file.blob != file.path:
        if file.blob.parent == folder / "blobs":
            yield file.blob
        return
    # a copy: where links don't work, the blob it was made from may have stayed
    stamp = stamps.read(file.path)
    blob = folder / "blobs" / (stamp.sha256 if stamp else "")
    with contextlib.suppress(OSError):
        if stamp and blob.lstat().st_size == file.n_bytes:
            yield blob


def _unused_payloads(cache: Path, blobs: Sequence[Path]) -> Iterator[Path]:
    for blob in blobs:
        payload = link_target(blob) if blob.is_symlink() else None
        if payload and _is_payload(cache, payload) and {*_users(cache, payload)} <= {*blobs}:
            yield payload


def _users(cache: Path, payload: Path) -> Iterator[Path]:
    """The blobs of all repositories, of data sets too, that link to what they share."""
    for folder in entries(_root(cache)):
        for blob in entries(folder / "blobs") if "--" in folder.name else ():
            with contextlib.suppress(OSError):
                if blob.is_symlink() and link_target(blob) == payload:
                    yield blob


def _freed(doomed: Iterable[Path]) -> int:
    """Bytes of files all of whose names go."""
    return sum(n_bytes for n_bytes, n_names_left in _files_of(doomed).values() if not n_names_left)


def _files_of(doomed: Iterable[Path]) -> dict[tuple[int, int], tuple[int, int]]:
    """By device and inode: a file's bytes, and how many other names it has (hard links)."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for path in doomed:
        with contextlib.suppress(OSError):
            at = path.lstat()
            if stat.S_ISREG(at.st_mode):
                _, n_names = found.get((at.st_dev, at.st_ino), (0, at.st_nlink))
                found[at.st_dev, at.st_ino] = at.st_size, n_names - 1
    return found


# ---- sentences -----------------------------------------------------------------------------------


def _others(cache: Path) -> str:
    return f"Other tools that use {printable(str(cache))} ({OTHER_TOOLS}) lose these files too."


def _begun(left: Leftover) -> str:
    name = printable(left.name) or "a file"
    here, n_bytes = gib(left.n_bytes_here), gib(left.n_bytes)
    return f"The broken-off download of {name} goes: {here} of {n_bytes} are here."


def _shared_names(leaving: Sequence[CachedFile], staying: Sequence[CachedFile]) -> Iterator[str]:
    """Other names of the same bytes, and other files of the same repositories."""
    sizes = {file.blob: file.n_bytes for file in leaving}
    shared: dict[tuple[str, str], set[Path]] = defaultdict(set)
    others: dict[str, dict[Path, int]] = {file.repo: {} for file in leaving}
    for file in staying:
        if file.blob in sizes:
            shared[file.repo, file.commit].add(file.blob)
        elif file.repo in others:
            others[file.repo][file.blob] = file.n_bytes
    for (repo, commit), blobs in sorted(shared.items()):
        n_bytes = gib(sum(sizes[blob] for blob in blobs))
        revision = f"Commit {printable(commit[:7])} of {repo}"
        yield f"{revision} has {_files(len(blobs))} of these too: {n_bytes} stay."
    for repo, found in sorted(others.items()):
        if found:
            n_bytes = gib(sum(found.values()))
            yield f"{repo} keeps {_files(len(found))} more: {n_bytes}."


def _staying_bytes(
    cache: Path, leaving: Sequence[CachedFile], doomed: Sequence[Path], kept: set[Path]
) -> Iterator[str]:
    """Files whose bytes the disk doesn't get back, though no name in a snapshot needs them."""
    going = _files_of(doomed)
    for file in leaving:
        name, n_bytes = printable(file.name), gib(file.n_bytes)
        real = Path(os.path.realpath(file.path))
        try:
            at = real.stat()
        except OSError:  # gone meanwhile
            continue
        _, n_names_left = going.get((at.st_dev, at.st_ino), (0, None))
        if file.blob in kept or n_names_left == 0:
            continue
        if n_names_left:
            yield f"{name} has another name on this disk (a hard link): its {n_bytes} stay."
        elif real.is_relative_to(_root(cache)):
            yield f"Other repositories use the bytes of {name} too: {n_bytes} stay."
        else:
            yield f"{name} only links to {printable(str(real))}, which stays."


def _files(n: int) -> str:
    return "1 file" if n == 1 else f"{n} files"


def _in_use(paths: Iterable[Path]) -> Iterator[str]:
    """Engines that have these files open or mapped right now, as far as the system tells."""
    wanted = {os.path.realpath(path) for path in paths}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if not any("localmoe" in word for word in process.cmdline()):
                continue
            opened = {file.path for file in process.open_files()}
            if hasattr(process, "memory_maps"):  # not on macOS
                opened |= {region.path for region in process.memory_maps()}
            if opened & wanted:
                yield f"Process {process.pid} uses it right now; its bytes stay until it ends."


# ---- deleting ------------------------------------------------------------------------------------


def _delete(path: Path) -> int:
    """One name. Gives the bytes that the disk gets back."""
    try:
        at = path.lstat()
        path.unlink()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _undeletable(path, error) from None
    return at.st_size if stat.S_ISREG(at.st_mode) and at.st_nlink == 1 else 0


def _undeletable(path: Path, error: OSError) -> LocalMoeError:
    why = (error.strerror or str(error)).lower()
    return LocalMoeError(
        f"{printable(str(path))} can't be deleted: {why}.",
        "End what uses it, or delete it as the user whose file it is.",
    )


def _delete_partial(left: Leftover) -> int:
    with _broken_off(left):
        remove_leftover(left.blob)
    return left.n_bytes_here


@contextlib.contextmanager
def _broken_off(left: Leftover) -> Iterator[None]:
    """Holds the lock of a download. Raises LocalMoeError where another program goes on with it."""
    try:
        with lock_of(left.blob).acquire(timeout=0):
            yield
    except Timeout:
        name = printable(left.name) or left.blob.name
        what = f"{name} is being downloaded right now."
        raise LocalMoeError(what, "End that download first.") from None
    except OSError as error:
        raise _undeletable(left.blob, error) from None


def _delete_payload(cache: Path, payload: Path, stamps: Stamps) -> int:
    """What blobs of several repositories shared, if none links to it any more."""
    with FileLock(payload.with_name(payload.name + ".lock")):  # huggingface_hub's own
        if any(_users(cache, payload)):
            return 0
        stamps.drop(payload)
        _delete(payload.with_name(payload.name + ".refs"))
        return _delete(payload)


def _tidy(folder: Path) -> None:
    """Folders that are empty go, and refs and notes of snapshots that aren't here any more."""
    _delete_empty(folder / "snapshots")
    snapshots = {path.name for path in entries(folder / "snapshots")}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for ref in walk(folder / "refs"):
            if read_regular(ref).decode("ascii").strip() not in snapshots:
                ref.unlink()
        for note in walk(folder / ".no_exist"):  # empty files: names the repository doesn't have
            if note.parts[len(folder.parts) + 1] not in snapshots and not note.lstat().st_size:
                note.unlink()
    _delete_empty(folder)


def _delete_empty(folder: Path) -> None:
    if folder.is_symlink():
        return
    for path in entries(folder):
        if path.is_dir():
            _delete_empty(path)
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()
