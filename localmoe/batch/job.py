"""A batch from its input to its last answer: resolve, check, load, ask.

`run_job` shows the steps in the order in which they happen. What a person sees of them is told
through callbacks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from ..callbacks import LoadCallbacks
from ..catalog.resolve import ModelResolver, ResolvedModel
from ..config.environment import engine_environment
from ..config.settings import Settings
from ..engine.client import EngineProcess
from ..hub.cache_layout import expected_sha256
from ..loading import (
    OpenModel,
    answer_options,
    format_of,
    load_found,
    open_vocabulary,
    special_tokens,
    think_of,
    title,
)
from ..planner.request import BatchShape
from ..prompt.jinja_client import Renderer
from ..prompt.reasoning import ReasoningMarkers, find_reasoning_markers
from .dispatch import StopFlag
from .encoder import Encoder, RestartingVocabulary, Side, with_renderer
from .manifest import Manifest, input_file
from .pending import PendingRequests
from .prefix_sharing import batch_shape_of
from .requests import Defaults, form_of
from .responses import FileOutput, StreamOutput
from .runner import (
    BatchProgress,
    InputCheck,
    Recovered,
    RunOptions,
    check_input,
    drop_superseded,
    recover,
    run_batch,
)

# what decides over answers; the rest is where and how fast
ANSWER_SETTINGS = (
    "system", "ctx_size", "kv_type", "max_tokens", "temperature", "top_k", "top_p", "min_p",
    "repeat_penalty", "presence_penalty", "frequency_penalty", "seed", "stop", "json_schema",
    "grammar",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BatchFiles:
    """What is read and written, and how a batch resumes with what is there; "-" is a stream."""

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

    @property
    def input_name(self) -> str:
        """What the input is called in the manifest."""
        return "stdin" if self.input == "-" else self.input


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How many requests are wanted at once (None leaves it open), and whether they share work."""

    n_at_once: int | None
    reuse_prefix: bool


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What is asked of which model, and how."""

    model: str
    files: BatchFiles
    settings: Settings
    parallelism: Parallelism
    load_callbacks: LoadCallbacks


@dataclass(frozen=True, slots=True)
class JobCallbacks:
    """Who is told how a job goes.

    `answer` gets the answers of a job that writes no file. `asking` is told whether requests are
    being answered, so that a stop has something to finish.
    """

    answer: Callable[[str], None]
    checked: Callable[[InputCheck, Recovered | None], None]
    asking: Callable[[bool], None]
    progress: Callable[[BatchProgress], None]


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended. `n_errors` counts all requests without an answer, earlier runs' too."""

    checked: InputCheck
    progress: BatchProgress
    n_errors: int

    @property
    def is_complete(self) -> bool:
        """Whether all that was asked has an answer or an error, wish to stop or not."""
        return self.progress.n_ended == self.progress.n_total


@dataclass(frozen=True, slots=True)
class _Checked:
    """The input's check, and what asking needs of the model: both None where nothing is asked."""

    requests: InputCheck
    n_ctx: int = 0
    reasoning_markers: ReasoningMarkers | None = None


def run_job(job: BatchJob, source: BinaryIO, stop: StopFlag, tell: JobCallbacks) -> JobResult:
    """Answers all requests of an input. Raises LocalMoeError.

    `source` can be read twice. Once a `stop` is wanted, what is being computed is finished.
    """
    with ExitStack() as stack:
        resolver = stack.enter_context(ModelResolver(job.settings, job.load_callbacks, "batch"))
        found = resolver.find(job.model)
        output = stack.enter_context(open_output(job, source, found, tell))
        pending = stack.enter_context(PendingRequests())
        recovered = None
        if isinstance(output, FileOutput):
            recovered = recover(output, pending, retry_errors=job.files.retry_errors)
        checked = _check(job, source, resolver, found, pending, output)
        if isinstance(output, FileOutput) and output.changes:
            drop_superseded(output, pending)
        tell.checked(checked.requests, recovered)
        progress = BatchProgress(0)
        if checked.requests.n_to_ask:
            progress = _ask(job, checked, resolver, found, pending, output, stop, tell)
        n_errors = checked.requests.n_bad + progress.n_failed
        result = JobResult(
            checked.requests, progress, n_errors + (recovered.n_failed if recovered else 0)
        )
        if job.files.ordered and isinstance(output, FileOutput) and result.is_complete:
            output.put_in_order(pending)
    return result


def open_output(
    job: BatchJob, source: BinaryIO, found: ResolvedModel, tell: JobCallbacks
) -> AbstractContextManager[FileOutput | StreamOutput]:
    """Opens where the answers go. Raises UsageError where a file holds those of another job."""
    if not job.files.is_file:
        return nullcontext(StreamOutput(tell.answer))
    return FileOutput(
        Path(job.files.output),
        manifest_of(job, source, found),
        errors=job.files.errors,
        resume_anyway=job.files.resume_anyway,
    )


