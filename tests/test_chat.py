"""A conversation's rules, with a fake engine of a few lines at the seam."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import pytest

from localmoe.engine.protocol import Delta, Piece, Request, Timings, Usage
from localmoe.errors import PromptError
from localmoe.serving.chat import Chat, Model
from localmoe.serving.mistral import MistralFormat
from localmoe.serving.prompt import Message

FORMAT = MistralFormat("v1", bos=1, eos=2)


@dataclass
class FakeEngine:
    """Encodes a character as its code point; answers with texts that it is given, a token each."""

    answers: list[list[str]]
    stopped_by: str | None = None
    requests: list[Request] = field(default_factory=list)

    def tokenize(self, pieces: Sequence[Piece]) -> list[tuple[int, ...]]:
        return [tuple(map(ord, piece.text)) for piece in pieces]

    def generate(self, request: Request) -> Generator[Delta, None, None]:
        self.requests.append(request)
        words = self.answers.pop(0)
        for n, word in enumerate(words):
            yield Delta(1, text=word, tokens=(1000 + n,))
        usage, timings = Usage(len(request.tokens), len(words), 0), Timings(0, 0, 0)
        yield Delta(
            1, finish_reason="stop", stopped_by=self.stopped_by, usage=usage, timings=timings
        )


def chat_with(engine: FakeEngine, n_ctx: int = 1000) -> Chat:
    return Chat(Model(engine, FORMAT, n_ctx))


def test_the_next_prompt_begins_with_the_last_and_the_sampled_tokens() -> None:
    engine = FakeEngine([["He", "llo"], ["Bye"]])
    chat = chat_with(engine)
    list(chat.ask("one"))
    list(chat.ask("two"))
    first, second = (request.tokens for request in engine.requests)
    assert second[: len(first) + 3] == (*first, 1000, 1001, 2)
    assert [m.role for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1] == Message("assistant", "Hello", (1000, 1001))


def test_an_answer_left_early_keeps_what_came() -> None:
    chat = chat_with(FakeEngine([["He", "llo"]]))
    turn = chat.ask("one")
    assert next(turn).text == "He"
    turn.close()
    assert chat.messages[1] == Message("assistant", "He", (1000,))


def test_a_question_with_no_answer_is_taken_back() -> None:
    chat = chat_with(FakeEngine([["", "late"]]))
    turn = chat.ask("one")
    next(turn)
    turn.close()
    assert chat.messages == []


def test_an_answer_cut_at_a_stop_string_is_kept_as_text() -> None:
    chat = chat_with(FakeEngine([["cut"]], stopped_by="X"))
    list(chat.ask("one"))
    assert chat.messages[1] == Message("assistant", "cut", None)


def test_a_full_context_is_refused_and_nothing_is_lost() -> None:
    engine = FakeEngine([["short"]])
    chat = chat_with(engine, n_ctx=60)
    list(chat.ask("one"))
    with pytest.raises(PromptError, match="the context holds 60"):
        list(chat.ask("x" * 60))
    assert len(chat.messages) == 2


def test_clear_keeps_the_system_message() -> None:
    chat = chat_with(FakeEngine([["a"]]))
    chat.messages = [Message("system", "Be brief.")]
    list(chat.ask("one"))
    assert chat.n_tokens() > 0
    chat.clear()
    assert chat.messages == [Message("system", "Be brief.")]
    assert chat.n_tokens() == 0
