"""A file on its way: its bytes at full length, and a journal beside it that knows which are there.

The journal has a head (which content this is) and eight bytes for each MiB: its CRC-32 as it was
received, and its state. Order makes it safe: a piece is WRITTEN once its bytes went to the kernel,
so `kill -9` leaves nothing in doubt; it is SYNCED once they went to the disk, and after a power
cut (another boot) only those count.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import psutil

from ..files import (
    open_regular_unbuffered,
    read_regular,
    remove_temporaries,
    sync_folder,
    write_atomically,
)
from .types import RemoteFile
from .verify import PIECE_BYTES, as_ranges, fill, n_pieces

PARTIAL_SUFFIX, JOURNAL_SUFFIX = ".localmoe-partial", ".localmoe-journal"
VERSION = 1
HEAD_BYTES = 8192
LONGEST_TEXT = 500  # of a name or an ETag: both fit into the head, however they are escaped
RECORD = struct.Struct("<II")  # CRC-32, state
ABSENT, WRITTEN, SYNCED = range(3)


class Partial:
    """The bytes of one blob that are here so far; goes on from what an earlier run left.

    Whoever has one holds the lock of its blob. Its methods may be called from several threads.
    All raise OSError where the disk does.
    """

    def __init__(self, blob: Path, file: RemoteFile) -> None:
        self.path = blob.with_name(blob.name + PARTIAL_SUFFIX)
        self.file = file
        self.etag: str | None = None  # what the server calls this content, once it has answered
        self._blob, self._journal_path = blob, blob.with_name(blob.name + JOURNAL_SUFFIX)
        self._lock = threading.Lock()
        self._n = n_pieces(file.n_bytes)
        self._fresh: list[int] = []
        blob.parent.mkdir(parents=True, exist_ok=True)
        self._forget()
        self._recall()
        self._open()

    def _forget(self) -> None:
        self.checksums, self._states = array("I", bytes(4 * self._n)), bytearray(self._n)

    def _recall(self) -> None:
        """Takes over what the journal says, where it is about this content and can be trusted."""
        head, records = _read_journal(self._journal_path)
        known = (head.get("sha256"), head.get("n_bytes"), head.get("version"))
        if known != (self.file.sha256, self.file.n_bytes, VERSION) or not self._is_whole_length():
            return
        etag, same_boot = head.get("etag"), head.get("boot") == boot_mark()
        self.etag = etag if _is_plain(etag) else None
        for i, (checksum, state) in enumerate(records[: self._n]):
            if state == SYNCED or (state == WRITTEN and same_boot):
                self.checksums[i], self._states[i] = checksum, state
        self._fresh = [i for i, state in enumerate(self._states) if state == WRITTEN]

    def _is_whole_length(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.file.n_bytes

    def _open(self) -> None:
        if not any(self._states):
            self._journal_path.unlink(missing_ok=True)  # before the bytes that it speaks of
            self.path.unlink(missing_ok=True)  # nothing is written through a link or into a pipe
            self.path.touch()
        self._bytes = FileIO(self.path, "r+")
        self._reader = FileIO(self.path)
        self._bytes.truncate(self.file.n_bytes)
        self._write_journal()

    def _write_journal(self) -> None:
        """The whole journal anew, beside and renamed: its head never stands before old records."""
        head = {
            "version": VERSION, "sha256": self.file.sha256, "n_bytes": self.file.n_bytes,
            "etag": self.etag, "name": self.file.name[:LONGEST_TEXT], "boot": boot_mark(),
        }  # fmt: skip
        records = b"".join(
            RECORD.pack(*pair) for pair in zip(self.checksums, self._states, strict=True)
        )
        remove_temporaries(self._journal_path)
        data = json.dumps(head).encode().ljust(HEAD_BYTES) + records
        write_atomically(self._journal_path, data, durable=True)
        self._journal = FileIO(self._journal_path, "r+")

    def agree(self, etag: str | None) -> bool:
        """Whether this ETag is of the same content; the first one is remembered."""
        if not _is_plain(etag):
            return True
        with self._lock:
            if self.etag is None:
                self.etag = etag
                self._journal.close()
                self._write_journal()
            return etag == self.etag

    def has(self, i: int) -> bool:
        """Whether a piece is here."""
        return self._states[i] != ABSENT

    @property
    def n_bytes_here(self) -> int:
        """Bytes of the pieces that are here."""
        return sum(end - start for start, end in self.ranges(present=True))

    def ranges(self, present: bool) -> tuple[tuple[int, int], ...]:
        """Byte ranges (start, end) that are here, or those that are missing."""
        numbers = [i for i in range(self._n) if self.has(i) == present]
        return as_ranges(numbers, self.file.n_bytes)

    def write(self, i: int, piece: memoryview) -> bool:
        """A whole piece: its bytes, then its record. False where another thread was faster."""
        checksum = zlib.crc32(piece)
        with self._lock:
            if self.has(i):
                return False
            self._bytes.seek(i * PIECE_BYTES)
            _write_all(self._bytes, piece)
            self._note(i, checksum)
            return True

    def _note(self, i: int, checksum: int) -> None:
        self.checksums[i] = checksum
        self._record(i, WRITTEN)
        self._fresh.append(i)

    def _record(self, i: int, state: int) -> None:
        self._states[i] = state
        self._journal.seek(HEAD_BYTES + i * RECORD.size)
        _write_all(self._journal, memoryview(RECORD.pack(self.checksums[i], state)))

    def read(self, i: int, buffer: memoryview) -> int:
        """The bytes of a piece that is here, for one reader at a time; gives their number."""
        self._reader.seek(i * PIECE_BYTES)
        return fill(self._reader, buffer)

    def sync(self) -> None:
        """From here on what is here survives a power cut."""
        with self._lock:
            fresh, self._fresh = self._fresh, []
        if not fresh:
            return
        datasync(self._bytes)
        with self._lock:
            if self._bytes.closed:
                return
            for i in fresh:
                if self._states[i] == WRITTEN:
                    self._record(i, SYNCED)
            journal = self._journal
        with suppress(ValueError):  # closed meanwhile, for one that was synced
            datasync(journal)

    def drop_damaged(self) -> int:
        """Compares what lies here with what was received; pieces that differ are missing again.

        Gives their number. Not while others write.
        """
        buffer = memoryview(bytearray(PIECE_BYTES))
        damaged = [
            i
            for i in range(self._n)
            if self.has(i) and zlib.crc32(buffer[: self.read(i, buffer)]) != self.checksums[i]
        ]
        with self._lock:
            for i in damaged:
                self._record(i, ABSENT)
        return len(damaged)

    def copy_pieces(self, source: Path, numbers: Sequence[int], checksums: Sequence[int]) -> None:
        """Takes pieces from a file that has them, without their bytes where the disk can share."""
        with open_regular_unbuffered(source) as file:
            for start, end in as_ranges(numbers, self.file.n_bytes):
                _copy_range(file, self._bytes, start, end)
        with self._lock:
            for i in numbers:
                self._note(i, checksums[i])

    def start_over(self) -> None:
        """Nothing is here any more, and any ETag will do."""
        self.close()
        self.etag, self._fresh = None, []
        self._forget()
        self._open()

    def finish(self) -> None:
        """The file is whole and right: it becomes the blob, and no partial is left."""
        datasync(self._bytes)
        self.close()
        self.path.replace(self._blob)
        sync_folder(self._blob.parent)  # or a power cut takes the rename back
        remove_leftover(self._blob)

    def remove(self) -> None:
        """Leaves nothing on the disk."""
        self.close()
        remove_leftover(self._blob)

    def close(self) -> None:
        """Closes the files."""
        with self._lock:
            for file in (self._bytes, self._reader, self._journal):
                file.close()


@dataclass(frozen=True, slots=True)
class Leftover:
    """A download that was broken off: the file's name in its repository, and how much is here."""

    name: str
    blob: Path
    n_bytes: int
    n_bytes_here: int


