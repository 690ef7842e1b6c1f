"""Files that a power cut leaves as they were promised: written, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

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
        import fcntl

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