def manifest_of(job: BatchJob, source: BinaryIO, found: ResolvedModel) -> Manifest:
    """Returns all that decides over the answers of a job."""
    said = job.settings.model_dump(mode="json", include=set(ANSWER_SETTINGS))
    settings = {name: said[name] if said[name] != [] else None for name in ANSWER_SETTINGS} | {
        "think": job.settings.think,
        "truncate": job.files.truncate,
        "errors": job.files.errors and errors_name(job.files.output, job.files.errors),
    }
    return Manifest(input_file(job.files.input_name, source), model_identity(found), settings)


def errors_name(output: str, errors: Path) -> str:
    """What a manifest calls a file of errors: its path from the folder of the output."""
    try:
        return os.path.relpath(os.path.realpath(errors), os.path.dirname(os.path.realpath(output)))
    except ValueError:  # another drive on Windows
        return os.path.realpath(errors)


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


# ---- the check ----


def _check(
    job: BatchJob,
    source: BinaryIO,
    resolver: ModelResolver,
    found: ResolvedModel,
    pending: PendingRequests,
    output: FileOutput | StreamOutput,
) -> _Checked:
    """Checks and encodes every line, by the model's vocabulary alone."""
    form = form_of(job.files.input_name, source)
    defaults = Defaults(answer_options(found.meta, job.settings, found.spec), job.settings.system)
    with ExitStack() as stack:
        encoder_of = cache(lambda: _open_encoder(job, resolver, found, stack))
        checked = check_input(source, form, defaults, encoder_of, pending, output)
        if not checked.n_to_ask:
            return _Checked(checked)
        encoder = encoder_of()
        meta, words = found.meta, encoder.vocabulary
        markers = find_reasoning_markers(special_tokens(meta), words, meta.chat_template)
        return _Checked(checked, encoder.n_ctx, markers)


def _open_encoder(
    job: BatchJob, resolver: ModelResolver, found: ResolvedModel, stack: ExitStack
) -> Encoder:
    """Opens what makes prompts; needed only where something is asked. `stack` closes it."""
    meta = found.meta
    plan = resolver.planner.plan_to_load(meta.paths[0], meta, tune=False)
    vocabulary = RestartingVocabulary(lambda: open_vocabulary(meta.paths[0]))
    stack.callback(vocabulary.close)
    renderer = Renderer(engine_environment())
    stack.callback(renderer.close)
    format = with_renderer(format_of(meta, think_of(job.settings)), renderer)
    return Encoder(format, vocabulary, plan.placement.n_ctx, job.files.truncate)


# ---- the answers ----


def _ask(
    job: BatchJob,
    checked: _Checked,
    resolver: ModelResolver,
    found: ResolvedModel,
    pending: PendingRequests,
    output: FileOutput | StreamOutput,
    stop: StopFlag,
    tell: JobCallbacks,
) -> BatchProgress:
    """Loads the model and asks all that there is to ask."""
    fetched = resolver.fetch(found)
    options = RunOptions(
        title(fetched.meta),
        format_of(fetched.meta).answers_start_text,
        job.parallelism.reuse_prefix,
        checked.reasoning_markers,
        thinking=job.settings.think not in ("off", "hide"),
    )
    parallelism = job.parallelism
    shape = batch_shape_of(pending, checked.n_ctx, parallelism.n_at_once, parallelism.reuse_prefix)
    engine = JobEngine(job, resolver, fetched, shape, tell.asking)
    try:
        return run_batch(pending, output, engine.open, options, stop, tell.progress)
    finally:
        tell.asking(False)
        engine.kill()


class JobEngine:
    """The engine of a job, which is started again where a request made it die."""

    def __init__(
        self,
        job: BatchJob,
        resolver: ModelResolver,
        found: ResolvedModel,
        shape: BatchShape,
        asking: Callable[[bool], None],
    ) -> None:
        self._job = job
        self._resolver = resolver
        self._found = found
        self._shape = shape
        self._asking = asking
        self._loaded: OpenModel | None = None

    def open(self) -> EngineProcess:
        """Returns an engine with the model loaded; another call ends the one before."""
        self._asking(False)  # while a model loads, nothing is lost by a Ctrl-C
        callbacks = self._job.load_callbacks
        if self._loaded is not None:
            self.kill()
            if callbacks.warning:
                callbacks.warning("The engine died; it is started again.")
        self._loaded = load_found(
            self._found,
            self._job.settings,
            callbacks,
            "batch",
            self._shape,
            measuring=self._resolver.release_engine(),
        )
        self._asking(True)
        return self._loaded.engine

    def kill(self) -> None:
        """Ends the engine at once."""
        if self._loaded is not None:
            self._loaded.engine.kill()
