"""The Hugging Face Hub: what a repository holds, bytes of its files, their place in the cache.

Questions and bytes go by one HTTP client, http.py, which is imported for the first request because
that takes a while. The cache has huggingface_hub's layout, so that its tools find what is here;
what the Hub said of a repository is kept beside the headers for when there is no network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from ..errors import DownloadError, LocalMoeError, UsageError, printable
from ..files import atomic_file, make_private_folder, open_regular, read_regular, write_atomically
from .cache_layout import COMMIT, SHA256, commit_here, commits_here
from .types import (
    OFFLINE_HINT,
    REPO,
    HttpRefusal,
    HubAccess,
    RemoteFile,
    RemoteRepo,
    TransferFault,
    is_repo_name,
    is_revision,
    retry_after_s,
)

if TYPE_CHECKING:
    from .http import HttpClient, RemoteBytes


def refusal_of(
    status: int,
    headers: Mapping[str, str],
    file: RemoteFile,
    has_token: bool,
    near: Callable[[], Sequence[str]],
) -> LocalMoeError:
    """The error for an answer of 4xx or 5xx to a request for `file`, or for its repository where
    it has no name. `headers` have names in lower case; `near` gives repositories with a name like
    it. Source: hf_raise_for_status (huggingface_hub/utils/_http.py)."""
    code, said = headers.get("x-error-code"), headers.get("x-error-message", "")
    repo = file.repo
    if code == "GatedRepo":
        hint = f"Open https://huggingface.co/{repo}, accept its terms, then: hf auth login"
        return DownloadError(f"{repo} is gated: its owner wants its terms accepted.", hint)
    if said.startswith("Invalid credentials") or (status == 401 and has_token):
        what = "The Hub refuses the token: it is wrong or has expired."
        return DownloadError(what, "Try: hf auth login, or unset HF_TOKEN")
    if code == "RevisionNotFound":
        what = f"{repo} has no revision {file.commit}."
        return UsageError(what, "Leave the revision out for the newest files.")
    if code == "EntryNotFound" or status == 416:
        what = f"{file.name or 'A file'} of {repo} has changed on the Hub or is gone."
        return DownloadError(what, "Pull it again.")
    if code == "RepoNotFound" or status in (401, 404):
        return no_such_repo(repo, has_token, near())
    if status in (408, 429) or status >= 500:
        wait_s = retry_after_s(headers)
        when = f"Try again in {wait_s:.0f} s." if wait_s else "Try again later."
        return TransferFault("busy", f"The Hub is busy (HTTP {status}).", wait_s, when)
    what = f"The Hub refuses access to {repo} (HTTP {status})."
    return DownloadError(what, "Does the token allow it? See: hf auth whoami")


def no_such_repo(repo: str, has_token: bool, near: Sequence[str]) -> UsageError:
    """It doesn't exist, or is private: the Hub doesn't say which."""
    hint = f"Did you mean {' or '.join(near)}?" if near else "Check the name on the Hub."
    if not has_token:
        hint += " For a private one: hf auth login"
    return UsageError(f"The Hub has no model {repo} that you may see.", hint)


def no_hub(host: str) -> DownloadError:
    """Something answers, but not with what the Hub would say."""
    what = f"What answers at {host} is not the Hub: a sign-in page of the network?"
    return DownloadError(what, "Open a web page in the browser, then try again.")


def is_no_network(fault: TransferFault) -> bool:
    """Whether nobody is there at all, which a few seconds won't change."""
    return fault.kind in ("unreachable", "proxy")


def keep_listing(headers: Path, listed: RemoteRepo, revision: str | None) -> None:
    """Keep what a revision (None: main) and its commit hold. What can't be written isn't kept."""
    files = [asdict(file) for file in listed.files if file.name.lower().endswith(".gguf")]
    text = json.dumps({"commit": listed.commit, "files": files})
    for called in {revision or "main", listed.commit}:
        path = listing_path(headers, listed.repo, called)
        with suppress(OSError):
            make_private_folder(path.parent)
            write_atomically(path, text.encode(), durable=False)


def kept_listing(headers: Path, repo: str, revision: str | None) -> RemoteRepo | None:
    """What was kept; None where that is nothing, or not what was written."""
    try:
        kept = json.loads(read_regular(listing_path(headers, repo, revision or "main")))
        commit, files = kept["commit"], tuple(RemoteFile(**file) for file in kept["files"])
        if COMMIT.fullmatch(commit) and all(is_right(file, repo, commit) for file in files):
            return RemoteRepo(repo, commit, files)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


