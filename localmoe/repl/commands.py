"""The slash commands of a chat: their names, what they do, and what may stand behind them.

One table has those on what was said (take it back, have it again, put a file to it, copy it),
another those on how it is answered: settings, figures, the plan, the model, what is kept.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit.completion import CompleteEvent, PathCompleter
from prompt_toolkit.document import Document

from ..catalog.catalog import model_aliases, read_catalog
from ..chat.context_window import SUMMARIZE
from ..chat.session import Sessions
from ..config.environment import config_folder, sessions_folder
from ..config.settings import Settings, load_settings
from ..config.sources import file_key, setting_name
from ..engine.protocol import TextPiece
from ..errors import LocalMoeError, UsageError
from ..files import read_text
from ..prompt.formats import EFFORTS
from ..terminal import console
from ..terminal.plan_view import plan_lines
from ..terminal.progress import load_callbacks, model_resolver
from .conversation import AT_LOADING

if TYPE_CHECKING:
    from .repl import Repl


CommandFunction = Callable[["Repl", str], None]
Complete = Callable[["Repl"], Iterable[tuple[str, str]]]
KEYS = """\
\"\"\" ... \"\"\"   a message of many lines; so is what is pasted
Alt-Enter     a new line (a backslash at the line's end does too)
Ctrl-G        write in your editor
Ctrl-C        stop an answer; what came of it stays
Ctrl-D        leave
A message that begins with a slash: put a space before it, or type //"""


@dataclass(frozen=True, slots=True)
class SlashCommand:
    """`words` gives what may follow, each with what it is. `takes_text`: also of several lines."""

    name: str
    arguments: str
    about: str
    run: CommandFunction
    words: Complete | None = None
    takes_file: bool = False
    takes_text: bool = False
    other_names: tuple[str, ...] = ()


class SlashCommands:
    """A table of commands."""

    def __init__(self, commands: Iterable[SlashCommand]) -> None:
        self._commands = tuple(commands)
        names = ((name, c) for c in self._commands for name in (c.name, *c.other_names))
        self._by_name = dict(names)

    def is_one(self, text: str) -> bool:
        """Whether a text is a command, or is meant to be one: no path, and no block of lines."""
        name, _ = split_command(text)
        if not text.startswith("/") or "/" in name:
            return False
        command = self._by_name.get(name)
        return "\n" not in text.strip() or bool(command and command.takes_text)

    def run(self, repl: Repl, line: str) -> None:
        """Do what a line like "/set temp 0" says. A name that is none raises UsageError; then the
        line is offered again."""
        name, argument = split_command(line)
        repl.offer = line
        command = self.find(name)
        repl.offer = ""
        command.run(repl, argument)

    def find(self, name: str) -> SlashCommand:
        """Returns a command by its name. Raises UsageError with one that is near."""
        if name in self._by_name:
            return self._by_name[name]
        near = difflib.get_close_matches(name, self._by_name, n=1)
        hint = f"Did you mean /{near[0]}? " if near else "/? lists them. "
        raise UsageError(
            f"There is no command /{name}.", f"{hint}To send it as a message, begin with //."
        )

    def help(self) -> str:
        """Returns what can be typed, a line for each command."""
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


def split_command(line: str) -> tuple[str, str]:
    """The name of a command, and what follows."""
    name, *rest = line[1:].split(maxsplit=1) if line[1:2].strip() else [""]
    return name, rest[0].strip() if rest else ""


def files(begun: str) -> Iterable[tuple[str, int, str]]:
    """Paths that begin like this."""
    completer = PathCompleter(expanduser=True)
    for found in completer.get_completions(Document(begun), CompleteEvent()):
        yield found.text, -found.start_position, ""


CODE_BLOCK = re.compile(r"^( *)(`{3,}|~{3,})[^\n]*\n(.*?)^ *\2", re.DOTALL | re.MULTILINE)
MAX_TOKEN_BYTES = 16
"""No token is longer on an average: a file with more bytes for each token is too long unread."""


def show_help(repl: Repl, argument: str) -> None:
    """Lists the commands."""
    repl.tell(repl.commands.help())


def leave(repl: Repl, argument: str) -> None:
    """Ends the chat."""
    raise EOFError


def clear(repl: Repl, argument: str) -> None:
    """Begins a new conversation."""
    repl.ready().begin_anew()
    repl.last, repl.attached = None, ""
    repl.tell("A new conversation.")


def regenerate(repl: Repl, argument: str) -> None:
    """Answers the last question again."""
    repl.answer(repl.ready().chat.regenerate())


def undo(repl: Repl, argument: str) -> None:
    """Takes the last question and its answer back."""
    question = repl.ready().chat.undo()
    if question is None:
        raise UsageError("Nothing was asked yet.")
    repl.last = None
    repl.save()
    repl.tell(f"Taken back: {console.first_line(question.content)}")


def edit(repl: Repl, argument: str) -> None:
    """Offers the last question to be changed and sent again."""
    asked = [m.content for m in repl.ready().messages if m.role == "user"]
    asked = [text for text in asked if text != SUMMARIZE]
    if not asked:
        raise UsageError("Nothing was asked yet.")
    repl.offer, repl.edits = asked[-1], True
    repl.tell("Change it and send it again; Ctrl-C leaves it as it was.")


def system(repl: Repl, argument: str) -> None:
    """Shows, sets or removes the system message."""
    chat = repl.ready().chat
    if argument:
        chat.set_system(None if argument in ("none", '""') else argument.strip('"'))
        repl.save()
    now = next((m.content for m in chat.messages if m.role == "system"), None)
    repl.tell(f"System message: {now}" if now else "There is no system message.")


def read(repl: Repl, argument: str) -> None:
    """Puts a text file before the next message."""
    if not argument:
        raise UsageError("Which file?", "Try: /read notes.txt")
    path = Path(argument).expanduser()
    text = checked_text(repl, path)
    mark = "```" if "```" not in text else "~~~~~~"
    attached = f"{repl.attached}{path.name}:\n{mark}\n{text.rstrip()}\n{mark}\n\n"
    chat = repl.conversation.chat
    n_tokens, n_free = count(repl, attached), chat.n_free()
    if n_tokens > n_free:
        rest = "and what was read before it have" if repl.attached else "has"
        anew = "Begin anew with /clear, or ask" if chat.on_full == "stop" else "Ask"
        raise UsageError(
            f"{path.name} {rest} {n_tokens:,} tokens; {n_free:,} of the context are free for that.",
            f"{anew} for more room: /set ctx-size {2 * (n_tokens + repl.n_ctx)}, then /model.",
        )
    repl.attached = attached
    repl.tell(f"{path.name}, {n_tokens:,} tokens, goes with your next message.")


def checked_text(repl: Repl, path: Path) -> str:
    """What a text file holds. Raises UsageError where it is none, or can't fit by its size."""
    if path.is_file() and path.stat().st_size > MAX_TOKEN_BYTES * repl.ready().chat.model.n_ctx:
        size = console.size(path.stat().st_size)
        raise UsageError(f"{path.name} has {size}: more than {repl.n_ctx:,} tokens can hold.")
    text = read_text(str(path))
    if "\0" in text:
        raise UsageError(f"{path.name} is not a text.")
    return text


def count(repl: Repl, text: str) -> int:
    """Returns how many tokens a text has."""
    (tokens,) = repl.ready().chat.model.engine.tokenize([TextPiece(text)])
    return len(tokens)


def no_images(repl: Repl, argument: str) -> None:
    """Says that no model sees images here."""
    raise UsageError("No model can see images here: localmoe runs text models only.")


def copy(repl: Repl, argument: str) -> None:
    """Copies the last answer, or one of its code blocks."""
    text = last_answer(repl)
    if argument:
        blocks = [unindented(found) for found in CODE_BLOCK.finditer(text)]
        if not argument.isdigit() or not 1 <= int(argument) <= len(blocks):
            raise UsageError(
                f"There is no code block {argument}: the answer has {len(blocks)}.",
                "/copy alone copies all of it.",
            )
        text = blocks[int(argument) - 1]
    console.clipboard(text)
    repl.tell(f"Handed {len(text):,} characters to the terminal's clipboard (OSC 52).")


def unindented(found: re.Match[str]) -> str:
    """A code block without the indent that it has in a list."""
    lines = found[3].split("\n")
    return "\n".join(line.removeprefix(found[1]) for line in lines)


def think(repl: Repl, argument: str) -> None:
    """Shows what the model thought, or sets whether it thinks."""

    if argument:
        change(repl, "think", argument)
        return
    said = [m for m in repl.ready().messages if m.role == "assistant" and m.thinking]
    if not said:
        raise UsageError("The model did not think so far.", "Some models never do.")
    repl.tell(said[-1].thinking.strip())


def last_answer(repl: Repl) -> str:
    """Returns the last answer. Raises UsageError where there is none."""
    said = [m.content for m in repl.ready().messages if m.role == "assistant"]
    if not said:
        raise UsageError("Nothing was answered yet.")
    return said[-1]


CONVERSATION_COMMANDS = (
    SlashCommand("help", "", "what can be typed here", show_help, other_names=("?",)),
    SlashCommand("exit", "", "leave (Ctrl-D too)", leave, other_names=("quit", "bye")),
    SlashCommand("clear", "", "begin a new conversation (a system message stays)", clear),
    SlashCommand("regen", "", "have the last question answered anew", regenerate),
    SlashCommand("undo", "", "take the last question and its answer back", undo),
    SlashCommand("edit", "", "change the last question and send it again", edit),
    SlashCommand(
        "system",
        "[TEXT]",
        "show or set the system message; none takes it away",
        system,
        takes_text=True,
    ),
    SlashCommand("read", "FILE", "put a text file before your next message", read, takes_file=True),
    SlashCommand("image", "", "not there: text models only", no_images),
    SlashCommand("copy", "[N]", "copy the last answer, or its Nth code block", copy),
    SlashCommand(
        "think",
        "[on|off|hide|low|medium|high]",
        "show what the model thought; whether it thinks, and you see it",
        think,
        lambda repl: [
            ("on", "think, shown"),
            ("off", "don't"),
            ("hide", "think, unseen"),
            *((effort, "how hard, where the model has levels") for effort in EFFORTS),
        ],
    ),
)


AT_ONCE = (
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "seed", "max_tokens", "stop", "think", "on_full", "plain",
)  # fmt: skip


def set_option(repl: Repl, argument: str) -> None:
    """Changes an option."""
    name, _, value = argument.partition(" ")
    if not value.strip():
        raise UsageError("Set what to what?", "Try: /set temp 0.2, or /show for what is set.")
    change(repl, name, value.strip())


def change(repl: Repl, shown: str, value: str) -> None:
    """Give a setting another value. Raises UsageError for a wrong name or value."""
    name, conversation = setting(shown), repl.conversation
    if value == "default":
        new = getattr(conversation.began_with, name)
    elif value == "none":
        new = Settings.model_fields[name].get_default()
    else:
        new = getattr(load_settings({name: value}, called=option_name, aliases=model_aliases), name)
    conversation.change(conversation.settings.model_copy(update={name: new}))
    repl.renew_view()
    is_pending = name in conversation.pending
    later = " It counts once /model has loaded the model anew." if is_pending else ""
    repl.tell(f"{option_name(name)} is {shown_value(new)}.{later}")


def setting(shown: str) -> str:
    """The setting that an option's name means. Raises UsageError."""
    name = setting_name(shown)
    if name in AT_ONCE + AT_LOADING:
        return name
    known = [option_name(each) for each in AT_ONCE + AT_LOADING]
    near = difflib.get_close_matches(option_name(name), known, n=1, cutoff=0.5)
    raise UsageError(
        f"There is nothing called {shown} to set.",
        f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}.",
    )