def leftovers(blobs: Path) -> Iterator[Leftover]:
    """The downloads that a `blobs` folder of the cache holds the beginnings of."""
    for partial in sorted(blobs.glob("*" + PARTIAL_SUFFIX)):
        blob = partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX))
        head, records = _read_journal(blob.with_name(blob.name + JOURNAL_SUFFIX))
        n_here = sum(state != ABSENT for _, state in records) * PIECE_BYTES
        n_bytes = head["n_bytes"] if isinstance(head.get("n_bytes"), int) else 0
        yield Leftover(str(head.get("name", "")), blob, n_bytes, min(n_here, n_bytes))


def remove_leftover(blob: Path) -> None:
    """For whoever holds the blob's lock. The journal goes first: never one without its bytes."""
    remove_temporaries(blob.with_name(blob.name + JOURNAL_SUFFIX))
    # version 0.1.0 wrote a journal anew under the second name
    for suffix in (JOURNAL_SUFFIX, JOURNAL_SUFFIX + ".new", PARTIAL_SUFFIX):
        blob.with_name(blob.name + suffix).unlink(missing_ok=True)


def _read_journal(path: Path) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Head and records, both empty where there is no journal or its head is damaged."""
    try:
        content = read_regular(path)
        head = json.loads(content[:HEAD_BYTES])
    except (OSError, ValueError, RecursionError):
        return {}, []
    records = content[HEAD_BYTES:]
    whole = len(records) - len(records) % RECORD.size
    found = [(crc, state) for crc, state in RECORD.iter_unpack(records[:whole])]
    return (head, found) if isinstance(head, dict) else ({}, [])


def _is_plain(etag: object) -> bool:
    """Whether a header can carry it, and the head of a journal."""
    plain = isinstance(etag, str) and etag.isascii() and etag.isprintable()
    return plain and len(str(etag)) <= LONGEST_TEXT


def boot_mark() -> str:
    """Tells this boot of the machine from others: what the kernel had not yet written is gone."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return str(int(psutil.boot_time()))


def datasync(file: FileIO) -> None:
    """Puts a file's bytes on the disk."""
    getattr(os, "fdatasync", os.fsync)(file.fileno())


def _write_all(file: FileIO, content: memoryview) -> None:
    """Unbuffered writes may take less than they are given, on a disk that is nearly full."""
    while content:
        content = content[file.write(content) or 0 :]


def _copy_range(source: FileIO, target: FileIO, start: int, end: int) -> None:
    at = start
    with suppress(AttributeError, OSError):  # not on this system, or not between these two
        while at < end:
            n = os.copy_file_range(source.fileno(), target.fileno(), end - at, at, at)
            if not n:
                break
            at += n
    buffer = memoryview(bytearray(PIECE_BYTES))
    source.seek(at)
    target.seek(at)
    while at < end:
        n = fill(source, buffer[: end - at])
        if not n:
            raise OSError(f"{source.name} ends at {at:,} bytes")
        _write_all(target, buffer[:n])
        at += n
