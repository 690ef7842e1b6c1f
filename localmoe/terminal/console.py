"""Everything a person sees. Nothing else prints.

The answer goes to stdout, all else to stderr; without a terminal there is no colour and no
progress. What comes from a model, a file or a server is shorn of what could steer a terminal.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import UNSAFE_CHARACTERS, escape_unsafe
from .cells import cropped, n_cells

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.protocol import Delta
    from ..prompt.messages import Prompt


GREETING = """\
localmoe runs Mixture-of-Experts models on the hardware you own. Try:

  localmoe run demo "Hi! How was your weekend?"    one answer, from a model that is here already
  localmoe chat demo                               a conversation
  localmoe show demo                               what is in a model file

localmoe --help lists every command."""

PROGRESS_AFTER_SECONDS = 0.4
PLAIN_EVERY_SECONDS = 60.0


def greeting() -> None:
    """Prints what `localmoe` alone shows."""
    print(GREETING)


def safe(text: str) -> str:
    """Text without the characters that could steer a terminal."""
    return UNSAFE_CHARACTERS.sub("", text)


def error(message: str, hint: str = "") -> None:
    """One line: what went wrong, and what to do."""
    line = " ".join(safe(f"{message} {hint}").split())
    print(f"localmoe: {line}", file=sys.stderr)


def warning(text: str) -> None:
    """A line about something that works, but not as it should."""
    print(f"localmoe: warning: {' '.join(safe(text).split())}", file=sys.stderr)


def note(text: str) -> None:
    """A remark beside the answer, dim where that shows."""
    print(dim(safe(text)), file=sys.stderr)


def log_line(line: str) -> None:
    """Prints a line on stderr."""
    print(safe(line), file=sys.stderr)


def dim(text: str, stream: TextIO | None = None) -> str:
    """Returns a text in dim letters, where the stream is a terminal."""
    stream = stream or sys.stderr
    return f"\x1b[2m{text}\x1b[0m" if stream.isatty() else text


def answer_text(text: str) -> None:
    """A piece of an answer, at once. A pipe gets it as it is, a terminal what can't harm it."""
    sys.stdout.write(safe(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def screen(text: str) -> None:
    """What was laid out for a terminal, with our own sequences in it, at once.

    Its text has passed `safe` (inline.paint).
    """
    sys.stdout.write(text)
    sys.stdout.flush()


def prepare_screen() -> bool:
    """Get stdout ready for a conversation; whether it can be drawn on, not only written to."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="replace")  # in a Latin-1 terminal, too, an answer goes on
    console = _rich_console()
    return console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows


def has_colour() -> bool:
    """Whether a person wants colours (https://no-color.org)."""
    return not _rich_console().no_color


def _rich_console() -> Console:
    from rich.console import Console  # start-up, 40 ms, which most commands don't need

    return Console(file=sys.stdout)


def first_line(text: str, n_chars: int = 60) -> str:
    """The first line of a text, cut to `n_chars`."""
    line = text.strip().split("\n")[0]
    return line if len(line) <= n_chars else f"{line[: n_chars - 1]}…"


def clipboard(text: str) -> None:
    """Hand text to the terminal for its clipboard (OSC 52 of xterm's ctlseqs)."""
    coded = base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")
    screen(f"\x1b]52;c;{coded}\x07")


def document(value: Any) -> None:
    """The one JSON document that --json promises."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    text = escape_unsafe(text)
    print(text)


def lines(texts: Iterable[str]) -> None:
    """Lines as they are laid out already."""
    for text in texts:
        print(safe(text).rstrip())


def table(rows: Sequence[Sequence[str]]) -> None:
    """Rows in columns, the first row their heads; on a terminal no line is longer than it."""
    shown = [[safe(cell) for cell in row] for row in rows]
    widths = [max(map(n_cells, column)) for column in zip(*shown, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in shown:
        cells = (
            cell + " " * (width - n_cells(cell)) for cell, width in zip(row, widths, strict=True)
        )
        line = "  ".join(cells)
        print((line if room is None else cropped(line, room)).rstrip())


class StatusLine:
    """A line on a terminal's stderr that says what is going on, once that has taken a moment.

    Without a terminal nothing is shown, but for what takes minutes: then a plain line now and then.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._started = self._last_plain = time.monotonic()
        self._shown = False

    def show(self, text: str, *, takes_minutes: bool = False) -> None:
        """Shows a text, once the work has taken a moment."""
        now = time.monotonic()
        if self._quiet or now - self._started < PROGRESS_AFTER_SECONDS:
            return
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._shown = True
            print(f"\r\x1b[K{dim(cropped(safe(text), width))}", end="", file=sys.stderr, flush=True)
        elif takes_minutes and now - self._last_plain > PLAIN_EVERY_SECONDS:
            self._last_plain = now
            print(safe(text), file=sys.stderr, flush=True)

    def around(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """`say` a sentence on a line of its own, clear of this one."""

        def said(text: str) -> None:
            self.done()
            say(text)

        return said

    def done(self) -> None:
        """Take the line away."""
        if self._shown:
            self._shown = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def stats(last: Delta, context: str = "") -> None:
    """One dim line on how an answer went; `context` says what is used of it."""
    if last.usage is None or last.timings is None:
        return
    parts = [
        f"{last.usage.completion_tokens} tokens",
        f"{last.timings.generation_tps:.1f} tok/s",
        f"first after {last.timings.first_token_s:.2f} s",
    ]
    if last.finish_reason == "length":
        parts.append("cut short: no room for more (-n, -c)")
    if last.finish_reason == "cancelled":
        parts.append("stopped")
    if context:
        parts.append(context)
    note(", ".join(parts))


def prompt(encoded: Prompt) -> None:
    """A prompt's text and token ids."""
    answer_text(encoded.text)
    ids = " ".join(map(str, encoded.tokens))
    print(f"\n\n{len(encoded.tokens)} tokens: {ids}")


def model(facts: Sequence[tuple[str, str]], parts: Sequence[tuple[str, int]]) -> None:
    """A model's facts and what its bytes are spent on."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {safe(value)}")
    total = sum(n_bytes for _, n_bytes in parts)
    print(f"\n{'Weights':<{width}}  {size(total)}")
    for role, n_bytes in parts:
        share = n_bytes / total
        print(f"  {role:<{width}}{size(n_bytes):>11}  {share:6.1%}  {bar(share)}")


def bar(share: float, width: int = 30) -> str:
    """Returns a bar of # for a share of `width`."""
    return "#" * max(1, round(share * width))


def size(n_bytes: int) -> str:
    """Bytes as people read them, in binary units."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