def option_name(name: str) -> str:
    """A setting's name as it is typed."""
    return file_key(name).replace("_", "-")


def shown_value(value: Any) -> str:
    """A setting's value as a person reads it."""
    if value is None or value == ():
        return "left to the model"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def settable(repl: Repl) -> Iterable[tuple[str, str]]:
    """Yields the options that can be set, each with its value."""
    settings = repl.conversation.settings
    for name in AT_ONCE + AT_LOADING:
        yield option_name(name), f"now: {shown_value(getattr(settings, name))}"


def show_settings(repl: Repl, argument: str) -> None:
    """Shows what is set and what the last prompt took."""
    conversation = repl.ready()
    chat, settings = conversation.chat, conversation.settings
    sampling = chat.options.sampling
    drawn = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")
    facts = [
        ("model", f"{conversation.title} ({conversation.model_name})"),
        ("context", f"{chat.n_tokens():,} of {repl.n_ctx:,} tokens used"),
        ("messages", n_messages(repl)),
        ("session", kept_as(repl)),
        ("sampling", ", ".join(f"{option_name(n)} {drawn_by(sampling, n)}" for n in drawn)),
        ("answers", f"max-tokens {shown_limit(settings.max_tokens)}, stop {stops(settings.stop)}"),
        ("thinking", settings.think or "the model's default"),
        ("when full", settings.on_full),
        *waiting(repl),
        *last_prompt(repl),
    ]
    repl.tell("\n".join(f"{name:<12}{value}" for name, value in facts))


