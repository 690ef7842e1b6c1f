"""The line editor: what a person types at a terminal, with a history and completion.

What is typed ahead while nobody is asked for a line waits, unseen.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from ..files import make_private_folder, open_regular, write_atomically

if sys.platform != "win32":
    import termios

LFLAG, CC = 3, 6
"""Places in the list that termios.tcgetattr gives."""


@contextmanager
def unseen_keys() -> Iterator[None]:
    """Keys that are pressed meanwhile aren't printed into an answer; Ctrl-C is as ever.

    They are read at the next prompt, which finds the terminal like this and leaves it so.
    """
    if sys.platform == "win32":  # Windows prints nothing unasked
        yield
        return
    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (termios.error, OSError, ValueError):
        yield
        return
    quiet = termios.tcgetattr(sys.stdin.fileno())
    quiet[LFLAG] &= ~(termios.ECHO | termios.ICANON)
    quiet[CC][termios.VMIN], quiet[CC][termios.VTIME] = 1, 0
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error, OSError, ValueError):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)


QUOTES = '"""'
PROMPT, CONTINUED = "> ", ". "
REFRESH_SECONDS = 0.25
MAX_HISTORY_BYTES = 4 << 20

Words = Callable[[str], Iterable[tuple[str, int, str]]]
"""Given the text before the cursor: what may stand there, how many characters of the text it
replaces, and what it is."""


class Interrupted(Exception):
    """Ctrl-C; `had_text` where the line was not empty, and is now."""

    def __init__(self, had_text: bool) -> None:
        super().__init__()
        self.had_text = had_text


class LineEditor:
    """Asks for texts. `hint` is shown, dim, where nothing was typed; it may change meanwhile."""

    def __init__(self, history: Path | None, words: Words, hint: Callable[[], str]) -> None:
        self._hint = hint
        self._error: BaseException | None = None
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUED,
            history=history_of(history),
            completer=_Completer(words),
            complete_while_typing=Condition(self._is_command),
            key_bindings=keys(),
            placeholder=self._placeholder,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
        )

    def read(self, default: str = "", *, refresh: bool = False) -> str | None:
        """A text; None at Ctrl-D. Raises Interrupted, and what `fail` was given.

        `refresh`: the hint is asked for again and again.
        """
        try:
            text = self._session.prompt(
                default=default,
                refresh_interval=REFRESH_SECONDS if refresh else 0.0,
                pre_run=self._leave,
            )
            return unquoted(text)
        except EOFError:
            return None
        except KeyboardInterrupt:
            raise Interrupted(bool(self._session.default_buffer.text)) from None

    def fail(self, error: BaseException) -> None:
        """End the waiting for a text, from any thread: `read` raises this."""
        self._error = error
        loop = self._session.app.loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it ended by itself meanwhile
                loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        app = self._session.app
        if self._error is not None and app.is_running and not app.is_done:
            app.exit(exception=self._error)

    def _placeholder(self) -> StyleAndTextTuples:
        return [("fg:ansibrightblack", self._hint())]

    def _is_command(self) -> bool:
        text = self._session.default_buffer.text
        return text.startswith("/") and "\n" not in text


def unquoted(text: str) -> str:
    """A text without the three quotes around it."""
    inner = text.strip()
    if inner.startswith(QUOTES) and inner.endswith(QUOTES) and len(inner) >= 2 * len(QUOTES):
        return inner[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


def is_open(text: str) -> bool:
    """Whether Enter begins a new line: three quotes aren't closed yet."""
    inner = text.strip()
    return inner.startswith(QUOTES) and (len(inner) < 2 * len(QUOTES) or not inner.endswith(QUOTES))


def keys() -> KeyBindings:
    """Enter sends, Alt-Enter or a backslash before Enter begins a line, Ctrl-G opens the editor."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        before = buffer.document.current_line_before_cursor
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None  # Enter takes what was chosen, and goes on
        elif is_open(buffer.text):
            buffer.newline(copy_margin=False)
        elif before.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @bindings.add("c-g")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor(validate_and_handle=False)

    return bindings


class _Completer(Completer):
    def __init__(self, words: Words) -> None:
        self._words = words

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        for word, n_chars, about in self._words(text):
            yield Completion(word, start_position=-n_chars, display_meta=about)


def history_of(path: Path | None) -> History:
    """What was typed before, in a file that nobody else can read; None keeps nothing."""
    if path is None:
        return InMemoryHistory()
    try:
        make_private_folder(path.parent)
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        open_regular(path).close()
        path.chmod(0o600)
        if path.stat().st_size > MAX_HISTORY_BYTES:
            forget_oldest(path)
    except OSError:
        return InMemoryHistory()
    return _PrivateHistory(str(path))


def forget_oldest(path: Path) -> None:
    """Keep the newer half of a history; entries begin with a comment line of their time."""
    with open_regular(path) as file:
        file.seek(-MAX_HISTORY_BYTES // 2, os.SEEK_END)
        kept = file.read(MAX_HISTORY_BYTES)
    begin = kept.find(b"\n# ")
    write_atomically(path, kept[begin:] if begin >= 0 else b"", durable=False, mode=0o600)


class _PrivateHistory(FileHistory):
    """A history whose disk may fill up: then what is typed is remembered for this chat alone."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)
