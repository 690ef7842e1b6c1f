"""Hashes model files, and keeps what was found right, so that 28 GB are hashed once.

The Hub knows one sha256 for a whole file: it says whether a file is right, never where it is
wrong. So CRC-32 checksums of each MiB are kept beside the stamp of a verified file, and
`verify --repair` fetches just the pieces that differ; sha256 alone decides.

A stamp holds for one file as it lies: with another inode, size or time of change it is void. It is
about the bytes behind all links, so every name of a blob shares it. Stamps can be deleted at any
time; a damaged one counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Literal

from ..errors import gib
from ..files import (
    make_private_folder,
    open_regular_unbuffered,
    read_regular,
    write_atomically,
)
from .cache_layout import SHA256

PIECE_BYTES = 1 << 20
"""What a journal knows, what a checksum covers, what a repair fetches."""

BLOCK_BYTES = 8 * PIECE_BYTES


@dataclass(frozen=True, slots=True)
class FileHashes:
    """Of a file as it lies on disk: `pieces` has the CRC-32 of each MiB, the last may be short."""

    n_bytes: int
    sha256: str
    pieces: tuple[int, ...]


def n_pieces(n_bytes: int) -> int:
    """Returns how many pieces with a checksum some bytes have."""
    return -(-n_bytes // PIECE_BYTES)


def piece_span(start: int, end: int) -> tuple[int, int]:
    """The pieces that a byte range touches: the first, and the one behind the last."""
    return start // PIECE_BYTES, n_pieces(end)


def hash_file(path: Path, on_progress: Callable[[int], None] | None = None) -> FileHashes:
    """Reads all of a file; `on_progress` is given the bytes hashed so far. Raises OSError.

    One thread reads ahead and one makes the checksums while this one makes the sha256, which is
    the slowest of the three: about 1 GB/s and core.
    """
    whole, pieces, n_bytes = hashlib.sha256(), list[int](), 0
    block, ahead = (memoryview(bytearray(BLOCK_BYTES)) for _ in range(2))
    with open_regular_unbuffered(path) as file, ThreadPoolExecutor(2) as threads:
        n = fill(file, block)
        while n:
            reading = threads.submit(fill, file, ahead)
            checking = threads.submit(_checksums, block[:n])
            whole.update(block[:n])
            pieces += checking.result()
            n_bytes += n
            if on_progress:
                on_progress(n_bytes)
            n = reading.result()
            block, ahead = ahead, block
    return FileHashes(n_bytes, whole.hexdigest(), tuple(pieces))


def fill(file: FileIO, buffer: memoryview) -> int:
    """Reads until the buffer is full or the file ends; gives the number of bytes."""
    n = 0
    while n < len(buffer) and (got := file.readinto(buffer[n:])):
        n += got
    return n


def _checksums(block: memoryview) -> list[int]:
    return [zlib.crc32(block[at : at + PIECE_BYTES]) for at in range(0, len(block), PIECE_BYTES)]


def pieces_path(stamps: Path, sha256: str) -> Path:
    """Where the checksums of a file lie: by its content, so every copy of it shares them."""
    return stamps / f"{sha256}.pieces"


def write_pieces(stamps: Path, hashes: FileHashes) -> None:
    """Keeps the checksums of a file whose sha256 was found right. Raises OSError."""
    packed = struct.pack(f"<{len(hashes.pieces)}I", *hashes.pieces)
    head = {"n_bytes": hashes.n_bytes, "piece_bytes": PIECE_BYTES, "crc32": zlib.crc32(packed)}
    path = pieces_path(stamps, hashes.sha256)
    make_private_folder(stamps)
    write_atomically(path, json.dumps(head).encode() + b"\n" + packed, durable=False)


def read_pieces(stamps: Path, sha256: str, n_bytes: int) -> tuple[int, ...] | None:
    """The checksums kept for this content; None where there are none, or they are damaged."""
    try:
        line, _, packed = read_regular(pieces_path(stamps, sha256)).partition(b"\n")
        head = json.loads(line)
    except (OSError, ValueError):
        return None
    expected = {"n_bytes": n_bytes, "piece_bytes": PIECE_BYTES, "crc32": zlib.crc32(packed)}
    if head != expected or len(packed) != 4 * n_pieces(n_bytes):
        return None
    return struct.unpack(f"<{n_pieces(n_bytes)}I", packed)


def damaged_pieces(found: FileHashes, known: Sequence[int]) -> tuple[int, ...]:
    """Numbers of the pieces that are wrong or not there, beside what is kept of the file."""
    padded = (*found.pieces, *[None] * len(known))
    return tuple(i for i, checksum in enumerate(known) if padded[i] != checksum)


def as_ranges(numbers: Sequence[int], n_bytes: int) -> tuple[tuple[int, int], ...]:
    """Pieces in ascending order -> byte ranges (start, end), neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for i in numbers:
        start, end = i * PIECE_BYTES, min((i + 1) * PIECE_BYTES, n_bytes)
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, end))
    return tuple(ranges)


NO_INODE = -1

Outcome = Literal["ok", "wrong hash", "wrong length", "unreadable", "missing", "unknown hash"]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What changes when a file does. The device's number is left out: it is another one after a
    restart on many file systems, and the path says which disk is meant."""

    inode: int
    n_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Stamp:
    """The sha256 that a file had when its fingerprint was this one."""

    sha256: str
    seen: Fingerprint


@dataclass(frozen=True, slots=True)
class ExpectedHash:
    """What a file should be; `n_bytes` where it is known apart from the file itself."""

    sha256: str
    n_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A file after all of it was read again, and `why` as a sentence.

    `n_bytes` and `sha256` are as found, None where it could not be read. `damaged` are byte ranges
    (start, end), empty where checksums of the right content aren't here to tell them.
    """

    path: Path
    outcome: Outcome
    why: str
    n_bytes: int | None = None
    sha256: str | None = None
    expected: ExpectedHash | None = None
    damaged: tuple[tuple[int, int], ...] = ()

    @property
    def is_ok(self) -> bool:
        """Whether the file is as its hash says."""
        return self.outcome == "ok"


