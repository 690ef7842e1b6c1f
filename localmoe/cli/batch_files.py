"""What `batch` reads and writes, and the signals that stop it."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from ..errors import LocalMoeError, UsageError

if TYPE_CHECKING:
    from types import FrameType

    from ..batch.dispatch import StopFlag
    from ..batch.encoder import Side


@dataclass(frozen=True, slots=True)
class Files:
    """What is read and written, and how it goes on with what is there."""

    input: str
    output: str
    errors: Path | None
    truncate: Side | None
    ordered: bool
    resume_anyway: bool
    retry_errors: bool

    @property
    def is_file(self) -> bool:
        return self.output != "-"


def check_files(files: Files, as_json: bool) -> None:
    """Raises UsageError where the files that were named can't go together."""
    if not files.is_file:
        if files.errors or files.ordered or files.retry_errors or files.resume_anyway:
            raise UsageError(
                "--errors, --ordered, --retry-errors and --resume-anyway need a file to write.",
                "Give one with -o.",
            )
        if as_json:
            raise UsageError("--json and the answers can't both be on stdout.", "Give -o FILE.")
        return
    names = [files.output, *([files.input] if files.input != "-" else [])]
    paths = [Path(name).resolve() for name in names] + (
        [files.errors.resolve()] if files.errors else []
    )
    if len(set(paths)) < len(paths):
        raise UsageError("Input, output and errors must be different files.")


@contextlib.contextmanager
def opened_input(name: str) -> Iterator[BinaryIO]:
    """The input as a file that can be read twice; a pipe is first written to a temporary one."""
    if name == "-" and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("There is no input.", "Give a file with -i, or pipe requests in.")
    with ExitStack() as stack:
        try:
            stream = cast(BinaryIO, sys.stdin.buffer) if name == "-" else open(name, "rb")  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"{name} can't be read: {error.strerror}.") from None
        stack.callback(stream.close)
        yield stream if stream.seekable() else stack.enter_context(copied(stream))


@contextlib.contextmanager
def copied(stream: BinaryIO) -> Iterator[BinaryIO]:
    """All that comes out of a pipe, in a temporary file."""
    with tempfile.TemporaryFile() as copy:
        try:
            shutil.copyfileobj(stream, copy, 1 << 20)
        except OSError as error:
            raise LocalMoeError(
                f"The input can't be kept in {tempfile.gettempdir()}: {error.strerror}.",
                "Make room there, or give the input as a file with -i.",
            ) from None
        copy.seek(0)
        yield cast(BinaryIO, copy)


class Interrupts:
    """Ctrl-C and SIGTERM: at once while nothing is asked, else first a wish to stop."""

    def __init__(self, stop: StopFlag) -> None:
        self._stop = stop
        self.is_asking = False

    def __enter__(self) -> Interrupts:
        self._before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # one signal too many must not turn an orderly end into another
        is_ending = self._stop.wanted or kind is KeyboardInterrupt
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if is_ending else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_asking or self._stop.wanted:
            raise KeyboardInterrupt
        self._stop.wanted = True
