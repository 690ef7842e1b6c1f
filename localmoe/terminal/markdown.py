"""Renders Markdown as it comes: finished lines once, the line that is being written ever again.

Every line of the source is shown on lines of its own: models break lines where they mean it. Only
a table waits for its rows; its columns are as wide as their cells want and the screen allows. Code
is shown exactly as it is, between its fences; nothing is put before or behind it, so that what is
copied from the screen runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .cells import n_cells
from .console import safe
from .highlight import Highlighter
from .spans import BOLD, DIM, UNDERLINE, StyledLine, StyledText, paint, parse_inline, wrap

DELIMITER = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")
CELL_END = re.compile(r"(?<!\\)\|")
GAP = "  "
MIN_CELLS = 6


def is_delimiter(line: str) -> bool:
    """Whether a line is the one under a table's head: | --- | :-: |"""
    return "|" in line and "-" in line and bool(DELIMITER.match(line))


def cells_of(row: str) -> list[str]:
    """Returns the cells of a table's row."""
    inner = row.strip().removeprefix("|")
    if inner.endswith("|") and not inner.endswith("\\|"):
        inner = inner[:-1]
    return [cell.strip().replace("\\|", "|") for cell in CELL_END.split(inner)]


class MarkdownTable:
    """A line that may be a table's head, and then the table's rows.

    Once `freeze` was called its columns keep their widths, and `take` gives each line once.
    """

    def __init__(self, head: str) -> None:
        self.source = head
        self._rows = [cells_of(head)]
        self._aligns: list[str] = []
        self._widths: list[int] | None = None
        self._n_taken = 0

    @property
    def is_table(self) -> bool:
        """Whether the line under the head made it a table."""
        return bool(self._aligns)

    def add(self, line: str) -> bool:
        """Take a line of the source in; False where it is none of the table's."""
        if self.is_table and "|" in line:
            self._rows.append(self._row(line))
            return True
        if not self.is_table and is_delimiter(line):
            aligns = [align_of(cell) for cell in cells_of(line)]
            if len(aligns) == len(self._rows[0]):
                self._aligns = aligns
                return True
        return False

    def _row(self, line: str) -> list[str]:
        n_columns = len(self._rows[0])
        return (cells_of(line) + [""] * n_columns)[:n_columns]

    def freeze(self, width: int) -> None:
        """Fixes the widths of columns by the rows so far."""
        self._widths = self._widths or self._columns(width, self._rows)

    def take(self) -> list[StyledLine]:
        """The lines that weren't taken yet; they are no longer among `lines`."""
        lines = self.lines(0)
        self._n_taken += len(lines)
        return lines

    def lines(self, width: int, unfinished: str = "") -> list[StyledLine]:
        """All lines that weren't taken; `unfinished` is a row that is being written."""
        rows = [*self._rows, *([self._row(unfinished)] if unfinished else [])]
        widths = self._widths or self._columns(width, rows)
        lines = self._row_lines(rows[0], widths, BOLD)
        lines.append(paint([StyledText(GAP.join("─" * n for n in widths), DIM)]))
        for row in rows[1:]:
            lines += self._row_lines(row, widths)
        return lines[self._n_taken :]

    @staticmethod
    def _columns(width: int, rows: Sequence[Sequence[str]]) -> list[int]:
        """Widths that fit: the widest columns give first."""
        columns = zip(*rows, strict=True)
        widths = [
            max(1, *(paint(parse_inline(cell)).cells for cell in column)) for column in columns
        ]
        room = width - len(GAP) * (len(widths) - 1)
        while sum(widths) > room and max(widths) > MIN_CELLS:
            widths[widths.index(max(widths))] -= 1
        return widths

    def _row_lines(
        self, row: Sequence[str], widths: Sequence[int], sgr: str = ""
    ) -> list[StyledLine]:
        columns = [wrap(parse_inline(c, sgr), n) for c, n in zip(row, widths, strict=True)]
        lines = []
        for n in range(max(map(len, columns))):
            parts = [column[n] if n < len(column) else StyledLine() for column in columns]
            padded = [pad(*part) for part in zip(parts, widths, self._aligns, strict=True)]
            text = GAP.join(padded).rstrip(" ")
            n_cells = sum(max(p.cells, w) for p, w in zip(parts, widths, strict=True))
            lines.append(StyledLine(text, n_cells + len(GAP) * (len(widths) - 1)))
        return lines


def align_of(mark: str) -> str:
    """Returns a column's alignment as str.format has it."""
    if mark.endswith(":"):
        return "^" if mark.startswith(":") else ">"
    return "<"


