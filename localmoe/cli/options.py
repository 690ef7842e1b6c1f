"""The options that commands share, each defined once; config.Settings checks their values."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..catalog.catalog import model_aliases
from ..config.settings import load_settings
from ..config.sources import file_key
from ..engine.protocol import Sampling
from ..errors import UsageError
from ..files import read_text
from ..structured.check import check_sampling, unheld_parts
from ..terminal import console

Command = TypeVar("Command", bound=Callable[..., Any])

KV_TYPES = click.Choice(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])


def group_of(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which they are given."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


offline_option = click.option("--offline", is_flag=True, default=None, help="Use no network.")

load_options = group_of(
    click.option(
        "-c", "--ctx-size", metavar="N", help="Context in tokens, like 8k; 0 is the model's own."
    ),
    click.option("--vram", metavar="SIZE", help="Use at most this of each GPU, like 8GiB,12GiB."),
    click.option("--ram", metavar="SIZE", help="Use at most this much RAM."),
    click.option(
        "-ngl", "--n-gpu-layers", metavar="auto|all|N", help="Layers on the GPU; auto by default."
    ),
    click.option(
        "-ncmoe", "--n-cpu-moe", type=int, metavar="N", help="Experts of the first N layers in RAM."
    ),
    click.option("-ctk", "--kv-type", type=KV_TYPES, help="Type of the KV cache; f16 by default."),
    click.option(
        "-t", "--threads", type=int, metavar="N", help="CPU threads at most; all physical cores."
    ),
    click.option("-ub", "--ubatch-size", type=int, metavar="N", help="Micro-batch in tokens."),
    click.option("--load-mode", type=click.Choice(["auto", "mmap", "pinned"])),
    click.option(
        "--tune/--no-tune",
        default=None,
        help="Time a model on the CPU the first time; on by default.",
    ),
    offline_option,
)

system_option = click.option("-s", "--system", metavar="TEXT", help="A system message.")
form_options = group_of(
    click.option("--json-schema", metavar="JSON|FILE", help="Answer in JSON of this schema."),
    click.option("--grammar", metavar="FILE", help="Answer as this GBNF grammar allows."),
)
sampling_options = group_of(
    click.option(
        "-n", "--max-tokens", type=int, metavar="N", help="End an answer after N tokens; -1: never."
    ),
    click.option("--temp", "temperature", type=float, help="0 always takes the likeliest token."),
    click.option("--top-k", type=int, help="Draw from the K likeliest tokens; 0 or -1: all."),
    click.option("--top-p", type=float),
    click.option("--min-p", type=float),
    click.option("--repeat-penalty", type=float),
    click.option("--presence-penalty", type=float, help="Against what was said already; -2 to 2."),
    click.option("--frequency-penalty", type=float, help="Against what was said often; -2 to 2."),
    click.option("--seed", type=int, help="The same seed gives the same answer."),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End at this text; may be repeated."
    ),
    system_option,
    form_options,
)

think_option = click.option(
    "--think",
    type=click.Choice(["on", "off", "hide", "low", "medium", "high"]),
    help="Whether a reasoning model thinks before it answers: shown, not at all, or unseen; or how "
    "hard. By default the model decides.",
)
chat_options = group_of(
    click.option(
        "--on-full",
        type=click.Choice(["stop", "drop", "summarize"]),
        help="When the context is full: stop, or leave out the oldest turns, or sum them up.",
    ),
    click.option("--no-save", "save", flag_value=False, default=None, help="Keep no session."),
    click.option("--plain", is_flag=True, default=None, help="Text as it comes, no Markdown."),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
messages_option = click.option(
    "--messages", metavar="FILE", help="A conversation as JSON, like [{role, content}]; - is stdin."
)
verbosity_options = group_of(
    click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log."),
    click.option("-q", "--quiet", is_flag=True, help="Nothing but the answer and errors."),
)


def settings_of(options: dict[str, Any], model: str | None = None) -> Any:
    """Checked Settings of a command's options, on top of what is set for the model elsewhere.

    Files that the options name are read, and what no answer could be held to is refused.
    """
    said = dict(options)
    if said.get("json_schema") is not None:
        said["json_schema"] = read_schema(said["json_schema"])
    if said.get("grammar") is not None:
        said["grammar"] = read_text(said["grammar"])
    settings = load_settings(said, model=model, called=option_name, aliases=model_aliases)
    if settings.json_schema is not None or settings.grammar is not None:
        check_sampling(Sampling(json_schema=settings.json_schema, grammar=settings.grammar))
    return settings


def warn_of_unheld(settings: Any) -> None:
    """Says what of a JSON schema is only checked once an answer is there."""
    for sentence in unheld_parts(Sampling(json_schema=settings.json_schema)):
        console.warning(sentence)


def option_name(setting: str) -> str:
    """The long option that makes a setting."""
    return f"--{file_key(setting).replace('_', '-')}"


def read_schema(given: str) -> str:
    """A JSON schema from the command line or a file."""
    text = given.strip()
    return given if text.startswith("{") or text in ("true", "false") else read_text(given)


def read_messages(path: str) -> Any:
    """What a file of messages holds, as JSON: a list, or an object like a session's export that has
    one. Raises UsageError."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{'stdin' if path == '-' else path} is not JSON: {error}.") from None
    return value["messages"] if isinstance(value, dict) and "messages" in value else value
