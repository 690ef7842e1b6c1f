"""Commands on how it is answered: settings, figures, the plan, the model, what is kept."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..config.sources import file_key, setting_name
from ..errors import LocalMoeError, UsageError
from . import render
from .conversation import AT_LOADING
from .slash import Command, Commands
from .slash_talk import COMMANDS as TALK_COMMANDS

if TYPE_CHECKING:
    from .repl import Repl

AT_ONCE = (
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "max_tokens", "stop",
    "think", "on_full", "plain",
)  # fmt: skip


def set_option(repl: Repl, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if not value.strip():
        raise UsageError("Set what to what?", "Try: /set temp 0.2, or /show for what is set.")
    change(repl, name, value.strip())


def change(repl: Repl, shown: str, value: str) -> None:
    """Give a setting another value. Raises UsageError for a wrong name or value."""
    from ..config.settings import Settings, load_settings

    name, conversation = setting(shown), repl.conversation
    if value == "default":
        new = getattr(conversation.began_with, name)
    elif value == "none":
        new = Settings.model_fields[name].get_default()
    else:
        new = getattr(load_settings({name: value}, called=option_name), name)
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
    return file_key(name).replace("_", "-")


def shown_value(value: Any) -> str:
    if value is None or value == ():
        return "left to the model"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def settable(repl: Repl) -> Iterable[tuple[str, str]]:
    settings = repl.conversation.settings
    for name in AT_ONCE + AT_LOADING:
        yield option_name(name), f"now: {shown_value(getattr(settings, name))}"


def show(repl: Repl, argument: str) -> None:
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
        ("thinking", settings.think),
        ("when full", settings.on_full),
        *waiting(repl),
        *last_prompt(repl),
    ]
    repl.tell("\n".join(f"{name:<12}{value}" for name, value in facts))


def kept_as(repl: Repl) -> str:
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
    chat = repl.conversation.chat
    n_said = sum(m.role != "system" for m in chat.messages)
    left_out = f", the first {chat.n_dropped} left out" if chat.n_dropped else ""
    return f"{n_said}{left_out}"


def drawn_by(sampling: Any, name: str) -> str:
    value = getattr(sampling, name)
    return "random" if value is None else f"{value:g}"


def shown_limit(n_tokens: int | None) -> str:
    return "as many as fit" if n_tokens is None else f"{n_tokens:,}"


def stops(texts: tuple[str, ...]) -> str:
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
    from .drawing import plan_lines

    loaded = repl.ready().loaded
    render.lines(plan_lines(loaded.plan, loaded.meta, repl.conversation.title, False))


def model(repl: Repl, argument: str) -> None:
    from .watching import finder, watching

    conversation = repl.ready()
    if argument:
        with finder(conversation.settings, argument, workload="chat") as search:
            found = search.fetch(search.find(argument))
        with watching(argument) as watch:
            conversation.switch(found, watch)
    elif conversation.pending:
        with watching(conversation.model_name) as watch:
            conversation.reload(watch)
    else:
        repl.tell(f"{conversation.title} ({conversation.model_name})")
        return
    repl.save()
    repl.tell(f"{conversation.title}. What was said so far is kept.")


def model_names(repl: Repl) -> Iterable[tuple[str, str]]:
    from ..catalog.catalog import read_catalog
    from ..config.environment import config_folder

    for name, spec in read_catalog(config_folder()).items():
        yield name, spec.about


def save(repl: Repl, argument: str) -> None:
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
    known = stored(repl).all()
    if not known:
        repl.tell("No session is kept yet.")
        return
    rows = [(s.name, f"{s.n_messages} messages", s.model, s.title) for s in known[:20]]
    render.table([("SESSION", "", "MODEL", "BEGINS"), *rows])
    if len(known) > len(rows):
        repl.tell(f"and {len(known) - len(rows)} more: localmoe sessions list")


def session_names(repl: Repl) -> Iterable[tuple[str, str]]:
    return [(s.name, s.title) for s in stored(repl).all()]


def stored(repl: Repl) -> Any:
    """The folder of sessions, also in a chat that isn't kept."""
    from ..chat.session import Sessions
    from ..config.environment import sessions_folder

    return repl.conversation.sessions or Sessions(sessions_folder())


def switches(repl: Repl) -> Iterable[tuple[str, str]]:
    return [("on", "after each answer"), ("off", ""), ("now", "of the last answer")]


COMMANDS = Commands(
    [
        *TALK_COMMANDS,
        Command(
            "set", "NAME VALUE", "change an option; default takes it back", set_option, settable
        ),
        Command("show", "", "what is set, and what the last prompt took", show),
        Command("stats", "[on|off|now]", "figures after each answer", stats, switches),
        Command("plan", "", "what of the model is where", plan),
        Command("model", "[NAME]", "go on with another model, or what was set", model, model_names),
        Command("save", "[NAME]", "keep this conversation, under a name", save),
        Command("load", "NAME", "go on with a conversation that was kept", load, session_names),
        Command("sessions", "", "the conversations that were kept", sessions),
    ]
)