def is_right(file: RemoteFile, repo: str, commit: str) -> bool:
    has_size = isinstance(file.n_bytes, int) and file.n_bytes >= 0
    has_hash = file.sha256 is None or SHA256.fullmatch(file.sha256) is not None
    return has_size and has_hash and (file.repo, file.commit) == (repo, commit)


def listing_path(headers: Path, repo: str, revision: str) -> Path:
    return headers / repo / f"{quote(revision, safe='')}.json"


STALL_S = 30.0  # without a byte of a file
API_S = 20.0  # for an answer of the API
NEAR_S = 5.0  # for one that is only an extra
PAUSES_S = (0.5, 2.0, 6.0)  # before each further try of a short request
TOKEN = re.compile(r"[!-~]+")  # what an HTTP header can hold
MAX_NAME_BYTES = 255  # of a part of a path, on every file system in use
N_NEAR = 3
COPIED_BYTES = 2**20  # at a time
LFS_POINTER = b"version https://git-lfs"
PAGES = (b"<!doctype", b"<html", b"<?xml")

T = TypeVar("T")


class Hub:
    """The Hub as `access` says. Can be used by several threads at once.

    `stall_s`: for how long nothing may come; `pauses_s`: the waits before further tries.
    """

    def __init__(
        self, access: HubAccess, *, stall_s: float = STALL_S, pauses_s: tuple[float, ...] = PAUSES_S
    ) -> None:
        self.access = access
        self.pauses_s = pauses_s
        self._stall_s = stall_s
        self._http: HttpClient | None = None
        self._lock = threading.Lock()
        self._revisions: dict[tuple[str, str], str] = {}  # (repo, commit) -> as it was asked for

    def repository(self, repo: str, revision: str | None = None) -> RemoteRepo:
        """The files of `repo` at a branch, tag or commit (None: its main branch).

        Takes one request; offline, what the Hub said last, or else what the cache holds of it.
        Raises UsageError for names that don't exist, DownloadError for everything else.
        """
        check_repo(repo)
        if revision is not None and not is_revision(revision):
            raise UsageError(f"{printable(revision)[:60]!r} is not the name of a revision.")
        if self.access.offline:
            kept = kept_listing(self.access.headers, repo, revision)
            return kept or self._cached_repository(repo, revision)
        self._need_network(repo)
        remote = self.retried(lambda: self._listing(repo, revision))
        self._revisions[repo, remote.commit] = revision or "main"
        keep_listing(self.access.headers, remote, revision)
        return remote

    def commit_of(self, repo: str, revision: str) -> str:
        """The commit that a revision stands for. The Hub is asked where it may have moved since;
        with no way there, what the cache knows counts. Raises as repository() does."""
        here = commit_here(self._folder(repo), revision)
        if here and (self.access.offline or here.startswith(revision)):
            return here
        try:
            return self.repository(repo, revision).commit
        except TransferFault:
            if here:
                return here
            raise

    def open(
        self, file: RemoteFile, start: int, end: int | None, *, etag: str | None = None
    ) -> RemoteBytes:
        """Bytes `start` to `end` (not included; None: to the end) of a file, still to be read.

        With `etag`, from an earlier answer, only as long as the file has it: else, and where the
        server knows no ranges, the answer is the whole file (`status` 200). Raises TransferFault
        where another try may help, DownloadError where none will.
        """
        self._need_network(file.repo)
        url = f"{self.access.endpoint}/{_resolve(file)}"
        try:
            remote = self._client().get_range(url, start, end, etag)
        except HttpRefusal as refusal:
            raise self._refused(refusal.status, refusal.headers, file) from None
        try:
            _check_beginning(remote, file)
        except BaseException:
            remote.close()
            raise
        return remote

    def link(self, file: RemoteFile) -> Path:
        """Make the verified blob of `file` known in the cache, so that every tool finds it.

        Asks nobody: a commit's files never change. Gives its path in the folder of snapshots.
        """
        if path := self.cached_path(file):
            self._note_revision(file)
            return path
        if not self.blob_path(file).is_file():
            raise DownloadError(f"{file.base_name} of {file.repo} is not here yet.", "Pull it.")
        path = self._snapshots(file.repo) / file.commit / file.name
        link_to_blob(path, self.blob_path(file), self.access.has_symlinks)
        self._note_revision(file)
        return path

    def blob_path(self, file: RemoteFile) -> Path:
        """Where the cache keeps its content. Raises DownloadError for a file without a sha256."""
        if file.sha256 is None:
            what = f"{file.base_name} of {file.repo} has no sha256 on the Hub"
            raise DownloadError(f"{what}, so it can't be verified.", "Choose another file.")
        return self._folder(file.repo) / "blobs" / file.sha256

    def cached_path(self, file: RemoteFile) -> Path | None:
        """Its path in the folder of snapshots, where it is here at its full length."""
        path = self._snapshots(file.repo) / file.commit / file.name
        if not path.is_file() or path.stat().st_size != file.n_bytes:
            return None
        return path if _linked_sha256(path) in (None, file.sha256) else None

    def retried(self, attempt: Callable[[], T]) -> T:
        """`attempt`, tried again after short waits as long as it raises TransferFault."""
        for pause_s in self.pauses_s:
            try:
                return attempt()
            except TransferFault as fault:
                is_long = fault.retry_after_s and fault.retry_after_s > self.pauses_s[-1]
                if is_long or is_no_network(fault):
                    raise  # the caller's person decides whether to wait for so long
                time.sleep(max(pause_s, fault.retry_after_s or 0.0))
        return attempt()

    # --- the API, and what it refuses

    def _client(self) -> HttpClient:
        from .http import HttpClient  # start-up, 130 ms

        with self._lock:
            self._http = self._http or HttpClient(self.access, self._stall_s)
            return self._http

    def _listing(self, repo: str, revision: str | None) -> RemoteRepo:
        """What the API says of a repository."""
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        url = f"{self.access.endpoint}/api/models/{repo}{at}?blobs=true"
        try:
            answer = self._client().get(url, API_S)
        except HttpRefusal as refusal:
            file = RemoteFile(repo, revision or "main", "", 0, None)
            raise self._refused(refusal.status, refusal.headers, file) from None
        try:
            return remote_repo(repo, json.loads(answer))
        except (ValueError, TypeError, KeyError, AttributeError):  # not the JSON it should be
            raise no_hub(urlsplit(self.access.endpoint).hostname or "") from None

    def _refused(self, status: int, headers: Mapping[str, str], file: RemoteFile) -> LocalMoeError:
        has_token = self.access.token is not None
        return refusal_of(status, headers, file, has_token, lambda: self._near(file.repo))

    def _near(self, repo: str) -> list[str]:
        """Repositories with a name like it, as far as the Hub's search finds them."""
        org, name = repo.split("/")
        found: set[str] = set()
        for query in ({"search": name}, {"author": org}):
            url = f"{self.access.endpoint}/api/models?{urlencode({**query, 'limit': 50})}"
            with suppress(Exception):  # the names are an extra to an error that stands anyway
                models = json.loads(self._client().get(url, NEAR_S))
                found.update(model["id"] for model in models)
        usable = [name for name in sorted(found - {repo}) if REPO.fullmatch(name)]
        return get_close_matches(repo, usable, N_NEAR, cutoff=0.5)

    def _need_network(self, repo: str) -> None:
        if self.access.offline:
            what = f"{repo} is not in the cache, or not whole, and the Hub is not asked offline."
            raise DownloadError(what, OFFLINE_HINT)
        if self.access.token and not TOKEN.fullmatch(self.access.token):
            # before an error of a library shows it
            what = "The token has characters that no token of the Hub has."
            raise DownloadError(what, "Try: hf auth login, or unset HF_TOKEN")

    # --- the cache

    def _folder(self, repo: str) -> Path:
        return self.access.cache / f"models--{repo.replace('/', '--')}"

    def _snapshots(self, repo: str) -> Path:
        return self._folder(repo) / "snapshots"

    def _cached_repository(self, repo: str, revision: str | None) -> RemoteRepo:
        commit = self._cached_commit(repo, revision)
        files = tuple(_cached_files(repo, commit, self._snapshots(repo) / commit)) if commit else ()
        if not files:
            self._need_network(f"{repo} at {revision}" if revision else repo)
        return RemoteRepo(repo, commit, files)

    def _cached_commit(self, repo: str, revision: str | None) -> str:
        """The commit that a revision stood for when it was pulled, "" where there is none."""
        folder = self._folder(repo)
        if revision:
            return commit_here(folder, revision) or ""
        return next(iter(commits_here(folder)), "")

    def _note_revision(self, file: RemoteFile) -> None:
        """Write refs/<branch>, by which other tools find the commit offline."""
        revision = self._revisions.get((file.repo, file.commit), file.commit)
        if revision == file.commit:
            return
        ref = self._folder(file.repo) / "refs" / revision
        with suppress(OSError):  # a cache that can't be written to has the file all the same
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(ref, file.commit.encode(), durable=False)


