"""Markdown as it is shown: the same however it comes in, on any screen, and code as it was."""

from __future__ import annotations

import os
import random
import re

import pytest

from localmoe.engine.protocol import Delta
from localmoe.terminal.answer_view import AnswerView
from localmoe.terminal.cells import n_cells
from localmoe.terminal.markdown import Markdown
from localmoe.terminal.spans import StyledLine, StyledText, parse_inline, wrap

SGR = re.compile(r"\x1b\[[\d;]*m")
CODE = (
    'def f(x):\n\t"""doc\n\tstring"""\n    return x  '
    + "# "
    + "long " * 30
    + "\n\n\nif f(1):   \n\tpass"
)
SOURCE = f"""\
# Title

Some *italic*, **bold with `code`** and a_name_here, 2 * 3 * 4, a [link](http://x.y/z). It goes on\
 so that it has to be wrapped at the end of the line, more than once on a narrow screen.

* item **one**, long enough to be wrapped over more than one line of the terminal
   1. nested

```python
{CODE}
```

| Name | Value | Remark |
|:-----|------:|--------|
| a | 1 | first |
| b `x` | 22 | a long cell that must be wrapped as the screen is narrow |

> quoted
---
Done. \\(x_1\\) 日本語のテキストはスペースなしで続くので、どこでも改行できます。
"""