def kept_as(repl: Repl) -> str:
    """Says under which name the chat is kept."""
    conversation = repl.conversation
    name = conversation.session.name if conversation.session else ""
    if conversation.sessions is None:
        return f"{name}; what is new is not kept (/save)" if name else "not kept (/save)"
    return name or "not kept yet"


def waiting(repl: Repl) -> Iterable[tuple[str, str]]:
    """What was set and doesn't count yet."""
    settings, pending = repl.conversation.settings, repl.conversation.pending
    values = (f"{option_name(name)} {shown_value(getattr(settings, name))}" for name in pending)
    if pending:
        yield "pending", f"{', '.join(values)}: /model loads the model anew"


def n_messages(repl: Repl) -> str:
    """Says how many messages there are, and how many were left out."""
    chat = repl.conversation.chat
    n_said = sum(m.role != "system" for m in chat.messages)
    left_out = f", the first {chat.n_dropped} left out" if chat.n_dropped else ""
    return f"{n_said}{left_out}"


def drawn_by(sampling: Any, name: str) -> str:
    """A sampling value as a person reads it."""
    value = getattr(sampling, name)
    return "random" if value is None else f"{value:g}"


def shown_limit(n_tokens: int | None) -> str:
    """The limit of an answer as a person reads it."""
    return "as many as fit" if n_tokens is None else f"{n_tokens:,}"


