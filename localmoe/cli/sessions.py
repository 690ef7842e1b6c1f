"""`sessions`: the chats that are kept, to look at, take along and delete."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from ..chat.kv_snapshot import QUOTA_BYTES
from ..chat.session import kept_sessions, others
from ..errors import LocalMoeError, UsageError
from ..terminal import console
from .completion import SessionType
from .options import json_option

if TYPE_CHECKING:
    from ..chat.session import SessionFacts, Sessions
    from ..chat.transcript import Transcript


HEAD = ("NAME", "MODEL", "LAST", "MESSAGES", "TEXT", "STATE", "ABOUT")
TITLE_LENGTH = 60
SPEAKERS = {"system": "System", "user": "You"}


@click.group()
def sessions() -> None:
    """The chats that are kept. `localmoe chat --session NAME` goes on with one."""


@sessions.command("list")
@json_option
def list_sessions(as_json: bool) -> None:
    """All sessions, the last one first.

    STATE is what is kept beside the text so that a chat opens again at once; the oldest go when
    all together are too large.
    """
    facts = kept_sessions().all()
    if as_json:
        console.document([session_document(found) for found in facts])
        return
    if not facts:
        console.note("No session is kept yet. Begin one: localmoe chat")
        return
    console.table([HEAD, *map(row, facts)])
    console.lines(totals(facts))


@sessions.command("show")
@click.argument("name", type=SessionType())
@click.option("--think", is_flag=True, help="What the model thought, too.")
def show_session(name: str, think: bool) -> None:
    """What was said in a session."""
    found = read_session(kept_sessions(), name)
    console.lines(spoken(found, think))


@sessions.command("export")
@click.argument("name", type=SessionType())
@click.option("--format", "form", type=click.Choice(["md", "json"]), default="md")
@click.option("-o", "--output", metavar="FILE", default="-", help="A new file; stdout by default.")
def export(name: str, form: str, output: str) -> None:
    """A session as Markdown or as JSON."""
    found = read_session(kept_sessions(), name)
    if output != "-":
        write_new(output, as_markdown(found) if form == "md" else as_json_text(name, found))
    elif form == "json":
        console.document(exported(name, found))
    else:
        console.answer_text(as_markdown(found))


@sessions.command("rm")
@click.argument("names", nargs=-1, metavar="NAME...", type=SessionType())
@click.option("--all", "everything", is_flag=True, help="All sessions; needs --yes.")
@click.option("-y", "--yes", is_flag=True, help="Yes, all of them.")
def remove(names: tuple[str, ...], everything: bool, yes: bool) -> None:
    """Delete sessions. One that is named is not asked about."""
    store = kept_sessions()
    if everything == bool(names):
        raise UsageError(
            "Name the sessions to delete, or say --all.", "See: localmoe sessions list"
        )
    if everything and not yes:
        n = len(store.names())
        raise UsageError(f"That would delete {counted(n, 'session')}.", "Say --all --yes.")
    names = tuple(dict.fromkeys(names or store.names()))
    for name in names:
        store.check_known(name)  # before any is gone
    failed: list[LocalMoeError] = []
    n_bytes = 0
    for name in names:
        try:
            n_bytes += store.remove(name)
        except LocalMoeError as error:
            failed.append(error)
    n_gone = len(names) - len(failed)
    if n_gone or not failed:
        freed = console.size(n_bytes)
        console.lines([f"{counted(n_gone, 'session')} deleted, {freed} free again."])
    if failed:
        raise failed[0]


def read_session(store: Sessions, name: str) -> Transcript:
    """A session, with a warning where lines of it are lost."""
    found = store.read(name)
    if found.damaged:
        console.warning(
            f"Line {found.damaged[0]} of {store.path(name)} is damaged{others(found.damaged)}: "
            "left out."
        )
    return found


# ---- list ----


def row(found: SessionFacts) -> Sequence[str]:
    """A session as a row of the table."""
    title = found.title[:TITLE_LENGTH] + ("..." if len(found.title) > TITLE_LENGTH else "")
    if found.damaged:
        title = f"(line {found.damaged[0]} is damaged) {title}"
    elif found.problem or not found.n_messages:
        title = found.problem or "(empty)"
    when = datetime.fromtimestamp(found.changed).strftime("%Y-%m-%d %H:%M")
    state = console.size(found.state_bytes) if found.state_bytes else ""
    sizes = (str(found.n_messages), console.size(found.text_bytes), state)
    model = short_model_name(found.model) if found.model else ""
    return (found.name, model, when, *sizes, title)


def short_model_name(model: str) -> str:
    """A model's name in a line; of a path its last part."""
    name = " ".join(model.split())
    return re.split(r"[/\\]", name)[-1] if name.endswith(".gguf") else name or "a model"


def totals(facts: Sequence[SessionFacts]) -> Iterator[str]:
    """Yields the lines below the table: number and size of all sessions."""
    text = sum(found.text_bytes for found in facts)
    states = sum(found.state_bytes for found in facts)
    yield ""
    yield (
        f"{counted(len(facts), 'session')}: {console.size(text)} of text, "
        f"{console.size(states)} of states (at most {console.size(QUOTA_BYTES)})"
    )


def counted(n: int, what: str) -> str:
    """A number with its noun in the singular or plural."""
    return f"{n} {what}{'s' if n != 1 else ''}"


def session_document(found: SessionFacts) -> dict[str, Any]:
    """A session as --json promises it."""
    return {
        "name": found.name,
        "model": found.model,
        "title": found.title,
        "created": found.created,
        "changed": datetime.fromtimestamp(found.changed).astimezone().isoformat("T", "seconds"),
        "messages": found.n_messages,
        "text_bytes": found.text_bytes,
        "state_bytes": found.state_bytes,
        "damaged_lines": list(found.damaged),
        "problem": found.problem,
    }


# ---- show and export ----


def spoken(found: Transcript, think: bool) -> Iterator[str]:
    """A conversation as a person reads it at a terminal."""
    for n, message in enumerate(found.messages):
        if n:
            yield ""
        yield f"{SPEAKERS.get(message.role, short_model_name(found.model))}:"
        if think and message.thinking:
            yield from (f"  | {line}" for line in message.thinking.strip().split("\n"))
        yield from message.content.strip("\n").split("\n")


def as_markdown(found: Transcript) -> str:
    """A conversation as a Markdown document."""
    title = found.title[:TITLE_LENGTH] or "A conversation"
    parts = [f"# {title}", f"*{short_model_name(found.model)}, {found.created[:10]}*"]
    for message in found.messages:
        speaker = SPEAKERS.get(message.role, short_model_name(found.model))
        parts += [f"## {speaker}", message.content.strip("\n")]
    return "\n\n".join(parts) + "\n"


def exported(name: str, found: Transcript) -> dict[str, Any]:
    """A session as JSON; its messages in the form of Hugging Face's."""
    messages = [
        {"role": m.role, "content": m.content, **({"thinking": m.thinking} if m.thinking else {})}
        for m in found.messages
    ]
    return {"name": name, "model": found.model, "created": found.created, "messages": messages}


def as_json_text(name: str, found: Transcript) -> str:
    """A session as a JSON document."""
    return json.dumps(exported(name, found), ensure_ascii=False, indent=2) + "\n"


def write_new(path: str, text: str) -> None:
    """A new file. Raises UsageError where there is one already, or it can't be written."""
    try:
        with open(path, "x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"There is a file {path} already.", "Give -o a new name.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} can't be written: {reason}.", "Check -o.") from None
