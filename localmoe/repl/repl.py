"""The conversation at a terminal: a line is read, what it asks for is done, until it ends."""

from __future__ import annotations

import re
import shutil
import textwrap
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.protocol import Delta
from ..errors import LocalMoeError, PromptError, RequestError
from ..prompt.reasoning import Answer
from ..terminal import console
from ..terminal.answer_view import AnswerView, PlainView
from ..terminal.line_editor import Interrupted, LineEditor, unseen_keys
from .conversation import Conversation
from .turn import Ended, Interrupt, Note, Tick, Turn

if TYPE_CHECKING:
    from ..terminal.answer_view import View
    from .commands import SlashCommands


STOP_SECONDS = 0.8
"""So long an answer that was stopped is waited for; then the prompt is back all the same."""
WAKE_SECONDS = 0.1
HOW_TO_LEAVE = "Ctrl-D or /exit leaves."
Deltas = Generator[Delta, None, None]


class Repl:
    """Asks for messages until there are no more, and shows the answers.

    What commands may use: `conversation`, `view`, `last` (the last answer), `shows_stats`, `offer`
    (text that the next line begins with), `attached` (text that the next message begins with) and
    `edits` (that it takes the last one's place; no longer than up to the next command).
    """

    def __init__(
        self,
        conversation: Conversation,
        commands: SlashCommands,
        *,
        history: Path | None,
        quiet: bool = False,
        shows_stats: bool = False,
    ) -> None:
        self.conversation = conversation
        self.commands = commands
        self.shows_stats = shows_stats
        self.last: Answer | None = None
        self.offer = ""
        self.attached = ""
        self.edits = False
        self._quiet = quiet
        self._complaint = ""  # why it could not be kept, as it was said
        self._typing = LineEditor(history, lambda text: commands.complete(self, text), self._hint)
        self._turn: Turn | None = None  # one that is still ending
        self._view: View | None = None
        conversation.on_note = self._note

    def run(self) -> None:
        """The whole conversation. Raises LocalMoeError where it can't go on."""
        self._greet()
        # not before: the imports of both would be in each other's way
        self.conversation.loading.start(self._typing.fail)
        with unseen_keys():
            try:
                while self._goes_on():
                    pass
            finally:
                self._leave()

    def say(self, text: str) -> None:
        """Ask something; the answer is shown, and kept."""
        chat = self.ready().chat
        edits, attached = self.edits, self.attached
        self.edits, self.attached = False, ""
        message = attached + text
        self.save(message)
        try:
            self.answer(chat.replace_last(message) if edits else chat.ask(message), question=text)
        finally:
            if self.offer:  # nothing came of it: it can be sent again as it was
                self.edits, self.attached = edits, attached

    def answer(self, deltas: Deltas, question: str = "") -> None:
        """Show an answer as it comes; `question` is offered again where nothing came of it."""
        turn, answer = Turn(deltas), Answer()
        self.offer = ""
        self.conversation.let_engine_return()
        self.view.begin()
        self._turn = turn
        with turn.taking_interrupts():  # a Ctrl-C that comes as it ends is nothing any more
            ended = self._follow(turn.start(), answer)
            self.view.finish()
            self.last = answer
            if ended is not None:
                self._turn = None
            self._close(answer, ended, question)

    def ready(self) -> Conversation:
        """The conversation, once its model is loaded and its last answer has ended."""
        self.settle()
        loading = self.conversation.loading
        line = console.StatusLine()
        try:
            while not loading.wait(WAKE_SECONDS):
                line.show(f"Loading {self.conversation.model_name} {loading.fraction:4.0%}")
        finally:
            line.done()
        self.conversation.ready()
        loading.say()
        return self.conversation

    def settle(self) -> None:
        """Wait for an answer that was stopped; another Ctrl-C ends the engine."""
        if self._turn is None:
            return
        with self._turn.taking_interrupts():
            for event in self._turn.events():
                if isinstance(event, Interrupt):
                    self.conversation.kill_engine()
                elif isinstance(event, Tick):
                    self.view.waiting("the last answer is still being stopped; Ctrl-C ends it")
        self.view.finish()
        self._turn = None
        self.conversation.let_engine_return()
        self.save()

    @property
    def view(self) -> View:
        """What answers are shown with, by the settings. Its code is imported for the first."""
        if self._view is None:
            settings = self.conversation.settings
            if settings.plain or not console.prepare_screen():
                self._view = PlainView(console.answer_text)
            else:
                size, colour = shutil.get_terminal_size, console.has_colour()
                self._view = AnswerView(console.screen, size, colour=colour)
            self._view.shows_thinking = settings.think != "hide"
        return self._view

    def renew_view(self) -> None:
        """Go by settings that have changed."""
        self._view = None

    # ---- a line ----

    def _goes_on(self) -> bool:
        """A line and what it asks for; False where the conversation is to end."""
        try:
            is_loading = not self.conversation.loading.is_over
            line = self._typing.read(self.offer, refresh=is_loading)
        except Interrupted as stop:
            self.offer, self.edits = "", False
            if not stop.had_text:
                left_out = "The file that was read is left out. " if self.attached else ""
                self.attached = ""
                self.tell(left_out + HOW_TO_LEAVE)
            return True
        if line is None:
            return False
        self.offer = ""
        try:
            return self._do(line)
        except KeyboardInterrupt:  # one that comes while a model loads, or as an answer ends
            self.offer = self.offer or line
        except EOFError:  # /exit
            return False
        except LocalMoeError as error:
            if self.conversation.loading.has_failed:
                raise
            console.error(error.message, error.hint)
        return True

    def _do(self, line: str) -> bool:
        """What a line asks for."""
        self.conversation.let_engine_return()
        if self.commands.is_one(line):
            self.edits = False
            self.commands.run(self, line.strip())
        elif line.strip():
            self.say(line[1:] if line.startswith("//") else line.lstrip(" "))
        return True

    # ---- an answer ----

    def _follow(self, turn: Turn, answer: Answer) -> Ended | None:
        """Show what happens in a turn; None where it takes long to stop."""
        stopped_at: float | None = None
        for event in turn.events():
            if isinstance(event, Delta):
                answer.add(event)
                self.view.add(event)
            elif isinstance(event, Note):
                self.view.note(event.text)
            elif isinstance(event, Interrupt):
                if stopped_at is not None:
                    self.conversation.kill_engine()
                turn.stop()
                stopped_at = stopped_at or time.monotonic()
            elif isinstance(event, Ended):
                return event
            elif stopped_at is None:
                self.view.waiting("reading")
            if stopped_at is not None and time.monotonic() - stopped_at > STOP_SECONDS:
                return None
        return None

    def _close(self, answer: Answer, ended: Ended | None, question: str) -> None:
        """What comes after an answer: figures, or why there are none."""
        error = ended.error if ended else None
        if not answer.text:
            self.offer = question
        if isinstance(error, (PromptError, RequestError)):
            console.error(error.message, error.hint)
        elif error is not None and self.conversation.was_killed:
            self.tell("The engine was ended; the next message starts it again.")
        elif error is not None:
            raise error
        elif answer.last is None:
            self.tell("stopped" if answer.text else "stopped; the question is taken back")
        elif self.shows_stats:
            self.show_stats()
        if ended is not None:
            self.save()
        if not self._quiet:
            console.screen("\n")

    @staticmethod
    def tell(text: str) -> None:
        """A remark, dim, its lines broken between words; a table's second column stays one."""
        width = shutil.get_terminal_size().columns - 1
        lines = console.safe(text).split("\n")  # before they are measured
        console.note("\n".join(folded(line, width) for line in lines))

    def save(self, question: str = "") -> bool:
        """Keep what was said, if it is to be kept; whether it is.

        That it can't be is said once, and is no reason to stop talking; next time it is tried anew.
        """
        complaint = ""
        try:
            self.conversation.save(question)
        except LocalMoeError as error:
            complaint = str(error)
        if complaint and complaint != self._complaint:
            console.warning(complaint)
        self._complaint = complaint
        return not complaint and self.conversation.sessions is not None

    def show_stats(self) -> None:
        """The line of figures on the last answer."""
        last = self.last.last if self.last else None
        if last is None or last.usage is None:
            self.tell("Nothing was answered yet.")
            return
        used, room = last.usage.prompt_tokens + last.usage.completion_tokens, self.n_ctx
        console.stats(last, f"{used:,} of {room:,} tokens of context used")

    @property
    def n_ctx(self) -> int:
        """Tokens of context."""
        return self.conversation.chat.model.n_ctx

    # ---- beginning and end ----

    def _greet(self) -> None:
        conversation = self.conversation
        if not self._quiet:
            console.note(f"{conversation.title}. /? for help, Ctrl-D to leave.")
            if conversation.messages:
                self.show_recent()
        self.offer_unanswered()

    def offer_unanswered(self) -> None:
        """Have a question that a crash left without an answer typed already."""
        session = self.conversation.session
        self.offer = session.unanswered if session else ""
        if self.offer and not self._quiet:
            self.tell("The last question was not answered. Enter asks it again.")

    def show_recent(self) -> None:
        """Where a conversation that goes on had got to."""
        conversation = self.conversation
        said = [m for m in conversation.messages if m.role != "system"]
        name = conversation.session.name if conversation.session else ""
        self.tell(f"{name}: {len(said)} messages so far." if said else f"{name}: nothing yet.")
        for message in said[-2:]:
            if message.role == "user":
                self.tell("> " + message.content.replace("\n", "\n. "))
            else:
                self.view.begin()
                self.view.add(Delta(0, text=message.content))
                self.view.finish()
                console.screen("\n")

    def _leave(self) -> None:
        """Keep what was said, and say how to go on."""
        conversation = self.conversation
        if self._turn is not None:
            conversation.kill_engine()
            self.settle()
        said = conversation.is_ready and any(m.role == "user" for m in conversation.messages)
        is_kept = said and self.save()
        session = conversation.session
        if is_kept and session is not None and not self._quiet:
            console.note(f"Continue with: localmoe chat --session {session.name}")

    def _hint(self) -> str:
        loading = self.conversation.loading
        if not loading.is_over:
            return f"loading {loading.fraction:.0%}; you can type already"
        return "" if self.last or self.edits else "your message; /? for help"

    def _note(self, text: str) -> None:
        if self._turn is not None and not self._turn.is_over:
            self._turn.note(text)
        else:
            self.tell(text)


def folded(line: str, width: int) -> str:
    """A line broken between words; what follows is set in as far as its second column."""
    column = re.match(r"\S.*?  +(?=\S)|(?=)", line)
    indent = " " * (column.end() if column and column.end() < width // 2 else 0)
    return textwrap.fill(
        line, width, subsequent_indent=indent, replace_whitespace=False, drop_whitespace=True,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
