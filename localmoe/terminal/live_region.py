"""Lines at the end of a terminal: some are printed for good, those below may still change.

What was printed for good is never touched again. Only as many lines are drawn again as changed, and
never more than the screen shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from .spans import StyledLine

UP, CLEAR_BELOW = "\x1b[{}A", "\x1b[J"
"""CUU and ED (ECMA-48): with SGR, all that this program sends beside text."""


class LiveRegion:
    """Writes lines with `write` to a terminal whose `size` may change at any time."""

    def __init__(self, write: Callable[[str], None], size: Callable[[], os.terminal_size]) -> None:
        self._write = write
        self._size = size
        self._columns = size().columns
        self._tail: list[StyledLine] = []  # what may still change; the cursor is at its end

    @property
    def resized(self) -> bool:
        """Whether the terminal has another width now."""
        return self._size().columns != self._columns

    def adapt(self) -> bool:
        """Go by the present size. True where what may still change has lost its place: a line
        is longer than the screen is wide by now, and how a terminal shows it can't be known."""
        self._columns = self._size().columns
        return any(line.cells > self._columns for line in self._tail)

    def let_go(self, *, same_line: bool) -> None:
        """Leave on the screen what is there; go on behind it, on the same line or a new one."""
        if not self._tail:
            return
        if not same_line:
            self._write("\n")
        self._tail = [StyledLine()] if same_line else []

    def update(self, finished: Sequence[StyledLine], tail: Sequence[StyledLine]) -> None:
        """Show lines in the place of what could still change; `tail` may change again."""
        new, old = [*finished, *tail], self._tail
        n_same = 0
        while n_same < min(len(new), len(old)) and new[n_same] == old[n_same]:
            n_same += 1
        text = self._change(old, new, n_same)
        if not tail and new:
            text += "\n"
        if text:
            self._write(text)
        self._tail = list(tail)

    def _change(self, old: Sequence[StyledLine], new: Sequence[StyledLine], n_same: int) -> str:
        """What to send so that the lines after the first `n_same` become the new ones."""
        rest = "\n".join(line.text for line in new[n_same:])
        if n_same == len(old):
            return "\n" + rest if old and n_same < len(new) else rest
        is_last = n_same == len(old) - 1
        if is_last and n_same < len(new) and new[n_same].text.startswith(old[-1].text):
            return rest[len(old[-1].text) :]
        n_up = min(sum(map(self._rows, old[n_same:])), self._size().lines) - 1
        up = UP.format(n_up) if n_up else ""
        at_start = f"{up}\r{CLEAR_BELOW}"
        if n_same and n_same == len(new):  # nothing more: back to the end of the line above
            return at_start + self._last_again(new[-1])
        return at_start + rest

    def _last_again(self, line: StyledLine) -> str:
        n_rows = self._rows(line)
        return f"{UP.format(n_rows)}\r{CLEAR_BELOW}{line.text}"

    def _rows(self, line: StyledLine) -> int:
        return max(1, -(-line.cells // self._columns))
