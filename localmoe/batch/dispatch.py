"""Many requests to an engine that may die: each is answered, or it is said why not.

Requests are put to the engine well ahead of what it computes, so that it can choose which go
together. When it dies, another takes its place and what was under way is asked again, at most twice
each, and in ever smaller company: the one request that an engine dies of ends alone, and takes no
other along.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..engine.client import Inbox
from ..engine.interfaces import Engine
from ..engine.protocol import Delta, Failed, FromEngine, Request
from ..engine.retry import DISPATCH_CRASHES, REQUEST_TRIES, CrashCounter
from ..errors import EngineError
from ..prompt.reasoning import Answer, ReasoningMarkers, join_reasoning
from ..structured.check import OutputMismatch, check_answer

MAX_AHEAD = 1024
MAX_TOKENS_AHEAD = 1 << 19
MAX_IN_FLIGHT_BY_ATTEMPT = (MAX_AHEAD, 32, 1)
"""How many may be under way together that were asked never, once, twice before: an entry for each
of REQUEST_TRIES."""
WAKE_SECONDS = 0.25
MAX_GROUP = 256

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Key]):
    """What became of a request: an answer, or a code and a sentence."""

    key: Key
    answer: Answer | None = None
    code: str = ""
    message: str = ""


@dataclass(slots=True)
class StopFlag:
    """A wish to end, from a signal handler or another thread: finish what is being computed."""

    wanted: bool = False


@dataclass(slots=True)
class _Question(Generic[Key]):
    key: Key
    request: Request
    markers: ReasoningMarkers | None = None
    n_asked: int = 0
    deltas: list[Delta] = field(default_factory=list)  # of the answer under way


def _checked(question: _Question[Key], answer: Answer) -> Outcome[Key]:
    """An answer, if it has the form that it must have."""
    reason = answer.last.finish_reason if answer.last else None
    try:
        check_answer(answer.text, reason, question.request.sampling)
    except OutputMismatch as error:
        return Outcome(question.key, code="wrong_form", message=str(error))
    return Outcome(question.key, answer)


@dataclass(slots=True)
class Dispatcher(Generic[Key]):
    """Requests on their way to engines and back. `engine_of` starts an engine and loads the model.

    With `stop` wanted, what isn't being computed yet is given up, without an outcome.
    The markers beside a request part its thinking from its answer.
    """

    requests: Iterable[tuple[Key, Request] | tuple[Key, Request, ReasoningMarkers | None]]
    engine_of: Callable[[], Engine]
    stop: StopFlag = field(default_factory=StopFlag)
    n_deaths: int = 0
    _engine: Engine | None = None
    _inbox: Inbox = field(default_factory=queue.SimpleQueue)
    _under_way: dict[int, _Question[Key]] = field(default_factory=dict)
    _again: list[_Question[Key]] = field(default_factory=list)
    _n_tokens: int = 0
    _crashes: CrashCounter = field(default_factory=lambda: CrashCounter(DISPATCH_CRASHES))
    _is_stopping: bool = False

    def outcomes(self) -> Iterator[list[Outcome[Key]]]:
        """Outcomes as they come, in groups of those that came together; now and then an empty one.

        Raises EngineError where no engine can be started, or none lives long enough to answer.
        Left early, what is under way is cancelled.
        """
        fresh = (_Question(*asked) for asked in self.requests)
        try:
            while True:
                if not self.stop.wanted:
                    self._ask(fresh)
                elif not self._is_stopping:
                    self._give_up_waiting()
                if not self._under_way and (self._is_stopping or not self._again):
                    return
                yield self._wait()
        finally:
            self._cancel(only_waiting=False)

    # ---- asking ----

    def _ask(self, fresh: Iterator[_Question[Key]]) -> None:
        """Put questions to the engine, as many as may be under way."""
        while not self.stop.wanted and (question := self._next(fresh)) is not None:
            if self._engine is None:
                self._inbox = queue.SimpleQueue()  # what a dead engine said is of no use
                self._engine = self.engine_of()
            try:
                id = self._engine.submit(question.request, self._inbox)
            except EngineError as death:
                self._again.append(question)
                self._inbox.put(death)
                return
            question.n_asked += 1
            question.deltas.clear()
            self._under_way[id] = question
            self._n_tokens += len(question.request.tokens)

    def _next(self, fresh: Iterator[_Question[Key]]) -> _Question[Key] | None:
        """The next to ask, those asked least first; None while those under way need the room."""
        company = max((q.n_asked - 1 for q in self._under_way.values()), default=0)
        before = min((q.n_asked for q in self._again), default=0)
        attempt = max(
            company, before, min(self._crashes.n_in_a_row, len(MAX_IN_FLIGHT_BY_ATTEMPT) - 1)
        )
        if (
            len(self._under_way) >= MAX_IN_FLIGHT_BY_ATTEMPT[attempt]
            or self._n_tokens >= MAX_TOKENS_AHEAD
        ):
            return None
        for n, question in enumerate(self._again):
            if question.n_asked == before:
                return self._again.pop(n)
        return next(fresh, None)

    def _give_up_waiting(self) -> None:
        self._is_stopping = True
        self._cancel(only_waiting=True)

    def _cancel(self, *, only_waiting: bool) -> None:
        with contextlib.suppress(EngineError):
            for id in list(self._under_way):
                if self._engine is not None:
                    self._engine.cancel(id, only_waiting=only_waiting)

    # ---- waiting ----

    def _wait(self) -> list[Outcome[Key]]:
        """What has come by now; waits a moment where nothing has."""
        outcomes: list[Outcome[Key]] = []
        with contextlib.suppress(queue.Empty):
            message = self._inbox.get(timeout=WAKE_SECONDS)
            while True:
                if isinstance(message, EngineError):
                    return [*outcomes, *self._died(message)]
                outcomes += self._outcome(message)
                if len(outcomes) >= MAX_GROUP:
                    break
                message = self._inbox.get_nowait()
        return outcomes

    def _outcome(self, message: FromEngine) -> list[Outcome[Key]]:
        if not isinstance(message, (Delta, Failed)) or message.id not in self._under_way:
            return []
        question = self._under_way[message.id]
        if isinstance(message, Delta):
            question.deltas.append(message)
            if message.finish_reason is None:
                return []
        del self._under_way[message.id]
        self._n_tokens -= len(question.request.tokens)
        self._crashes.reset()
        if isinstance(message, Failed):
            said = f"{message.message} {message.hint}".strip()
            return [Outcome(question.key, code="refused", message=said)]
        if message.finish_reason == "cancelled":
            return []
        return [
            _checked(question, join_reasoning(question.deltas, question.markers, question.request))
        ]

    def _died(self, death: EngineError) -> list[Outcome[Key]]:
        """Bury the engine; what was under way waits to be asked again, or has been too often."""
        if self._engine is not None:
            self._engine.kill()
            self._engine = None
        self.n_deaths += 1
        lost = list(self._under_way.values())
        self._under_way.clear()
        self._n_tokens = 0
        self._crashes.add(death)
        self._again += [q for q in lost if q.n_asked < REQUEST_TRIES]
        message = f"The engine died {REQUEST_TRIES} times while it was asked this: {death.message}"
        given_up = [q for q in lost if q.n_asked >= REQUEST_TRIES]
        return [Outcome(q.key, code="engine_died", message=message) for q in given_up]
