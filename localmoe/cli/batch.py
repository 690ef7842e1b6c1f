"""What `batch` reads and writes, and the signals that stop it.

`batch`: a file of requests, answered into a file that a crash can't harm.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import click

from ..batch.dispatch import StopFlag
from ..batch.encoder import Encoder, RestartingVocabulary, with_renderer
from ..batch.manifest import Manifest, input_file
from ..batch.pending import PendingRequests
from ..batch.prefix_sharing import batch_shape_of
from ..batch.requests import Defaults, form_of
from ..batch.responses import FileOutput, StreamOutput
from ..batch.runner import (
    BatchProgress,
    RunOptions,
    check_input,
    drop_superseded,
    recover,
    run_batch,
)
from ..catalog.resolve import ModelResolver
from ..config.environment import engine_environment
from ..errors import LocalMoeError, UsageError
from ..hub.cache_layout import expected_sha256
from ..loading import (
    answer_options,
    format_of,
    load_found,
    open_vocabulary,
    special_tokens,
    title,
    wants_thinking,
)
from ..prompt.jinja_client import Renderer
from ..prompt.reasoning import find_reasoning_tokens
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
)

if TYPE_CHECKING:
    from types import FrameType

    from ..batch.dispatch import StopFlag
    from ..batch.encoder import Encoder, Side
    from ..batch.manifest import Manifest
    from ..batch.pending import PendingRequests
    from ..batch.requests import Defaults
    from ..batch.responses import FileOutput, StreamOutput
    from ..batch.runner import BatchProgress, InputCheck, Recovered
    from ..callbacks import LoadCallbacks
    from ..catalog.resolve import ModelResolver, ResolvedModel
    from ..config.settings import Settings
    from ..engine.client import EngineProcess
    from ..loading import OpenModel
    from ..planner.request import BatchShape
    from ..prompt.reasoning import ReasoningTokens


@dataclass(frozen=True, slots=True)
class BatchFiles:
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
        """Whether the answers go to a file, so that the batch can be resumed."""
        return self.output != "-"


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


EXIT_ITEM_ERRORS = 5
EXIT_INTERRUPTED = 130
GO_ON = "Run the same command again to go on."
# what decides over answers; the rest is where and how fast
ANSWER_SETTINGS = (
    "system", "ctx_size", "kv_type", "max_tokens", "temperature", "top_k", "top_p", "min_p",
    "repeat_penalty", "seed", "stop", "json_schema", "grammar",
)  # fmt: skip


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

    A line is an OpenAI batch line, {"prompt": ...}, {"messages": [...]}, or plain text.
    """
    files = BatchFiles(input_, output, errors, truncate, ordered, resume_anyway, retry_errors)
    check_files(files, as_json)
    settings = settings_of(options, model)
    company = Parallelism(n_wanted(parallel), reuse_prefix=not no_share)
    with load_callbacks(model, quiet, verbose) as watch:
        return BatchCommand(model, files, settings, watch, company, quiet=quiet)(as_json)


