"""A Markdown table as it comes: columns as wide as their cells want and the screen allows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .inline import BOLD, DIM, Line, Span, inline, paint, wrap

DELIMITER = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")
CELL_END = re.compile(r"(?<!\\)\|")
GAP = "  "
MIN_CELLS = 6


def is_delimiter(line: str) -> bool:
    """Whether a line is the one under a table's head: | --- | :-: |"""
    return "|" in line and "-" in line and bool(DELIMITER.match(line))


def cells_of(row: str) -> list[str]:
    inner = row.strip().removeprefix("|")
    if inner.endswith("|") and not inner.endswith("\\|"):
        inner = inner[:-1]
    return [cell.strip().replace("\\|", "|") for cell in CELL_END.split(inner)]


class Table:
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
        self._widths = self._widths or self._columns(width, self._rows)

    def take(self) -> list[Line]:
        """The lines that weren't taken yet; they are no longer among `lines`."""
        lines = self.lines(0)
        self._n_taken += len(lines)
        return lines

    def lines(self, width: int, unfinished: str = "") -> list[Line]:
        """All lines that weren't taken; `unfinished` is a row that is being written."""
        rows = [*self._rows, *([self._row(unfinished)] if unfinished else [])]
        widths = self._widths or self._columns(width, rows)
        lines = self._row_lines(rows[0], widths, BOLD)
        lines.append(paint([Span(GAP.join("─" * n for n in widths), DIM)]))
        for row in rows[1:]:
            lines += self._row_lines(row, widths)
        return lines[self._n_taken :]

    @staticmethod
    def _columns(width: int, rows: Sequence[Sequence[str]]) -> list[int]:
        """Widths that fit: the widest columns give first."""
        columns = zip(*rows, strict=True)
        widths = [max(1, *(paint(inline(cell)).cells for cell in column)) for column in columns]
        room = width - len(GAP) * (len(widths) - 1)
        while sum(widths) > room and max(widths) > MIN_CELLS:
            widths[widths.index(max(widths))] -= 1
        return widths

    def _row_lines(self, row: Sequence[str], widths: Sequence[int], sgr: str = "") -> list[Line]:
        columns = [wrap(inline(c, sgr), n) for c, n in zip(row, widths, strict=True)]
        lines = []
        for n in range(max(map(len, columns))):
            parts = [column[n] if n < len(column) else Line() for column in columns]
            padded = [pad(*part) for part in zip(parts, widths, self._aligns, strict=True)]
            text = GAP.join(padded).rstrip(" ")
            n_cells = sum(max(p.cells, w) for p, w in zip(parts, widths, strict=True))
            lines.append(Line(text, n_cells + len(GAP) * (len(widths) - 1)))
        return lines


def align_of(mark: str) -> str:
    if mark.endswith(":"):
        return "^" if mark.startswith(":") else ">"
    return "<"


def pad(line: Line, width: int, align: str) -> str:
    """A cell's line with the spaces that its column wants."""
    n = max(0, width - line.cells)
    left = {"<": 0, ">": n, "^": n // 2}[align]
    return " " * left + line.text + " " * (n - left)