def check_repo(repo: str) -> None:
    """Raises UsageError where `repo` is not of the form org/name."""
    if not is_repo_name(repo):
        shown = printable(repo)[:100]
        raise UsageError(f"{shown!r} is not the name of a repository.", "It looks like: org/name")


def file_of(repo: RemoteRepo, name: str) -> RemoteFile:
    """The file with that name. Raises UsageError with the names that are near."""
    for file in repo.files:
        if file.name == name:
            return file
    names = {file.name.lower(): file.name for file in repo.files}
    near = [names[n] for n in get_close_matches(name.lower(), names, N_NEAR, cutoff=0.6)]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"See: localmoe show {repo.repo}"
    raise UsageError(f"{repo.repo} has no file {printable(name)[:100]}.", hint)


def is_safe_name(name: str) -> bool:
    """Whether a file name stays in its folder, and a terminal unharmed."""
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and not re.match(r"[A-Za-z]:", name)
        and not any(part in ("", ".", "..") or len(part.encode()) > MAX_NAME_BYTES
                    for part in parts)
    )  # fmt: skip


def check_name(repo: str, name: str) -> None:
    """Raises DownloadError for a file name that could lead out of its folder."""
    if not is_safe_name(name):
        what = f"{repo} has a file with an unsafe name ({printable(name)[:60]!r})"
        raise DownloadError(f"{what}: it is not used.", "Choose another repository.")