def stops(texts: tuple[str, ...]) -> str:
    """Says where answers end."""
    return ", ".join(map(repr, texts)) or "at the model's own end"


def last_prompt(repl: Repl) -> Iterable[tuple[str, str]]:
    """What the last answer took."""
    last = repl.last.last if repl.last else None
    if last is None or last.usage is None or last.timings is None:
        return
    usage, timings = last.usage, last.timings
    computed = usage.prompt_tokens - usage.cached_tokens
    yield (
        "last prompt",
        f"{usage.prompt_tokens:,} tokens, {usage.cached_tokens:,} of them held already, "
        f"{computed:,} computed at {timings.prompt_tps:.0f} tok/s",
    )
    yield (
        "last answer",
        f"{usage.completion_tokens:,} tokens at {timings.generation_tps:.1f} tok/s, "
        f"the first after {timings.first_token_s:.2f} s",
    )


def stats(repl: Repl, argument: str) -> None:
    """Shows the figures of the last answer, or of every one from now on."""
    if argument in ("on", "off"):
        repl.shows_stats = argument == "on"
        repl.tell(f"Figures after each answer: {argument}.")
    elif argument in ("", "now"):
        conversation = repl.ready()
        if repl.last is not None and repl.last.last is not None:
            repl.show_stats()
        else:
            n_used = conversation.chat.n_tokens()
            repl.tell(f"{n_used:,} of {repl.n_ctx:,} tokens of context used")
    else:
        raise UsageError(f"/stats {argument} means nothing.", "There is: /stats on, off or now.")


