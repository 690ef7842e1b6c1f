"""Text with Markdown's inline marks as lines of a terminal: emphasis, code, links, word wrap.

Marks that don't close stay as they were written, so that text which only looks like Markdown is
shown whole. A backslash before a bracket is kept: it is more often LaTeX than an escape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .cells import char_cells, n_cells
from .console import safe

BOLD, ITALIC, STRIKE, UNDERLINE, DIM, CODE = "1", "3", "9", "4", "2", "36"
"""SGR parameters (ECMA-48, 8.3.117)."""

INLINE = re.compile(
    r"\\(?P<escaped>[*_`#+\-.!~|<>])"
    r"|(?P<ticks>`+)(?P<code>(?!`).+?(?<!`))(?P=ticks)(?!`)"
    r"|!?\[(?P<label>(?:[^\[\]]|\[[^\[\]]*\])*)\]"
    r"\((?P<url>[^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?:\s+\"[^\"]*\")?\)"
    r"|<(?P<address>https?://[^\s<>]+)>"
    r"|(?P<mark>\*+|_+|~~)"
)
WORD = re.compile(r"\s+|\S+")


@dataclass(frozen=True, slots=True)
class StyledText:
    """Text and the SGR parameters that it is shown with, like "1;3"."""

    text: str
    sgr: str = ""


@dataclass(frozen=True, slots=True)
class StyledLine:
    """A line as it is written to a terminal, and how many cells wide it is."""

    text: str = ""
    cells: int = 0


@dataclass(slots=True)
class _Mark:
    """A run of * or _ or ~~ that may open or close emphasis; `n` of it are still literal."""

    char: str
    n: int
    opens: bool
    closes: bool


def paint(spans: Sequence[StyledText]) -> StyledLine:
    """Spans as one line. The last gate: nothing but our own SGR sequences steers the terminal."""
    text, cells = "", 0
    for span in spans:
        shown = safe(span.text).replace("\n", " ")
        if shown:
            text += f"\x1b[{span.sgr}m{shown}\x1b[0m" if span.sgr else shown
            cells += n_cells(shown)
    return StyledLine(text, cells)


# ---- marks ----


def parse_inline(text: str, sgr: str = "") -> list[StyledText]:
    """The spans of a text; `sgr` is what all of it is shown with."""
    if not any(char in text for char in "*_`[<~\\"):
        return [StyledText(text, sgr)]
    items = list(_items(text))
    styles = _emphasis(items)
    spans = []
    for item, added in zip(items, styles, strict=True):
        span = StyledText(item.char * item.n) if isinstance(item, _Mark) else item
        spans.append(StyledText(span.text, ";".join(filter(None, [sgr, *added, span.sgr]))))
    return [span for span in spans if span.text]


def _items(text: str) -> Iterator[StyledText | _Mark]:
    end = 0
    for found in INLINE.finditer(text):
        if found.start() > end:
            yield StyledText(text[end : found.start()])
        end = found.end()
        if found["escaped"]:
            yield StyledText(found["escaped"])
        elif found["code"]:
            yield StyledText(_code(found["code"]), CODE)
        elif found["url"]:
            yield from _link(found["label"], found["url"])
        elif found["address"]:
            yield StyledText(found["address"], UNDERLINE)
        else:
            yield _mark(text, found.start(), end)
    if end < len(text):
        yield StyledText(text[end:])


def _code(inner: str) -> str:
    """`` ` `` has spaces so that it can hold a backtick; they aren't part of it."""
    padded = inner[0] == inner[-1] == " " and inner.strip()
    return inner[1:-1] if padded and len(inner) > 2 else inner


def _link(label: str, url: str) -> Iterator[StyledText]:
    """A link's text and its address in full: nobody is sent where they can't see."""
    if label and label != url:
        yield StyledText(label, UNDERLINE)
        yield StyledText(f" ({url})", DIM)
    else:
        yield StyledText(url, UNDERLINE)


def _mark(text: str, start: int, end: int) -> _Mark:
    """Whether a run may open or close (CommonMark 0.31, 6.2), by the characters beside it."""
    before, after = text[start - 1 : start] or " ", text[end : end + 1] or " "
    left = not after.isspace() and (after.isalnum() or not before.isalnum())
    right = not before.isspace() and (before.isalnum() or not after.isalnum())
    if text[start] == "_":  # not in the middle of a_name
        left, right = left and not before.isalnum(), right and not after.isalnum()
    return _Mark(text[start], end - start, left, right)


def _emphasis(items: list[StyledText | _Mark]) -> list[list[str]]:
    """Pair the marks; for each item the SGR parameters that marks give it."""
    styles: list[list[str]] = [[] for _ in items]
    open_marks: list[int] = []
    for n, item in enumerate(items):
        if not isinstance(item, _Mark):
            continue
        while item.closes and item.n and (start := _opener(items, open_marks, item)) is not None:
            opener = items[start]
            assert isinstance(opener, _Mark)
            size = 2 if min(item.n, opener.n) >= 2 else 1
            sgr = STRIKE if item.char == "~" else (BOLD if size == 2 else ITALIC)
            for inside in styles[start + 1 : n]:
                inside.append(sgr)
            opener.n -= size
            item.n -= size
            del open_marks[open_marks.index(start) + bool(opener.n) :]
        if item.opens and item.n:
            open_marks.append(n)
    return styles


def _opener(items: list[StyledText | _Mark], open_marks: list[int], closer: _Mark) -> int | None:
    for n in reversed(open_marks):
        opener = items[n]
        if isinstance(opener, _Mark) and opener.char == closer.char:
            return n
    return None


# ---- wrapping ----


def wrap(
    spans: Sequence[StyledText],
    width: int,
    first: Sequence[StyledText] = (),
    rest: Sequence[StyledText] = (),
) -> list[StyledLine]:
    """Spans in lines of at most `width` cells, broken between words; `first` and `rest` stand
    before the first line and the others. A longer word is left whole: the terminal breaks it,
    and joins it again when it is copied.
    """
    lines: list[list[StyledText]] = [[]]
    room = width - sum(n_cells(span.text) for span in first)
    later = width - sum(n_cells(span.text) for span in rest)
    used = 0
    for word in _words(spans):
        cells = sum(n_cells(span.text) for span in word)
        is_space = word[0].text.isspace()
        if used and used + cells > max(room, 1):
            if lines[-1][-1].text.isspace():
                lines[-1].pop()
            lines.append([])
            used, room = 0, later
            if is_space:
                continue
        lines[-1] += word
        used += cells
    begun = [list(first), *([list(rest)] * (len(lines) - 1))]
    return [paint([*start, *line]) for start, line in zip(begun, lines, strict=True)]


def _words(spans: Sequence[StyledText]) -> Iterator[list[StyledText]]:
    """Pieces between which a line may be broken: spaces, words (which may go over spans), and
    each wide character for itself."""
    word: list[StyledText] = []
    for span in spans:
        for piece in _pieces(span.text):
            splits = piece.isspace() or _is_wide(piece)
            if word and splits:
                yield word
                word = []
            if splits:
                yield [StyledText(piece, span.sgr)]
            else:
                word.append(StyledText(piece, span.sgr))
    if word:
        yield word


def _pieces(text: str) -> Iterator[str]:
    for piece in WORD.findall(text):
        if piece.isascii() or piece.isspace():
            yield piece
            continue
        start = 0
        for n, char in enumerate(piece):
            if char_cells(char) == 2:
                if n > start:
                    yield piece[start:n]
                yield char
                start = n + 1
        if start < len(piece):
            yield piece[start:]


def _is_wide(piece: str) -> bool:
    return len(piece) == 1 and char_cells(piece) == 2
