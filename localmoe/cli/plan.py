"""`plan`: what would go where, before anything is allocated."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from . import render
from .drawing import plan_lines
from .options import json_option, load_options, settings_of
from .watching import finder

if TYPE_CHECKING:
    from ..catalog.resolve import ResolvedModel
    from ..engine.protocol import Placement
    from ..planner.plan import Memory, Plan
    from ..planner.search import Workload


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
    from ..catalog.resolve import check_runs
    from ..loading import title

    with finder(settings_of(options, model), workload=workload) as search:
        model_found = search.find(model)
        meta = model_found.meta
        check_runs(meta, model_found.is_here)
        found = search.planner.plan(meta.paths[0], meta)
    if as_json:
        render.document(document(found))
    elif print_flags:
        render.lines([shlex.join(server_flags(found.placement, model_found))])
    else:
        render.lines(plan_lines(found, meta, title(meta), explain))


def document(found: Plan) -> dict[str, Any]:
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
    yield from ("-t", str(place.n_threads), "-ctk", place.kv_type, "-ctv", place.kv_type)
    yield from ("-fa", place.flash_attention)
    if place.tensor_split:
        yield from ("-ts", ",".join(f"{share:g}" for share in place.tensor_split))
    patterns = [rf"blk\.{n}\.ffn_.*_exps=CPU" for n in place.cpu_expert_layers]
    patterns += [f"{name.replace('.', chr(92) + '.')}=CPU" for name in place.cpu_expert_tensors]
    if patterns:
        yield from ("-ot", ",".join(patterns))
    if place.load_mode == "pinned":
        yield "--no-mmap"
    yield "--no-repack"  # it can have one order only, and prompts suffer more from the other