def remote_repo(repo: str, answer: Any) -> RemoteRepo:
    """What the Hub says, believed only as far as it has the right form."""
    commit: str = answer["sha"]
    if not COMMIT.fullmatch(commit):
        raise DownloadError(f"The Hub gives no commit for {repo}.", "Try again later.")
    # of names that are not safe the other files are none the worse
    files = [
        _remote_file(repo, commit, sibling)
        for sibling in answer.get("siblings") or []
        if is_safe_name(sibling["rfilename"])
    ]
    return RemoteRepo(repo, commit, tuple(files))


def _remote_file(repo: str, commit: str, sibling: Any) -> RemoteFile:
    name, lfs = sibling["rfilename"], sibling.get("lfs")
    n_bytes, sha256 = (lfs["size"], lfs["sha256"]) if lfs else (sibling.get("size"), None)
    if not isinstance(n_bytes, int) or n_bytes < 0:
        raise DownloadError(f"The Hub gives no size for {name} of {repo}.", "Try again later.")
    if sha256 is not None and not SHA256.fullmatch(sha256):
        raise DownloadError(f"The Hub gives no sha256 for {name} of {repo}.", "Try again.")
    return RemoteFile(repo, commit, name, n_bytes, sha256)


def _cached_files(repo: str, commit: str, folder: Path) -> Iterator[RemoteFile]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            yield RemoteFile(repo, commit, name, path.stat().st_size, _linked_sha256(path))


def _linked_sha256(path: Path) -> str | None:
    """From a link to blobs/<sha256>. A file of git itself is called after its shorter sha1."""
    etag = path.resolve().name if path.is_symlink() else ""
    return etag if SHA256.fullmatch(etag) else None


def link_to_blob(path: Path, blob: Path, has_symlinks: bool) -> None:
    """Make `path` lead to a blob, by a relative link as huggingface_hub does.

    Where there are no symbolic links (Windows, some disks) it is a second name, or else a copy.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    ways: list[Callable[[], None]] = [lambda: os.link(blob, path)]
    if has_symlinks:
        ways.insert(0, lambda: path.symlink_to(os.path.relpath(blob, path.parent)))
    for make in ways:
        try:
            return make()
        except FileExistsError:
            return None  # another program was quicker
        except OSError:
            continue  # not on this disk, or not allowed
    with atomic_file(path, durable=False) as copy, open_regular(blob) as stream:
        shutil.copyfileobj(stream, copy, COPIED_BYTES)
    return None


def _resolve(file: RemoteFile) -> str:
    return f"{file.repo}/resolve/{file.commit}/{quote(file.name)}"


def _check_beginning(remote: RemoteBytes, file: RemoteFile) -> None:
    """Pages and pointers that come with status 200 in place of a model."""
    if not file.name.lower().endswith(".gguf"):
        return
    start = remote.peek().lstrip(b" \t\r\n\xef\xbb\xbf").lower() if remote.start == 0 else b""
    if remote.content_type.lower().startswith("text/html") or start.startswith(PAGES):
        what = f"A web page came in place of {file.base_name}: a sign-in page of the network?"
        raise DownloadError(what, "Open a web page in the browser, then try again.")
    if start.startswith(LFS_POINTER):
        what = f"A Git LFS pointer came in place of {file.base_name}."
        raise DownloadError(what, "The server lacks the file itself: try another, or HF_ENDPOINT.")
