"""What comes from outside as messages: taken, or refused with a sentence that says where."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.api import Reply, conversation
from localmoe.batch.pending import PendingRequest
from localmoe.batch.requests import Defaults, request_of
from localmoe.batch.responses import answer_reply
from localmoe.chat.chat import AnswerOptions
from localmoe.chat.transcript import Transcript
from localmoe.cli.options import read_messages
from localmoe.cli.sessions import as_json_text
from localmoe.engine.protocol import Delta, Timings, Usage
from localmoe.errors import PromptError
from localmoe.prompt.messages import Message, check_conversation, parse_messages
from localmoe.prompt.reasoning import Answer

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
UNSAID = st.sampled_from([None, "", [], {}])
FIELDS = ["refusal", "tool_calls", "annotations", "audio", "function_call", "parsed", "images",
    "reasoning_content", "reasoning", "thinking", "name", "tool_call_id"]  # fmt: skip


def test_messages_are_taken_as_they_are() -> None:
    parsed = parse_messages(
        [{"role": "system", "content": ""}, USER, {"role": "assistant", "content": " \n"}, USER]
    )
    assert parsed == [
        Message("system", ""), Message("user", "Hi"), Message("assistant", " \n"),
        Message("user", "Hi"),
    ]  # fmt: skip


def test_parts_are_joined_as_the_reference_joins_them() -> None:
    parts = [{"type": "text", "text": text} for text in ("one", "", "two")]
    assert parse_messages([{"role": "user", "content": parts}])[0].content == "one\n\ntwo"


@given(st.dictionaries(st.sampled_from(FIELDS), UNSAID))
def test_null_and_empty_say_nothing(unsaid: dict[str, Any]) -> None:
    said = [{**unsaid, **USER}, {**unsaid, **ANSWER}, USER]
    assert parse_messages(said) == parse_messages([USER, ANSWER, USER])


@pytest.mark.parametrize(
    "notes",
    [
        {"id": "msg_1", "type": "message", "status": "completed", "annotations": [{"url": "x"}]},
        {"provider_specific_fields": {"refusal": None}, "finish_reason": "stop", "index": 0},
        {"content": [{"type": "output_text", "text": "Hello", "annotations": []}]},
        {"content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]},
        {"content": None, "refusal": "Hello"},
        {"content": [{"type": "refusal", "refusal": "Hello"}]},
        {"parsed": {"a": 1}, "executed_tools": [1], "weight": 1, "prefix": False},
    ],
)  # fmt: skip
def test_what_is_said_about_an_answer_says_nothing_to_a_model(notes: dict[str, Any]) -> None:
    parsed = parse_messages([USER, {**ANSWER, **notes}, {**USER, "name": "Ann"}])
    assert parsed == parse_messages([USER, ANSWER, USER])


@pytest.mark.parametrize(
    "said",
    [
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm.", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
        {"thinking": "Hm."},
        {"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello"}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
            {"type": "text", "text": "Hello"}]},
    ],
)  # fmt: skip
def test_what_was_thought_is_kept_apart_from_the_answer(said: dict[str, Any]) -> None:
    assert parse_messages([USER, {**ANSWER, **said}, USER])[1] == Message(
        "assistant", "Hello", thinking="Hm."
    )


def test_an_answer_of_which_nothing_came_is_taken() -> None:
    empty = Message("assistant", "", thinking="Hm.")
    said = [USER, {"role": "assistant", "content": "", "reasoning_content": "Hm."}, USER]
    assert parse_messages(said)[1] == empty
    said[1] = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    assert parse_messages(said)[1] == empty
    begun = [USER, {"role": "assistant", "content": ""}]
    assert parse_messages(begun) == conversation(begun) == parse_messages([USER])


def test_a_developer_is_the_system() -> None:
    said = [{"role": "developer", "content": "Be brief."}, USER]
    assert parse_messages(said)[0] == Message("system", "Be brief.")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "Messages must be a list, not null."),
        ({}, "Messages must be a list, not an object."),
        ("Hi", "Messages must be a list, not a string."),
        ([], "There is no message of the user to answer."),
        (["Hi"], "Message 1 is a string, not an object."),
        ([USER, 7], "Message 2 is a number, not an object."),
        ([{"content": "Hi"}], 'Message 1 has no "role".'),
        ([{"role": "user"}], 'Message 1 has no "content".'),
        ([{**USER, "nmae": "Ann"}], 'Message 1 has the key "nmae", which is not known.'),
        ([{**USER, "\x1b[31m": 1}], 'Message 1 has the key "\\x1b[31m", which is not known.'),
        ([{"role": None, "content": "Hi"}], 'The "role" of message 1 is null, not a string.'),
        ([{"role": "human", "content": "Hi"}], 'Message 1 has the role "human"'),
        ([{"role": "tool", "content": "Hi"}, USER], 'Message 1 has the role "tool"'),
        ([{"role": "user", "content": None}], "Message 1 (user) is empty."),
        ([USER, {"role": "assistant"}, USER], 'Message 2 has no "content".'),
        ([USER, {**ANSWER, "tool_calls": [{"id": "a"}]}, USER], 'Message 2 has "tool_calls".'),
        ([USER, {**ANSWER, "function_call": {"name": "f"}}, USER], 'has "function_call".'),
        ([USER, {**ANSWER, "audio": {"id": "a"}}, USER], 'Message 2 has "audio".'),
        ([{"role": "user", "content": True}], 'The "content" of message 1 is true or false'),
        ([{"role": "user", "content": ""}], "Message 1 (user) is empty."),
        ([{"role": "user", "content": []}], "Message 1 (user) is empty."),
        ([{"role": "user", "content": "a\ud800b"}], "Message 1 holds half of a surrogate pair at"),
        ([{"role": "user", "content": "a\0"}], "Message 1 holds a NUL character at character 2."),
        ([{"role": "system", "content": "Hi"}], "There is no message of the user to answer."),
        ([USER, {"role": "system", "content": "x"}], "Message 2, the last one, has the role"),
        ([{"role": "user", "content": ["x"]}], "Part 1 of message 1 is a string, not an object."),
        ([{"role": "user", "content": [{"type": "image"}]}], 'is of the type "image"; only text'),
        ([{"role": "user", "content": [{"text": "x"}]}], "Part 1 of message 1 is without a type"),
        ([{"role": "user", "content": [{"type": "text"}]}], 'The "text" of part 1 of message 1 is'),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}],
            'Part 1 of message 1 has the key "y", which is not known.',
        ),
    ],
)
def test_what_is_wrong_is_named(value: object, says: str) -> None:
    with pytest.raises(PromptError) as error:
        parse_messages(value)
    assert says in error.value.message
    assert error.value.hint
    assert error.value.message.isprintable()


def test_a_conversation_may_end_with_an_answer_that_goes_on() -> None:
    messages = [Message("user", "Hi"), Message("assistant", "Hel")]
    assert check_conversation(messages) == messages
    begun = {"role": "assistant", "content": "Hel", "prefix": True}
    assert parse_messages([USER, begun]) == messages


# ---- what we said ourselves ----

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9)
END = Delta(1, finish_reason="stop", usage=Usage(1, 1, 0), timings=Timings(0.1, 1.0, 1.0))


def echoes(answer: Answer) -> list[Any]:
    """An answer as each door gives it out: a batch's line, a reply, a session's export."""
    ask = PendingRequest(1, "a", b"key", True, (1,), AnswerOptions())
    line = json.loads(answer_reply(ask, answer, "demo").raw)
    kept = Transcript(messages=[Message("user", "Hi"), answer.message()])
    session = json.loads(as_json_text("mine", kept))
    return [
        line["response"]["body"]["choices"][0]["message"],
        Reply(answer),
        session["messages"][1],
    ]


@given(texts, texts)
def test_every_answer_of_ours_is_taken_back_at_every_door(text: str, thinking: str) -> None:
    answer = Answer(text, thinking, last=END)
    for echo in echoes(answer):
        said = [USER, echo, USER]
        assert [m.content for m in parse_messages(said)] == ["Hi", text, "Hi"]
        assert len(request_of({"messages": said}, Defaults()).messages) == 3
        assert conversation(said)[1].content == text
        with TemporaryDirectory() as folder:
            path = Path(folder, "chat.json")
            for whole in (said, {"name": "mine", "model": "demo", "messages": said}):
                path.write_text(json.dumps(whole), "utf-8")
                assert parse_messages(read_messages(str(path)))[1].content == text
