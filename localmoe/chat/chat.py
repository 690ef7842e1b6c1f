"""A conversation: its history with the tokens of every answer, and one turn at a time.

Nothing of it is lost in silence: turns that no longer fit are left out whole, and said; an engine
that dies is followed by another one, which is asked the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from ..engine.interfaces import Engine
from ..engine.protocol import Delta, Request, Sampling
from ..engine.retry import CHAT_ENCODE_TRIES, retry_on_crash, stream_with_retry
from ..errors import EngineError, LocalMoeError, PromptError, RequestError
from ..prompt.messages import Message, Prompt, PromptFormat
from ..prompt.reasoning import Answer, ReasoningMarkers, nothing_came, split_reasoning
from ..structured.check import with_held_schema
from .context_window import (
    LEAST_ANSWER,
    SUMMARIZE,
    SUMMARY_SHARE,
    ContextBudget,
    DroppedTurns,
    cut,
    full,
    system_and_turns,
    too_long,
)

OnFull = Literal["stop", "drop", "summarize"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How answers are asked for: sampling, at most how many tokens, where to stop."""

    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatModel:
    """A model that can be talked to: an engine that has it loaded, its format, its room.

    `n_ctx` is in tokens, for a conversation and the answer to it. `on_answered` is told the last
    delta of every answer. `reasoning_markers` part thinking from answer, where the model has such
    tokens.
    """

    engine: Engine
    format: PromptFormat
    n_ctx: int
    on_answered: Callable[[Delta], None] | None = None
    reasoning_markers: ReasoningMarkers | None = None

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """The prompt of a conversation. Raises PromptError where it leaves no room to answer."""
        prompt = self.format.encode(messages, self.engine)
        n_prompt = len(prompt.tokens)
        if n_prompt >= self.n_ctx:
            raise PromptError(
                f"The conversation has {n_prompt} tokens; the context holds {self.n_ctx}, "
                "the answer included.",
                f"Shorten it, or ask for more room: -c {2 * n_prompt}.",
            )
        return prompt

    def answer(self, prompt: Prompt, options: AnswerOptions) -> Generator[Delta, None, None]:
        """Generate after a prompt; the last delta has the finish reason."""
        reasoning_markers = self.reasoning_markers
        request = Request(
            tokens=prompt.tokens,
            sampling=with_held_schema(options.sampling),
            max_tokens=options.max_tokens,
            stop=options.stop,
            strip_leading_space=self.format.answers_start_text and not prompt.is_begun,
            reasoning_tokens=reasoning_markers.ids if reasoning_markers else (),
        )
        with closing(self.engine.generate(request)) as deltas:
            for delta in split_reasoning(deltas, reasoning_markers, request):
                if delta.finish_reason and self.on_answered:
                    self.on_answered(delta)
                yield delta


