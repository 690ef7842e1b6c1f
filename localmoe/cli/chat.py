"""`chat`: a conversation at a terminal, or one message per line of stdin."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..chat.session import Sessions
from ..config.environment import sessions_folder
from ..errors import LocalMoeError, UsageError
from ..prompt.reasoning import Answer
from ..repl.conversation import Conversation
from ..terminal import console
from ..terminal.progress import load_callbacks, model_resolver
from .options import (
    chat_options,
    group_of,
    json_option,
    load_options,
    sampling_options,
    settings_of,
    think_option,
    verbosity_options,
    warn_of_unheld,
)
from .prompt_input import check_stdin

if TYPE_CHECKING:
    from ..chat.session import Session
    from ..config.settings import Settings


MAX_LINE_CHARS = 16 << 20
"""More than any context holds."""


def chat_in_lines(conversation: Conversation, *, as_json: bool) -> None:
    """Answer every line. Raises LocalMoeError where one can't be answered; what was said is
    printed (with `as_json`) and kept (with a session) all the same."""
    answers: list[dict[str, Any]] = []
    conversation.ready()
    conversation.on_note = console.note
    if session := conversation.session:
        _say_unanswered(session.name, session.unanswered)
    try:
        for line in lines_of_stdin():
            text = line.rstrip("\r\n")
            if text.strip():
                answers += _turn(conversation, text, as_json)
    except (LocalMoeError, KeyboardInterrupt):
        if as_json:
            _document(conversation, answers)
        raise
    if as_json:
        _document(conversation, answers)


def lines_of_stdin() -> Iterator[str]:
    """Lines with their ends. Raises UsageError where one is too long, or no text."""
    try:
        while line := sys.stdin.readline(MAX_LINE_CHARS + 1):
            if len(line) > MAX_LINE_CHARS:
                raise UsageError(f"A line of stdin has more than {MAX_LINE_CHARS:,} characters.")
            yield line
    except UnicodeDecodeError:
        raise UsageError("stdin is not UTF-8 text.") from None


def _say_unanswered(name: str, question: str) -> None:
    """A question that a crash left without an answer stays in the file until another is asked."""
    if question:
        console.note(
            f"The last question of {name} was not answered: {console.first_line(question)}"
        )


def _turn(conversation: Conversation, text: str, as_json: bool) -> list[dict[str, Any]]:
    """One message and its answer; gives the facts of it."""
    answer = Answer()
    try:
        with closing(conversation.chat.ask(text)) as deltas:
            for delta in deltas:
                answer.add(delta)
                if not as_json and delta.kind == "text":
                    console.answer_text(delta.text)
    finally:
        if not as_json and answer.text:
            console.answer_text("\n")
        conversation.save()
    if answer.last is None:
        return []
    facts = asdict(answer.last)
    return [{k: facts[k] for k in ("finish_reason", "usage", "timings")}]


def _document(conversation: Conversation, answers: list[dict[str, Any]]) -> None:
    said = [{"role": m.role, "content": m.content} for m in conversation.messages]
    console.document({"messages": said, "answers": answers})


session_options = group_of(
    click.option("--continue", "continues", is_flag=True, help="Go on with the last session."),
    click.option("--session", "session_name", metavar="NAME", help="Go on with it, or begin it."),
)


@click.command()
@click.argument("model", required=False)
@load_options
@sampling_options
@think_option
@chat_options
@session_options
@click.option("--stats", is_flag=True, help="Figures after each answer; /stats on in the chat.")
@json_option
@verbosity_options
def chat(
    model: str | None,
    continues: bool,
    session_name: str | None,
    stats: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """A conversation. Ctrl-C stops an answer, Ctrl-D leaves; /? lists what else there is.

    MODEL is a name of `localmoe list`, with a quant like mixtral:Q5_K_M, or user/repo,
    user/repo:Q4_K_M, user/repo/file.gguf, a link to huggingface.co, or the path of a GGUF file;
    demo where none is given. What isn't here is fetched first.

    What is said at a terminal is kept: --continue and --session go on with it.

    Without a terminal, each line of stdin is a message; with --json the whole conversation is
    printed as one JSON document at the end.
    """
    settings = settings_of(options, model)
    check_stdin()
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    is_named = continues or session_name is not None
    sessions = stored(settings) if at_terminal or is_named else None
    with session_of(sessions, continues, session_name) as session:
        name = model or (session.model if session else "") or "demo"
        if model is None:
            settings = settings_of(options, name)  # what the config file says of that model
        if not quiet:
            warn_of_unheld(settings)
        whose = session.name if session and session.model and model is None else ""
        with conversation_with(name, settings, quiet or as_json, verbose, whose) as conversation:
            conversation.keep(sessions, session)
            if verbose or not at_terminal:
                conversation.load_now()
            if at_terminal:
                return talk(conversation, quiet=quiet, shows_stats=stats)

            return chat_in_lines(conversation, as_json=as_json)


@contextmanager
def conversation_with(
    name: str, settings: Settings, quiet: bool, verbose: bool, whose: str = ""
) -> Iterator[Conversation]:
    """A conversation with a model that is found and fetched, but not loaded yet.

    `whose` is the session that names it, if that does.
    """
    with model_resolver(settings, name, quiet, "chat", verbose) as search:
        try:
            found = search.find(name)
        except UsageError as error:
            if not whose:
                raise
            raise UsageError(
                f"The session {whose} was with {name}. {error.message}",
                f"Try: localmoe chat MODEL --session {whose}",
            ) from None
        found = search.fetch(found)
        measuring = search.release_engine()
    with load_callbacks(name, quiet, verbose) as callbacks:
        conversation = Conversation(found, settings, callbacks, measuring)
        try:
            yield conversation
        finally:
            conversation.close()


def talk(conversation: Conversation, *, quiet: bool, shows_stats: bool) -> None:
    """The conversation at a terminal."""
    # start-up, 180 ms of prompt_toolkit, which a pipe does not need
    from ..repl.commands import COMMANDS
    from ..repl.repl import Repl

    folder = sessions_folder().parent / "typed"
    history = folder / "history" if conversation.settings.save else None
    Repl(conversation, COMMANDS, history=history, quiet=quiet, shows_stats=shows_stats).run()


def stored(settings: Settings) -> Sessions | None:
    """Where sessions are kept; None where they aren't."""
    if not settings.save:
        return None

    return Sessions(sessions_folder())


def session_of(
    sessions: Sessions | None, continues: bool, name: str | None
) -> AbstractContextManager[Session | None]:
    """The session that goes on, or begins with a name; None where none is named. Raises
    UsageError."""
    if continues and name is not None:
        raise UsageError("Both --continue and --session were given.", "Leave one of them out.")
    if (continues or name is not None) and sessions is None:
        raise UsageError("A session can't go on where none is kept.", "Leave out --no-save.")
    if sessions is None:
        return nullcontext()
    if continues:
        latest = sessions.latest()
        if latest is None:
            raise UsageError("No session is kept yet.", "Begin one: localmoe chat")
        return latest
    return nullcontext() if name is None else sessions.open_or_new(name)
