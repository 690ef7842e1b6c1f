"""A conversation's rules, with a fake engine of a few lines at the seam, and with the real one."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.chat.chat import AnswerOptions, Chat, ChatModel
from localmoe.chat.context_window import SUMMARIZE
from localmoe.config.environment import engine_environment
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Delta, Placement, Request, Sampling, TextPiece, Timings, Usage
from localmoe.errors import EngineError, PromptError, RequestError
from localmoe.gguf.demo import DEMO
from localmoe.prompt.messages import Message
from localmoe.prompt.mistral import MistralFormat

FORMAT = MistralFormat("v1", bos=1, eos=2)


@dataclass
class FakeEngine:
    """Encodes a character as its code point; answers with texts that it is given, a token each."""

    answers: list[list[str | Delta]]
    stopped_by: str | None = None
    requests: list[Request] = field(default_factory=list)

    def tokenize(self, pieces: Sequence[TextPiece]) -> list[tuple[int, ...]]:
        return [tuple(map(ord, piece.text)) for piece in pieces]

    def generate(self, request: Request) -> Generator[Delta, None, None]:
        self.requests.append(request)
        words = self.answers.pop(0)
        for n, word in enumerate(words):
            yield word if isinstance(word, Delta) else Delta(1, text=word, tokens=(1000 + n,))
        usage, timings = Usage(len(request.tokens), len(words), 0), Timings(0, 0, 0)
        yield Delta(
            1, finish_reason="stop", stopped_by=self.stopped_by, usage=usage, timings=timings
        )


def chat_with(engine: FakeEngine, n_ctx: int = 1000) -> Chat:
    return Chat(ChatModel(engine, FORMAT, n_ctx))


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


# ---- a turn that is left, taken back, asked again ----


def test_left_behind_a_held_back_stop_string_the_text_counts() -> None:
    """A token is sampled, but its text may be a stop string's beginning, and never came."""
    chat = chat_with(
        FakeEngine([[Delta(1, "He", (7,)), Delta(1, "", (8,), has_pending_text=True)]])
    )
    turn = chat.ask("one")
    next(turn)
    next(turn)
    turn.close()
    assert chat.messages[1] == Message("assistant", "He", None)


def test_thinking_is_kept_for_show_and_out_of_the_prompt() -> None:
    thought = Delta(1, "Hm", (7,), kind="thinking")
    engine = FakeEngine([[thought, "Yes"], ["ok"]])
    chat = chat_with(engine)
    list(chat.ask("one"))
    assert chat.messages[1] == Message("assistant", "Yes", (1001,), "Hm")
    list(chat.ask("two"))
    assert 7 not in engine.requests[1].tokens


def test_an_answer_of_thinking_alone_is_taken_back_and_said() -> None:
    notes: list[str] = []
    chat = chat_with(FakeEngine([[Delta(1, "Hm", (7,), kind="thinking")]]))
    chat.on_note = notes.append
    list(chat.ask("one"))
    assert chat.messages == []
    assert "still thinking" in notes[0]


def test_undo_gives_the_question_back() -> None:
    chat = chat_with(FakeEngine([["a"], ["b"]]))
    chat.set_system("Be brief.")
    list(chat.ask("one"))
    list(chat.ask("two"))
    assert chat.undo() == Message("user", "two")
    assert [m.content for m in chat.messages] == ["Be brief.", "one", "a"]
    assert chat.undo() == Message("user", "one")
    assert chat.undo() is None
    assert chat.messages == [Message("system", "Be brief.")]


def test_regenerate_asks_the_same_with_another_draw() -> None:
    engine = FakeEngine([["a"], ["b"], ["c"]])
    chat = chat_with(engine)
    with pytest.raises(PromptError, match="Nothing was asked"):
        next(chat.regenerate())
    list(chat.ask("one", seed=5))
    list(chat.regenerate())
    assert [m.content for m in chat.messages] == ["one", "b"]
    list(chat.regenerate(seed=9))
    assert len({request.tokens for request in engine.requests}) == 1
    assert [request.sampling.seed for request in engine.requests] == [5, None, 9]


def test_regenerating_nothing_leaves_the_answer_that_was() -> None:
    chat = chat_with(FakeEngine([["a"], ["b"], ["", "late"]]))
    list(chat.ask("one"))
    list(chat.ask("one"))
    before = list(chat.messages)
    turn = chat.regenerate()
    next(turn)
    turn.close()
    assert chat.messages == before


