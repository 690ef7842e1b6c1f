"""`show` and `prompt`: what is in a model file, and what a conversation becomes.

`plan`: what would go where, before anything is allocated.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..catalog.resolve import check_runs, why_not
from ..loading import format_of, open_vocabulary, think_of, title
from ..terminal import console
from ..terminal.plan_view import plan_lines
from ..terminal.progress import model_resolver
from .options import (
    form_options,
    json_option,
    load_options,
    messages_option,
    offline_option,
    settings_of,
    system_option,
    think_option,
)
from .prompt_input import conversation_of

if TYPE_CHECKING:
    from ..catalog.resolve import ResolvedModel
    from ..engine.protocol import Placement
    from ..gguf.model_meta import ModelMeta
    from ..planner.plan import Memory, Plan
    from ..planner.search import Workload


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
    with model_resolver(settings_of({"offline": offline}, model)) as search:
        found = search.find(model, must_fit=False)
    parts = found.meta.bytes_by_role
    if as_json:
        console.document({**shape(found), "bytes_by_role": dict(parts)})
        return
    sizes = sorted(((ROLES[role], n) for role, n in parts.items()), key=lambda part: -part[1])
    console.model(facts(found), sizes)


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
        ("Sampling", ", ".join(f"{name} {shown_value_of(v)}" for name, v in meta.sampling.items())),
        ("File", ", ".join(path.name for path in meta.paths)),
        ("Runs", f"no: {refusal}" if refusal else ""),
    ]
    return [(name, value) for name, value in lines if value]


def experts(meta: ModelMeta) -> str:
    """How many experts a model has and uses, in words."""
    if not meta.is_moe:
        return "none: a dense model"
    shared = f", {meta.n_shared_experts} shared" if meta.n_shared_experts else ""
    return f"{meta.n_experts} experts, {meta.n_experts_used} used for a token{shared}"


def billions(n: int) -> str:
    """A count of parameters as people write it."""
    return f"{n / 1e9:.1f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def shown_value_of(value: float | int | str) -> str:
    """A value of the metadata in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@click.command()
@click.argument("model")
@click.argument("text", required=False)
@messages_option
@system_option
@form_options
@think_option
@offline_option
@json_option
def prompt(
    model: str, text: str | None, messages: str | None, as_json: bool, **options: Any
) -> None:
    """The exact text and token ids that a conversation becomes. Loads the vocabulary alone.

    Options that change a prompt change it here: a schema or a grammar turns thinking off.
    """
    settings = settings_of(options, model)
    conversation = conversation_of(text, messages, settings.system)
    with model_resolver(settings) as search:
        found = search.find(model, must_fit=False)
    meta = found.meta
    check_runs(meta, found.is_here)
    format = format_of(meta, think_of(settings))
    with open_vocabulary(meta.paths[0]) as engine:
        encoded = format.encode(conversation, engine)
    if as_json:
        console.document({"text": encoded.text, "tokens": list(encoded.tokens)})
    else:
        console.prompt(encoded)


@click.command()
@click.argument("model")
@load_options
@click.option(
    "--for",
    "workload",
    type=click.Choice(["run", "chat", "batch"]),
    default="chat",
    help="What it is for: one answer, conversations (the default), files of prompts.",
)
@click.option("--explain", is_flag=True, help="Show what was rejected, and why.")
@click.option("--print-flags", is_flag=True, help="Print the placement as llama-server's flags.")
@json_option
def plan(
    model: str,
    workload: Workload,
    explain: bool,
    print_flags: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """What would go where. Needs a model's header alone, and allocates nothing.

    With --vram or --ram of more than this machine has, it plans for a machine like that.
    """
    with model_resolver(settings_of(options, model), workload=workload) as search:
        model_found = search.find(model)
        meta = model_found.meta
        check_runs(meta, model_found.is_here)
        found = search.planner.plan(meta.paths[0], meta)
    if as_json:
        console.document(plan_document(found))
    elif print_flags:
        console.lines([shlex.join(server_flags(found.placement, model_found))])
    else:
        console.lines(plan_lines(found, meta, title(meta), explain))


def plan_document(found: Plan) -> dict[str, Any]:
    """A plan as --json promises it."""
    place = found.placement
    return {
        "fits": found.fits,
        "placement": {**asdict(place), "n_ctx_total": place.n_ctx_total},
        "memory": [memory_document(memory) for memory in found.memory],
        "forecast": found.forecast and asdict(found.forecast),
        "reasons": list(found.reasons),
        "rejected": list(found.rejected),
        "alternatives": list(found.alternatives),
    }


def memory_document(memory: Memory) -> dict[str, Any]:
    """One device's memory as --json promises it."""
    parts = ("weights", "kv", "compute", "overhead", "repacked")
    figures = {part: getattr(memory, part) for part in parts}
    shown: dict[str, Any] = {
        "device": memory.device,
        "budget_bytes": memory.budget_bytes,
        **{f"{part}_bytes": figure.n_bytes for part, figure in figures.items()},
        "total_bytes": memory.total_bytes,
        "basis": {part: figure.basis for part, figure in figures.items()},
    }
    if memory.device == "RAM":
        shown["mapped_bytes"] = memory.mapped_bytes
        shown["pinned_bytes"] = memory.pinned_bytes
        shown["resident_bytes"] = memory.total_bytes - memory.mapped_bytes
    return shown


def server_flags(place: Placement, found: ResolvedModel) -> Iterator[str]:
    """The same placement for llama-server, which would otherwise fit by itself. It fetches a model
    that isn't here from the same repository."""
    yield "llama-server"
    if found.files:
        yield from ("-hf", found.files[0].repo, "-hff", found.files[0].name)
    else:
        yield from ("-m", str(found.meta.paths[0]))
    yield from ("-fit", "off")
    yield from ("-ngl", str(place.n_gpu_layers), "-c", str(place.n_ctx_total))
    yield from ("-np", str(place.n_seq), "-ub", str(place.n_ubatch), "-b", str(place.n_batch))
    yield "--kv-unified" if place.kv_unified else "--no-kv-unified"  # by itself it decides by -np
    yield from ("-t", str(place.n_threads), "-ctk", place.kv_type, "-ctv", place.kv_type)
    yield from ("-fa", place.flash_attention)
    if place.tensor_split:
        yield from ("-ts", ",".join(f"{share:g}" for share in place.tensor_split))
    if patterns := place.cpu_patterns():
        yield from ("-ot", ",".join(f"{pattern}=CPU" for pattern in patterns))
    if place.load_mode == "pinned":
        yield "--no-mmap"
    yield "--no-repack"  # it can have one order only, and prompts suffer more from the other