@dataclass(slots=True)
class Chat:
    """A conversation with a model.

    `messages` holds everything that was said, the system message first; the first `n_dropped` after
    the system's no longer go into the prompt. `on_full` says what happens when the next turn does
    not fit: the oldest turns go out ("drop"), a summary by the model takes their place, or nothing
    more is asked ("stop"). `on_note` is told what a person should know, in sentences. `revive`
    gives a model in a new engine where the old one died, or raises LocalMoeError.
    """

    model: ChatModel
    options: AnswerOptions = AnswerOptions()
    messages: list[Message] = field(default_factory=list)
    n_dropped: int = 0
    on_full: OnFull = "drop"
    on_note: Callable[[str], None] | None = None
    revive: Callable[[EngineError], ChatModel] | None = None
    _unanswered: Message | None = field(default=None, init=False, repr=False)

    def ask(self, text: str, seed: int | None = None) -> Generator[Delta, None, None]:
        """One turn. Left early (a break, Ctrl-C), the answer keeps what came of it.

        Where nothing came, or the prompt can't be made, the question is taken back. Where no engine
        could be had to answer it, `regenerate` asks it again and `undo` gives it back.
        """
        options = self.options
        if seed is not None:
            options = replace(options, sampling=replace(options.sampling, seed=seed))
        yield from self._turn(Message("user", text), options)

    def regenerate(self, seed: int | None = None) -> Generator[Delta, None, None]:
        """The last question, answered anew; the answer that was, where nothing comes.

        Without a seed it is another draw, whatever seed the conversation has. Raises PromptError
        where nothing was asked yet.
        """
        options = replace(self.options, sampling=replace(self.options.sampling, seed=seed))
        yield from self._instead(self._take_last, lambda question: question, options)

    def replace_last(self, text: str) -> Generator[Delta, None, None]:
        """Another question in the place of the last one; that and its answer, where nothing comes.

        Raises PromptError where nothing was asked yet.
        """
        yield from self._instead(self.undo, lambda _: Message("user", text), self.options)

    def undo(self) -> Message | None:
        """Take the last question and its answer back; gives the question, None where there is none.

        Turns that were left out come back where nothing else is left.
        """
        question = self._take_last()
        while question is not None and question.content == SUMMARIZE:
            self.n_dropped = 0
            question = self._take_last()
        if self.n_dropped >= len(system_and_turns(self.messages)[1]):
            self.n_dropped = 0
        return question

    def set_system(self, text: str | None) -> None:
        """Another system message, or none, for all that follows."""
        _, turns = system_and_turns(self.messages)
        self.messages = ([Message("system", text)] if text else []) + turns

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [m for m in self.messages if m.role == "system"]
        self.n_dropped, self._unanswered = 0, None

    def n_tokens(self) -> int:
        """How much of the context the conversation takes by now."""
        if not any(m.role == "user" for m in self.messages):
            return 0
        return len(self._living(lambda: self._encode(self.prompted())).tokens)

    def n_free(self) -> int:
        """How many tokens the next question may well have, with room left to answer it.

        Where turns may leave, no more than the system message is in its way.
        """
        stays = self.prompted() if self.on_full == "stop" else system_and_turns(self.messages)[0]
        asked = [*answered(stays), Message("user", "?")]
        n_taken = len(self._living(lambda: self._encode(asked)).tokens)
        return max(
            0, self.model.n_ctx - n_taken - ContextBudget(self.model.n_ctx).n_answer - LEAST_ANSWER
        )

    # ---- a turn ----

    def _turn(self, question: Message, options: AnswerOptions) -> Generator[Delta, None, None]:
        self._unanswered = None
        answer = Answer()

        def begin() -> Generator[Delta, None, None]:
            return self.model.answer(self._fitted(question), options)

        try:
            for delta in stream_with_retry(begin, self._come_back):
                answer.add(delta)
                yield delta
        except (PromptError, RequestError):
            raise
        except LocalMoeError:
            self._unanswered = None if answer.text else question
            raise
        finally:
            if answer.text:
                self.messages = [*answered(self.messages), question, answer.message()]
        if not answer.text:
            self._note(nothing_came(answer, "; the question is taken back"))

    def _instead(
        self,
        take: Callable[[], Message | None],
        another: Callable[[Message], Message],
        options: AnswerOptions,
    ) -> Generator[Delta, None, None]:
        """A turn in the place of the last one, which `take` takes back; that, where nothing comes.

        Raises PromptError where nothing was asked yet.
        """
        before = list(self.messages), self.n_dropped, self._unanswered
        taken = take()
        if taken is None:
            raise PromptError("Nothing was asked yet.", "Ask something first.")
        question = another(taken)
        try:
            yield from self._turn(question, options)
        finally:
            if not any(message is question for message in self.messages):
                self.messages, self.n_dropped, self._unanswered = before

    def _take_last(self) -> Message | None:
        """The last question, out of the conversation with all that followed it."""
        if question := self._unanswered:
            self._unanswered = None
            return question
        asked = [n for n, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            return None
        question = self.messages[asked[-1]]
        del self.messages[asked[-1] :]
        return question

    def _note(self, sentence: str) -> None:
        if self.on_note:
            self.on_note(sentence)

    # ---- the engine ----

    def _come_back(self, error: EngineError, has_begun: bool = False) -> None:
        """Go on in a new engine. Raises LocalMoeError where there is none to be had."""
        if self.revive is None:
            raise error
        goes_on = " The answer begins anew." if has_begun else ""
        self._note(f"{error.message} It is started again.{goes_on}")
        n_ctx = self.model.n_ctx
        self.model = self.revive(error)
        if self.model.n_ctx < n_ctx:
            self._note(f"The context has {self.model.n_ctx:,} tokens now; it had {n_ctx:,}.")

    def _living(self, use: Callable[[], T]) -> T:
        """Uses the engine; if it is found dead, the one that takes its place."""
        return retry_on_crash(use, self._come_back, CHAT_ENCODE_TRIES)

    # ---- the context ----

    def _encode(self, messages: Sequence[Message]) -> Prompt:
        return self.model.format.encode(messages, self.model.engine)

    def _room(self) -> ContextBudget:
        n_ctx = self.model.n_ctx
        n_summary = n_ctx // SUMMARY_SHARE if self.on_full == "summarize" else 0
        return ContextBudget(n_ctx, self.options.max_tokens, n_summary)

    def prompted(self, question: Message | None = None) -> list[Message]:
        """The messages that go into the prompt, with a question that is to be asked."""
        system, turns = system_and_turns(self.messages)
        kept = turns[self.n_dropped :]
        return [*system, *(answered(kept) if question else kept), *([question] if question else [])]

    def _fitted(self, question: Message) -> Prompt:
        """The prompt of the next turn; the oldest turns leave where they must. Raises PromptError.

        Where it can't be made to fit, nothing has changed.
        """
        room = self._room()
        system, turns = system_and_turns(self.prompted(question))
        prompt = self._encode([*system, *turns])
        if room.fits(prompt):
            return prompt
        if len(turns) == 1:
            if room.fits_barely(prompt):
                return prompt
            raise too_long(len(prompt.tokens), room, alone=not system)
        leaving = cut(self._encode, system, turns, prompt, room)
        if self.on_full == "stop":
            raise full(len(prompt.tokens), room)
        if self.on_full == "summarize":
            return self._summarized(question, leaving, [*system, *turns[: leaving.n_messages]])
        self.n_dropped += leaving.n_messages
        self._note(f"{leaving.turns} and {are(leaving)} left out.")
        return leaving.prompt

    def _summarized(self, question: Message, leaving: DroppedTurns, told: list[Message]) -> Prompt:
        """Put the model's own summary where turns leave; where that can't be, just leave them out.

        `told` is the beginning of the conversation up to where they end. The engine holds it still,
        and only the request and the summary are computed. The summary is a turn of its own.
        """
        self._note(f"{leaving.turns}; the model summarizes {them(leaving)}.")
        summary = self._summary(told)
        system, turns = system_and_turns(self.messages)
        at = self.n_dropped + leaving.n_messages
        before = self.messages, self.n_dropped
        self.n_dropped = at
        if summary is not None:
            turn = [Message("user", SUMMARIZE), summary]
            self.messages = [*system, *turns[:at], *turn, *turns[at:]]
            prompt = self._encode(self.prompted(question))
            if self._room().fits(prompt):
                return prompt
        self.messages = before[0]
        self._note(f"No summary came of it; {leaving.turns} and {are(leaving)} left out.")
        return leaving.prompt

    def _summary(self, told: list[Message]) -> Message | None:
        """What the model says when it is asked to sum up; None where that came to nothing."""
        prompt = self._encode([*told, Message("user", SUMMARIZE)])
        n_most = min(self.model.n_ctx // SUMMARY_SHARE, self.model.n_ctx - len(prompt.tokens))
        if n_most < 1:
            return None
        sampling = replace(self.options.sampling, temperature=0.0, grammar=None, json_schema=None)
        answer = Answer()
        for delta in self.model.answer(prompt, AnswerOptions(sampling, n_most)):
            answer.add(delta)
        return answer.message() if answer.text else None


def answered(messages: Sequence[Message]) -> list[Message]:
    """A conversation without questions at its end that have no answer, as a session has that broke
    off: the next question takes their place."""
    said = list(messages)
    while said and said[-1].role == "user":
        said.pop()
    return said


def are(leaving: DroppedTurns) -> str:
    """The verb for some turns."""
    return "is" if leaving.n_turns == 1 else "are"


def them(leaving: DroppedTurns) -> str:
    """The pronoun for some turns."""
    return "it" if leaving.n_turns == 1 else "them"
