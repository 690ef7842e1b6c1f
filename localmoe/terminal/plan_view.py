"""Plans as pictures in text: a bar for each memory, a letter for each layer. 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..engine.protocol import first_gpu_layer
from .console import safe, size

if TYPE_CHECKING:
    from ..gguf.model_meta import ModelMeta
    from ..perf.cost_model import Forecast
    from ..planner.plan import Memory, Plan


BAR_WIDTH = 76
PARTS = (("weights", "#"), ("kv", "="), ("compute", "+"), ("overhead", "~"),
         ("repacked", "%"))  # fmt: skip
NAMES = {"weights": "weights", "kv": "KV cache", "compute": "compute", "overhead": "overhead",
         "repacked": "repacked copies"}  # fmt: skip
FREE = "."
LAYER_LETTERS = {"gpu": "G", "part": "p", "experts": "e", "ram": "r"}
LEGEND = "G on a GPU   p experts partly in RAM   e experts in RAM   r in RAM"


def plan_lines(plan: Plan, meta: ModelMeta, title: str, explain: bool) -> Iterator[str]:
    """A plan as a person reads it."""
    place = plan.placement
    sequences = f" for each of {place.n_seq} sequences" if place.n_seq > 1 else ""
    yield f"{safe(title)}, {meta.quant_label}, {size(meta.weights_bytes)}"
    yield (
        f"context {place.n_ctx:,} tokens{sequences}, KV cache {place.kv_type}, "
        f"micro-batch {place.n_ubatch}, {place.n_threads} threads, {place.load_mode}"
    )
    if plan.forecast:
        yield forecast_line(plan.forecast)
    for memory in plan.memory:
        yield ""
        yield from memory_lines(memory)
    if place.n_gpu_layers:
        yield ""
        yield from layer_lines(plan, meta)
    yield ""
    yield from (f"* {safe(reason)}" for reason in plan.reasons)
    if explain:
        yield ""
        yield "Not taken:" if plan.rejected else "Nothing else was open."
        yield from (f"* {safe(rejected)}" for rejected in plan.rejected)


def forecast_line(expected: Forecast) -> str:
    """`forecast: 187 tok/s in, 12.4 out; off by 8% in and 5% out so far`."""
    line = f"forecast: {rate(expected.prompt_tps)} tok/s in, {rate(expected.generation_tps)} out"
    if expected.basis == "formula":
        return f"{line}, by formula: no speed was measured here yet"
    errors = {"in": expected.prompt_error, "out": expected.generation_error}
    known = [f"{error:.0%} {way}" for way, error in errors.items() if error is not None]
    return f"{line}; off by {' and '.join(known)} so far" if known else line


def rate(tps: float) -> str:
    """Tokens per second with a sensible number of digits."""
    return f"{tps:,.0f}" if tps >= 100 else f"{tps:.1f}"


def memory_lines(memory: Memory) -> Iterator[str]:
    """A memory's name and fill, its bar, and its parts with where each figure comes from."""
    taken = f"{size(memory.total_bytes)} of {size(memory.budget_bytes)}"
    yield f"{safe(memory.device):<{BAR_WIDTH - len(taken)}}{taken}"
    yield memory_bar(memory)
    sized = [(NAMES[name], mark, getattr(memory, name)) for name, mark in PARTS]
    shown = [
        f"{mark} {name} {size(part.n_bytes)} ({part.basis})"
        for name, mark, part in sized
        if part.n_bytes
    ]
    for start in range(0, len(shown), 2):
        yield "  " + "".join(f"{text:<38}" for text in shown[start : start + 2]).rstrip()
    if memory.pinned_bytes:
        yield f"  {size(memory.pinned_bytes)} of the weights are pinned"


def memory_bar(memory: Memory) -> str:
    """Parts in proportion to the budget; what is there at all shows, what is too much overflows."""
    scale = BAR_WIDTH / max(memory.budget_bytes, memory.total_bytes, 1)
    text = ""
    done = 0.0
    for name, mark in PARTS:
        done += getattr(memory, name).n_bytes * scale
        text += mark * max(0, round(done) - len(text))
    return text.ljust(BAR_WIDTH, FREE)[:BAR_WIDTH]


def layer_lines(plan: Plan, meta: ModelMeta) -> Iterator[str]:
    """Where each layer is, a letter each, and the single expert tensors by name."""
    letters = "".join(LAYER_LETTERS[where] for where in layer_places(plan, meta))
    for start in range(0, len(letters), 64):
        yield f"layer {start:>3}  {letters[start : start + 64]}"
    yield f"           {LEGEND}"
    names = plan.placement.cpu_expert_tensors
    if names:
        yield f"           in RAM by name: {', '.join(map(safe, names))}"


def layer_places(plan: Plan, meta: ModelMeta) -> list[str]:
    """For each layer: gpu, part, experts or ram (keys of LAYER_LETTERS)."""
    place = plan.placement
    first = first_gpu_layer(meta.n_layers + meta.n_nextn_layers, place.n_gpu_layers)
    partly = {t.layer for t in meta.tensors if t.name in set(place.cpu_expert_tensors)}

    def where(n: int) -> str:
        if n < first:
            return "ram"
        if n in place.cpu_expert_layers:
            return "experts"
        return "part" if n in partly else "gpu"

    return [where(n) for n in range(meta.n_layers)]
