"""Batches: the lines of a file checked, asked, and answered into an output that survives anything.

    with FileOutput(path, manifest) as output, Backlog() as backlog:
        recover(output, backlog)
        check_input(stream, form, defaults, encoder_of, backlog, output)
        run_batch(backlog, output, engine_of, options, Stop())

For a Python program that has its requests in a list there is `answers`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from ..engine.interfaces import Engine
from ..engine.protocol import FinishReason, Request, Timings, Usage
from ..files import InputLine, digest, read_lines
from ..prompt.messages import is_begun_answer
from ..prompt.reasoning import ReasoningMarkers
from ..structured.check import unheld_parts, with_held_schema
from .dispatch import Dispatcher, Key, Outcome, StopFlag
from .encoder import Encoder
from .journal import Record
from .parameters import ItemError, printable_name
from .pending import PendingRequest, PendingRequests
from .requests import (
    BatchRequest,
    Defaults,
    Form,
    is_blank,
    request_of,
    request_of_line,
)
from .responses import FileOutput, Output, OutputLine, answer_reply, error_reply

GROUP = 256


@dataclass(slots=True)
class InputCheck:
    """What a check found: lines that ask something, and what became of them.

    `n_done` were answered or had failed in an earlier run; `n_bad` can't be asked. Answers of
    `n_partly_held` are checked at their end for what can't be held while answering.
    """

    n_lines: int = 0
    n_done: int = 0
    n_bad: int = 0
    n_to_ask: int = 0
    n_truncated: int = 0
    n_partly_held: int = 0


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """How far the asking is. Counts are of this run; tokens are those of answered requests."""

    n_total: int
    n_answered: int = 0
    n_failed: int = 0
    n_deaths: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    @property
    def n_ended(self) -> int:
        """Requests that have an answer or an error."""
        return self.n_answered + self.n_failed


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an output held: requests answered and failed before, and bytes cut off a torn end."""

    n_answered: int
    n_failed: int
    n_cut_bytes: int


def recover(
    output: FileOutput, backlog: PendingRequests, *, retry_errors: bool = False
) -> Recovered:
    """Note what was answered before. With `retry_errors` what failed is taken out, to be asked
    again. Raises LocalMoeError where the output is damaged before its end.
    """
    n_answered = n_failed = 0

    def note(record: Record) -> None:
        nonlocal n_answered, n_failed
        if record.is_error:
            n_failed += 1
        else:
            n_answered += 1
        if not (record.is_error and retry_errors):
            backlog.mark_done(record.key)

    n_cut_bytes = output.recover(note)
    if n_failed and retry_errors:
        output.drop(lambda record: not record.is_error)
        n_failed = 0
    return Recovered(n_answered, n_failed, n_cut_bytes)


def drop_superseded(output: FileOutput, backlog: PendingRequests) -> None:
    """Take out answers to requests that are asked differently now; to be called after the check.

    Answers to requests that are not in the input any more stay.
    """

    def is_wanted(record: Record) -> bool:
        return backlog.line_of(record.key) is not None or not backlog.is_named(record.name)

    output.drop(is_wanted)


# ---- the check -----------------------------------------------------------------------------------


def check_input(
    stream: BinaryIO,
    form: Form,
    defaults: Defaults,
    encoder_of: Callable[[], Encoder],
    backlog: PendingRequests,
    output: Output,
) -> InputCheck:
    """Read the whole input: what can be asked goes into the backlog in tokens, what can't be asked
    into the output as an error, what was answered before nowhere.

    `encoder_of` is called once something has to be encoded.
    """
    checked = InputCheck()
    bad: list[OutputLine] = []
    for line in read_lines(stream):
        if is_blank(line):
            continue
        checked.n_lines += 1
        reply = _check_line(line, form, defaults, encoder_of, backlog, checked)
        if reply is not None:
            bad.append(reply)
        if len(bad) >= GROUP:
            output.write(bad)
            bad.clear()
    if bad:
        output.write(bad)
    return checked


