"""Files that a power cut leaves as they were promised: written, synced, renamed.

A file that is written beside its final name and gets it when it is whole, or goes away.

Lines of files of any size, read with bounded memory.

A line that is longer than what is allowed is read past in pieces and never held; it still counts,
and has a digest, so that every line after it has its right number.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from .errors import UsageError

if sys.platform == "darwin":
    import fcntl

APPENDING = (
    os.O_WRONLY | os.O_CREAT | os.O_APPEND
    | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
)  # fmt: skip
"""Flags of os.open for a file that is only added to."""


def append(fd: int, block: bytes, n_bytes: int) -> None:
    """Write a block behind the `n_bytes` of a file; when this returns, it is on the disk.

    Where it can't be, the file is cut back to what it was, and the OSError is raised.
    """
    try:
        n_written = os.write(fd, block)
        while n_written < len(block):  # no room is what cuts a write short: this says it
            n_written += os.write(fd, block[n_written:])
        sync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, n_bytes)
        raise


def sync(fd: int) -> None:
    """Have what was written on the disk itself, beyond its own cache where the system can."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):  # not every file system can
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Have the names of files on the disk; Windows has no such call. Raises OSError: not every
    file system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_file(new: Path, old: Path) -> None:
    """Let a file that is on the disk take another's name, for good where the file system can."""
    os.replace(new, old)
    with contextlib.suppress(OSError):
        sync_folder(old.parent)


class UnfinishedFile:
    """What becomes `target`: `path` beside it, open as `file`. Leaving it early removes it.

    What a killed process left under that name is replaced. Where another process does the same at
    the same time, one of the two fails with FileExistsError and changes nothing of the other's.
    Every method raises OSError.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self.path.unlink(missing_ok=True)
        self.file: BinaryIO = self.path.open("xb")
        self._identity = _identity(os.fstat(self.file.fileno()))

    def complete(self) -> None:
        """All of it is on the disk. Nothing can be written to it afterwards."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def rename(self) -> None:
        """Give it its name, and have the folder written too where the system can do that."""
        if not self._is_ours() or self.target.exists():
            raise FileExistsError(0, "another process writes it too")
        self.path.rename(self.target)
        with contextlib.suppress(OSError):
            sync_folder(self.target.parent)

    def _is_ours(self) -> bool:
        return self.path.exists() and _identity(self.path.stat()) == self._identity

    def __enter__(self) -> UnfinishedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk is told already, and again by closing
            self.file.close()
        if self._is_ours():
            self.path.unlink()


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


MAX_LINE_BYTES = 16 << 20
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class InputLine:
    """A line of a file, counted from 1, at byte `offset`; `n_bytes` has its line end in it.

    `raw` is the line without its end, or None where it is too long. `whole` says that a line end
    was there. `digest` is that of the line without its end.
    """

    number: int
    offset: int
    n_bytes: int
    raw: bytes | None
    whole: bool
    digest: bytes


def read_lines(stream: BinaryIO, max_bytes: int = MAX_LINE_BYTES) -> Iterator[InputLine]:
    """Every line of a stream from where it stands, blank ones too; offsets count from there."""
    number = offset = 0
    while raw := stream.readline(max_bytes + 2):
        number += 1
        if raw.endswith(b"\n") or len(raw) < max_bytes + 2:
            text = raw.removesuffix(b"\n").removesuffix(b"\r")
            kept = text if len(text) <= max_bytes else None
            yield InputLine(number, offset, len(raw), kept, raw.endswith(b"\n"), digest(text))
            offset += len(raw)
        else:
            line = _pass_by(stream, raw, number, offset)
            yield line
            offset += line.n_bytes


def _pass_by(stream: BinaryIO, begun: bytes, number: int, offset: int) -> InputLine:
    """The rest of a line that is too long, of which only the digest and the length are kept."""
    hashed, n_bytes, last = blake2b(begun, digest_size=16), len(begun), begun
    while not last.endswith(b"\n") and (piece := stream.readline(PIECE_BYTES)):
        hashed.update(piece)
        n_bytes += len(piece)
        last = piece
    return InputLine(number, offset, n_bytes, None, last.endswith(b"\n"), hashed.digest())


def digest(*parts: bytes) -> bytes:
    """16 bytes that stand for some texts, and for where one ends and the next begins."""
    hashed = blake2b(digest_size=16)
    for part in parts[:-1]:
        hashed.update(len(part).to_bytes(8, "big") + part)
    hashed.update(parts[-1])
    return hashed.digest()


def read_text(path: str) -> str:
    """A text file, or stdin for `-`, as UTF-8. Raises UsageError."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} can't be read: {reason}.") from None
    return decoded(raw, "stdin" if path == "-" else path)


def decoded(raw: bytes, name: str) -> str:
    """Bytes from outside as text. Raises UsageError."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text.") from None