def n_wanted(given: str) -> int | None:
    """The number of --parallel, None for `auto`. Raises UsageError on anything else."""
    if given == "auto":
        return None
    if not (given.isdecimal() and 1 <= int(given) <= 256):
        raise UsageError(f"--parallel is {given}.", "It is auto, or a number of 1 to 256.")
    return int(given)


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How many requests are wanted at once (None leaves it open), and whether they share work."""

    n_at_once: int | None
    reuse_prefix: bool


class BatchCommand:
    """One run of the command, step by step: check, ask, tell."""

    def __init__(
        self,
        model: str,
        files: BatchFiles,
        settings: Settings,
        watch: LoadCallbacks,
        company: Parallelism,
        *,
        quiet: bool,
    ) -> None:
        self._model = model
        self._files = files
        self._settings = settings
        self._watch = watch
        self._company = company
        self._crowd: BatchShape | None = None
        self._markers: ReasoningTokens | None = None
        self._quiet = quiet
        self._stack = ExitStack()
        self._checking = ExitStack()  # what is needed no longer once a model is loaded
        self._stop = StopFlag()
        self._interrupts = Interrupts(self._stop)
        self._loaded: OpenModel | None = None

    def __call__(self, as_json: bool) -> int:
        """Run it; gives the exit code. Raises LocalMoeError."""
        try:
            with self._interrupts, self._stack:
                return self._run(as_json)
        except KeyboardInterrupt:
            return self._interrupted()
        finally:
            if self._loaded is not None:
                self._loaded.engine.kill()

    def _run(self, as_json: bool) -> int:
        output = self._output
        backlog = self._stack.enter_context(PendingRequests())
        recovered, checked = self._check(output, backlog)
        progress = self._ask(output, backlog) if checked.n_to_ask else BatchProgress(0)
        n_errors = checked.n_bad + progress.n_failed + (recovered.n_failed if recovered else 0)
        if self._files.ordered and isinstance(output, FileOutput) and not self._stop.wanted:
            output.put_in_order(backlog)
        if as_json:
            console.document(summary_document(checked, progress, n_errors, self._stop.wanted))
        for line in summary_lines(progress, n_errors):
            self._note(line)
        if self._stop.wanted:
            return self._interrupted()
        return EXIT_ITEM_ERRORS if n_errors else 0

    def _interrupted(self) -> int:
        self._note(f"Stopped. {GO_ON}" if self._files.is_file else "Stopped.")
        return EXIT_INTERRUPTED

    def _note(self, text: str) -> None:
        if not self._quiet:
            console.note(text)

    # ---- the check ----

    def _check(
        self, output: FileOutput | StreamOutput, backlog: PendingRequests
    ) -> tuple[Recovered | None, InputCheck]:
        """Look at what was answered before, and at every line of the input."""
        recovered = None
        if isinstance(output, FileOutput):
            recovered = recover(output, backlog, retry_errors=self._files.retry_errors)
        form = form_of(self._input_name, self._input)
        with self._checking:
            checked = check_input(
                self._input, form, self._defaults, lambda: self._encoder, backlog, output
            )
            if checked.n_to_ask:
                self._markers = self._find_reasoning_tokens()
        if isinstance(output, FileOutput) and output.changes:
            drop_superseded(output, backlog)
        self._note(check_line(checked, recovered))
        return recovered, checked

    @cached_property
    def _input(self) -> BinaryIO:
        return self._stack.enter_context(opened_input(self._files.input))

    @property
    def _input_name(self) -> str:
        return "stdin" if self._files.input == "-" else self._files.input

    @cached_property
    def _output(self) -> FileOutput | StreamOutput:
        if not self._files.is_file:
            return StreamOutput(console.answer_text)
        output = FileOutput(
            Path(self._files.output),
            self._manifest(),
            errors=self._files.errors,
            resume_anyway=self._files.resume_anyway,
        )
        return self._stack.enter_context(output)

    def _manifest(self) -> Manifest:
        said = self._settings.model_dump(mode="json", include=set(ANSWER_SETTINGS))
        settings = {name: said[name] if said[name] != [] else None for name in ANSWER_SETTINGS} | {
            "think": self._settings.think if self._settings.think != "on" else None,
            "truncate": self._files.truncate,
            "errors": self._files.errors and self._files.errors.name,
        }
        source = input_file(self._input_name, self._input)
        return Manifest(source, model_identity(self._found), settings)

    @cached_property
    def _defaults(self) -> Defaults:
        found = self._found
        options = answer_options(found.meta, self._settings, found.spec)
        return Defaults(options, self._settings.system)

    @cached_property
    def _n_ctx(self) -> int:
        """The most tokens that a request may have, its answer included."""
        meta = self._found.meta
        return self._finder.planner.plan_to_load(meta.paths[0], meta, tune=False).placement.n_ctx

    @cached_property
    def _encoder(self) -> Encoder:
        """Makes prompts by the vocabulary alone; needed only where something has to be asked."""
        env, meta = engine_environment(), self._found.meta
        n_ctx = self._n_ctx
        vocabulary = RestartingVocabulary(lambda: open_vocabulary(meta.paths[0]))
        renderer = Renderer(env)
        self._checking.callback(vocabulary.close)
        self._checking.callback(renderer.close)
        format = with_renderer(format_of(meta, think=wants_thinking(self._settings)), renderer)
        return Encoder(format, vocabulary, n_ctx, self._files.truncate)

    def _find_reasoning_tokens(self) -> ReasoningTokens | None:
        """What parts thinking from answer in this model's vocabulary."""
        return find_reasoning_tokens(special_tokens(self._found.meta), self._encoder.vocabulary)

    # ---- the model ----

    @cached_property
    def _finder(self) -> ModelResolver:
        return self._stack.enter_context(ModelResolver(self._settings, self._watch, "batch"))

    @cached_property
    def _found(self) -> ResolvedModel:
        return self._finder.find(self._model)

    @cached_property
    def _fetched(self) -> ResolvedModel:
        try:
            return self._finder.fetch(self._found)
        finally:
            self._finder.close()  # its engine would hold memory beside the model's

    def _engine(self) -> EngineProcess:
        """An engine with the model loaded; another call ends the one before."""
        self._interrupts.is_asking = False  # while a model loads, nothing is lost by a Ctrl-C
        if self._loaded is not None:
            self._loaded.engine.kill()
            if self._watch.warning:
                self._watch.warning("The engine died; it is started again.")
        self._loaded = load_found(self._fetched, self._settings, self._watch, "batch", self._crowd)
        self._interrupts.is_asking = True
        return self._loaded.engine

    def _ask(self, output: FileOutput | StreamOutput, backlog: PendingRequests) -> BatchProgress:
        """Ask all that there is to ask, with a line on how far it is."""
        meta = self._fetched.meta
        options = RunOptions(
            title(meta),
            format_of(meta).answers_start_text,
            self._company.reuse_prefix,
            self._markers,
            thinking=self._settings.think == "on",
        )
        self._crowd = batch_shape_of(
            backlog, self._n_ctx, self._company.n_at_once, self._company.reuse_prefix
        )
        told = ProgressReporter(self._stop, console.StatusLine(self._quiet), self._note)
        try:
            return run_batch(backlog, output, self._engine, options, self._stop, told)
        finally:
            self._interrupts.is_asking = False
            told.line.done()


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


def model_identity(found: ResolvedModel) -> dict[str, Any]:
    """What tells a model from every other: its file's hash where it is known, else its date."""
    paths = found.meta.paths
    hashes = [file.sha256 for file in found.files] or [expected_sha256(path) for path in paths]
    identity: dict[str, Any] = {
        "model file": paths[0].name if found.is_here else found.files[0].base_name,
        "model bytes": found.n_bytes,
    }
    if all(hashes):
        return {**identity, "model sha256": hashes}
    return {**identity, "model modified": [path.stat().st_mtime_ns for path in paths]}
