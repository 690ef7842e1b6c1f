"""A program at a terminal of which every cell can be looked at: a pty, and pyte behind it."""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from collections.abc import Callable

import pexpect
import pyte

SECONDS = 30.0
PROMPT = ">"


class Terminal:
    """`localmoe ARGUMENTS` at a terminal of a size; close it."""

    def __init__(self, arguments: list[str], columns: int = 80, rows: int = 24, **env: str) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=5000, ratio=0.001)
        self._stream = pyte.Stream(self.screen)
        self.raw = ""
        self._above: list[str] = []
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "localmoe", *arguments],
            encoding="utf-8",
            # this terminal answers no questions about its cursor
            env={**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **env},
            dimensions=(rows, columns),
        )
        self.child.delaybeforesend = None

    def close(self) -> None:
        self.child.close(force=True)

    @property
    def text(self) -> str:
        """What is on the screen, and what has scrolled off it."""
        scrolled = self.screen.history.top
        for line in itertools.islice(scrolled, len(self._above), None):
            self._above.append("".join(line[n].data for n in range(self.screen.columns)))
        lines = [*self._above, *self.screen.display]
        return "\n".join(line.rstrip() for line in lines).rstrip()

    @property
    def line(self) -> str:
        """The line that the cursor is in."""
        return str(self.screen.display[self.screen.cursor.y]).rstrip()

    def pump(self, seconds: float = 0.05) -> bool:
        """Take in what was written; False where the program has ended."""
        try:
            text = self.child.read_nonblocking(1 << 16, seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += text
        self._stream.feed(text)
        return True

    def wait(self, condition: Callable[[str], object], seconds: float = SECONDS) -> None:
        """Wait until the text on the screen is as wanted."""
        end = time.monotonic() + seconds
        while not condition(self.text):
            runs = self.pump()
            if condition(self.text):
                return
            assert runs, f"it ended; on the screen:\n{self.text}"
            assert time.monotonic() < end, f"on the screen:\n{self.text}"

    def wait_for(self, pattern: str, seconds: float = SECONDS) -> None:
        self.wait(lambda text: re.search(pattern, text), seconds)

    def n_prompts(self) -> int:
        return sum(line.startswith(PROMPT) for line in self.text.split("\n"))

    def wait_prompt(self, n: int = 1, seconds: float = SECONDS) -> None:
        """Wait until the nth prompt is there for a line, and nothing comes behind it: what was said
        before is shown behind such marks, too."""
        n_seen = -1
        while n_seen != len(self.raw):
            self.wait(
                lambda _: (
                    self.n_prompts() >= n
                    and self.line.startswith(PROMPT)
                    and not self.screen.cursor.hidden
                ),
                seconds,
            )
            n_seen = len(self.raw)
            self.pump()

    def send(self, text: str) -> None:
        self.child.send(text)

    def enter(self, text: str = "", end: str = "\r") -> str:
        """Type a line, wait for the next prompt; gives what came between the two."""
        n = self.n_prompts()
        self.send(text + end)
        self.wait_prompt(n + 1)
        lines = self.text.split("\n")
        prompts = [number for number, line in enumerate(lines) if line.startswith(PROMPT)]
        return "\n".join(lines[prompts[n - 1] + 1 : prompts[-1]])

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def ends(self, seconds: float = SECONDS) -> int | None:
        """Wait for the program's end; gives its exit code."""
        end = time.monotonic() + seconds
        while self.pump():
            assert time.monotonic() < end, f"it goes on; on the screen:\n{self.text}"
        self.child.close()
        return self.child.exitstatus
