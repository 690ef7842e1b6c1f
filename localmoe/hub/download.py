"""Downloads files from the Hub: resumed, verified, and put where every tool finds them.

The cache and its locks are laid out as huggingface_hub has them. The bytes are our own transfer's,
because huggingface_hub neither resumes nor checks what it got. A file becomes a blob of the cache
only when its sha256 is the Hub's. `ProgressMeter` says how far a download is.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..callbacks import DownloadPhase, DownloadProgress
from ..errors import DownloadError, gib
from .client import Hub
from .partial_file import Partial, leftovers, remove_leftover
from .transfer import ContentChanged, RetryPolicy, Transfer
from .types import RemoteFile
from .verify import (
    ExpectedHash,
    FileHashes,
    Stamps,
    Verdict,
    n_pieces,
    piece_span,
    read_pieces,
    verify_file,
    write_pieces,
)

AT_MOST_EVERY_S = 0.2
SMOOTHED_OVER_S = 5.0


class ProgressMeter:
    """Makes Progress of counts, and hands it on at most five times a second."""

    def __init__(
        self,
        n_bytes_total: int,
        n_files: int,
        on_progress: Callable[[DownloadProgress], None] | None,
    ) -> None:
        self._n_bytes_total, self._n_files = n_bytes_total, n_files
        self._n_bytes_before = self._n_files_done = 0
        self._on_progress = on_progress
        self._samples: deque[tuple[float, int]] = deque()
        self._phase: DownloadPhase | None = None
        self._shown_at = 0.0

    def update(
        self, name: str, phase: DownloadPhase, n_bytes_done: int, n_counted: int, trouble: str = ""
    ) -> None:
        """Of the file that is in work: its bytes done; `n_counted` is what the speed is made of."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase = phase
            self._samples.clear()
        elif now - self._shown_at < AT_MOST_EVERY_S:
            return
        self._shown_at = now
        self._samples.append((now, n_counted))
        while now - self._samples[0][0] > SMOOTHED_OVER_S:
            self._samples.popleft()
        if self._on_progress:
            done = self._n_bytes_before + n_bytes_done
            self._on_progress(self._progress(name, phase, done, trouble))

    def file_done(self, name: str, n_bytes: int) -> None:
        """The file is whole, right, and in its place."""
        self._n_bytes_before += n_bytes
        self._n_files_done += 1
        if self._on_progress and self._n_files_done == self._n_files:
            phase = self._phase or "verifying"
            self._on_progress(self._progress(name, phase, self._n_bytes_before))

    def _progress(
        self, name: str, phase: DownloadPhase, n_done: int, trouble: str = ""
    ) -> DownloadProgress:
        speed, left = self._bytes_per_s(), self._n_bytes_total - n_done
        seconds_left = 0.0 if not left else left / speed if speed else None
        return DownloadProgress(
            n_done, self._n_bytes_total, speed, seconds_left,
            self._n_files_done, self._n_files, name, phase, trouble,
        )  # fmt: skip

    def _bytes_per_s(self) -> float:
        if len(self._samples) < 2:
            return 0.0
        (first_at, first), (last_at, last) = self._samples[0], self._samples[-1]
        return (last - first) / (last_at - first_at) if last_at > first_at else 0.0


CONNECTIONS = 4
LOCK_POLL_S = 0.2
SPARE_BYTES = 64 << 20
"""Left free on a disk: journals, links, and whatever else the machine writes meanwhile."""

WRONG_HINT = "Try again later, or choose the model from another repository."

FULL = (errno.ENOSPC, errno.EDQUOT)


