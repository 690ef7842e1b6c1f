"""The hashes of a file: its sha256, and a checksum of each MiB, so that damage can be located.

The Hub knows one sha256 for a whole file: it says whether a file is right, never where it is
wrong. So the checksums of a verified file are kept beside its stamp, and `verify --repair` fetches
just the pieces that differ. They are CRC-32: they find damage, and sha256 alone decides.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

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
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(2) as threads:
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
    stamps.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(json.dumps(head).encode() + b"\n" + packed)
    beside.replace(path)


def read_pieces(stamps: Path, sha256: str, n_bytes: int) -> tuple[int, ...] | None:
    """The checksums kept for this content; None where there are none, or they are damaged."""
    try:
        line, _, packed = pieces_path(stamps, sha256).read_bytes().partition(b"\n")
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
