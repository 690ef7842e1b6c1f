"""A file that is written beside its final name and gets it when it is whole, or goes away."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..disk import sync_folder


class Unfinished:
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

    def __enter__(self) -> Unfinished:
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
