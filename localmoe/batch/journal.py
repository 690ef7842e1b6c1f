"""An output file that is its own journal: every line in it is whole, on disk, and said once.

One process writes it, behind a lock. Lines are appended in a single write and are acknowledged only
after an fsync; the line without an end that a crash or a power cut leaves is cut off at the next
start, and anything else that is no record is refused. Nothing is changed in place: a rewrite goes
to a file beside it that then takes its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LocalMoeError, UsageError
from ..files import (
    InputLine,
    append_durably,
    atomic_file,
    has_name,
    is_torn_record,
    open_locked,
    open_regular,
    read_lines,
    remove_temporaries,
    sync,
    sync_folder,
)

MAX_RECORD_BYTES = 64 << 20
COPY_BYTES = 1 << 20
RECORD_OPENING = b'{"id": "batch_req_'
KEY = re.compile(r"batch_req_([0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class Record:
    """A line of an output: where it is, and what it is about.

    `key` stands for the name and the request; `name` is the custom_id, or made of the number of the
    request's line, which is `line`.
    """

    offset: int
    n_bytes: int
    key: bytes
    name: str
    line: int
    is_error: bool


class Journal:
    """An output, opened by this process alone. Close it, or use it as a context manager.

    Raises UsageError where another process has it, or it can't be one.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))  # of a link, the file that it names is rewritten
        _refuse_odd(self.path)
        self._fd = -1
        self._n_bytes = 0
        self._is_begun = self.path.exists()
        try:
            self._open()
        except OSError as error:
            raise UsageError(f"{path} can't be written: {error.strerror}.") from None
        remove_temporaries(self.path)  # of a rewrite that a crash cut short

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and lets other processes have it; one that was not begun is removed."""
        with contextlib.suppress(OSError):  # Windows deletes no file that is open
            if self._fd >= 0 and not self._is_begun and has_name(self._fd, self.path):
                self.path.unlink()
        self._close_file()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written yet."""
        return not self.path.exists() or self.path.stat().st_size == 0

    # ---- reading ----

    def recover(self, on_record: Callable[[Record], None]) -> int:
        """Read every record and cut a torn line off the end; gives the bytes that were cut.

        Raises LocalMoeError naming the line where anything else is no record; then the file stays.
        """
        end, lacks_line_end = 0, False
        for line, record in self._lines():
            if record is None:
                if is_torn_record(line, RECORD_OPENING):
                    break  # it is the last
                raise LocalMoeError(
                    f"Line {line.number} of {self.path} is damaged, or no answer of a batch.",
                    "Take that line out, and its request is asked again; or choose another -o.",
                )
            end, lacks_line_end = record.offset + record.n_bytes, not line.whole
            on_record(record)
        n_cut = self._cut(end)
        if lacks_line_end:
            self.append([b"\n"])
        return n_cut

    def records(self) -> Iterator[Record]:
        """Every record of an output that was recovered."""
        return (record for _, record in self._lines() if record is not None)

    def _lines(self) -> Iterator[tuple[InputLine, Record | None]]:
        with contextlib.suppress(FileNotFoundError), open_regular(self.path) as file:
            for line in read_lines(file, MAX_RECORD_BYTES):
                yield line, record_of(line)

    # ---- writing ----

    def append(self, lines: Sequence[bytes]) -> None:
        """Write whole lines behind the others; when this returns, they are on disk.

        Raises LocalMoeError where there is no room; then the file is as it was.
        """
        block = b"".join(lines)
        try:
            append_durably(self._fd, block, self._n_bytes)
        except OSError as error:
            raise self._failed(error) from None
        self._n_bytes += len(block)

    def rewrite(self, places: Iterable[tuple[int, int]]) -> None:
        """Keep only the records at these places (offset, length), in this order."""
        try:
            with atomic_file(self.path, durable=True) as new:
                with open_regular(self.path) as old:
                    for offset, n_bytes in places:
                        old.seek(offset)
                        for n_left in range(n_bytes, 0, -COPY_BYTES):
                            new.write(old.read(min(n_left, COPY_BYTES)))
                if os.name == "nt":
                    self._close_file()  # Windows replaces nothing that is open
            self._open()
        except OSError as error:
            raise self._failed(error) from None
        self._cut(os.fstat(self._fd).st_size)

    def _open(self) -> None:
        """Opens and locks what has the name now, in place of what had it. Raises OSError."""
        try:
            before, self._fd = self._fd, open_locked(self.path)
        except BlockingIOError:
            raise UsageError(
                f"Another run is writing {self.path}.", "Wait for it, or choose another -o."
            ) from None
        if before >= 0:
            os.close(before)

    def _cut(self, end: int) -> int:
        """Takes off everything after `end`; gives how much that was."""
        try:
            n_cut = os.fstat(self._fd).st_size - end
            if n_cut:
                os.ftruncate(self._fd, end)
            sync(self._fd)  # of a run that was killed, not all that can be read need be on disk
            if not self._is_begun:
                with contextlib.suppress(OSError):
                    sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from None
        self._n_bytes, self._is_begun = end, True
        return n_cut

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _failed(self, error: OSError) -> LocalMoeError:
        return LocalMoeError(
            f"{self.path} can't be written: {error.strerror}. All answers written so far are safe.",
            "Mend that, and run the same command again: it goes on where it stopped.",
        )


def _refuse_odd(path: Path) -> None:
    """Raises UsageError where an output can't be: only a file can be added to, cut and renamed."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UsageError(f"There is no folder {path.parent}.", "Check -o.") from None
        return
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}.") from None
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is not a file.", "Give a file, or -o - for standard output.")


def record_of(line: InputLine) -> Record | None:
    """The record that a line of an output is; None where it isn't one."""
    if line.raw is None:
        return None
    try:
        value = json.loads(line.raw.decode("utf-8-sig"))
        key = KEY.fullmatch(value["id"])
        name, number, is_error = value["custom_id"], value["line"], value["error"] is not None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not key or not isinstance(name, str) or not isinstance(number, int):
        return None
    return Record(line.offset, line.n_bytes, bytes.fromhex(key[1]), name, number, is_error)