class Reflowing:
    """A terminal that breaks its long lines anew when its width changes; all of it can be seen."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines = [""]
        self._at = (0, 0)  # which line, and how far in it

    def size(self) -> os.terminal_size:
        return os.terminal_size((self.columns, self.rows))

    def write(self, text: str) -> None:
        for piece in re.findall(r"\x1b\[\d+A|\x1b\[J|\x1b\[[\d;]*m|\r|\n|[^\x1b\r\n]+", text):
            number, n_chars = self._at
            if piece.endswith("A") and piece.startswith("\x1b"):
                self._up(int(piece[2:-1]))
            elif piece == "\r":
                self._at = (number, n_chars - n_chars % self.columns)
                if n_chars and n_chars % self.columns == 0:  # it waits at the edge
                    self._at = (number, n_chars - self.columns)
            elif piece == "\x1b[J":
                self.lines = [*self.lines[:number], self.lines[number][:n_chars]]
            elif piece == "\n":
                assert number == len(self.lines) - 1
                self.lines.append("")
                self._at = (number + 1, 0)
            elif not piece.startswith("\x1b"):
                line = self.lines[number]
                assert n_chars == len(line), "text is only written at the end"
                self.lines[number] = line + piece
                self._at = (number, n_chars + len(piece))

    def _up(self, n: int) -> None:
        assert n < self.rows, "what has scrolled off can't be reached"
        starts = [
            (number, start)
            for number, line in enumerate(self.lines)
            for start in range(0, max(1, len(line)), self.columns)
        ]
        number, n_chars = self._at
        row = max(k for k, start in enumerate(starts) if start <= (number, max(0, n_chars - 1)))
        self._at = starts[row - n]


def shown(source: str, columns: int, rows: int, draw: random.Random, n_most: int) -> list[str]:
    """The lines on a terminal after a text that came in pieces."""
    terminal = Reflowing(columns, rows)
    view = AnswerView(terminal.write, terminal.size)
    view.begin()
    while source:
        n = draw.randint(1, n_most)
        view.add(Delta(1, text=source[:n]))
        source = source[n:]
    view.finish()
    return terminal.lines


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


ASCII = SOURCE[: SOURCE.index("日")]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_it_is_the_same_however_it_comes(columns: int) -> None:
    whole = shown(ASCII, columns, 50, random.Random(0), 10_000)
    for seed in range(5):
        for n_most in (1, 4, 30):
            assert shown(ASCII, columns, 50, random.Random(seed), n_most) == whole


def test_blocks() -> None:
    text = "\n".join(shown(ASCII, 60, 50, random.Random(0), 5))
    assert text.startswith("Title\n\nSome italic, bold with code and a_name_here, 2 * 3 * 4, a\n")
    assert "link (http://x.y/z)" in text
    assert "• item one, long enough to be wrapped over more than one\n  line of" in text
    assert "\n   1. nested\n" in text
    assert f"\n```python\n{CODE}\n```\n" in text  # nothing before it, nothing behind
    assert "\na         1  first\nb x      22  a long cell" in text
    assert "\n│ quoted\n─────" in text
    assert "\\(x_1\\)" in text


@pytest.mark.parametrize("rows", [4, 6, 10])
def test_on_a_low_screen_nothing_is_lost(rows: int) -> None:
    for seed in range(6):
        lines = shown(ASCII, 30, rows, random.Random(seed), 7)
        expected = shown(ASCII, 30, 100, random.Random(seed), 7)
        joined = " ".join(lines)
        assert set(words(" ".join(expected))) <= set(words(joined))
        assert "\n".join(lines).count(CODE) == 1


def test_a_resize_destroys_nothing_and_repeats_half_a_word_at_most() -> None:
    plain = "word%d and some **more** of it, " * 40 % tuple(range(40))
    for text in (plain, f"```python\n{CODE}\n```\n", ASCII):
        for seed in range(20):
            draw = random.Random(seed)
            terminal = Reflowing(60, 24)
            view = AnswerView(terminal.write, terminal.size)
            view.begin()
            rest = text
            while rest:
                n = draw.randint(1, 9)
                view.add(Delta(1, text=rest[:n]))
                rest = rest[n:]
                if draw.random() < 0.1:
                    terminal.columns = draw.choice([25, 40, 60, 90])
            view.finish()
            found = words("\n".join(terminal.lines))
            wanted = words("\n".join(shown(text, 1000, 100, draw, 10_000)))
            assert is_part(wanted, found), (seed, terminal.lines)
            assert len(found) < len(wanted) + 30
            if text.startswith("```"):
                assert CODE in "\n".join(terminal.lines)


def is_part(wanted: list[str], found: list[str]) -> bool:
    """Whether all words are there, in their order."""
    rest = iter(found)
    return all(word in rest for word in wanted)


def test_a_list_s_code_can_be_copied() -> None:
    source = "1. Do this:\n\n   ```sh\n   if a; then\n     b\n   fi\n   ```\n2. Done\n"
    text = "\n".join(shown(source, 60, 20, random.Random(1), 3))
    assert "\n```sh\nif a; then\n  b\nfi\n```\n2. Done" in text


def test_a_long_table_keeps_its_head_and_gives_each_row_once() -> None:
    rows = "".join(f"| r{n} | {n} |\n" for n in range(60))
    lines = shown(f"| a | b |\n|---|--:|\n{rows}\nend\n", 40, 10, random.Random(3), 4)
    assert [line.split()[0] for line in lines if line.startswith("r")] == [
        f"r{n}" for n in range(60)
    ]
    assert lines[0].split() == ["a", "b"]


@pytest.mark.parametrize(
    ("source", "plain"),
    [
        ("**a *b* c**", "a b c"),
        ("a * b * c", "a * b * c"),
        ("*a", "*a"),
        ("snake_case_name", "snake_case_name"),
        ("`` `x` ``", "`x`"),
        ("`**a**`", "**a**"),
        (r"\*a\*", "*a*"),
        (r"\[x\]", r"\[x\]"),
        ("[a](http://b.c)", "a (http://b.c)"),
        ("<http://b.c>", "http://b.c"),
        ("a < b > c", "a < b > c"),
        ("&#27;[31m", "&#27;[31m"),
        ("~~a~~", "a"),
        ("***a***", "a"),
    ],
)
def test_inline_marks(source: str, plain: str) -> None:
    assert "".join(span.text for span in parse_inline(source)) == plain


def test_wrapping() -> None:
    lines = wrap([StyledText("one two"), StyledText("three", "1"), StyledText(" four")], 9)
    assert [SGR.sub("", line.text).rstrip() for line in lines] == ["one", "twothree", "four"]
    assert wrap([StyledText("x" * 30)], 9) == [StyledLine("x" * 30, 30)]
    assert [line.cells for line in wrap([StyledText("日本語日本語")], 5)] == [4, 4, 4]
    assert n_cells("a\tb") == 9


def test_code_is_coloured_and_no_character_of_it_changed() -> None:
    markdown = Markdown(80, 24)
    markdown.feed(f"```python\n{CODE}\n```\n")
    lines = [line.text for line in markdown.take()]
    assert "\x1b[" in lines[1]
    assert "\n".join(SGR.sub("", line) for line in lines[1:-1]) == CODE


def test_thinking_is_folded_into_a_line() -> None:
    now = [0.0]
    terminal = Reflowing(60, 24)
    view = AnswerView(terminal.write, terminal.size, clock=lambda: now[0])
    view.begin()
    for n in range(40):
        view.add(Delta(1, text=f"Thought {n}.\n", tokens=(1, 2), kind="thinking"))
    assert terminal.lines[-1].strip() == "Thought 39."
    assert len(terminal.lines) < 10
    now[0] = 12.0
    view.add(Delta(1, text="The answer."))
    view.finish()
    assert terminal.lines == [
        "thought for 12 s, 80 tokens; /think shows it", "", "The answer.", "",
    ]  # fmt: skip


def test_thinking_that_is_hidden_leaves_the_same_line() -> None:
    terminal = Reflowing(60, 24)
    view = AnswerView(terminal.write, terminal.size, clock=lambda: 0.0)
    view.shows_thinking = False
    view.begin()
    view.add(Delta(1, text="Secret", tokens=(1,), kind="thinking"))
    assert terminal.lines == ["thinking, 1 tokens"]
    view.add(Delta(1, text="Yes."))
    view.finish()
    assert terminal.lines[0] == "thought for 0 s, 1 tokens; /think shows it"


def test_an_answer_that_begins_anew_leaves_what_came_on_the_screen() -> None:
    terminal = Reflowing(60, 24)
    view = AnswerView(terminal.write, terminal.size)
    view.begin()
    view.add(Delta(1, text="Half an ans"))
    view.note("The engine died.")
    view.add(Delta(0, anew=True))
    view.add(Delta(1, text="A whole answer."))
    view.finish()
    assert terminal.lines == ["Half an ans", "The engine died.", "A whole answer.", ""]
