"""A conversation: its history with the tokens of every answer, and one turn at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..engine.protocol import Delta, Piece, Request, Sampling
from ..errors import PromptError
from .prompt import Message, Prompt, PromptFormat


class Engine(Protocol):
    """What a conversation needs of an engine; a real one is engine.client.Engine."""

    def tokenize(self, pieces: Sequence[Piece]) -> list[tuple[int, ...]]: ...

    def generate(self, request: Request) -> Generator[Delta, None, None]: ...


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How answers are asked for: sampling, at most how many tokens, where to stop."""

    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be talked to: an engine that has it loaded, its format, its room.

    `n_ctx` is in tokens, for a conversation and the answer to it. `on_answered` is told the last
    delta of every answer.
    """

    engine: Engine
    format: PromptFormat
    n_ctx: int
    on_answered: Callable[[Delta], None] | None = None

    def encode(self, messages: Sequence[Message]) -> Prompt:
        """The prompt of a conversation. Raises PromptError where it leaves no room to answer."""
        prompt = self.format.encode(messages, self.engine)
        n_prompt = len(prompt.tokens)
        if n_prompt >= self.n_ctx:
            raise PromptError(
                f"The conversation has {n_prompt} tokens; the context holds {self.n_ctx}, "
                "the answer included.",
                f"Begin anew (/clear in a chat), or ask for more room: -c {2 * n_prompt}.",
            )
        return prompt

    def answer(self, prompt: Prompt, options: AnswerOptions) -> Generator[Delta, None, None]:
        """Generate after a prompt; the last delta has the finish reason."""
        request = Request(
            tokens=prompt.tokens,
            sampling=options.sampling,
            max_tokens=options.max_tokens,
            stop=options.stop,
            starts_text=self.format.answers_start_text,
        )
        with closing(self.engine.generate(request)) as deltas:
            for delta in deltas:
                if delta.finish_reason and self.on_answered:
                    self.on_answered(delta)
                yield delta


@dataclass(slots=True)
class Answer:
    """An answer as it grows: its text, the tokens that were sampled for it, and its last delta."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        if delta.finish_reason:
            self.last = delta

    def message(self) -> Message:
        """The answer as a turn of the conversation.

        Cut at a stop string, its text is less than its tokens say; then the text counts.
        """
        cut = self.last is not None and self.last.stopped_by is not None
        return Message("assistant", self.text, None if cut else self.tokens)


@dataclass(slots=True)
class Chat:
    """A conversation with a model. `messages` holds what was said, the system message first."""

    model: Model
    options: AnswerOptions = AnswerOptions()
    messages: list[Message] = field(default_factory=list)

    def ask(self, text: str, seed: int | None = None) -> Generator[Delta, None, None]:
        """One turn. Left early (a break, Ctrl-C), the answer keeps what came of it.

        Where nothing came, or the prompt can't be made, the question is taken back.
        """
        question = Message("user", text)
        prompt = self.model.encode([*self.messages, question])
        options = self.options
        if seed is not None:
            options = replace(options, sampling=replace(options.sampling, seed=seed))
        answer = Answer()
        try:
            for delta in self.model.answer(prompt, options):
                answer.add(delta)
                yield delta
        finally:
            if answer.text:
                self.messages += [question, answer.message()]

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [m for m in self.messages if m.role == "system"]

    def n_tokens(self) -> int:
        """How much of the context the conversation takes by now."""
        if not any(m.role == "user" for m in self.messages):
            return 0
        return len(self.model.format.encode(self.messages, self.model.engine).tokens)
