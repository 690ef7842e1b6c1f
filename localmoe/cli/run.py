"""`run`: one answer, for people in a hurry and for scripts."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..catalog.catalog import read_catalog
from ..catalog.model_name import parse_name
from ..config.environment import config_folder
from ..prompt.reasoning import Answer, nothing_came
from ..structured.check import check_answer, is_structured
from ..terminal import console
from ..terminal.progress import load_with_progress
from .options import (
    json_option,
    load_options,
    messages_option,
    sampling_options,
    settings_of,
    think_option,
    verbosity_options,
    warn_of_unheld,
)
from .prompt_input import conversation_of

if TYPE_CHECKING:
    from ..chat.chat import AnswerOptions
    from ..loading import OpenModel
    from ..prompt.messages import Message
    from ..prompt.reasoning import Answer, nothing_came

CHARACTERS_PER_TOKEN = 4  # of English; what a plan is made for need not be exact


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    metavar="FILE",
    help="Text that goes after the prompt, - is stdin; may be repeated.",
)
@messages_option
@load_options
@sampling_options
@think_option
@json_option
@verbosity_options
def run(
    model: str,
    prompt: str | None,
    files: tuple[str, ...],
    messages: str | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """One answer: the answer alone on stdout, all else on stderr.

    MODEL is a name of `localmoe list`, with a quant like mixtral:Q5_K_M, or user/repo,
    user/repo:Q4_K_M, user/repo/file.gguf, a link to huggingface.co, or the path of a GGUF file.
    What isn't here is fetched first.

    The prompt is PROMPT, then the text of each -f FILE, then what is piped into stdin, with a
    blank line between:

        cat error.log | localmoe run mixtral "What went wrong?"

    Without PROMPT and -f, stdin is the prompt. Beside them, a pipe that brings nothing within a
    second is left alone, and a line on stderr says so; -f - waits for it however long that takes.

    With --json-schema or --grammar, an answer that was cut short or doesn't validate is an error
    (exit code 1), and stdout stays empty. What a reasoning model thinks is not part of its answer.
    """
    settings = settings_of(options, model)
    if not quiet:
        warn_of_unheld(settings)
    # a wrong name is the first thing to say, before a prompt is waited for
    parse_name(model, read_catalog(config_folder()))
    conversation = conversation_of(prompt, messages, settings.system, files, quiet)
    n_prompt = sum(len(message.content) for message in conversation) // CHARACTERS_PER_TOKEN
    with load_with_progress(model, settings, "run", verbose, quiet or as_json, n_prompt) as loaded:
        answer = answered(loaded, conversation, loaded.options(settings), as_json)
        finish_run(answer, loaded.load_s, as_json, quiet)


def answered(
    loaded: OpenModel, conversation: list[Message], options: AnswerOptions, as_json: bool
) -> Answer:
    """The answer, shown as it comes; one that must have a form is shown when it has it.

    Only a person at a terminal sees it before: a program would take half an answer for one.
    Raises LocalMoeError.
    """
    waits = as_json or (is_structured(options.sampling) and not sys.stdout.isatty())
    encoded = loaded.model.encode(conversation)
    answer = Answer()
    with closing(loaded.model.answer(encoded, options)) as deltas:
        for delta in deltas:
            answer.add(delta)
            if not waits and delta.kind == "text":
                console.answer_text(delta.text)
    reason = answer.last.finish_reason if answer.last else None
    try:
        check_answer(answer.text, reason, options.sampling)
    finally:
        if not waits:
            console.answer_text("\n")
    if waits and not as_json:
        console.answer_text(answer.text + "\n")
    return answer


def finish_run(answer: Answer, load_s: float, as_json: bool, quiet: bool) -> None:
    """What comes after an answer: its JSON document, or a line of figures."""
    last = answer.last
    assert last
    assert last.usage
    assert last.timings
    if as_json:
        console.document(
            {
                "text": answer.text,
                **({"thinking": answer.thinking} if answer.thinking else {}),
                "finish_reason": last.finish_reason,
                "usage": asdict(last.usage),
                "timings": {"load_s": load_s, **asdict(last.timings)},
            }
        )
    elif sys.stderr.isatty() and not quiet:
        console.stats(last)
    if not answer.text.strip() and not quiet:
        console.warning(nothing_came(answer))
