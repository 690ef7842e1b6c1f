"""What comes from outside as messages: taken, or refused with a sentence that says where."""

from __future__ import annotations

import pytest

from localmoe.errors import PromptError
from localmoe.prompt.messages import Message, check_conversation, parse_messages

USER = {"role": "user", "content": "Hi"}


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
        ([{**USER, "name": "Ann"}], 'Message 1 has the key "name", which is not known.'),
        ([{**USER, "\x1b[31m": 1}], 'Message 1 has the key "\\x1b[31m", which is not known.'),
        ([{"role": None, "content": "Hi"}], 'The "role" of message 1 is null, not a string.'),
        ([{"role": "human", "content": "Hi"}], 'Message 1 has the role "human"'),
        ([{"role": "tool", "content": "Hi"}, USER], 'Message 1 has the role "tool"'),
        ([{"role": "user", "content": None}], 'The "content" of message 1 is null, not text.'),
        ([{"role": "user", "content": True}], 'The "content" of message 1 is true or false'),
        ([{"role": "user", "content": ""}], "Message 1 (user) is empty."),
        ([{"role": "user", "content": []}], "Message 1 (user) is empty."),
        ([USER, {"role": "assistant", "content": ""}, USER], "Message 2 (assistant) is empty."),
        ([{"role": "user", "content": "a\ud800b"}], "Message 1 holds half of a surrogate pair at"),
        ([{"role": "user", "content": "a\0"}], "Message 1 holds a NUL character at character 2."),
        ([{"role": "system", "content": "Hi"}], "There is no message of the user to answer."),
        ([USER, {"role": "assistant", "content": "x"}], "Message 2, the last one, has the role"),
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