def pad(line: StyledLine, width: int, align: str) -> str:
    """A cell's line with the spaces that its column wants."""
    n = max(0, width - line.cells)
    left = {"<": 0, ">": n, "^": n // 2}[align]
    return " " * left + line.text + " " * (n - left)


FENCE = re.compile(r"( *)(`{3,}|~{3,})\s*([^`]*)$")
HEADING = re.compile(r" {0,3}(#{1,6})(?:\s+(.*?)(?:\s+#+)?\s*)?$")
RULE = re.compile(r" {0,3}([-*_])(?: *\1){2,}\s*$")
ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$", re.DOTALL)
QUOTE = re.compile(r" {0,3}((?:>\s?)+)(.*)$", re.DOTALL)
BULLET = "•"
RULE_CELLS = 40


class Fence:
    """An open code block: how its end looks, how far it is set in, its colours."""

    def __init__(self, found: re.Match[str], colour: bool) -> None:
        self._indent = len(found[1])
        self._mark = found[2]
        self._highlighter = Highlighter(found[3], colour)

    def is_end(self, line: str) -> bool:
        """Whether a line ends the code block."""
        text = line.strip()
        return text.startswith(self._mark) and not text.strip(self._mark[0])

    def code(self, line: str) -> str:
        """A line without the indent that the block has in a list."""
        n_spaces = len(line) - len(line.lstrip(" "))
        return line[min(n_spaces, self._indent) :]

    def line(self, text: str) -> StyledLine:
        """Returns a line of code in its colours."""
        return self._highlighter.line(self.code(text))


class Markdown:
    """A text as lines for a terminal of `width` cells. What is not finished is never more than
    `height` lines. `feed` it, `take` what is finished, show `tail` below."""

    def __init__(self, width: int, height: int, colour: bool = True) -> None:
        self._colour = colour
        self._finished: list[StyledLine] = []
        self._line = ""  # the source line that is being written
        self._goes_on: str | None = None  # what stands before the rest of a line that was split
        self._n_shown = 0  # characters of this line of code that can't be drawn again
        self._fence: Fence | None = None
        self._table: MarkdownTable | None = None
        self._wants_blank = False
        self._has_text = False
        self.resize(width, height)

    def resize(self, width: int, height: int) -> None:
        """Takes over the terminal's new size."""
        self._width, self._height = max(width, 8), max(height, 2)

    @property
    def in_code(self) -> bool:
        """Whether a code block is open."""
        return self._fence is not None

    def feed(self, text: str) -> None:
        """Takes more of the text."""
        first, *others = safe(text).split("\n")
        self._line += first
        for other in others:
            self._end_line()
            self._line = other
        self._limit()

    def take(self) -> list[StyledLine]:
        """The lines that were finished since the last time."""
        finished, self._finished = self._finished, []
        return finished

    def tail(self) -> list[StyledLine]:
        """The lines of what may still change."""
        lines = self._table_lines(self._table) if self._table else []
        if not self._table and self._line:
            lines = self._shown(self._line)
        return [StyledLine(), *lines] if self._wants_blank and lines else lines

    def _table_lines(self, table: MarkdownTable) -> list[StyledLine]:
        """A table, or what may be its head, with the row that is being written."""
        if table.is_table and ("|" in self._line or not self._line):
            return table.lines(self._width, self._line)
        head = table.lines(self._width) if table.is_table else self._shown_text(table.source)
        is_rule = not table.is_table and not self._line.strip("|-: ")
        return head if is_rule else [*head, *self._shown(self._line)]

    def close(self) -> None:
        """The end of the text: everything is finished."""
        if self._line:
            self._end_line()
        self._end_table()
        self._fence = None

    def cut(self) -> None:
        """What is shown of the tail can't be drawn again: only what follows is still to come."""
        if self._table and self._table.is_table:
            self._table.freeze(self._width)
            self._table.take()
        elif self._table:
            self._end_table()
            self._finished = []
        if self._fence:
            self._n_shown = len(self._fence.code(self._line))
        elif self._line:
            self._split(len(self._line) - len(re.split(r"\s", self._line)[-1]))
            self._finished = []
        self._wants_blank = False

    # ---- lines of the source ----

    def _end_line(self) -> None:
        """The source line is whole."""
        line, self._line = self._line, ""
        if self._fence:
            self._end_code_line(self._fence, line)
            return
        if self._goes_on is not None or not self._is_row(line):
            self._end_table()
            self._end_text(line)
        self._goes_on = None

    def _end_code_line(self, fence: Fence, line: str) -> None:
        n_shown, self._n_shown = self._n_shown, 0
        if fence.is_end(line):
            self._fence = None
            self._finish([paint([StyledText(line.strip()[n_shown:], DIM)])])
        elif n_shown or n_cells(line) > self._width * self._height:
            fence.line(line)
            self._finish([paint([StyledText(fence.code(line)[n_shown:])])])
        else:
            self._finish([fence.line(line)])

    def _is_row(self, line: str) -> bool:
        """Whether a line belongs to a table; then the table has it."""
        if self._table and self._table.add(line):
            return True
        if "|" not in line or any(mark.match(line) for mark in (FENCE, HEADING, ITEM, QUOTE)):
            return False
        self._end_table()
        self._table = MarkdownTable(line)
        return True

    def _end_table(self) -> None:
        if self._table:
            table, self._table = self._table, None
            if table.is_table:
                self._finish(table.lines(self._width))
            else:
                self._end_text(table.source)

    def _end_text(self, line: str) -> None:
        if not line.strip() and self._goes_on is None:
            self._wants_blank = self._has_text
            return
        found = FENCE.match(line) if self._goes_on is None else None
        if found:
            self._fence = Fence(found, self._colour)
        self._finish(self._shown_text(line))

    def _finish(self, lines: list[StyledLine]) -> None:
        if self._wants_blank:
            self._finished.append(StyledLine())
        self._wants_blank = False
        self._has_text = True
        self._finished += lines

    # ---- how a line is shown ----

    def _shown(self, line: str) -> list[StyledLine]:
        """The line that is being written."""
        if not self._fence:
            return self._shown_text(line)
        text = self._fence.code(line)[self._n_shown :]
        return [paint([StyledText(text, DIM if self._fence.is_end(line) else "")])]

    def _shown_text(self, line: str) -> list[StyledLine]:
        if self._goes_on is not None:
            rest = [StyledText(self._goes_on)]
            return wrap(parse_inline(line), self._width, rest, rest)
        if FENCE.match(line):
            return [paint([StyledText(line.strip(), DIM)])]
        if RULE.match(line):
            return [paint([StyledText("─" * min(self._width, RULE_CELLS), DIM)])]
        if found := HEADING.match(line):
            sgr = f"{BOLD};{UNDERLINE}" if len(found[1]) == 1 else BOLD
            return wrap(parse_inline(found[2] or "", sgr), self._width)
        first, text = beginning(line)
        n_spaces = sum(n_cells(span.text) for span in first)
        rest = first if QUOTE.match(line) else [StyledText(" " * n_spaces)]
        return wrap(parse_inline(text, DIM if QUOTE.match(line) else ""), self._width, first, rest)

    # ---- what grows too high ----

    def _limit(self) -> None:
        """Finish the upper part of what would be higher than the screen."""
        if self._table and self._table.is_table:
            if len(self._table.lines(self._width)) >= self._height - 2:
                self._table.freeze(self._width)
                self._finish(self._table.take())
        elif not self._fence:
            while self._line and (n := len(self._shown(self._line))) >= self._height:
                self._split(self._start_of_last_row(n))

    def _start_of_last_row(self, n_lines: int) -> int:
        """Where in the source the last of its lines begins, or a word of it."""
        ends = [found.end() for found in re.finditer(r"\s+", self._line)]
        for end in reversed(ends):
            if len(self._shown(self._line[:end].rstrip())) < n_lines:
                return end
        return len(self._line)

    def _split(self, at: int) -> None:
        """Finish a line's beginning; the rest goes on with the same indent."""
        head, rest = self._line[:at].rstrip(), self._line[at:]
        if head:
            self._finish(self._shown_text(head))
            if self._goes_on is None:
                self._goes_on = indent_of(head, beginning(head)[0])
        self._line = rest


def beginning(line: str) -> tuple[list[StyledText], str]:
    """What stands before a line's text, as it is shown, and the text."""
    if found := ITEM.match(line):
        mark = BULLET if found[2] in "-*+" else found[2]
        return [StyledText(f"{found[1]}{mark} ")], found[3]
    if found := QUOTE.match(line):
        return [StyledText("│ " * found[1].count(">"), DIM)], found[2]
    text = line.lstrip(" ")
    return [StyledText(" " * (len(line) - len(text)))], text


def indent_of(line: str, first: list[StyledText]) -> str:
    """The prefix of what goes on after a line was split."""
    shown = "".join(span.text for span in first)
    return shown if QUOTE.match(line) else " " * n_cells(shown)
