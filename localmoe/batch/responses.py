"""Where a batch's answers go, and in which form: OpenAI batch response lines."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import UsageError, escape_unsafe
from ..prompt.reasoning import Answer
from .journal import Journal, Record
from .manifest import Manifest, differences, manifest_path, read_manifest, write_manifest
from .parameters import ItemError
from .pending import PendingRequest, PendingRequests


@dataclass(frozen=True, slots=True)
class OutputLine:
    """A line of an output, its line end included."""

    raw: bytes
    is_error: bool


class Output(Protocol):
    """Takes replies; when `write` returns, they are where they belong."""

    def write(self, replies: Sequence[OutputLine]) -> None:
        """Writes answers; when it returns, they are where they belong."""
        ...


# ---- the lines -----------------------------------------------------------------------------------


def answer_reply(
    ask: PendingRequest, answer: Answer, model: str, *, thinking: bool = True
) -> OutputLine:
    """The line of a whole answer; `thinking`: with what was thought before it, if anything was."""
    last = answer.last
    assert last is not None
    assert last.usage is not None
    assert last.timings is not None
    n_prompt, n_answer = last.usage.prompt_tokens, last.usage.completion_tokens
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{ask.key.hex()}",
        "object": "chat.completion" if ask.chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(ask, answer, thinking=thinking)],
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
            "prompt_tokens_details": {"cached_tokens": last.usage.cached_tokens},
        },
        "timings": {name: round(value, 4) for name, value in asdict(last.timings).items()},
    }
    if ask.n_cut:
        body["truncated_prompt_tokens"] = ask.n_cut
    response = {"status_code": 200, "request_id": uuid.uuid4().hex, "body": body}
    return OutputLine(_line(ask.key, ask.name, ask.line, response, None), is_error=False)


def _choice(ask: PendingRequest, answer: Answer, *, thinking: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"text": answer.text}
    if ask.chat:
        message = {"role": "assistant", "content": answer.text}
        if answer.thinking and thinking:
            message["reasoning_content"] = answer.thinking  # as DeepSeek's API and llama-server
        said = {"message": message}
    reason = answer.last.finish_reason if answer.last else None
    return {"index": 0, **said, "logprobs": None, "finish_reason": reason}


def error_reply(key: bytes, name: str, line: int, error: ItemError) -> OutputLine:
    """The line of a request that has no answer."""
    problem = {"code": error.code, "message": error.message}
    return OutputLine(_line(key, name, line, None, problem), is_error=True)


def _line(key: bytes, name: str, number: int, response: Any, error: Any) -> bytes:
    value = {
        "id": f"batch_req_{key.hex()}",
        "custom_id": name,
        "line": number,
        "response": response,
        "error": error,
    }
    text = json.dumps(value, ensure_ascii=False)
    text = escape_unsafe(text)
    return text.encode("utf-8") + b"\n"


# ---- where they go -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamOutput:
    """Replies as text to a function, at once; nothing can be resumed."""

    emit: Callable[[str], None]

    def write(self, replies: Sequence[OutputLine]) -> None:
        """Hands answers to the function as text."""
        for reply in replies:
            self.emit(reply.raw.decode("utf-8"))


class FileOutput:
    """Replies in a journal, errors in one of their own if wanted. Close it.

    Opening one locks it, and holds it against its manifest. Raises UsageError where another
    run writes it, where it isn't ours, and where it was made from something else.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        errors: Path | None = None,
        resume_anyway: bool = False,
    ) -> None:
        self.answers = Journal(path)
        self.errors = self.answers
        try:
            if errors is not None:
                self.errors = Journal(errors)
            self.changes = self._check(manifest, resume_anyway)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the files."""
        for journal in self.journals:
            journal.close()

    def __enter__(self) -> FileOutput:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def journals(self) -> tuple[Journal, ...]:
        """The journal of answers, and that of errors where it is another."""
        return (self.answers,) if self.errors is self.answers else (self.answers, self.errors)

    def write(self, replies: Sequence[OutputLine]) -> None:
        """Raises LocalMoeError where there is no room; what was written before is safe."""
        for journal in self.journals:
            lines = [r.raw for r in replies if self._journal_of(r.is_error) is journal]
            if lines:
                journal.append(lines)

    def recover(self, on_record: Callable[[Record], None]) -> int:
        """Read what is there; gives how many bytes of torn tails were cut off."""
        return sum([journal.recover(on_record) for journal in self.journals])

    def drop(self, is_wanted: Callable[[Record], bool]) -> None:
        """Take out the records that aren't wanted any more."""
        for journal in self.journals:
            if not all(is_wanted(record) for record in journal.records()):
                kept = (r for r in journal.records() if is_wanted(r))
                journal.rewrite((r.offset, r.n_bytes) for r in kept)

    def put_in_order(self, backlog: PendingRequests) -> None:
        """Rewrite the records in the order of the input's lines."""
        for journal in self.journals:
            before, is_ordered = 0, True
            for record in journal.records():
                line = backlog.line_of(record.key) or record.line
                backlog.place(line, record.offset, record.n_bytes)
                before, is_ordered = line, is_ordered and line >= before
            places = backlog.places()
            if is_ordered:
                list(places)
            else:
                journal.rewrite(places)

    def _journal_of(self, is_error: bool) -> Journal:
        return self.errors if is_error else self.answers

    def _has_other_errors(self, before: Manifest, now: Manifest) -> bool:
        """Whether the file of errors holds something, and was not that of the runs before."""
        is_same = before.settings.get("errors") == now.settings.get("errors")
        return self.errors is not self.answers and not is_same and not self.errors.is_empty

    def _check(self, manifest: Manifest, resume_anyway: bool) -> list[str]:
        """Write the manifest, unless what is there is from another; gives what changed."""
        path = self.answers.path
        before = read_manifest(path)
        is_empty = all(journal.is_empty for journal in self.journals)
        if before is None and not is_empty:
            there = next(journal.path for journal in self.journals if not journal.is_empty)
            raise UsageError(
                f"{there} is there already, and no batch wrote it: {manifest_path(path).name} is "
                "missing.",
                "Choose another name, or take the file away.",
            )
        if before and self._has_other_errors(before, manifest):
            raise UsageError(
                f"{self.errors.path} is there already, and this batch did not write it.",
                "Choose another name for --errors, or take the file away.",
            )
        changes = [] if before is None or is_empty else differences(before, manifest)
        if changes and not resume_anyway:
            raise UsageError(
                f"{path.name} was started with other settings: {', '.join(changes)}.",
                "Choose another -o, or go on all the same with --resume-anyway.",
            )
        if before != manifest:
            write_manifest(path, manifest)
        return changes
