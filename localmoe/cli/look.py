"""`show` and `prompt`: what is in a model file, and what a conversation becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import render
from .options import json_option, messages_option, offline_option, settings_of
from .watching import finder

if TYPE_CHECKING:
    from ..catalog.resolve import ResolvedModel
    from ..gguf.model_meta import ModelMeta

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
@offline_option
@json_option
def show(model: str, offline: bool | None, as_json: bool) -> None:
    """What is in a model file: its shape, its experts, what its bytes are spent on.

    Of a model that isn't here, the header alone is fetched.
    """
    with finder(settings_of({"offline": offline}, model)) as search:
        found = search.find(model, must_fit=False)
    parts = found.meta.bytes_by_role
    if as_json:
        render.document({**shape(found), "bytes_by_role": dict(parts)})
        return
    sizes = sorted(((ROLES[role], n) for role, n in parts.items()), key=lambda part: -part[1])
    render.model(facts(found), sizes)


def shape(found: ResolvedModel) -> dict[str, Any]:
    """What --json says of a model: plain values, sizes in bytes."""
    meta, quant = found.meta, found.quant
    plain = (
        "architecture", "name", "description", "license", "size_label", "file_bytes",
        "weights_bytes", "quant_label", "n_layers", "n_experts", "n_experts_used",
        "n_shared_experts", "context_length", "n_embd", "n_ff", "n_ff_expert", "n_heads",
        "n_kv_heads", "head_dim_k", "head_dim_v", "n_params", "n_active_params",
        "legacy_split_experts",
    )  # fmt: skip
    return {
        **{name: getattr(meta, name) for name in plain},
        "repo": quant and quant.repo,
        "revision": quant and quant.files[0].commit,
        "files": [str(path) for path in meta.paths] if found.is_here else [],
        "quant_mix": {name: total.n_bytes for name, total in meta.quant_mix.items()},
        "n_vocab": meta.tokenizer.n_vocab,
        "sampling": dict(meta.sampling),
    }


def facts(found: ResolvedModel) -> list[tuple[str, str]]:
    """What a person is told of a model, line by line."""
    from ..catalog.resolve import why_not
    from ..loading import title

    meta, refusal = found.meta, why_not(found.meta, found.is_here)
    lines = [
        ("Model", title(meta)),
        ("About", meta.description),
        ("License", meta.license),
        ("Architecture", f"{meta.architecture}, {meta.n_layers} layers, width {meta.n_embd}"),
        ("Experts", experts(meta)),
        ("Parameters", f"{billions(meta.n_params)}, {billions(meta.n_active_params)} active"),
        ("Context", f"{meta.context_length:,} tokens"),
        ("Vocabulary", f"{meta.tokenizer.n_vocab:,} tokens"),
        ("Quant", f"{meta.quant_label} ({', '.join(meta.quant_mix)})"),
        ("Sampling", ", ".join(f"{name} {shown(v)}" for name, v in meta.sampling.items())),
        ("File", ", ".join(path.name for path in meta.paths)),
        ("Runs", f"no: {refusal}" if refusal else ""),
    ]
    return [(name, value) for name, value in lines if value]


def experts(meta: ModelMeta) -> str:
    if not meta.is_moe:
        return "none: a dense model"
    shared = f", {meta.n_shared_experts} shared" if meta.n_shared_experts else ""
    return f"{meta.n_experts} experts, {meta.n_experts_used} used for a token{shared}"


def billions(n: int) -> str:
    return f"{n / 1e9:.1f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def shown(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@click.command()
@click.argument("model")
@click.argument("text", required=False)
@messages_option
@click.option("-s", "--system", metavar="TEXT", help="A system message.")
@offline_option
@json_option
def prompt(
    model: str,
    text: str | None,
    messages: str | None,
    system: str | None,
    offline: bool | None,
    as_json: bool,
) -> None:
    """The exact text and token ids that a conversation becomes. Loads the vocabulary alone."""
    from ..catalog.resolve import check_runs
    from ..loading import format_of, open_vocabulary
    from .asked import conversation_of

    conversation = conversation_of(text, messages, system)
    with finder(settings_of({"offline": offline}, model)) as search:
        found = search.find(model, must_fit=False)
    meta = found.meta
    check_runs(meta, found.is_here)
    format = format_of(meta)
    with open_vocabulary(meta.paths[0]) as engine:
        encoded = format.encode(conversation, engine)
    if as_json:
        render.document({"text": encoded.text, "tokens": list(encoded.tokens)})
    else:
        render.prompt(encoded)
