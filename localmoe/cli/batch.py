"""`batch`: a file of requests, answered into a file that a crash can't harm."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import click

from ..batch.dispatch import StopFlag
from ..batch.encoder import Side
from ..batch.job import BatchFiles, BatchJob, JobCallbacks, Parallelism, run_job
from ..batch.manifest import manifest_path
from ..batch.runner import BatchProgress
from ..batch.transcode import is_table, write_rows, write_utf8
from ..errors import LocalMoeError, UsageError
from ..files import is_temporary
from ..terminal import console
from ..terminal.batch_view import Pace, check_line, progress_line, summary_document, summary_lines
from ..terminal.progress import load_callbacks
from .options import (
    json_option,
    load_options,
    sampling_options,
    settings_of,
    think_option,
    verbosity_options,
    warn_of_unheld,
)
from .prompt_input import check_stdin

if TYPE_CHECKING:
    from types import FrameType


def check_files(files: BatchFiles, as_json: bool) -> None:
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
    refuse_shared_names(files)


def refuse_shared_names(files: BatchFiles) -> None:
    """Raises UsageError where two of the files that a batch reads and writes are one."""
    output = Path(os.path.realpath(files.output))
    uses = {"-o": output, "the manifest of -o": manifest_path(output)}
    if files.errors:
        uses["--errors"] = Path(os.path.realpath(files.errors))
    written = list(uses.values())
    if files.input != "-":
        uses["-i"] = source = Path(os.path.realpath(files.input))
        if any(is_temporary(source, path) for path in written):
            raise UsageError(
                f"{files.input} has the name of a temporary file of the output.", "Rename it."
            )
    for (one, path), (other, other_path) in combinations(uses.items(), 2):
        if is_same_file(path, other_path):
            raise UsageError(
                f"Input, output and errors must be different files: {path} is {one} and {other}."
            )


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, also by a hard link or in other letters."""
    try:
        return one == other or one.samefile(other)
    except OSError:  # one is not there yet
        return os.path.normcase(one) == os.path.normcase(other)


@contextlib.contextmanager
def opened_input(name: str, template: str | None = None) -> Iterator[BinaryIO]:
    """The input as lines in a file that can be read twice.

    A pipe is first written to a temporary one, and what is UTF-16 or a table is rewritten.
    Raises UsageError.
    """
    if name == "-":
        check_stdin()
        if sys.stdin.isatty():
            raise UsageError("There is no input.", "Give a file with -i, or pipe requests in.")
    with ExitStack() as stack:
        try:
            stream = cast(BinaryIO, sys.stdin.buffer) if name == "-" else open(name, "rb")  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"{name} can't be read: {error.strerror}.") from None
        stack.callback(stream.close)
        whole = stream if stream.seekable() else stack.enter_context(copied(stream))
        text = cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))
        if write_utf8(whole, text):
            whole = text
        if is_table(name, template):
            rows = cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))
            write_rows(whole, rows, "stdin" if name == "-" else name, template)
            whole = rows
        yield whole


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

    def set_asking(self, is_asking: bool) -> None:
        """Notes whether requests are being answered, which a first signal lets finish."""
        self.is_asking = is_asking

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # one signal too many must not turn an orderly end into another
        is_ending = self._stop.wanted or kind is KeyboardInterrupt
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if is_ending else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_asking or self._stop.wanted:
            raise KeyboardInterrupt
        self._stop.wanted = True


EXIT_ITEM_ERRORS = 5
EXIT_INTERRUPTED = 130
GO_ON = "Run the same command again to go on."


@click.command()
@click.argument("model")
@click.option(
    "-i",
    "--input",
    "input_",
    default="-",
    metavar="FILE",
    help="Requests; - is stdin, the default.",
)
@click.option(
    "-o", "--output", default="-", metavar="FILE", help="Answers; - is stdout, the default."
)
@click.option("--errors", type=click.Path(path_type=Path), help="Errors in a file of their own.")
@click.option("--ordered", is_flag=True, help="At the end, sort the answers as the input is.")
@click.option("--truncate", type=click.Choice(["head", "tail", "middle"]),
              help="Where to cut prompts that are too long; else they are refused.")  # fmt: skip
