"""Pictures of the chat for the documentation: what a real terminal shows, as SVG.

    python scripts/screens.py docs/screens

The chat is run in a pty with the demo model; what it writes goes through pyte, and what is on the
screen then becomes a picture. The demo model writes no Markdown: that picture is of an answer that
is played to the same code which shows a model's.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from terminal import Terminal

from localmoe.engine.protocol import Delta
from localmoe.terminal.answer_view import AnswerView

COLUMNS, ROWS = 84, 24
COLOURS = {"brown": "yellow", "default": None}
MARKDOWN = """\
Here is a **binary search**, and what it costs:

```python
def find(items: list[int], wanted: int) -> int | None:
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2  # rounds down
        if items[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low if items[low:low + 1] == [wanted] else None
```

| Items | Steps at most | A linear search |
|------:|:-------------:|----------------:|
| 1,000 | 10 | 1,000 |
| 1,000,000 | 20 | 1,000,000 |

1. The list has to be *sorted*.
2. Of equal items it finds the first; see `bisect_left`.
"""


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as state:
        os.environ |= {"LOCALMOE_STATE": state, "LOCALMOE_TUNE": "no"}
        for name, play in PICTURES.items():
            (folder / f"{name}.svg").write_text(play(), "utf-8")
            print(folder / f"{name}.svg")


def chat() -> str:
    terminal = Terminal(
        ["chat", "demo", "--temp", "0", "--stats", "--session", "monday"], COLUMNS, ROWS
    )
    terminal.wait_prompt()
    terminal.enter("Hi! How are you?")
    terminal.enter("Do you like music?")
    terminal.enter("/set tempp 0.2")
    terminal.enter("/undo")
    terminal.send("/s")
    terminal.wait_for("sessions")
    terminal.pump(0.3)
    picture = svg(terminal.screen, "localmoe chat demo --stats")
    terminal.close()
    return picture


def session() -> str:
    """A session that goes on, and an engine that is killed in it."""
    import signal

    import psutil

    first = Terminal(["chat", "demo", "--temp", "0", "--session", "week"], COLUMNS, ROWS)
    first.wait_prompt()
    first.enter("My name is Tom. Do you like long walks in the hills when it rains?")
    first.send("\x04")
    first.ends()
    terminal = Terminal(["chat", "--continue", "--temp", "0"], COLUMNS, ROWS)
    terminal.wait_prompt(2)
    terminal.enter("What did you do today?")
    terminal.enter("/show")
    for process in psutil.Process(terminal.child.pid).children():
        process.send_signal(signal.SIGKILL)
    terminal.enter("Are you still there?")
    picture = svg(terminal.screen, "localmoe chat --continue")
    terminal.close()
    return picture


def markdown() -> str:
    screen = pyte.Screen(COLUMNS, ROWS + 1)
    stream = pyte.Stream(screen)
    screen.set_mode(pyte.modes.LNM)
    view = AnswerView(stream.feed, lambda: os.terminal_size((COLUMNS, ROWS + 1)))
    view.begin()
    for start in range(0, len(MARKDOWN), 3):
        view.add(Delta(1, text=MARKDOWN[start : start + 3]))
    view.finish()
    return svg(screen, "localmoe chat")


def svg(screen: pyte.Screen, title: str) -> str:
    """A screen as a picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    last = max(n for n, line in enumerate(screen.display) if line.strip())
    for row in range(last + 1):
        text = Text()
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            text.append(cell.data, style_of(cell))
        console.print(text, soft_wrap=True)
    return console.export_svg(
        title=title, unique_id=f"screen-{''.join(filter(str.isalpha, title))}"
    )


def style_of(cell: pyte.screens.Char) -> Style:
    return Style(
        color=colour(cell.fg),
        bgcolor=colour(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        strike=cell.strikethrough,
        reverse=cell.reverse,
    )


def colour(name: str) -> str | None:
    """A colour's name in rich's words."""
    if name in COLOURS:
        return COLOURS[name]
    if len(name) == 6 and all(digit in "0123456789abcdef" for digit in name):
        return f"#{name}"
    return (
        name.replace("brightbrown", "bright_yellow")
        .replace("bright", "bright_", 1)
        .replace("__", "_")
    )


PICTURES: dict[str, Callable[[], str]] = {
    "chat": chat,
    "session": session,
    "markdown": markdown,
}

if __name__ == "__main__":
    main()
