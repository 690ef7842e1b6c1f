"""Inputs that are rewritten as lines of JSON: texts in UTF-16, tables in CSV."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.batch.requests import Defaults, request_of
from localmoe.batch.transcode import is_table, write_rows, write_utf8
from localmoe.errors import UsageError
from localmoe.files import decoded

LINES = '{"prompt": "Gr\u00fc\u00dfe \U0001f600"}\r\n{"prompt": "two"}\r\n'


def rows(raw: str | bytes, template: str | None = None) -> list[dict[str, Any]]:
    source = io.BytesIO(raw.encode() if isinstance(raw, str) else raw)
    target = io.BytesIO()
    write_rows(source, target, "table.csv", template)
    return [json.loads(line) if line.strip() else {} for line in target]


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe" + LINES.encode("utf-16-le"),
        b"\xfe\xff" + LINES.encode("utf-16-be"),
        LINES.encode("utf-16-le"),
        LINES.encode("utf-16-be"),
    ],
)
def test_what_powershell_writes_is_read(raw: bytes) -> None:
    target = io.BytesIO()
    assert write_utf8(io.BytesIO(raw), target)
    assert target.read().decode() == LINES
    assert decoded(raw, "a.json") == LINES


def test_utf8_is_left_alone_and_half_a_character_is_no_text() -> None:
    assert not write_utf8(io.BytesIO(LINES.encode()), io.BytesIO())
    target = io.BytesIO()
    assert write_utf8(io.BytesIO(b"\xff\xfea\0\n\0b"), target)
    assert target.read() == b"a\n\xff"


def test_each_row_is_a_request() -> None:
    raw = 'id,prompt,max_tokens\r\n1,"What is a ""router""?",8\r\n\r\n2,"one\ntwo",\r\n'
    assert rows(raw) == [
        {"id": "1", "prompt": 'What is a "router"?', "max_tokens": 8},
        {},
        {"id": "2", "prompt": "one\ntwo"},
    ]
    assert request_of(rows(raw)[0], Defaults()).options.max_tokens == 8


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_template_makes_prompts_of_columns(delimiter: str) -> None:
    raw = "\ufeffid,text,to\n7,Hello {id},German\n".replace(",", delimiter)
    asked = rows(raw, "To {to}: {text}")
    assert asked == [{"id": "7", "text": "Hello {id}", "to": "German",
                      "prompt": "To German: Hello {id}"}]  # fmt: skip
    assert request_of(asked[0], Defaults()).messages[0].content == "To German: Hello {id}"


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9)


@given(st.lists(cells.filter(bool), min_size=1, max_size=5))
def test_every_text_comes_out_as_it_was(texts: list[str]) -> None:
    quoted = "".join('"{}"\n'.format(text.replace('"', '""')) for text in texts)
    assert [row["prompt"] for row in rows(f"prompt\n{quoted}")] == texts


@pytest.mark.parametrize(
    ("raw", "template", "says"),
    [
        ("id,question\n1,Hi\n", None, "no column prompt; it has id, question"),
        ("", None, "no column prompt; it has none"),
        ("id,question\n1,Hi\n", "{text}", "names {text}; the columns of table.csv are id"),
        ("id,question\n1,Hi\n", "text", "names no column"),
        ("prompt\nHi, you\n", None, "Row 1 of table.csv has 2 fields"),
        ("prompt,prompt\na,b\n", None, "names a column twice"),
        ('prompt\n"Hi\n', None, "not a valid CSV"),
        (b"prompt\nGr\xfc\xdfe\n", None, "not UTF-8"),
    ],
)
def test_what_is_no_table_of_prompts_is_refused(
    raw: str | bytes, template: str | None, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        rows(raw, template)


def test_a_table_is_known_by_its_name_or_its_template() -> None:
    assert is_table("a.CSV", None)
    assert is_table("-", "{text}")
    assert not is_table("a.jsonl", None)