def _check_line(
    line: InputLine,
    form: Form,
    defaults: Defaults,
    encoder_of: Callable[[], Encoder],
    backlog: PendingRequests,
    checked: InputCheck,
) -> OutputLine | None:
    """Put a line where it belongs; gives its error where it can't be asked."""
    key, name = None, line_name(line.number)
    try:
        request = request_of_line(line, form, defaults)
        name = request.custom_id or name
        _take_name(name, request.custom_id, line, backlog)
        key = digest(b"named", name.encode(), line.digest)
        backlog.take_key(key, line.number)
        if backlog.is_done(key):
            checked.n_done += 1
            return None
        tokens, n_cut = encoder_of().encode(request)
    except ItemError as error:
        if key is None:
            name = error.custom_id or name
            key = digest(b"line", b"%d" % line.number, line.digest)
            backlog.take_key(key, line.number)
        if backlog.is_done(key):
            checked.n_done += 1
            return None
        checked.n_bad += 1
        return error_reply(key, name, line.number, error)
    backlog.add(pending_request(request, line.number, name, key, tokens, n_cut))
    checked.n_to_ask += 1
    checked.n_truncated += n_cut > 0
    checked.n_partly_held += bool(unheld_parts(request.options.sampling))
    return None


def pending_request(
    request: BatchRequest, line: int, name: str, key: bytes, tokens: tuple[int, ...], n_cut: int
) -> PendingRequest:
    """Returns a request with what it became in tokens."""
    is_begun = is_begun_answer(request.messages)
    options = request.options
    return PendingRequest(line, name, key, request.is_chat, tokens, options, n_cut, is_begun)


def _take_name(name: str, custom_id: str | None, line: InputLine, backlog: PendingRequests) -> None:
    taken = backlog.take_name(name, line.number)
    if taken != line.number:
        message = f"The custom_id {printable_name(name)} is that of line {taken} already."
        raise ItemError("duplicate_custom_id", message, custom_id)


def line_name(number: int) -> str:
    """What a request is called that has no custom_id."""
    return f"line-{number}"


# ---- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunOptions:
    """`model` is what answers name as theirs. With `reuse_prefix`, requests that begin alike share
    work.

    `answers_start_text` is that of the model's prompt format, `reasoning_markers` are those of its
    vocabulary; what a model thought is told where `thinking` is wanted.
    """

    model: str
    answers_start_text: bool = False
    reuse_prefix: bool = True
    reasoning_markers: ReasoningMarkers | None = None
    thinking: bool = True


def run_batch(
    backlog: PendingRequests,
    output: Output,
    engine_of: Callable[[], Engine],
    options: RunOptions,
    stop: StopFlag,
    on_progress: Callable[[BatchProgress], None] | None = None,
) -> BatchProgress:
    """Ask all that the backlog holds and write what comes; what is counted is on disk.

    Raises LocalMoeError where the output can't be written or no engine lives; what was written is
    safe, and another run goes on from there.
    """
    asked = (asked_of(ask, ask, options) for ask in backlog.asks())
    asking = Dispatcher(asked, engine_of, stop)
    progress = BatchProgress(backlog.n_asks)
    started = time.monotonic()
    for outcomes in asking.outcomes():
        if outcomes:
            output.write([reply_of(outcome, options) for outcome in outcomes])
        progress = advanced(progress, outcomes)
        seconds = time.monotonic() - started
        progress = replace(progress, n_deaths=asking.n_deaths, seconds=seconds)
        if on_progress:
            on_progress(progress)
    return progress


def asked_of(
    key: Key, ask: PendingRequest, options: RunOptions
) -> tuple[Key, Request, ReasoningMarkers | None]:
    """Returns a pending request as a dispatcher takes it. Only chats have thinking to part."""
    markers = options.reasoning_markers if ask.chat else None
    return key, engine_request(ask, options, markers), markers


