"""The commands of a conversation: their names, what they do, and what may stand behind them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from .repl import Repl

Run = Callable[["Repl", str], None]
Complete = Callable[["Repl"], Iterable[tuple[str, str]]]
KEYS = """\
\"\"\" ... \"\"\"   a message of many lines; so is what is pasted
Alt-Enter     a new line (a backslash at the line's end does too)
Ctrl-G        write in your editor
Ctrl-C        stop an answer; what came of it stays
Ctrl-D        leave
A message that begins with a slash: put a space before it, or type //"""


@dataclass(frozen=True, slots=True)
class Command:
    """`words` gives what may follow, each with what it is. `takes_text`: also of several lines."""

    name: str
    arguments: str
    about: str
    run: Run
    words: Complete | None = None
    takes_file: bool = False
    takes_text: bool = False
    other_names: tuple[str, ...] = ()


class Commands:
    """A table of commands."""

    def __init__(self, commands: Iterable[Command]) -> None:
        self._commands = tuple(commands)
        names = ((name, c) for c in self._commands for name in (c.name, *c.other_names))
        self._by_name = dict(names)

    def is_one(self, text: str) -> bool:
        """Whether a text is a command, or is meant to be one: no path, and no block of lines."""
        name, _ = split(text)
        if not text.startswith("/") or "/" in name:
            return False
        command = self._by_name.get(name)
        return "\n" not in text.strip() or bool(command and command.takes_text)

    def run(self, repl: Repl, line: str) -> None:
        """Do what a line like "/set temp 0" says. A name that is none raises UsageError; then the
        line is offered again."""
        name, argument = split(line)
        repl.offer = line
        command = self.find(name)
        repl.offer = ""
        command.run(repl, argument)

    def find(self, name: str) -> Command:
        if name in self._by_name:
            return self._by_name[name]
        near = difflib.get_close_matches(name, self._by_name, n=1)
        hint = f"Did you mean /{near[0]}? " if near else "/? lists them. "
        raise UsageError(
            f"There is no command /{name}.", f"{hint}To send it as a message, begin with //."
        )

    def help(self) -> str:
        shown = [(f"/{c.name} {c.arguments}".rstrip(), c.about) for c in self._commands]
        width = max(len(usage) for usage, _ in shown)
        return "\n".join([*(f"{usage:<{width}}  {about}" for usage, about in shown), "", KEYS])

    def complete(self, repl: Repl, text: str) -> Iterable[tuple[str, int, str]]:
        """What may stand at the end of `text`: the word, how much of the text it replaces, what
        it is."""
        name, space, argument = text[1:].partition(" ")
        if not space:
            for command in self._commands:
                if command.name.startswith(name):
                    yield command.name, len(name), command.about
        elif (found := self._by_name.get(name)) is None:
            return
        elif found.takes_file:
            yield from files(argument)
        elif found.words:
            for word, about in found.words(repl):
                if word.startswith(argument):
                    yield word, len(argument), about


def split(line: str) -> tuple[str, str]:
    """The name of a command, and what follows."""
    name, *rest = line[1:].split(maxsplit=1) if line[1:2].strip() else [""]
    return name, rest[0].strip() if rest else ""


def files(begun: str) -> Iterable[tuple[str, int, str]]:
    """Paths that begin like this."""
    from prompt_toolkit.completion import CompleteEvent, PathCompleter
    from prompt_toolkit.document import Document

    completer = PathCompleter(expanduser=True)
    for found in completer.get_completions(Document(begun), CompleteEvent()):
        yield found.text, -found.start_position, ""