def download(
    hub: Hub,
    files: Sequence[RemoteFile],
    on_progress: Callable[[DownloadProgress], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
    connections: int = CONNECTIONS,
    patience: RetryPolicy | None = None,
) -> tuple[Path, ...]:
    """Every file verified, in the cache, linked and stamped: their paths in the snapshot folder.

    What an earlier call left is gone on from. `on_progress` is called at most five times a second,
    `on_notice` with a sentence for a person. Raises DownloadError; KeyboardInterrupt passes within
    a second and keeps what came.
    """
    pull = _Download(hub, files, on_progress, on_notice, connections, patience)
    pull.check_room(files)
    return tuple(pull.fetch(file, trust_stamp=True) for file in files)


def repair(
    hub: Hub,
    file: RemoteFile,
    on_progress: Callable[[DownloadProgress], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
    connections: int = CONNECTIONS,
    patience: RetryPolicy | None = None,
    verdict: Verdict | None = None,
) -> Path:
    """A file of the cache made right again: only its damaged pieces are fetched, where they are
    known from when it was verified, and all of it otherwise.

    `verdict` spares reading it once more. The old file is replaced, never written to: an engine
    that has it mapped keeps what it mapped. Raises DownloadError.
    """
    pull = _Download(hub, (file,), on_progress, on_notice, connections, patience)
    return pull.fetch(file, trust_stamp=False, verdict=verdict)


class _Download:
    """One call of download: what all its files share."""

    def __init__(
        self,
        hub: Hub,
        files: Sequence[RemoteFile],
        on_progress: Callable[[DownloadProgress], None] | None,
        on_notice: Callable[[str], None] | None,
        connections: int,
        patience: RetryPolicy | None,
    ) -> None:
        self.hub, self.stamps = hub, Stamps(hub.access.stamps)
        self.connections, self.patience = connections, patience or RetryPolicy()
        self.notice = on_notice or (lambda sentence: None)
        self.meter = ProgressMeter(sum(file.n_bytes for file in files), len(files), on_progress)

    def check_room(self, files: Sequence[RemoteFile]) -> None:
        """Raises DownloadError where the disk has no room for what is missing of all the files."""
        missing = []
        for file in files:
            with self._disk_errors_of(file):
                blob = self.hub.blob_path(file)
                if not blob.exists():
                    missing.append(file.n_bytes - partial_bytes(blob))
        if missing:
            check_disk_space(self.hub.access.cache, missing, files[0].base_name)

    def fetch(self, file: RemoteFile, trust_stamp: bool, verdict: Verdict | None = None) -> Path:
        """One file, from wherever it stands to its place in the snapshot folder."""
        with self._disk_errors_of(file):
            blob = self.hub.blob_path(file)
            with self._only_one(file, blob):
                self._settle(file, blob, trust_stamp, verdict)
                self._sweep(file, blob)
            path = self.hub.link(file)  # takes that lock itself
        self.meter.file_done(file.base_name, file.n_bytes)
        return path

    @contextmanager
    def _only_one(self, file: RemoteFile, blob: Path) -> Iterator[None]:
        """Holds the lock that huggingface_hub takes for this blob, in whatever program.

        It is the kernel's: it goes with the process that holds it, however that ends.
        """
        lock = lock_of(blob)
        if not _acquired(lock, 0):
            self.notice(f"Another program is downloading {file.base_name}; waiting for it.")
            while not _acquired(lock, LOCK_POLL_S):
                here = partial_bytes(blob)
                self.meter.update(file.base_name, "waiting", here, here)
        try:
            yield
        finally:
            lock.release()

    def _settle(
        self, file: RemoteFile, blob: Path, trust_stamp: bool, verdict: Verdict | None
    ) -> None:
        """The blob is there afterwards, and right. What other tools brought is read first."""
        assert file.sha256
        if blob.exists():
            if trust_stamp and self.stamps.holds(blob, file.sha256):
                return
            verdict = verdict or self._verify(file, blob)
            if verdict.is_ok:
                return
            again = sum(end - start for start, end in verdict.damaged) or file.n_bytes
            self.notice(f"{file.base_name} is damaged. {verdict.why} Fetching {gib(again)} again.")
        if self.hub.access.offline:
            raise DownloadError(
                f"{file.base_name} is not here whole, and nothing is fetched offline.",
                "Try again without --offline and HF_HUB_OFFLINE.",
            )
        self._bring(file, blob, verdict)

    def _verify(self, file: RemoteFile, blob: Path) -> Verdict:
        assert file.sha256
        expected = ExpectedHash(file.sha256, file.n_bytes)
        name = file.base_name
        return verify_file(
            blob, expected, self.stamps, lambda n: self.meter.update(name, "verifying", n, n)
        )

    def _bring(self, file: RemoteFile, blob: Path, verdict: Verdict | None) -> None:
        check_disk_space(
            self.hub.access.cache, [file.n_bytes - partial_bytes(blob)], file.base_name
        )
        partial = Partial(blob, file)
        try:
            if verdict and verdict.damaged:
                self._take_good_pieces(partial, blob, verdict)
            sha256 = self._receive_right(partial)
            partial.finish()
        finally:
            partial.close()
        self.stamps.write(blob, sha256)
        with suppress(OSError):  # without them a repair fetches the whole file
            hashes = FileHashes(file.n_bytes, sha256, tuple(partial.checksums))
            write_pieces(self.stamps.folder, hashes)

    def _take_good_pieces(self, partial: Partial, blob: Path, verdict: Verdict) -> None:
        """Of a damaged file, what its checksums say is right, into what replaces it."""
        file = partial.file
        assert file.sha256
        known = read_pieces(self.stamps.folder, file.sha256, file.n_bytes)
        if known is None:
            return
        bad = {i for start, end in verdict.damaged for i in range(*piece_span(start, end))}
        good = [i for i in range(n_pieces(file.n_bytes)) if i not in bad and not partial.has(i)]
        partial.copy_pieces(blob, good, known)

    def _receive_right(self, partial: Partial) -> str:
        """Fetch until the sha256 is the Hub's, with one start from nothing; else DownloadError."""
        expected, name = partial.file.sha256 or "", partial.file.base_name
        started_over = mended = False
        while True:
            try:
                sha256 = self._receive(partial)
                if sha256 == expected:
                    return sha256
                if not mended and (n := partial.drop_damaged()):
                    mended = True
                    self.notice(f"{n} MiB were damaged on the disk since; fetching them again.")
                    continue
                why = f"{name} arrived with the sha256 {sha256[:12]}…, not {expected[:12]}…"
                if started_over:
                    partial.remove()
                    raise DownloadError(f"{why}, twice: it was not kept.", WRONG_HINT)
            except ContentChanged:
                why = f"{name} changed on the server while it was downloaded"
                # the pieces so far stay: they count as soon as the server has their content again
                if started_over or not self._is_still(partial.file):
                    raise DownloadError(f"{why}: it is not used.", WRONG_HINT) from None
            self.notice(f"{why}; starting over.")
            partial.start_over()
            started_over = True

    def _receive(self, partial: Partial) -> str:
        name, n_bytes = partial.file.base_name, partial.file.n_bytes

        def on_tick(transfer: Transfer) -> None:
            if transfer.n_bytes_here < n_bytes:
                here, received = transfer.n_bytes_here, transfer.n_received
                self.meter.update(name, "downloading", here, received, transfer.trouble)
            else:
                hashed = transfer.n_bytes_hashed
                self.meter.update(name, "verifying", hashed, hashed)

        return Transfer(self.hub, partial, self.connections, self.patience).run(on_tick)

    def _is_still(self, file: RemoteFile) -> bool:
        """Whether the repository's commit says what it said of this file."""
        now = self.hub.repository(file.repo, file.commit).files
        return any((f.name, f.n_bytes, f.sha256) == (file.name, file.n_bytes, file.sha256)
                   for f in now)  # fmt: skip

    def _sweep(self, file: RemoteFile, blob: Path) -> None:
        """No partial is left of this file, nor of what stood under its name before."""
        remove_leftover(blob)
        for left in list(leftovers(blob.parent)):
            if left.name == file.name and _acquired(lock := lock_of(left.blob), 0):
                try:
                    remove_leftover(left.blob)
                finally:
                    lock.release()

    @contextmanager
    def _disk_errors_of(self, file: RemoteFile) -> Iterator[None]:
        """Whatever the disk refuses becomes a DownloadError."""
        try:
            yield
        except OSError as error:
            raise self._disk_error(error, file) from error

    def _disk_error(self, error: OSError, file: RemoteFile) -> DownloadError:
        name, folder = file.base_name, self.hub.access.cache
        if error.errno in FULL:
            here = gib(partial_bytes(self.hub.blob_path(file)))
            return DownloadError(
                f"The disk is full; {here} of {gib(file.n_bytes)} of {name} are here and kept.",
                "Free some room (localmoe list, localmoe rm); the same command then goes on.",
            )
        if error.errno == errno.EFBIG:
            what = f"{folder} takes no file as large as {name} ({gib(file.n_bytes)})."
            return DownloadError(what, "Set HF_HUB_CACHE to a folder on another disk.")
        reason = (error.strerror or str(error)).lower()
        return DownloadError(f"{name} can't be written to {folder}: {reason}.")


def lock_of(blob: Path) -> FileLock:
    """huggingface_hub's own lock of a blob (`.locks` in the cache), so that its tools wait too."""
    repo_folder = blob.parent.parent
    path = repo_folder.parent / ".locks" / repo_folder.name / f"{blob.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, mode=0o664)


def _acquired(lock: FileLock, wait_s: float) -> bool:
    with suppress(Timeout):
        lock.acquire(timeout=wait_s)
        return True
    return False


def partial_bytes(blob: Path) -> int:
    """What is here of a blob that isn't finished."""
    return sum(left.n_bytes_here for left in leftovers(blob.parent) if left.blob == blob)


def check_disk_space(cache: Path, missing_bytes: Sequence[int], name: str) -> None:
    """Raises DownloadError where the disk of the cache has no room for all that is missing."""
    needed = sum(missing_bytes)
    try:
        folder = next(f for f in (cache, *cache.parents) if f.exists())
        free = shutil.disk_usage(folder).free
    except (OSError, StopIteration):
        return  # whoever writes there will see
    if needed and needed + SPARE_BYTES > free:
        others = f" and {len(missing_bytes) - 1} more" if len(missing_bytes) > 1 else ""
        raise DownloadError(
            f"{name}{others} needs {gib(needed)} of disk; {gib(free)} are free in {folder}.",
            "Free some with localmoe rm, or set HF_HUB_CACHE to a folder on another disk.",
        )