def plan(repl: Repl, argument: str) -> None:
    """Shows the plan that the model was loaded by."""
    loaded = repl.ready().loaded
    console.lines(plan_lines(loaded.plan, loaded.meta, repl.conversation.title, False))


def model(repl: Repl, argument: str) -> None:
    """Says which model answers, or loads another one."""
    conversation = repl.ready()
    if argument:
        with model_resolver(conversation.settings, argument, workload="chat") as search:
            found = search.fetch(search.find(argument))
        with load_callbacks(argument) as callbacks:
            conversation.switch(found, callbacks)
    elif conversation.pending:
        with load_callbacks(conversation.model_name) as callbacks:
            conversation.reload(callbacks)
    else:
        repl.tell(f"{conversation.title} ({conversation.model_name})")
        return
    repl.save()
    repl.tell(f"{conversation.title}. What was said so far is kept.")


def model_names(repl: Repl) -> Iterable[tuple[str, str]]:
    """Yields the catalog's names, each with what it is."""
    for name, spec in read_catalog(config_folder()).items():
        yield name, spec.about


def save(repl: Repl, argument: str) -> None:
    """Keeps the conversation, under another name where one is given."""
    conversation = repl.ready()
    before = conversation.session.name if conversation.session else ""
    was_kept, conversation.sessions = conversation.sessions, stored(repl)
    left = ""
    try:
        if argument and argument != before:
            left = conversation.rename(argument)
    except LocalMoeError:
        conversation.sessions = was_kept
        raise
    conversation.save()  # not repl's: that it can't be done is the answer here
    name = conversation.session.name if conversation.session else ""
    if left:
        repl.tell(f"Kept as {name} from here on; {left} stays as it was.")
    elif name and name == argument == before and was_kept:
        repl.tell(f"It is kept as {name} already.")
    else:
        repl.tell(f"Kept as {name}." if name else "Kept from the first message on.")


def load(repl: Repl, argument: str) -> None:
    """Goes on with another session."""
    if not argument:
        raise UsageError("Which session?", "/sessions lists them.")
    conversation = repl.ready()
    session = conversation.session
    if session is None or session.name != argument:
        conversation.open(stored(repl).open(argument))
    repl.last, repl.attached = None, ""
    repl.show_recent()
    repl.offer_unanswered()


def sessions(repl: Repl, argument: str) -> None:
    """Lists the sessions."""
    known = stored(repl).all()
    if not known:
        repl.tell("No session is kept yet.")
        return
    rows = [(s.name, f"{s.n_messages} messages", s.model, s.problem or s.title) for s in known[:20]]
    console.table([("SESSION", "", "MODEL", "BEGINS"), *rows])
    if len(known) > len(rows):
        repl.tell(f"and {len(known) - len(rows)} more: localmoe sessions list")


def session_names(repl: Repl) -> Iterable[tuple[str, str]]:
    """Returns the names of sessions, each with its title."""
    with suppress(LocalMoeError):  # /load says so itself
        return [(s.name, s.title) for s in stored(repl).all()]
    return []


def stored(repl: Repl) -> Any:
    """The folder of sessions, also in a chat that isn't kept."""
    return repl.conversation.sessions or Sessions(sessions_folder())


def switches(repl: Repl) -> Iterable[tuple[str, str]]:
    """Returns what may follow /stats."""
    return [("on", "after each answer"), ("off", ""), ("now", "of the last answer")]


COMMANDS = SlashCommands(
    [
        *CONVERSATION_COMMANDS,
        SlashCommand(
            "set", "NAME VALUE", "change an option; default takes it back", set_option, settable
        ),
        SlashCommand("show", "", "what is set, and what the last prompt took", show_settings),
        SlashCommand("stats", "[on|off|now]", "figures after each answer", stats, switches),
        SlashCommand("plan", "", "what of the model is where", plan),
        SlashCommand(
            "model", "[NAME]", "go on with another model, or what was set", model, model_names
        ),
        SlashCommand("save", "[NAME]", "keep this conversation, under a name", save),
        SlashCommand(
            "load", "NAME", "go on with a conversation that was kept", load, session_names
        ),
        SlashCommand("sessions", "", "the conversations that were kept", sessions),
    ]
)
