"""The conversation at a terminal: reading lines, showing answers, a few commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Any

from ..errors import PromptError, RequestError
from ..serving.chat import Answer, Chat
from . import render

HELP = """\
/clear   begin anew (a system message stays)
/stats   how much of the context is used
/exit    leave (Ctrl-D too)
Ctrl-C   stop an answer; what came of it stays"""


class Repl:
    """Asks for messages until there are no more, and shows the answers.

    With a terminal it edits lines and shows figures; without one, each line of stdin is a message.
    """

    def __init__(self, chat: Chat, name: str, *, as_json: bool, quiet: bool) -> None:
        self._chat = chat
        self._name = name
        self._as_json = as_json
        self._at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
        self._quiet = quiet or not self._at_terminal
        self._answers: list[dict[str, Any]] = []

    def run(self) -> None:
        if not self._quiet:
            render.note(f"{self._name}. /? for help, Ctrl-D to leave.")
        read = terminal_reader() if self._at_terminal else line_reader()
        while self._goes_on(read):
            pass
        if self._as_json:
            messages = [{"role": m.role, "content": m.content} for m in self._chat.messages]
            render.document({"messages": messages, "answers": self._answers})

    def _goes_on(self, read: Callable[[], str | None]) -> bool:
        """A line and what it asks for; False where the conversation is to end."""
        try:
            line = read()
            if line is None:
                return False
            if line.startswith("/") and self._at_terminal:
                return self._command(line.strip()) != "exit"
            if line.strip():
                self._turn(line)
        except (
            KeyboardInterrupt
        ):  # at a terminal one that comes late, as an answer ends, is nothing
            if not self._at_terminal:
                raise
        return True

    def _turn(self, text: str) -> None:
        answer = Answer()
        try:
            with closing(self._chat.ask(text)) as deltas:
                for delta in deltas:
                    answer.add(delta)
                    if not self._as_json:
                        render.answer_text(delta.text)
        except KeyboardInterrupt:
            if not self._at_terminal:
                raise
            render.answer_text("\n")
            render.note("stopped" if answer.text else "stopped; the question is taken back")
            return
        except (PromptError, RequestError) as error:
            if not self._at_terminal:
                raise
            render.error(error.message, error.hint)
            return
        self._close_turn(answer)

    def _close_turn(self, answer: Answer) -> None:
        assert answer.last
        if self._as_json:
            facts = asdict(answer.last)
            self._answers.append({k: facts[k] for k in ("finish_reason", "usage", "timings")})
            return
        render.answer_text("\n")
        if not self._quiet:
            render.stats(answer.last)

    def _command(self, line: str) -> str:
        """Do what a command says; gives "exit" where the conversation is to end."""
        match line:
            case "/exit" | "/quit" | "/bye":
                return "exit"
            case "/?" | "/help":
                render.note(HELP)
            case "/clear":
                self._chat.clear()
                render.note("A new conversation.")
            case "/stats":
                used, room = self._chat.n_tokens(), self._chat.model.n_ctx
                render.note(f"{used} of {room} tokens of context used.")
            case _:
                render.note(f"There is no command {line.split()[0]}. /? lists them.")
        return ""


def terminal_reader() -> Callable[[], str | None]:
    """Lines with editing and a history; None at Ctrl-D. Ctrl-C empties the line."""
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession("> ")

    def read() -> str | None:
        while True:
            try:
                return session.prompt()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None

    return read


def line_reader() -> Callable[[], str | None]:
    """Lines of a pipe or a file; None at its end."""

    def read() -> str | None:
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    return read