@click.option(
    "--template", metavar="TEXT", help="Make prompts of a CSV table's columns, like '{question}'."
)
@click.option("--retry-errors", is_flag=True, help="Ask again what failed in an earlier run.")
@click.option("--resume-anyway", is_flag=True, help="Go on although input or settings changed.")
@click.option("--parallel", default="auto", metavar="auto|N", help="Requests computed at once.")
@click.option("--no-share", is_flag=True, help="Compute each prompt whole, as if it were alone.")
@load_options
@sampling_options
@think_option
@json_option
@verbosity_options
def batch(
    model: str,
    input_: str,
    output: str,
    errors: Path | None,
    ordered: bool,
    truncate: Side | None,
    template: str | None,
    retry_errors: bool,
    resume_anyway: bool,
    parallel: str,
    no_share: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Answer a file of requests, one a line. The same command goes on where a run stopped.

    A line is an OpenAI batch line, {"prompt": ...}, {"messages": [...]}, or plain text. Of a table
    (.csv, .tsv) each row is one, by its column prompt or by --template.
    """
    files = BatchFiles(input_, output, errors, truncate, ordered, resume_anyway, retry_errors)
    check_files(files, as_json)
    settings = settings_of(options, model)
    if not quiet:
        warn_of_unheld(settings)
    parallelism = Parallelism(n_wanted(parallel), reuse_prefix=not no_share)
    with load_callbacks(model, quiet, verbose) as callbacks:
        job = BatchJob(model, files, settings, parallelism, callbacks)
        return run_shown(job, template, as_json=as_json, quiet=quiet)


def run_shown(job: BatchJob, template: str | None, *, as_json: bool, quiet: bool) -> int:
    """Runs a job with its progress on stderr; returns the exit code. Raises LocalMoeError."""

    def note(text: str) -> None:
        if not quiet:
            console.note(text)

    stop = StopFlag()
    interrupts = Interrupts(stop)
    shown = ProgressReporter(stop, console.StatusLine(quiet), note)
    tell = JobCallbacks(
        answer=console.answer_text,
        checked=lambda checked, recovered: note(check_line(checked, recovered)),
        asking=interrupts.set_asking,
        progress=shown,
    )
    stopped = f"Stopped. {GO_ON}" if job.files.is_file else "Stopped."
    try:
        with interrupts, opened_input(job.files.input, template) as source:
            try:
                result = run_job(job, source, stop, tell)
            finally:
                shown.line.done()
            is_stopped = not result.is_complete
            if as_json:
                console.document(
                    summary_document(result.checked, result.progress, result.n_errors, is_stopped)
                )
            for line in summary_lines(result.progress, result.n_errors):
                note(line)
    except KeyboardInterrupt:
        note(stopped)
        return EXIT_INTERRUPTED
    if is_stopped:
        note(stopped)
        return EXIT_INTERRUPTED
    return EXIT_ITEM_ERRORS if result.n_errors else 0


def n_wanted(given: str) -> int | None:
    """The number of --parallel, None for `auto`. Raises UsageError on anything else."""
    if given == "auto":
        return None
    if not (given.isdecimal() and 1 <= int(given) <= 256):
        raise UsageError(f"--parallel is {given}.", "It is auto, or a number of 1 to 256.")
    return int(given)


class ProgressReporter:
    """Tells how far a batch is, and once that it is about to stop."""

    def __init__(
        self, stop: StopFlag, line: console.StatusLine, note: Callable[[str], None]
    ) -> None:
        self.line = line
        self._stop = stop
        self._note = line.around(note)
        self._pace = Pace()
        self._said_stop = False

    def __call__(self, progress: BatchProgress) -> None:
        if self._stop.wanted and not self._said_stop:
            self._said_stop = True
            self._note("Stopping: finishing what is being computed; again to drop it.")
        tps = self._pace(progress.seconds, progress.completion_tokens)
        self.line.show(progress_line(progress, tps), takes_minutes=True)
