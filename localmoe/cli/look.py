"""`show` and `prompt`: what is in a model file, and what a conversation becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import render
from .options import json_option, messages_option

if TYPE_CHECKING:
    from ..models.meta import ModelMeta

ROLES = {
    "experts": "experts",
    "shared_experts": "shared experts",
    "attention": "attention",
    "recurrent": "recurrent",
    "dense_ffn": "dense FFN",
    "router": "router",
    "embedding": "embedding",
    "output": "output",
    "norm": "norms",
    "other": "other",
}


@click.command()
@click.argument("model")
@json_option
def show(model: str, as_json: bool) -> None:
    """What is in a model file: its shape, its experts, what its bytes are spent on."""
    from ..models.catalog import resolve
    from ..models.meta import read_meta

    meta = read_meta(resolve(model))
    parts = {role: meta.bytes_of_role(role) for role in ROLES}
    if as_json:
        render.document({**shape(meta), "bytes_by_role": {k: v for k, v in parts.items() if v}})
    else:
        sizes = sorted(((ROLES[r], n) for r, n in parts.items() if n), key=lambda part: -part[1])
        render.model(meta, facts(meta), sizes)


@click.command()
@click.argument("model")
@click.argument("text", required=False)
@messages_option
@click.option("-s", "--system", metavar="TEXT", help="A system message.")
@json_option
def prompt(
    model: str, text: str | None, messages: str | None, system: str | None, as_json: bool
) -> None:
    """The exact text and token ids that a conversation becomes. Loads the vocabulary alone."""
    from ..load import format_of, open_vocabulary, readable_meta
    from ..models.catalog import resolve
    from .talk import conversation_of

    conversation = conversation_of(text, messages, system)
    path = resolve(model)
    format = format_of(readable_meta(path))
    with open_vocabulary(path) as engine:
        encoded = format.encode(conversation, engine)
    if as_json:
        render.document({"text": encoded.text, "tokens": list(encoded.tokens)})
    else:
        render.prompt(encoded)
