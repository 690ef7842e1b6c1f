"""Files: written whole or not at all, added to durably, and read with bounded memory.

A line that is longer than what is allowed is read past in pieces and never held; it still counts,
and has a digest, so that every line after it has its right number.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import glob
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO

from .errors import UsageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

TEMPORARY_SUFFIX = ".new"
APPENDING = (
    os.O_WRONLY | os.O_CREAT | os.O_APPEND
    | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
)  # fmt: skip
"""Flags of os.open for a file that is only added to."""


LOCK_OFFSET = 1 << 40
"""The byte that is locked on Windows, where a locked byte can't be read."""


def open_locked(path: Path) -> int:
    """Opens a file, made where there is none, that only this process may add to until it closes it.

    The lock is the file's, not the name's: another name of it (a hard link) leads to the same lock.
    Raises BlockingIOError where another process has it, and OSError.
    """
    while True:
        fd = os.open(path, APPENDING, 0o666)
        try:
            _lock(fd)
            if has_name(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # another process put a new file in its place before it was locked


def _lock(fd: int) -> None:
    if sys.platform == "win32":
        os.lseek(fd, LOCK_OFFSET, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:  # what Windows says of a byte that is locked
            raise BlockingIOError(error.errno, error.strerror) from None
    else:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_there(path: Path) -> bool:
    """Whether anything has this name, be it a link that leads nowhere. Raises OSError."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def has_name(fd: int, path: Path) -> bool:
    """Whether `path` leads to the file that was opened as `fd`, and to no other by now."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def append_durably(fd: int, block: bytes, n_bytes: int) -> None:
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


def make_private_folder(folder: Path) -> None:
    """Makes a folder and those missing above it, for their owner alone. Raises OSError."""
    missing = [folder, *folder.parents]
    while missing and missing[-1].exists():
        missing.pop()
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def atomic_file(
    path: Path, *, durable: bool, mode: int = 0o666, replace: bool = True
) -> Iterator[BinaryIO]:
    """Opens a file for reading and writing that takes the name `path` when the block ends.

    Until then, and where the block raises, what had that name stays as it was, and nothing is left
    behind. The temporary name beside it (`file.name`) can't be guessed. A `durable` file is on the
    disk before it takes the name. Without `replace`, a file that has the name by then stays, and
    FileExistsError is raised. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_CLOEXEC", 0)
    try:
        with open(temporary, "w+b", opener=lambda name, _: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            if durable:
                sync(file.fileno())
        if not replace and path.exists():
            raise FileExistsError(0, "another process writes it too", str(path))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        with contextlib.suppress(OSError):  # not every file system can
            sync_folder(path.parent)


def write_atomically(path: Path, data: bytes, *, durable: bool, mode: int = 0o666) -> None:
    """Writes a file whole or not at all, as `atomic_file` does. Raises OSError."""
    with atomic_file(path, durable=durable, mode=mode) as file:
        file.write(data)


def remove_temporaries(path: Path) -> None:
    """Deletes what killed processes left of `path`, for the one process that may write it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"):
        if is_temporary(left, path):
            with contextlib.suppress(OSError):
                left.unlink()


def is_temporary(name: Path, path: Path) -> bool:
    """Whether `atomic_file` may give this name to a file that is about to take that of `path`."""
    pattern = rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(TEMPORARY_SUFFIX)}"
    return name.parent == path.parent and bool(re.fullmatch(pattern, name.name))


# ---- reading -------------------------------------------------------------------------------------

MAX_READ_BYTES = 64 << 20
"""More than any file of this program's own has, and any text that a model can take."""
MAX_LINE_BYTES = 16 << 20
PIECE_BYTES = 1 << 20
CONTROL_BYTES = re.compile(rb"[\x00-\x1f]")
"""What JSON writes as escapes only."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError, also for what is none.

    Whatever this program reads without being told to is opened so: a pipe may never be written to,
    and a device may never end.
    """
    return BufferedReader(open_regular_unbuffered(path))


def open_regular_unbuffered(path: Path) -> FileIO:
    """Opens a regular file for reading without a buffer. Raises OSError, also for what is none."""
    return FileIO(path, "rb", opener=_open_regular)


def _open_regular(name: str, flags: int) -> int:
    fd = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # without it, a pipe is waited for
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    raise OSError(errno.EINVAL, "Not a regular file", name)


def read_regular(path: Path, max_bytes: int = MAX_READ_BYTES) -> bytes:
    """All of a regular file. Raises OSError, also where it is larger than `max_bytes`."""
    with open_regular(path) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise OSError(errno.EFBIG, f"Larger than {max_bytes >> 10:,} KiB", str(path))
    return raw


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


def is_torn_record(line: InputLine, opening: bytes) -> bool:
    """Whether a crash left this of a record that was being added to a file of records.

    Such a line is the last and has no line end. It begins with the `opening` of every record, or
    with zeros, which a file system puts where the data never came. A record has its opening once
    and no control characters; a line with more was joined by another program.
    """
    if line.whole or line.raw is None:
        return False
    text = line.raw.rstrip(b"\0")
    is_one = text.find(opening, 1) < 0 and not CONTROL_BYTES.search(text)
    return is_one and text[: len(opening)] == opening[: len(text)]


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
    """A text file or pipe that a person named, or stdin for `-`, as UTF-8. Raises UsageError."""
    name = "stdin" if path == "-" else path
    try:
        if path == "-":
            raw = sys.stdin.buffer.read(MAX_READ_BYTES + 1)
        else:
            with open(path, "rb") as file:
                raw = file.read(MAX_READ_BYTES + 1)
    except (OSError, ValueError) as error:
        is_closed = path == "-" and isinstance(error, OSError) and error.errno == errno.EBADF
        reason = "it is closed" if is_closed else getattr(error, "strerror", None) or error
        raise UsageError(f"{name} can't be read: {reason}.") from None
    if len(raw) > MAX_READ_BYTES:
        raise UsageError(f"{name} has more than {MAX_READ_BYTES >> 20} MiB: too much for a model.")
    return decoded(raw, name)


def utf16_codec(head: bytes) -> str | None:
    """The codec of a text that begins like one in UTF-16, as PowerShell's `>` writes; else None."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return {b"{\0": "utf-16-le", b"[\0": "utf-16-le", b"\0{": "utf-16-be"}.get(head[:2])


def decoded(raw: bytes, name: str) -> str:
    """Bytes from outside as text, in UTF-8 or UTF-16. Raises UsageError."""
    try:
        return raw.decode(utf16_codec(raw) or "utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text.") from None
