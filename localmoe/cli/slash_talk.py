"""Commands on what was said: take it back, have it again, put a file to it, copy it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from . import render
from .slash import Command

if TYPE_CHECKING:
    from .repl import Repl

CODE_BLOCK = re.compile(r"^( *)(`{3,}|~{3,})[^\n]*\n(.*?)^ *\2", re.DOTALL | re.MULTILINE)
MAX_TOKEN_BYTES = 16
"""No token is longer on an average: a file with more bytes for each token is too long unread."""


def show_help(repl: Repl, argument: str) -> None:
    repl.tell(repl.commands.help())


def leave(repl: Repl, argument: str) -> None:
    raise EOFError


def clear(repl: Repl, argument: str) -> None:
    repl.ready().begin_anew()
    repl.last, repl.attached = None, ""
    repl.tell("A new conversation.")


def regenerate(repl: Repl, argument: str) -> None:
    repl.answer(repl.ready().chat.regenerate())


def undo(repl: Repl, argument: str) -> None:
    question = repl.ready().chat.undo()
    if question is None:
        raise UsageError("Nothing was asked yet.")
    repl.last = None
    repl.save()
    repl.tell(f"Taken back: {first_line(question.content)}")


def edit(repl: Repl, argument: str) -> None:
    from ..chat.context_window import SUMMARIZE

    asked = [m.content for m in repl.ready().messages if m.role == "user"]
    asked = [text for text in asked if text != SUMMARIZE]
    if not asked:
        raise UsageError("Nothing was asked yet.")
    repl.offer, repl.edits = asked[-1], True
    repl.tell("Change it and send it again; Ctrl-C leaves it as it was.")


def system(repl: Repl, argument: str) -> None:
    chat = repl.ready().chat
    if argument:
        chat.set_system(None if argument in ("none", '""') else argument.strip('"'))
        repl.save()
    now = next((m.content for m in chat.messages if m.role == "system"), None)
    repl.tell(f"System message: {now}" if now else "There is no system message.")


def read(repl: Repl, argument: str) -> None:
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
    from ..files import read_text

    if path.is_file() and path.stat().st_size > MAX_TOKEN_BYTES * repl.ready().chat.model.n_ctx:
        size = render.size(path.stat().st_size)
        raise UsageError(f"{path.name} has {size}: more than {repl.n_ctx:,} tokens can hold.")
    text = read_text(str(path))
    if "\0" in text:
        raise UsageError(f"{path.name} is not a text.")
    return text


def count(repl: Repl, text: str) -> int:
    from ..engine.protocol import TextPiece

    (tokens,) = repl.ready().chat.model.engine.tokenize([TextPiece(text)])
    return len(tokens)


def no_images(repl: Repl, argument: str) -> None:
    raise UsageError("No model can see images here: localmoe runs text models only.")


def copy(repl: Repl, argument: str) -> None:
    text = last_answer(repl)
    if argument:
        blocks = [unindented(found) for found in CODE_BLOCK.finditer(text)]
        if not argument.isdigit() or not 1 <= int(argument) <= len(blocks):
            raise UsageError(
                f"There is no code block {argument}: the answer has {len(blocks)}.",
                "/copy alone copies all of it.",
            )
        text = blocks[int(argument) - 1]
    render.clipboard(text)
    repl.tell(f"Handed {len(text):,} characters to the terminal's clipboard (OSC 52).")


def unindented(found: re.Match[str]) -> str:
    """A code block without the indent that it has in a list."""
    lines = found[3].split("\n")
    return "\n".join(line.removeprefix(found[1]) for line in lines)


def think(repl: Repl, argument: str) -> None:
    from .slash_facts import change

    if argument:
        change(repl, "think", argument)
        return
    said = [m for m in repl.ready().messages if m.role == "assistant" and m.thinking]
    if not said:
        raise UsageError("The model did not think so far.", "Some models never do.")
    repl.tell(said[-1].thinking.strip())


def last_answer(repl: Repl) -> str:
    said = [m.content for m in repl.ready().messages if m.role == "assistant"]
    if not said:
        raise UsageError("Nothing was answered yet.")
    return said[-1]


def first_line(text: str, n_chars: int = 60) -> str:
    line = text.strip().split("\n")[0]
    return line if len(line) <= n_chars else f"{line[: n_chars - 1]}…"


COMMANDS = (
    Command("help", "", "what can be typed here", show_help, other_names=("?",)),
    Command("exit", "", "leave (Ctrl-D too)", leave, other_names=("quit", "bye")),
    Command("clear", "", "begin a new conversation (a system message stays)", clear),
    Command("regen", "", "have the last question answered anew", regenerate),
    Command("undo", "", "take the last question and its answer back", undo),
    Command("edit", "", "change the last question and send it again", edit),
    Command(
        "system",
        "[TEXT]",
        "show or set the system message; none takes it away",
        system,
        takes_text=True,
    ),
    Command("read", "FILE", "put a text file before your next message", read, takes_file=True),
    Command("image", "", "not there: text models only", no_images),
    Command("copy", "[N]", "copy the last answer, or its Nth code block", copy),
    Command(
        "think",
        "[on|off|hide]",
        "show what the model thought; whether it thinks, and you see it",
        think,
        lambda repl: [("on", "think, shown"), ("off", "don't"), ("hide", "think, unseen")],
    ),
)