def test_another_question_takes_the_place_of_the_last_or_leaves_it() -> None:
    engine = FakeEngine([["a"], ["b"], ["c"], ["", "late"], ["d"]])
    chat = chat_with(engine, n_ctx=120)
    with pytest.raises(PromptError, match="Nothing was asked"):
        next(chat.replace_last("two"))
    list(chat.ask("zero"))
    list(chat.ask("one"))
    list(chat.replace_last("two"))
    assert [m.content for m in chat.messages] == ["zero", "a", "two", "c"]
    before = list(chat.messages)
    turn = chat.replace_last("three")
    next(turn)
    turn.close()
    assert chat.messages == before
    with pytest.raises(PromptError, match="The message has"):
        list(chat.replace_last("x" * 120))
    assert chat.messages == before
    chat.model = replace(chat.model, engine=Dying([[]]))
    with pytest.raises(EngineError):
        list(chat.replace_last("four"))
    assert chat.messages == before


@pytest.mark.parametrize("on_full", ["drop", "summarize", "stop"])
def test_what_is_said_to_be_free_can_be_asked(on_full: Any) -> None:
    chat, engine, _ = long_chat(400, 4, on_full=on_full)
    n_free = chat.n_free()
    assert (n_free > 280) is (on_full != "stop")  # where turns may leave, they are not in the way
    engine.answers = [["sum"], ["a"]] if on_full == "summarize" else [["a"]]
    list(chat.ask("x" * n_free + "and a question of 31 characters"))
    assert chat.messages[-1].content == "a"
    chat.set_system("x" * 400)
    assert chat.n_free() == 0