def fingerprint(path: Path) -> Fingerprint:
    """Of the file behind all links. Raises OSError."""
    found = path.stat()
    return Fingerprint(found.st_ino, found.st_size, found.st_mtime_ns)


class Stamps:
    """Stamps in a folder, a small JSON file for each model file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, path: Path) -> Stamp | None:
        """The stamp kept for a file, void or not."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            raw = json.loads(read_regular(self._place(path)))
            seen = Fingerprint(**{name: _whole(n) for name, n in raw["seen"].items()})
            if SHA256.fullmatch(raw["sha256"]):
                return Stamp(raw["sha256"], seen)
        return None

    def write(self, path: Path, sha256: str, seen: Fingerprint | None = None) -> None:
        """Keep that a file has this hash; `seen` where it was looked at before it was read.

        Where that isn't possible, the file is hashed again next time.
        """
        with contextlib.suppress(OSError):
            place, stamp = self._place(path), Stamp(sha256, seen or fingerprint(path))
            beside = place.with_name(f"{place.name}.{os.getpid()}")
            make_private_folder(self.folder)
            try:
                beside.write_text(json.dumps({"path": str(path), **asdict(stamp)}), "utf-8")
                beside.replace(place)
            finally:
                beside.unlink(missing_ok=True)

    def drop(self, path: Path) -> None:
        """Forget a file."""
        with contextlib.suppress(OSError):
            self._place(path).unlink(missing_ok=True)

    def void(self, path: Path) -> None:
        """A file counts as verified no more; what it should be is remembered."""
        if stamp := self.read(path):
            self.write(path, stamp.sha256, Fingerprint(NO_INODE, stamp.seen.n_bytes, 0))

    def forget_content(self, sha256: str) -> None:
        """Leave no checksums of a content that is here no more."""
        with contextlib.suppress(OSError):
            pieces_path(self.folder, sha256).unlink(missing_ok=True)

    def holds(self, path: Path, sha256: str | None) -> bool:
        """Whether a file is as it was when it was verified, with this hash where one is given."""
        stamp = self.read(path)
        if not stamp or sha256 not in (None, stamp.sha256):
            return False
        try:
            return stamp.seen == fingerprint(path)
        except OSError:
            return False

    def _place(self, path: Path) -> Path:
        whole = os.fsencode(os.path.realpath(path))
        return self.folder / f"{hashlib.sha256(whole).hexdigest()[:32]}.json"


def _whole(raw: object) -> int:
    if not isinstance(raw, int):
        raise ValueError(f"not a number: {raw!r}")
    return raw


# ---- verifying -----------------------------------------------------------------------------------


def verify_file(
    path: Path,
    expected: ExpectedHash | None,
    stamps: Stamps,
    on_progress: Callable[[int], None] | None = None,
) -> Verdict:
    """Reads all of a file and holds it against what it should be; stamps it when it is right.

    `on_progress` is given the bytes read so far. The stamp of a file that is wrong is void.
    """
    if not path.exists():
        stamps.drop(path)
        return Verdict(path, "missing", "It is not here.", expected=expected)
    if not path.is_file():  # reading a pipe might never end
        return Verdict(path, "unreadable", "It is not a file.", expected=expected)
    try:
        before = fingerprint(path)
        found = hash_file(path, on_progress)
        after = fingerprint(path)
    except OSError as error:
        stamps.void(path)
        why = f"It can't be read: {(error.strerror or str(error)).lower()}."
        return Verdict(path, "unreadable", why, expected=expected)
    if before != after:
        why = "It changed while it was read."
        return Verdict(path, "unreadable", why, found.n_bytes, found.sha256, expected)
    if not expected:
        why = f"No known sha256 to compare it with; its sha256 is {found.sha256}."
        return Verdict(path, "unknown hash", why, found.n_bytes, found.sha256)
    if found.sha256 != expected.sha256:
        stamps.void(path)
        return _wrong(path, found, expected, stamps.folder)
    stamps.write(path, found.sha256, before)
    with contextlib.suppress(OSError):  # without them a repair fetches the whole file
        write_pieces(stamps.folder, found)
    why = f"All of its {found.n_bytes:,} bytes are right."
    return Verdict(path, "ok", why, found.n_bytes, found.sha256, expected)


def _wrong(path: Path, found: FileHashes, expected: ExpectedHash, folder: Path) -> Verdict:
    right_bytes = found.n_bytes if expected.n_bytes is None else expected.n_bytes
    known = read_pieces(folder, expected.sha256, right_bytes)
    damaged = as_ranges(damaged_pieces(found, known), right_bytes) if known else ()
    if found.n_bytes != right_bytes:
        outcome: Outcome = "wrong length"
        why = f"It has {found.n_bytes:,} bytes, not {right_bytes:,}."
    else:
        outcome = "wrong hash"
        why = f"Its sha256 is {found.sha256[:12]}…, not {expected.sha256[:12]}…{_where(damaged)}."
    return Verdict(path, outcome, why, found.n_bytes, found.sha256, expected, damaged)


def _where(damaged: tuple[tuple[int, int], ...]) -> str:
    if not damaged:
        return ""
    n_bytes = sum(end - start for start, end in damaged)
    place = f"at byte {damaged[0][0]:,}" if len(damaged) == 1 else f"in {len(damaged)} places"
    return f": {gib(n_bytes)} {place} {'is' if len(damaged) == 1 else 'are'} damaged"
