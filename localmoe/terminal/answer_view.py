"""An answer on a terminal as it grows: what is waited for, thinking that folds, Markdown."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ..engine.protocol import Delta
from .console import safe
from .live_region import LiveRegion
from .markdown import Markdown
from .spans import DIM, StyledLine, StyledText, paint, wrap

WAIT_SECONDS = 0.3
"""A shorter wait needs no explanation."""
N_THINKING_LINES = 6
N_THINKING_CHARS = 4000
"""Of a train of thought the end is looked at; the rest has scrolled by."""


class AnswerView:
    """Shows one answer after the other. `finish` ends each.

    With `shows_thinking` the last lines of a model's thinking are seen while it thinks; either way
    a line stays that says how long it took.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        size: Callable[[], os.terminal_size],
        *,
        colour: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shows_thinking = True
        self._size = size
        self._colour = colour
        self._clock = clock
        self._scroll = LiveRegion(write, size)
        self._begin()

    def _begin(self) -> None:
        size = self._size()
        self._markdown = Markdown(size.columns - 1, size.lines - 1, self._colour)
        self._asked = self._clock()
        self._status = ""
        self._has_text = False
        self._thinking = ""
        self._thinks_since: float | None = None
        self._n_thought = 0

    def begin(self) -> None:
        """An answer was asked for."""
        self._begin()

    def waiting(self, text: str) -> None:
        """What is being waited for, shown once that has taken a moment."""
        if self._has_text or self._clock() - self._asked < WAIT_SECONDS:
            return
        self._status = text
        self._show([])

    def add(self, delta: Delta) -> None:
        """Shows what is new of the answer."""
        if delta.anew:
            self._end_text()
            self._begin()
        text = safe(delta.text)  # before anything looks at it
        if delta.kind == "thinking":
            self._think(text, len(delta.tokens))
        elif text and (self._has_text or text.strip()):
            self._say(text)
        elif not delta.tokens and delta.prompt_tokens and not self._has_text:
            self.waiting(f"reading: {delta.prompt_tokens:,} tokens")

    def note(self, text: str) -> None:
        """A sentence between the lines."""
        self._end_text()
        self._scroll.update(wrap([StyledText(text, DIM)], self._size().columns - 1), [])

    def finish(self) -> None:
        """The answer is over."""
        self._end_text()
        self._begin()

    # ---- its parts ----

    def _say(self, text: str) -> None:
        folded = self._fold()
        self._has_text = True
        self._adapt()
        self._markdown.feed(text)
        self._scroll.update([*folded, *self._markdown.take()], self._markdown.tail())

    def _think(self, text: str, n_tokens: int) -> None:
        if self._thinks_since is None:
            self._thinks_since = self._clock()
        self._n_thought += n_tokens
        self._thinking = (self._thinking + text)[-N_THINKING_CHARS:]
        if not self._has_text:
            self._show(self._thinking_lines())

    def _thinking_lines(self) -> list[StyledLine]:
        width = self._size().columns - 1
        n_lines = max(1, min(N_THINKING_LINES, self._size().lines - 4))
        if not self.shows_thinking:
            return [paint([StyledText(f"thinking, {self._n_thought:,} tokens", DIM)])]
        lines: list[StyledLine] = []
        for text in self._thinking.strip().split("\n")[-n_lines:]:
            lines += wrap([StyledText(text, DIM)], width, [StyledText("  ")], [StyledText("  ")])
        return [paint([StyledText("thinking", DIM)]), *lines[-n_lines:]]

    def _fold(self) -> list[StyledLine]:
        """The line that stays of the thinking."""
        if self._thinks_since is None or self._has_text or not self._thinking.strip():
            return []
        seconds = self._clock() - self._thinks_since
        text = f"thought for {seconds:.0f} s, {self._n_thought:,} tokens; /think shows it"
        return [paint([StyledText(text, DIM)]), StyledLine()]

    def _show(self, lines: list[StyledLine]) -> None:
        """What will be gone again when the text comes."""
        self._adapt()
        status = [] if lines or not self._status else [paint([StyledText(self._status, DIM)])]
        self._scroll.update([], [*lines, *status])

    def _end_text(self) -> None:
        folded = self._fold()
        self._markdown.close()
        self._scroll.update([*folded, *self._markdown.take()], [])

    def _adapt(self) -> None:
        """Go by the size that the terminal has now; what was printed stays as it is."""
        if not self._scroll.resized:
            return
        size = self._size()
        lost = self._scroll.adapt()
        if lost and self._has_text:
            self._scroll.let_go(same_line=self._markdown.in_code)
            self._markdown.cut()
        elif lost:
            self._scroll.let_go(same_line=False)
        self._markdown.resize(size.columns - 1, size.lines - 1)


class PlainView:
    """Shows answers as the text that they are, piece by piece, without what steers a terminal."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.shows_thinking = True
        self._write = write
        self.begin()

    def begin(self) -> None:
        """Begins an answer."""
        self._kind = ""
        self._at_start = True

    def waiting(self, text: str) -> None:
        """Nothing: what was written can't be taken back."""

    def add(self, delta: Delta) -> None:
        """Shows what is new of the answer."""
        if delta.anew:
            self.finish()
        text = safe(delta.text)  # before anything looks at it
        if not text or (delta.kind == "thinking" and not self.shows_thinking):
            return
        if self._kind not in ("", delta.kind):
            self._put("\n\n")
        self._kind = delta.kind
        self._put(text)

    def note(self, text: str) -> None:
        """Shows a remark on a line of its own."""
        self.finish()
        self._put(f"{text}\n")

    def finish(self) -> None:
        """Ends the line of the answer."""
        if not self._at_start:
            self._put("\n")
        self.begin()

    def _put(self, text: str) -> None:
        self._write(text)
        self._at_start = text.endswith("\n")


View = AnswerView | PlainView
