"""`run` and `chat`: an answer, a conversation."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from . import render
from .options import (
    json_option,
    load_options,
    messages_option,
    read_messages,
    read_text,
    sampling_options,
    settings_of,
    verbosity_options,
)
from .watching import watching

if TYPE_CHECKING:
    from ..config import Settings
    from ..load import LoadedModel
    from ..placement.search import Workload
    from ..serving.prompt import Message


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@messages_option
@load_options
@sampling_options
@json_option
@verbosity_options
def run(
    model: str,
    prompt: str | None,
    messages: str | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """One answer: the answer alone on stdout. Without PROMPT, it is read from stdin.

    MODEL is a name of `localmoe list`, with a quant like mixtral:Q5_K_M, or user/repo,
    user/repo:Q4_K_M, user/repo/file.gguf, a link to huggingface.co, or the path of a GGUF file.
    What isn't here is fetched first.
    """
    from ..config import config_folder
    from ..models.catalog import read_catalog
    from ..models.names import parse_name
    from ..serving.chat import Answer

    settings = settings_of(options)
    # a wrong name is the first thing to say, before a prompt is waited for
    parse_name(model, read_catalog(config_folder()))
    conversation = conversation_of(prompt, messages, settings.system)
    with load(model, settings, "run", verbose, quiet or as_json) as loaded:
        encoded = loaded.model.encode(conversation)
        answer = Answer()
        with closing(loaded.model.answer(encoded, loaded.options(settings))) as deltas:
            for delta in deltas:
                answer.add(delta)
                if not as_json:
                    render.answer_text(delta.text)
        finish_run(answer, loaded.load_s, as_json, quiet)


def finish_run(answer: Any, load_s: float, as_json: bool, quiet: bool) -> None:
    """What comes after an answer: its JSON document, or a line end and a line of figures."""
    if as_json:
        render.document(
            {
                "text": answer.text,
                "finish_reason": answer.last.finish_reason,
                "usage": asdict(answer.last.usage),
                "timings": {"load_s": load_s, **asdict(answer.last.timings)},
            }
        )
        return
    render.answer_text("\n")
    if sys.stderr.isatty() and not quiet:
        render.stats(answer.last)


@click.command()
@click.argument("model", default="demo")
@load_options
@sampling_options
@json_option
@verbosity_options
def chat(model: str, as_json: bool, verbose: bool, quiet: bool, **options: Any) -> None:
    """A conversation. Ctrl-C stops an answer, Ctrl-D leaves; /? lists what else there is.

    MODEL is a name of `localmoe list`, with a quant like mixtral:Q5_K_M, or user/repo,
    user/repo:Q4_K_M, user/repo/file.gguf, a link to huggingface.co, or the path of a GGUF file;
    demo where none is given. What isn't here is fetched first.

    Without a terminal, each line of stdin is a message; with --json the whole conversation is
    printed as one JSON document at the end.
    """
    from ..load import title
    from ..serving.chat import Chat
    from .repl import Repl

    settings = settings_of(options)
    with load(model, settings, "chat", verbose, quiet or as_json) as loaded:
        conversation = Chat(loaded.model, loaded.options(settings), system_message(settings.system))
        Repl(conversation, title(loaded.meta), as_json=as_json, quiet=quiet).run()


def load(
    model: str, settings: Settings, workload: Workload, verbose: bool, quiet: bool
) -> LoadedModel:
    """Load a model with its progress shown."""
    from ..load import open_model

    with watching(model, quiet, verbose) as watch:
        return open_model(model, settings, watch, workload)


def conversation_of(prompt: str | None, messages: str | None, system: str | None) -> list[Message]:
    """The conversation that a command line means. Raises UsageError."""
    from ..serving.prompt import parse_messages

    if messages is not None:
        if prompt is not None:
            raise UsageError("Both a prompt and --messages were given.", "Leave one of them out.")
        return [*system_message(system), *parse_messages(read_messages(messages))]
    if prompt is None or prompt == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("There is no prompt.", 'Try: localmoe run demo "Hi!"')
        prompt = read_text("-").rstrip("\r\n")
    user: list[object] = [{"role": "user", "content": prompt}]
    return [*system_message(system), *parse_messages(user)]


def system_message(text: str | None) -> list[Message]:
    from ..serving.prompt import Message

    return [] if text is None else [Message("system", text)]