def engine_request(
    ask: PendingRequest, options: RunOptions, markers: ReasoningMarkers | None
) -> Request:
    """Returns a pending request as the engine takes it."""
    return Request(
        tokens=ask.tokens,
        sampling=with_held_schema(ask.options.sampling),
        max_tokens=ask.options.max_tokens,
        stop=ask.options.stop,
        strip_leading_space=ask.chat and options.answers_start_text and not ask.is_begun,
        stream=False,
        reuse_prefix=options.reuse_prefix,
        reasoning_tokens=markers.ids if markers else (),
    )


def reply_of(outcome: Outcome[PendingRequest], options: RunOptions) -> OutputLine:
    """Returns the line of the output for an outcome."""
    ask = outcome.key
    if outcome.answer is not None:
        return answer_reply(ask, outcome.answer, options.model, thinking=options.thinking)
    error = ItemError(outcome.code, outcome.message)
    return error_reply(ask.key, ask.name, ask.line, error)


def advanced(progress: BatchProgress, outcomes: Iterable[Outcome[PendingRequest]]) -> BatchProgress:
    """The progress with some more outcomes in it."""
    lasts = [o.answer.last for o in outcomes if o.answer is not None]
    usages = [last.usage for last in lasts if last is not None and last.usage is not None]
    return replace(
        progress,
        n_answered=progress.n_answered + len(usages),
        n_failed=progress.n_failed + sum(outcome.answer is None for outcome in outcomes),
        prompt_tokens=progress.prompt_tokens + sum(u.prompt_tokens for u in usages),
        cached_tokens=progress.cached_tokens + sum(u.cached_tokens for u in usages),
        completion_tokens=progress.completion_tokens + sum(u.completion_tokens for u in usages),
    )


# ---- for programs --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BatchResult:
    """An answer to the request of this `index`, or in `error` a sentence on why there is none.

    `tokens` are all that were sampled, those of the `thinking` too.
    """

    index: int
    custom_id: str | None
    text: str = ""
    thinking: str = ""
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    error: str = ""


def answers(
    requests: Iterable[object],
    encoder: Encoder,
    engine_of: Callable[[], Engine],
    defaults: Defaults,
    *,
    reuse_prefix: bool = True,
    reasoning_markers: ReasoningMarkers | None = None,
) -> Iterator[BatchResult]:
    """Results as they finish. A request is a prompt, a list of messages, or a line's object.

    One that can't be asked is a result with an error. `encoder` must not depend on an engine that
    may die; `engine_of` is called again when one has. Raises EngineError where none lives.
    """
    refused: list[BatchResult] = []
    options = RunOptions("", encoder.format.answers_start_text, reuse_prefix, reasoning_markers)

    def asked() -> Iterator[tuple[tuple[int, str | None], Request, ReasoningMarkers | None]]:
        for index, value in enumerate(requests):
            try:
                request = request_of(as_line(value), defaults)
                ask = ask_of(index, request, encoder)
            except ItemError as error:
                refused.append(BatchResult(index, error.custom_id, error=error.message))
            else:
                yield asked_of((index, request.custom_id), ask, options)

    for outcomes in Dispatcher(asked(), engine_of).outcomes():
        yield from [refused.pop(0) for _ in range(len(refused))]
        yield from map(result_of, outcomes)
    yield from refused


def ask_of(index: int, request: BatchRequest, encoder: Encoder) -> PendingRequest:
    """Encodes a program's request."""
    tokens, n_cut = encoder.encode(request)
    return pending_request(request, index, "", b"", tokens, n_cut)


def as_line(value: object) -> object:
    """A request of a program in the form of a line."""
    if isinstance(value, str):
        return {"prompt": value}
    return {"messages": value} if isinstance(value, (list, tuple)) else value


def result_of(outcome: Outcome[tuple[int, str | None]]) -> BatchResult:
    """Returns an outcome as the Python interface has it."""
    index, custom_id = outcome.key
    answer = outcome.answer
    if answer is None or answer.last is None:
        return BatchResult(index, custom_id, error=outcome.message)
    return BatchResult(
        index,
        custom_id,
        answer.text,
        answer.thinking,
        answer.tokens,
        answer.last.finish_reason,
        answer.last.usage,
        answer.last.timings,
    )