def test_the_system_message_is_one_and_the_first() -> None:
    chat = chat_with(FakeEngine([["a"]]))
    list(chat.ask("one"))
    chat.set_system("Be brief.")
    chat.set_system("Be kind.")
    assert [m.role for m in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[0].content == "Be kind."
    chat.set_system(None)
    assert chat.messages[0].role == "user"


def test_a_question_that_was_never_answered_gives_way_or_is_asked_again() -> None:
    engine = FakeEngine([["b"], ["c"]])
    chat = chat_with(engine)
    chat.messages = [Message("user", "one"), Message("assistant", "a"), Message("user", "broken")]
    list(chat.regenerate())
    assert [m.content for m in chat.messages] == ["one", "a", "broken", "b"]
    chat.messages[-1:] = []
    list(chat.ask("two"))
    assert "broken" not in shown(engine.requests[-1])
    assert [m.content for m in chat.messages] == ["one", "a", "two", "c"]


# ---- engines that die ----


class Dying(FakeEngine):
    """Dies after the last word of every answer."""

    def generate(self, request: Request) -> Generator[Delta, None, None]:
        for delta in FakeEngine.generate(self, request):
            if delta.finish_reason:
                raise EngineError("The engine was killed.")
            yield delta


class Refusing(FakeEngine):
    def generate(self, request: Request) -> Generator[Delta, None, None]:
        raise RequestError("The grammar is empty.")


def test_a_question_is_asked_again_twice_and_then_kept() -> None:
    notes: list[str] = []
    engine = Dying([["He"], ["Hel"], ["Hell"]])
    chat = chat_with(engine)
    chat.on_note = notes.append
    chat.revive = lambda error: chat.model
    with pytest.raises(EngineError, match="killed"):
        list(chat.ask("one"))
    assert len(engine.requests) == 3
    assert len(notes) == 2
    assert chat.messages[1].content == "Hell"  # of the last alone
    assert chat.undo() == Message("user", "one")


def test_without_another_engine_the_question_is_held() -> None:
    chat = chat_with(Dying([[]]))
    with pytest.raises(EngineError):
        list(chat.ask("one"))
    assert chat.messages == []
    engine = FakeEngine([["Hello"]])
    chat.model = replace(chat.model, engine=engine)
    list(chat.regenerate())
    assert [m.content for m in chat.messages] == ["one", "Hello"]


def test_a_refused_request_is_no_death() -> None:
    chat = chat_with(Refusing([]))
    chat.revive = lambda error: pytest.fail("revived")
    with pytest.raises(RequestError):
        list(chat.ask("one"))
    assert chat.undo() is None


# ---- a full context ----


def long_chat(n_ctx: int, n_turns: int, **options: Any) -> tuple[Chat, FakeEngine, list[str]]:
    """Turns of 20 characters and a fake engine that answers each with one token."""
    engine, notes = FakeEngine([[f"a{n}"] for n in range(n_turns)]), list[str]()
    chat = Chat(ChatModel(engine, FORMAT, n_ctx), on_note=notes.append, **options)
    chat.set_system("SYS")
    for n in range(n_turns):
        list(chat.ask(f"question number {n:04}"))
    return chat, engine, notes


def shown(request: Request) -> str:
    return "".join(chr(token) for token in request.tokens if 2 < token < 1000)


def test_the_oldest_turns_leave_whole_down_to_three_quarters() -> None:
    chat, engine, notes = long_chat(400, 40)
    sizes = [len(request.tokens) for request in engine.requests]
    assert max(sizes) <= 400 - 400 // 8
    drops = [after for before, after in pairwise(sizes) if after < before]
    assert drops
    assert max(drops) <= 300
    assert len(drops) == len(notes) < 20  # not at every turn
    assert len(chat.messages) == 81  # nothing of what was said is gone
    for request in engine.requests:
        text = shown(request)
        assert "SYS" in text
        assert text.count("question") == text.count("[INST]") == text.count("[/INST]")
    assert re.fullmatch(
        r"\d oldest turns \(\d+ tokens\) no longer fit and are left out\.", notes[0]
    )
    kept = len(chat.messages) - 1 - chat.n_dropped
    assert chat.prompted()[1:] == chat.messages[-kept:]
    assert chat.n_tokens() <= 400


def test_what_left_is_counted_in_tokens() -> None:
    notes: list[str] = []
    engine = FakeEngine([["a"]] * 40)
    chat = Chat(ChatModel(engine, FORMAT, 400), on_note=notes.append)
    while not notes:
        before = list(chat.messages)
        list(chat.ask("question"))
    whole = FORMAT.encode([*before, Message("user", "question")], engine).tokens
    n_left = len(whole) - len(engine.requests[-1].tokens)
    assert f"({n_left} tokens)" in notes[0]
    assert f"{chat.n_dropped // 2} oldest turns" in notes[0]


def test_stop_refuses_and_names_the_ways_out() -> None:
    engine = FakeEngine([["a"]] * 20)
    chat = Chat(ChatModel(engine, FORMAT, 400), on_full="stop")
    questions = (delta for n in range(20) for delta in chat.ask(f"question number {n:04}"))
    with pytest.raises(PromptError) as refused:
        list(questions)
    assert "the context holds 400" in refused.value.message
    for way in ("/clear", "--on-full drop", "summarize", "-c 800"):
        assert way in refused.value.hint
    n_messages = len(chat.messages)
    assert n_messages == 2 * len(engine.requests)
    chat.on_full = "drop"
    list(chat.ask("question number 9999"))
    assert len(chat.messages) == n_messages + 2


@pytest.mark.parametrize("on_full", ["drop", "stop", "summarize"])
def test_a_message_too_long_by_itself_is_refused_and_nothing_changes(on_full: Any) -> None:
    chat, engine, notes = long_chat(400, 3, on_full=on_full)
    before, n_asked = list(chat.messages), len(engine.requests)
    with pytest.raises(PromptError, match="The message and the system prompt have .* holds 400"):
        list(chat.ask("x" * 380))
    assert (chat.messages, chat.n_dropped, notes) == (before, 0, [])
    assert len(engine.requests) == n_asked
    chat.clear()
    chat.set_system(None)
    with pytest.raises(PromptError, match="The message has"):
        list(chat.ask("x" * 380))


def test_a_long_message_may_take_most_of_the_context() -> None:
    engine = FakeEngine([["a"], ["b"], ["c"]])
    chat = Chat(ChatModel(engine, FORMAT, 400))
    list(chat.ask("one"))
    list(chat.ask("x" * 340))
    assert chat.n_dropped == 2
    assert "one" not in shown(engine.requests[-1])
    assert chat.undo() is not None
    assert chat.n_dropped == 0  # nothing else was left
    list(chat.ask("two"))
    assert "one" in shown(engine.requests[-1])


def test_an_answer_that_fills_the_context_makes_the_next_turn_drop() -> None:
    chat, engine, notes = long_chat(400, 5)
    engine.answers = [["y" * 10] * 150, ["ok"]]
    list(chat.ask("a long one"))
    assert chat.n_tokens() > 400 - 400 // 8
    list(chat.ask("next"))
    assert len(notes) == 1
    assert len(engine.requests[-1].tokens) <= 300


def test_a_summary_takes_the_place_of_what_leaves() -> None:
    engine = FakeEngine([])
    notes: list[str] = []
    chat = Chat(ChatModel(engine, FORMAT, 1600), on_full="summarize", on_note=notes.append)
    chat.set_system("SYS")
    n = 0
    while not notes:
        engine.answers = [[f"a{n}"], [f"b{n}"]]
        list(chat.ask(f"question number {n:04}"))
        n += 1
    told, asked = engine.requests[-2:]
    before = engine.requests[-3]
    n_common = len(os.path.commonprefix([shown(told), shown(before)]))
    assert n_common > len(shown(told)) - len(SUMMARIZE) - 30  # all but the request is held still
    assert told.sampling.temperature == 0
    assert told.max_tokens == 100
    at = 1 + chat.n_dropped
    summary = chat.messages[at : at + 2]
    assert summary[0].content == SUMMARIZE
    assert summary[1] == Message("assistant", f"a{n - 1}", (1000,))
    assert 1000 in asked.tokens
    assert shown(asked).startswith(f"[INST] SYS\n\n{SUMMARIZE}")
    assert len(asked.tokens) <= 1300  # a request of 160 characters is 160 tokens here
    assert "the model summarizes them" in notes[0]


def test_undo_goes_past_a_summary() -> None:
    chat = chat_with(FakeEngine([]))
    turn = [Message("user", SUMMARIZE), Message("assistant", "In short.")]
    old = [Message("user", "one"), Message("assistant", "a")]
    chat.messages, chat.n_dropped = [*old, *turn], 2
    assert chat.undo() == Message("user", "one")
    assert (chat.messages, chat.n_dropped) == ([], 0)


class Wordless(FakeEngine):
    """Has nothing to sum up."""

    def generate(self, request: Request) -> Generator[Delta, None, None]:
        self.answers = [[] if shown(request).endswith(f"{SUMMARIZE} [/INST]") else ["b"]]
        return FakeEngine.generate(self, request)


def test_where_no_summary_comes_the_turns_are_left_out_all_the_same() -> None:
    notes: list[str] = []
    chat = Chat(ChatModel(Wordless([]), FORMAT, 1600), on_full="summarize", on_note=notes.append)
    while not notes:
        list(chat.ask("question"))
    assert notes[-1].startswith("No summary came of it; ")
    assert chat.n_dropped > 0
    assert all(m.content != SUMMARIZE for m in chat.messages)


@given(st.data(), st.sampled_from(["drop", "summarize"]), st.integers(100, 2000))
def test_whatever_is_said_it_fits_or_is_refused(data: Any, on_full: Any, n_ctx: int) -> None:
    engine = FakeEngine([])
    chat = Chat(ChatModel(engine, FORMAT, n_ctx), on_full=on_full)
    chat.set_system(data.draw(st.sampled_from([None, "SYS"])))
    n_said = 0
    for _ in range(data.draw(st.integers(1, 12))):
        words = ["w"] * data.draw(st.integers(1, n_ctx // 2))
        engine.answers = [words, words]
        before = len(chat.messages)
        try:
            list(chat.ask("x" * data.draw(st.integers(1, n_ctx))))
            n_said += 2
        except PromptError:
            assert len(chat.messages) == before
    assert all(len(request.tokens) < n_ctx for request in engine.requests)
    own = [m for m in chat.messages if m.role == "user" and m.content != SUMMARIZE]
    assert 2 * len(own) == n_said
    assert all(m.role == "system" for m in chat.prompted()[: len(chat.prompted()) % 2])


# ---- the real engine ----


@pytest.fixture(scope="module")
def demo() -> Iterator[ChatModel]:
    with EngineProcess(engine_environment()) as engine:
        engine.load(str(DEMO), Placement(n_threads=2, n_ctx=256))
        yield ChatModel(engine, FORMAT, 256)


@pytest.mark.parametrize("on_full", ["drop", "summarize"])
def test_an_unchanged_beginning_is_not_computed_again(demo: ChatModel, on_full: Any) -> None:
    notes: list[str] = []
    chat = Chat(demo, AnswerOptions(Sampling(seed=1), 24), on_full=on_full, on_note=notes.append)
    for n in range(14):
        n_notes, held = len(notes), chat.prompted()
        *_, last = chat.ask(f"Hi! My name is Ada {n}. What do you like the best of all?")
        assert last.usage
        if len(notes) == n_notes and held:
            n_new = last.usage.prompt_tokens - last.usage.cached_tokens
            assert n_new < 30  # the question alone
    assert len(notes) >= 2
    assert len([m for m in chat.messages if m.role == "user" and m.content != SUMMARIZE]) == 14


def test_the_longest_answer_ends_with_length_and_the_chat_goes_on(demo: ChatModel) -> None:
    notes: list[str] = []
    wild = Sampling(temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, seed=3)
    chat = Chat(demo, AnswerOptions(wild), on_note=notes.append)
    for n in range(12):
        *_, last = chat.ask(f"Tell me everything that you know, part {n}.")
        assert last.usage
        if last.finish_reason == "length":
            break
    assert last.finish_reason == "length"
    chat.options = AnswerOptions(Sampling(temperature=0))
    list(chat.ask("Hi!"))
    assert notes
    assert chat.messages[-2].content == "Hi!"
