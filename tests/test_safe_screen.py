"""Nothing that a model says steers the terminal: generated streams through what writes to it."""

from __future__ import annotations

import io
import os
import random
import re
from collections.abc import Callable

import pytest

from localmoe.engine.protocol import Delta
from localmoe.repl.repl import Repl
from localmoe.terminal import console
from localmoe.terminal.answer_view import AnswerView, PlainView
from localmoe.terminal.cells import cropped, n_cells
from localmoe.terminal.progress import name_ending

N_STREAMS = 10_000
SIZE = os.terminal_size((40, 12))
CONTROLS = [
    *map(chr, [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)]),
    *"\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ud800",
]
STEERING = re.compile(f"[{''.join(map(re.escape, CONTROLS))}]")
ATTACKS = [
    "\x1b[31m", "\x1b[2J", "\x1b[H", "\x1b[1A", "\x1b[J", "\x1b]0;title\x07", "\x1b]52;c;aGk=\x07",
    "\x1b]8;;http://evil\x1b\\x\x1b]8;;\x1b\\", "\x9b31m", "\x9d0;t\x9c", "\x1bP+q\x1b\\", "\x1bc",
    "\x1b[6n", "\x1b[?1049h", "\r", "\x08\x08", "\x85", "\u202etxt.exe\u202c",
]  # fmt: skip
MARKS = [
    "**", "*", "_", "`", "```python\n", "```\n", "# ", "- ", "1. ", "> ",
    "| a | b |\n", "|---|---|\n",
    "[x](http://y.z)", "<https://y.z>", "\n", "\n\n", "---\n", "~~",
    "\\", "&#27;", "&#x202e;", "\t",
]  # fmt: skip
WORDS = [
    "word ", "日本語", "a", " ", "def f(): return 'x'\n", "é", "👍\ufe0f", "a_b ",
    "supercalifragilistic ",
]  # fmt: skip
# all that this program may send: text, line ends, and three sequences of its own (CUU, ED, SGR)
ALLOWED = re.compile(
    r"(?:[^\x00-\x08\x0b-\x1f\x7f-\x9f]|\r\x1b\[J|\x1b\[\d{1,2}A|\x1b\[(?:\d{1,2}(?:;\d{1,2})*)?m)*"
)


def stream(draw: random.Random) -> list[Delta]:
    """An answer with attacks in it, thinking before it or not, cut anywhere."""
    pieces = draw.choices(
        [draw.choice(CONTROLS), draw.choice(ATTACKS), draw.choice(MARKS), draw.choice(WORDS)],
        k=4,
    )
    pieces += [draw.choice(draw.choice((CONTROLS, ATTACKS, MARKS, WORDS))) for _ in range(10)]
    draw.shuffle(pieces)
    text = "".join(pieces)
    cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(4)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    n_thinking = draw.choice((0, 0, 1))
    return [
        Delta(1, text=part, tokens=(1,), kind="thinking" if n < n_thinking else "text")
        for n, part in enumerate(parts)
    ]


def shown(deltas: list[Delta]) -> str:
    """What the terminal is sent for an answer."""
    sent: list[str] = []
    view = AnswerView(sent.append, lambda: SIZE, clock=lambda: 0.0)
    view.begin()
    for delta in deltas:
        view.add(delta)
    view.finish()
    return "".join(sent)


def without_controls(delta: Delta) -> Delta:
    return Delta(1, text=STEERING.sub("", delta.text), tokens=delta.tokens, kind=delta.kind)


@pytest.mark.parametrize("part", range(4))
def test_no_control_character_of_a_model_reaches_the_terminal(part: int) -> None:
    """What is sent is byte for byte what the same text without them would give, so that no
    sequence of ours can hide one of theirs; and it has no others than ours."""
    draw = random.Random(part)
    for _ in range(N_STREAMS // 4):
        deltas = stream(draw)
        sent = shown(deltas)
        assert ALLOWED.fullmatch(sent), deltas
        assert not set(sent) & set(CONTROLS) - {"\x1b", "\r"}
        assert sent == shown([without_controls(delta) for delta in deltas]), deltas


class Screen(io.StringIO):
    """A terminal that only takes in what it is sent."""

    def isatty(self) -> bool:
        return True


def plain(deltas: list[Delta]) -> None:
    """As `chat --plain` shows an answer."""
    view = PlainView(console.answer_text)
    view.begin()
    for delta in deltas:
        view.add(delta)
    view.finish()


def run(deltas: list[Delta]) -> None:
    """As `run` shows an answer."""
    for delta in deltas:
        console.answer_text(delta.text)


def told(deltas: list[Delta]) -> None:
    """As /think shows what a model thought."""
    Repl.tell("".join(delta.text for delta in deltas))


@pytest.mark.parametrize("show", [plain, run, told])
def test_plain_text_and_remarks_bring_none_either(
    show: Callable[[list[Delta]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sent_for(deltas: list[Delta]) -> str:
        screen = Screen()
        monkeypatch.setattr("sys.stdout", screen)
        monkeypatch.setattr("sys.stderr", screen)
        show(deltas)
        return screen.getvalue()

    draw = random.Random(show.__name__)
    for _ in range(N_STREAMS // 10):
        deltas = stream(draw)
        sent = sent_for(deltas)
        assert ALLOWED.fullmatch(sent), deltas
        assert not set(sent) & set(CONTROLS) - {"\x1b"}
        assert sent == sent_for([without_controls(delta) for delta in deltas]), deltas


def test_the_check_would_see_one() -> None:
    assert not ALLOWED.fullmatch("\x1b[2J")
    assert not ALLOWED.fullmatch("a\x9b31m")
    assert not ALLOWED.fullmatch("\x1b]8;;http://x\x1b\\")
    assert ALLOWED.fullmatch(shown([Delta(1, text="# **a** `b`\n```py\nx = 1\n```\n")]))


def test_columns_stand_under_each_other_whatever_they_hold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.table(
        [("NAME", "TITLE", "N"), ("会話", "日本語の題名", "1"), ("e\u0301", "plain", "2")]
    )
    rows = capsys.readouterr().out.splitlines()
    places = {n_cells(row[: row.rindex(last)]) for row, last in zip(rows, "N12", strict=True)}
    assert len(places) == 1


def test_a_line_is_cut_by_its_cells() -> None:
    assert cropped("日本語", 5) == "日本"
    assert cropped("日本語", 6) == "日本語"
    assert cropped("plain", 3) == "pla"
    assert cropped("日", 1) == ""
    assert name_ending("日本語.gguf", 8) == "…語.gguf"
