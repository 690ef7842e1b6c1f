"""Plans: for invented machines, within budgets, with what a person fixed; and what is refused.

python tests/test_plan.py        writes data/plans.txt anew: look at every line that changed
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent / "scripts")]

from make_model import FAMILIES, SHAPES, make_model
from native_memory import RecordedGpus, recorded_gpus
from synthetic.families import with_layers

from localmoe.engine.protocol import KvType
from localmoe.errors import DoesNotFit
from localmoe.gguf.model_meta import ModelMeta, read_meta
from localmoe.gguf.tensors import TensorInfo
from localmoe.hardware.machine import Gpu, Machine
from localmoe.perf.figures import NOTHING_MEASURED, ComputePoint, Measured
from localmoe.planner.buffers import can_hold_cache
from localmoe.planner.model_bytes import GRAPHS_BYTES, OVERHEAD_BYTES, RAM, HostResidue
from localmoe.planner.plan import Plan, best_plan, make_plan
from localmoe.planner.request import PlanRequest

GIB, MIB = 1 << 30, 1 << 20
TABLE = Path(__file__).parent / "data" / "plans.txt"
PUBLISHED = {**SHAPES, **FAMILIES}


@cache
def meta_named(name: str) -> ModelMeta:
    """The header of a published shape, quantized to Q4_K_M."""
    if name == "demo":
        return read_meta(Path(__file__).parent.parent / "localmoe/models/demo/demo.gguf")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        make_model(path, PUBLISHED[name], "Q4_K_M", header_only=True)
        return read_meta(path)


def machine(ram: float, *vram: float, unified: bool = False) -> Machine:
    """RAM and cards in GiB; as much of each is free."""
    gpus = tuple(
        Gpu(f"GPU{i}", "invented", int(size * GIB), int(size * GIB), unified=unified)
        for i, size in enumerate(vram)
    )
    return Machine(int(ram * GIB), int(ram * GIB), 8, gpus)


# ---- the table ----

MIXTRAL = "mixtral-8x7b"
MACHINES: list[tuple[str, Machine, PlanRequest]] = [
    *[(MIXTRAL, machine(ram), PlanRequest()) for ram in (8, 16, 24, 28, 32, 64)],
    *[(MIXTRAL, machine(ram, 4), PlanRequest()) for ram in (16, 24, 32)],
    *[(MIXTRAL, machine(ram, 6), PlanRequest()) for ram in (16, 32)],
    *[(MIXTRAL, machine(ram, 8), PlanRequest()) for ram in (8, 16, 24, 32, 64)],
    *[(MIXTRAL, machine(ram, 12), PlanRequest()) for ram in (16, 32)],
    *[(MIXTRAL, machine(ram, 16), PlanRequest()) for ram in (8, 16, 32)],
    *[(MIXTRAL, machine(ram, 24), PlanRequest()) for ram in (8, 32)],
    (MIXTRAL, machine(16, 32), PlanRequest()),
    (MIXTRAL, machine(16, 8, 12), PlanRequest()),
    (MIXTRAL, machine(32, 12, 8), PlanRequest()),
    (MIXTRAL, machine(32, 24, 6), PlanRequest()),
    (MIXTRAL, machine(16, 24, 24), PlanRequest()),
    (MIXTRAL, machine(16, 8, 8, 12), PlanRequest()),
    (MIXTRAL, machine(16, 12, 12, 12), PlanRequest()),
    (MIXTRAL, machine(16, 16, unified=True), PlanRequest()),
    (MIXTRAL, machine(32, 24, unified=True), PlanRequest()),
    (MIXTRAL, machine(64, 48, unified=True), PlanRequest()),
    (MIXTRAL, machine(32, 8), PlanRequest(n_ctx=32768)),
    (MIXTRAL, machine(32, 8), PlanRequest(n_ctx=32768, kv_type="q8_0")),
    (MIXTRAL, machine(32, 16), PlanRequest(n_ubatch=2048, load_mode="pinned")),
    (MIXTRAL, machine(16), PlanRequest(load_mode="mmap")),
    ("mixtral-8x22b", machine(64, 24), PlanRequest()),
    ("mixtral-8x22b", machine(64, 24, 24), PlanRequest()),
    ("qwen3moe", machine(16, 8), PlanRequest()),
    ("qwen3moe", machine(32, 4), PlanRequest(n_ctx=32768)),
    ("gpt-oss", machine(16, 16), PlanRequest()),
    ("demo", machine(8), PlanRequest()),
]  # fmt: skip


def table() -> str:
    """A line for each machine: layers, experts on GPUs, MiB of each memory; or why not."""
    heading = (
        "# model, GPUs + RAM in GiB, what was asked: layers, experts on GPUs, MiB of each memory"
    )
    return "\n".join([heading, *(line_of(*row) for row in MACHINES)]) + "\n"


def line_of(name: str, on: Machine, request: PlanRequest) -> str:
    cards = " ".join(f"{gpu.total_bytes // GIB}" for gpu in on.gpus) or "no GPU"
    cards += " unified" if any(gpu.unified for gpu in on.gpus) else ""
    default = PlanRequest()
    asked = [
        f"{field}={getattr(request, field)}"
        for field in ("n_ctx", "kv_type", "n_ubatch", "load_mode")
        if getattr(request, field) != getattr(default, field)
    ]
    head = " ".join([f"{name}, {cards} + {on.ram_total_bytes // GIB}", *asked])
    try:
        plan = make_plan(on, meta_named(name), NOTHING_MEASURED, request)
    except DoesNotFit as error:
        return f"{head}: refused. {error}"
    return f"{head}: {placed(plan, meta_named(name))}"


def placed(plan: Plan, meta: ModelMeta) -> str:
    place = plan.placement
    split = "+".join(f"{share:g}" for share in place.tensor_split)
    layers = f"{place.n_gpu_layers}/{meta.n_layers + 1} layers" + (f" ({split})" if split else "")
    n_experts, n_ram = expert_counts(plan, meta)
    memory = ", ".join(
        f"{m.device} {mib(m.total_bytes)}/{mib(m.budget_bytes)}" for m in plan.memory
    )
    return f"{layers}, {n_experts - n_ram}/{n_experts} experts; {memory}"


def expert_counts(plan: Plan, meta: ModelMeta) -> tuple[int, int]:
    """Expert tensors, and those of them that are in RAM."""
    place = plan.placement
    first = max(0, meta.n_layers + 1 - place.n_gpu_layers)
    experts = [t for t in meta.tensors if t.role == "experts" and (t.layer or 0) < meta.n_layers]
    in_ram = [
        t
        for t in experts
        if (t.layer or 0) < first
        or t.layer in place.cpu_expert_layers
        or t.name in place.cpu_expert_tensors
    ]
    return len(experts), len(in_ram)


def mib(n_bytes: int) -> int:
    return round(n_bytes / MIB)


@pytest.mark.parametrize(
    ("head_dim", "kv_type", "can"),
    [(128, "q8_0", True), (80, "q8_0", False), (80, "f16", True), (96, "q4_0", True)],
)
def test_a_cache_has_whole_blocks_of_each_head(head_dim: int, kv_type: KvType, can: bool) -> None:
    meta = replace(meta_named("demo"), head_dim_k=head_dim)
    assert can_hold_cache(meta, kv_type) is can


def test_invented_machines() -> None:
    assert len(MACHINES) >= 40
    assert table() == TABLE.read_text("utf-8")


# ---- against llama.cpp with CUDA ----


def fixed_as(row: RecordedGpus) -> tuple[Machine, PlanRequest]:
    """A machine and request that come to the placement of a record."""
    layers = row.n_gpu_layers
    moved = {"experts": 10**6, "half-experts": meta_named(row.name).n_layers // 2}.get(row.tag, 0)
    request = PlanRequest(
        n_ctx=row.n_ctx, n_gpu_layers=layers, n_cpu_moe=moved, n_ubatch=row.n_ubatch
    )
    return machine(512, *[512] * row.n_gpus), request


@pytest.mark.parametrize("name", ["mixtral-8x7b", "mixtral-8x22b", *FAMILIES])
def test_weights_and_caches_of_gpus_are_those_of_llama(name: str) -> None:
    """To the byte for caches. Weights but for CUDA's alignment: 128 bytes, and a row of padding."""
    meta = meta_named(name)
    rows = [row for row in recorded_gpus() if row.name == name and row.n_gpus == 1]
    assert {row.tag for row in rows} == {"all", "experts", "half-experts", "layers"}
    for row in rows:
        on, request = fixed_as(row)
        plan = best_plan(on, meta, NOTHING_MEASURED, request)
        gpu, ram = plan.memory
        assert gpu.kv.n_bytes == row.gpus[0].cache
        assert ram.kv.n_bytes == row.ram.cache
        slack = 512 * len(meta.tensors)
        assert 0 <= row.gpus[0].weights - gpu.weights.n_bytes <= slack, row
        assert abs(ram.weights.n_bytes - row.ram.weights) <= slack, row


def test_layers_go_to_gpus_as_llama_splits_them() -> None:
    """upper_bound over cumulated float shares (load_tensors, src/llama-model.cpp), all splits."""
    for n in (2, 7, 33, 49, 57):
        for first in range(n + 1):
            for second in {0, 1, (n - first) // 2, n - first}:
                if first + second <= n:
                    split = (first, second, n - first - second)
                    assert native_split(split, n) == split


def native_split(split: tuple[int, ...], n: int) -> tuple[int, ...]:
    shares = np.zeros(len(split), np.float32)
    total = np.float32(0)
    for i, share in enumerate(split):
        total = np.float32(total + np.float32(share))
        shares[i] = total
    shares /= total
    at = [int(np.searchsorted(shares, np.float32(i) / np.float32(n), "right")) for i in range(n)]
    return tuple(at.count(place) for place in range(len(split)))


def test_two_gpus_hold_what_cuda_told() -> None:
    """The same split gives each GPU the same weights and cache as llama.cpp gave it."""
    rows = [r for r in recorded_gpus() if r.n_gpus == 2 and r.tag == "all" and r.n_ctx == 4096]
    assert len(rows) >= 40
    for row in rows:
        meta = meta_named(row.name)
        used = [row.n_first, row.n_gpu_layers - row.n_first]
        # budgets that leave no other choice: what the record holds, and the buffers beside it
        sized = best_plan(machine(512, 512, 512), meta, NOTHING_MEASURED, PlanRequest())
        beside = [m.compute.n_bytes + m.overhead.n_bytes for m in sized.memory]
        budgets = tuple(
            gpu.weights + gpu.cache + more + 4096
            for gpu, more in zip(row.gpus, beside, strict=False)
        )
        plan = make_plan(
            machine(512, 512, 512), meta, NOTHING_MEASURED, PlanRequest(vram_bytes=budgets)
        )
        assert plan.placement.tensor_split == tuple(map(float, used)), row
        for memory, gpu in zip(plan.memory, row.gpus, strict=False):
            assert memory.kv.n_bytes == gpu.cache
            # frequencies of the rotation (1 KiB) go with layers, here they count with the output
            off_by = gpu.weights - memory.weights.n_bytes
            assert -1024 <= off_by <= 512 * len(meta.tensors)


def test_layers_for_drafting_are_counted_as_llama_counts_them(tmp_path: Path) -> None:
    """They stand between the last layer and the output, and nothing is loaded for them."""
    family = with_layers(FAMILIES["qwen35moe"], 8)
    family = replace(family, kv={**family.kv, "nextn_predict_layers": 2})
    path = tmp_path / "model.gguf"
    make_model(path, family, "Q4_K_M", header_only=True)
    meta = read_meta(path)
    on = machine(64, 64, 64)
    plan = make_plan(on, meta, NOTHING_MEASURED, PlanRequest())
    assert plan.placement.n_gpu_layers == 9  # 6 layers, 2 for drafting, the output
    assert sum(plan.placement.tensor_split) == 9
    kept = make_plan(on, meta, NOTHING_MEASURED, PlanRequest(n_gpu_layers=5))
    assert kept.placement.n_gpu_layers == 5
    on_gpus = sum(m.weights.n_bytes for m in kept.memory[:-1])
    last_two = sum(sum(roles.values()) for roles in meta.layer_bytes[4:6])
    output = sum(t.n_bytes for t in meta.tensors if t.name.startswith("output"))
    assert on_gpus == pytest.approx(last_two + output, abs=100)


# ---- properties ----


@cache
def base() -> ModelMeta:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        make_model(path, SHAPES["tiny"], "Q4_K_M", header_only=True)
        return read_meta(path)


def tensor(name: str, layer: int | None, role: str, n_bytes: int) -> TensorInfo:
    return TensorInfo(name, "Q4_K", (1,), 1, n_bytes, 0, 0, layer, role)  # type: ignore[arg-type]


mega = st.integers(1, 40).map(lambda n: n * MIB)


@st.composite
def models(draw: st.DrawFn) -> ModelMeta:
    """Up to six layers of some MiB, with and without experts; tied and untied embeddings."""
    n = draw(st.integers(1, 6))
    tensors = [tensor("token_embd.weight", None, "embedding", draw(mega))]
    if draw(st.booleans()):
        tensors.append(tensor("output.weight", None, "output", draw(mega)))
    for i in range(n):
        tensors.append(tensor(f"blk.{i}.attn_q.weight", i, "attention", draw(mega)))
        for part in ("gate", "up", "down")[: draw(st.integers(0, 3))]:
            tensors.append(tensor(f"blk.{i}.ffn_{part}_exps.weight", i, "experts", draw(mega)))
    heads = tuple(draw(st.integers(0, 3)) for _ in range(n))
    return replace(base(), n_layers=n, n_heads=(4,) * n, n_kv_heads=heads, tensors=tuple(tensors))


@st.composite
def machines(draw: st.DrawFn, most_gpus: int = 2) -> Machine:
    sizes = draw(st.lists(st.integers(0, 700), max_size=most_gpus))
    ram = draw(st.integers(0, 1000))
    unified = bool(sizes) and draw(st.integers(0, 4)) == 0
    return machine(ram / 1024, *(size / 1024 for size in sizes), unified=unified)


# what is measured on these machines: a small overhead, so that small models have a choice
FEW = Measured(overhead_bytes={f"GPU{i}": 3 * MIB for i in range(3)})
requests = st.builds(
    PlanRequest,
    n_ctx=st.sampled_from([512, 4096, 16384]),
    n_seq=st.sampled_from([1, 3]),
    n_gpu_layers=st.sampled_from(["auto", "auto", "all", 0, 1, 3]),
    n_cpu_moe=st.sampled_from([None, None, 0, 2, 99]),
    kv_type=st.sampled_from(["f16", "q8_0"]),
    n_ubatch=st.sampled_from([128, 512]),
    vram_bytes=st.sampled_from([None, None, (200 * MIB,), (90 * MIB, 300 * MIB), (GIB,)]),
    ram_bytes=st.sampled_from([None, None, 300 * MIB]),
)


def tried(on: Machine, meta: ModelMeta, request: PlanRequest) -> Plan | None:
    try:
        return make_plan(on, meta, FEW, request)
    except DoesNotFit:
        return None


@given(machines(3), models(), requests)
@settings(max_examples=200)
def test_no_memory_is_asked_for_more_than_its_budget(
    on: Machine, meta: ModelMeta, request: PlanRequest
) -> None:
    plan = tried(on, meta, request)
    if plan is None:
        return
    for memory in plan.memory:
        assert memory.total_bytes <= memory.budget_bytes
    in_ram = on.ram_available_bytes if request.ram_bytes is None else request.ram_bytes
    assert plan.memory[-1].budget_bytes <= min(in_ram, on.ram_available_bytes)
    shared = {gpu.name for gpu in on.gpus if gpu.unified} | {RAM}
    pooled = sum(m.total_bytes for m in plan.memory if m.device in shared)
    assert pooled <= on.ram_available_bytes
    asked = request.vram_bytes or tuple(gpu.free_bytes for gpu in on.gpus)
    for gpu, most in zip(on.gpus, asked, strict=False):
        held = sum(m.total_bytes for m in plan.memory if m.device == gpu.name)
        assert held <= min(most, gpu.free_bytes)


@given(machines(3), models(), requests)
@settings(max_examples=150)
def test_every_byte_is_somewhere_once(on: Machine, meta: ModelMeta, request: PlanRequest) -> None:
    """Weights add up, with one copy of tied embeddings where the output is on a GPU."""
    plan = tried(on, meta, request)
    if plan is None:
        return
    weights = sum(memory.weights.n_bytes for memory in plan.memory)
    embedding = meta.tensors[0].n_bytes
    tied = plan.placement.n_gpu_layers and not any(t.role == "output" for t in meta.tensors)
    assert weights == meta.weights_bytes + (embedding if tied else 0)


@given(machines(), models(), requests)
@settings(max_examples=150)
def test_what_a_person_fixed_is_kept(on: Machine, meta: ModelMeta, request: PlanRequest) -> None:
    plan = tried(on, meta, request)
    if plan is None:
        return
    place = plan.placement
    assert (place.n_ctx, place.n_seq, place.kv_type) == (
        request.n_ctx, request.n_seq, request.kv_type,
    )  # fmt: skip
    assert place.n_ubatch == request.n_ubatch
    if request.n_gpu_layers != "auto":
        everything = meta.n_layers + 1
        asked = everything if request.n_gpu_layers == "all" else request.n_gpu_layers
        assert place.n_gpu_layers == min(asked, everything)
    if request.n_cpu_moe is not None and place.n_gpu_layers:
        assert place.cpu_expert_layers == tuple(range(min(request.n_cpu_moe, meta.n_layers)))
        assert place.cpu_expert_tensors == ()


@given(machines(), models(), requests, st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=200)
def test_a_larger_machine_never_refuses_what_a_smaller_one_took(
    on: Machine, meta: ModelMeta, request: PlanRequest, more_ram: int, more_vram: int
) -> None:
    larger = replace(
        on,
        ram_available_bytes=on.ram_available_bytes + more_ram * MIB,
        gpus=tuple(replace(g, free_bytes=g.free_bytes + more_vram * MIB) for g in on.gpus),
    )
    if tried(on, meta, request):
        assert tried(larger, meta, request)


@given(st.integers(0, 700), st.integers(0, 300), models(), requests)
@settings(max_examples=150)
def test_more_memory_on_a_gpu_never_holds_less_of_the_model(
    size: int, more: int, meta: ModelMeta, request: PlanRequest
) -> None:
    plans = [
        tried(machine(2, vram / 1024), meta, replace(request, vram_bytes=None, ram_bytes=None))
        for vram in (size, size + more)
    ]
    less, larger = (held_on_gpus(plan) for plan in plans)
    assert larger >= less


def held_on_gpus(plan: Plan | None) -> int:
    """Bytes of weights and cache on GPUs."""
    memory = plan.memory[:-1] if plan else ()
    return sum(m.weights.n_bytes + m.kv.n_bytes for m in memory)


@given(machines(), models(), requests)
@settings(max_examples=50)
def test_a_plan_depends_on_nothing_else(on: Machine, meta: ModelMeta, request: PlanRequest) -> None:
    assert best_or_refused(on, meta, request) == best_or_refused(on, meta, request)


def best_or_refused(on: Machine, meta: ModelMeta, request: PlanRequest) -> Plan | str:
    try:
        return make_plan(on, meta, FEW, request)
    except DoesNotFit as error:
        return str(error)


# ---- what is refused ----


def refused(on: Machine, request: PlanRequest, name: str = MIXTRAL) -> DoesNotFit:
    with pytest.raises(DoesNotFit) as error:
        make_plan(on, meta_named(name), NOTHING_MEASURED, request)
    assert error.value.exit_code == 3
    return error.value


def test_a_refusal_names_the_numbers_and_a_quant_that_fits() -> None:
    error = refused(machine(16, 8), PlanRequest())
    assert error.message == "mixtral-8x7b needs 20.1 GiB of RAM and may take 16.0 GiB."
    assert "Take a quant of at most 22.4 GiB" in error.hint
    assert "--load-mode mmap" in error.hint


def test_what_was_fixed_and_does_not_fit_is_refused_with_what_does() -> None:
    """A context of 32k needs 4 GiB of cache; 17 layers with all their experts need 14 GiB."""
    error = refused(machine(28.5), PlanRequest(n_ctx=32768))
    assert "of RAM and may take 28.5 GiB" in error.message
    assert error.hint == "It fits with -c 8192."
    error = refused(machine(29.5), PlanRequest(n_ctx=32768))
    assert error.hint == "It fits with -ctk q8_0 or -c 16384."
    error = refused(machine(64, 8), PlanRequest(n_gpu_layers=17, n_cpu_moe=0))
    assert "GPU0 and may take 8.0 GiB" in error.message
    assert error.hint == "It fits with -ngl auto and no -ncmoe (that is 33 layers)."


def suggestions(hint: str) -> Iterator[PlanRequest]:
    words = hint.replace(".", "").split()
    for option, value in zip(words, words[1:], strict=False):
        if option == "-c":
            yield PlanRequest(n_ctx=int(value))
        if option == "-ctk":
            yield PlanRequest(n_ctx=32768, kv_type=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("ram", [27.5, 28.0, 28.5, 29.0, 29.5, 30.0])
def test_what_is_suggested_fits(ram: float) -> None:
    error = refused(machine(ram), PlanRequest(n_ctx=32768))
    found = list(suggestions(error.hint))
    assert found
    for request in found:
        assert make_plan(machine(ram), meta_named(MIXTRAL), NOTHING_MEASURED, request).fits


def test_layers_on_a_gpu_that_is_not_there() -> None:
    error = refused(machine(64), PlanRequest(n_gpu_layers=10))
    assert "llama.cpp sees none here" in error.message


def test_a_file_larger_than_ram_is_run_only_when_asked_for() -> None:
    refused(machine(16), PlanRequest())
    request = PlanRequest(load_mode="mmap")
    plan = make_plan(machine(16), meta_named(MIXTRAL), NOTHING_MEASURED, request)
    assert plan.fits
    assert plan.memory[-1].missing_bytes > 0


def test_where_ram_is_short_the_gpu_is_filled_to_the_brim() -> None:
    """Whole layers first would leave 10 MiB of the GPU empty, which RAM has no room for."""
    experts = {0: (30, 30), 1: (40, 200)}
    tensors = [tensor("token_embd.weight", None, "embedding", MIB)]
    for layer, sizes in experts.items():
        tensors.append(tensor(f"blk.{layer}.attn_q.weight", layer, "attention", MIB))
        for part, size in zip(("up", "down"), sizes, strict=True):
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            tensors.append(tensor(name, layer, "experts", size * MIB))
    kept = {"n_layers": 2, "n_heads": (4, 4), "n_kv_heads": (1, 1)}
    meta = replace(base(), tensors=tuple(tensors), **kept)  # type: ignore[arg-type]
    ample = best_plan(machine(8, 8), meta, FEW, PlanRequest(n_cpu_moe=2))
    beside = ample.memory[0].total_bytes
    plans = [
        make_plan(machine(8, (beside + 71 * MIB) / GIB), meta, FEW, PlanRequest(ram_bytes=ram))
        for ram in (8 * GIB, ample.memory[1].total_bytes - 69 * MIB)
    ]
    assert [300 - in_experts(plan, meta) for plan in plans] == [60, 70]


def in_experts(plan: Plan, meta: ModelMeta) -> int:
    """MiB of experts in RAM."""
    place = plan.placement
    return sum(
        t.n_bytes // MIB
        for t in meta.tensors
        if t.role == "experts"
        and (t.layer in place.cpu_expert_layers or t.name in place.cpu_expert_tensors)
    )


# ---- single facts ----


def test_alternatives_fit() -> None:
    plan = make_plan(machine(32, 8), meta_named(MIXTRAL), NOTHING_MEASURED, PlanRequest())
    (sentence,) = plan.alternatives
    n_ctx = int(sentence.split()[1])
    assert n_ctx > plan.placement.n_ctx
    request = PlanRequest(n_ctx=n_ctx)
    assert make_plan(machine(32, 8), meta_named(MIXTRAL), NOTHING_MEASURED, request).fits


def test_reasons_and_what_was_rejected() -> None:
    plan = make_plan(machine(32, 8), meta_named(MIXTRAL), NOTHING_MEASURED, PlanRequest())
    assert plan.reasons == (
        "context of 4096 tokens: the default; the model was trained for 32768",
        "all layers on the GPU: there is room for every layer's dense part",
        "22 of 96 expert tensors on the GPU: no more fit beside that",
    )
    rejected = "everything on the GPU: 26.9 GiB of weights and cache, room for 7.3 GiB"
    assert plan.rejected == (rejected,)
    whole = make_plan(machine(32, 32), meta_named(MIXTRAL), NOTHING_MEASURED, PlanRequest())
    assert whole.rejected == ()
    assert "all experts on the GPU: there is room for all 96 tensors" in whole.reasons


def test_reasons_of_machines_without_a_use_for_a_gpu() -> None:
    meta = meta_named(MIXTRAL)
    for on, request, why in (
        (machine(32), PlanRequest(), "there is no GPU to use"),
        (machine(32, 8), PlanRequest(n_gpu_layers=0), "as asked"),
        (machine(32, 0.5), PlanRequest(), "the GPUs have too little room for one layer"),
    ):
        plan = make_plan(on, meta, NOTHING_MEASURED, request)
        assert f"everything on the CPU: {why}" in plan.reasons
        assert plan.placement.n_gpu_layers == 0


def test_memory_that_is_shared_is_given_once() -> None:
    """28.1 GiB of model on 32 GiB: the GPU's part is gone from RAM's budget."""
    on = machine(32, 24, unified=True)
    plan = make_plan(on, meta_named(MIXTRAL), NOTHING_MEASURED, PlanRequest())
    gpu, ram = plan.memory
    assert ram.budget_bytes == on.ram_available_bytes - gpu.total_bytes
    assert any("the same memory" in reason for reason in plan.reasons)
    error = refused(machine(24, 18, unified=True), PlanRequest())
    assert error.message == (
        "mixtral-8x7b needs 28.1 GiB of the memory that GPU0 and RAM share and may take 24.0 GiB."
    )
    assert make_plan(machine(24, 18), meta_named(MIXTRAL), NOTHING_MEASURED, PlanRequest()).fits


def test_ram_in_three_kinds() -> None:
    meta = meta_named(MIXTRAL)
    for mode, with_gpu in (("auto", True), ("pinned", True), ("pinned", False)):
        on = machine(32, 8) if with_gpu else machine(32)
        request = PlanRequest(load_mode=mode)  # type: ignore[arg-type]
        ram = make_plan(on, meta, NOTHING_MEASURED, request).memory[-1]
        weights = ram.weights.n_bytes
        embeddings = meta.bytes_by_role["embedding"]  # read row by row, never copied to a GPU
        pinned = weights - embeddings if mode == "pinned" and with_gpu else 0
        assert (ram.pinned_bytes, ram.mapped_bytes) == (pinned, weights - pinned)
        assert ram.repacked.n_bytes == 0


@pytest.mark.parametrize(("quant", "wider_up"), [("Q4_K", 0), ("Q4_K_M", 0), ("Q4_K", 64 * MIB)])
def test_no_token_goes_to_ram_twice_for_a_divided_layer(quant: str, wider_up: int) -> None:
    """As it would with `up` alone on the GPU, between `gate` and `down`."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder) / "m.gguf", SHAPES[MIXTRAL], quant, header_only=True)[0]
        meta, divided = read_meta(path), 0
    wider = (replace(t, n_bytes=t.n_bytes + wider_up * ("_up_" in t.name)) for t in meta.tensors)
    meta = replace(meta, tensors=tuple(wider))
    for mib in range(6 * 1024, 24 * 1024, 300):
        request = PlanRequest(vram_bytes=(mib * MIB,))
        place = make_plan(machine(64, 24), meta, NOTHING_MEASURED, request).placement
        names = [name.split(".")[2] for name in place.cpu_expert_tensors]
        assert sorted(names) != ["ffn_down_exps", "ffn_gate_exps"]
        divided += len(names) == 2
    assert divided > 10


def test_biases_of_experts_are_where_their_matrix_is() -> None:
    meta, divided = meta_named("gpt-oss"), 0
    biases = [t.name for t in meta.tensors if t.role == "experts" and t.name.endswith("bias")]
    for mib in range(3 * 1024, 12 * 1024, 200):
        request = PlanRequest(vram_bytes=(mib * MIB,))
        place = make_plan(machine(64, 16), meta, NOTHING_MEASURED, request).placement
        in_ram = set(place.cpu_expert_tensors)
        matrices = {name.rpartition(".")[0] for name in in_ram}
        assert {name for name in biases if name.rpartition(".")[0] in matrices} <= in_ram
        divided += bool(in_ram)
    assert divided > 10


@pytest.mark.parametrize(("name", "n_tensors"), [(MIXTRAL, 96), ("gpt-oss", 72)])
def test_room_is_kept_for_what_is_pinned_and_not_for_all_that_could_be(
    name: str, n_tensors: int
) -> None:
    """For its page tables: 52 MiB for all of Mixtral's experts, 8 for those of five layers."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder) / "m.gguf", PUBLISHED[name], "Q4_K", header_only=True)[0]
        meta = read_meta(path)
    experts = [t for t in meta.tensors if t.role == "experts"]
    one = sum(t.n_bytes for t in experts) // n_tensors
    total = sum(t.n_bytes for t in meta.tensors)
    empty = []
    for share in range(66, 90, 2):
        budget = total * share // 100 + GIB
        request = PlanRequest(vram_bytes=(budget,), load_mode="pinned", n_ctx=4096)
        plan = make_plan(machine(64, 40), meta, NOTHING_MEASURED, request)
        assert plan.kind == "experts"
        empty.append(budget - plan.memory[0].total_bytes)
    assert max(empty) < one + 2 * GRAPHS_BYTES


def test_layers_count_whose_experts_a_person_put_in_ram() -> None:
    """Not those that have none, nor those that are in RAM as a whole."""
    deepseek = meta_named("deepseek2")  # its first layer has no experts
    request = PlanRequest(n_cpu_moe=1)
    plan = make_plan(machine(64, 64), deepseek, NOTHING_MEASURED, request)
    assert plan.left == HostResidue()
    for n_gpu_layers, n_layers in ((5, 0), (33, 8), (29, 4)):
        request = PlanRequest(n_cpu_moe=8, n_gpu_layers=n_gpu_layers)
        plan = best_plan(machine(64, 24), meta_named(MIXTRAL), NOTHING_MEASURED, request)
        assert plan.left.n_layers == n_layers


def test_each_gpu_counts_its_own_layers_with_experts_in_ram() -> None:
    plan = make_plan(machine(64, 8, 8, 12), meta_named(MIXTRAL), NOTHING_MEASURED, PlanRequest())
    pools = [memory.overhead.n_bytes - OVERHEAD_BYTES for memory in plan.memory[:-1]]
    assert sum(pools) == plan.left.n_layers * GRAPHS_BYTES
    assert max(pools) < sum(pools)


@pytest.mark.parametrize("n_gpus", [1, 3])
def test_files_of_many_sizes_are_planned_in_bounded_time(n_gpus: int) -> None:
    """48 layers of five kinds; nothing is timed here, but it would not end."""
    meta = meta_named("qwen3moe")
    scaled = (
        replace(t, n_bytes=t.n_bytes * (8 + (t.layer or 0) * 7 % 5) // 8 // 32 * 32)
        if t.role == "experts"
        else t
        for t in meta.tensors
    )
    meta = replace(meta, tensors=tuple(scaled))
    plan = best_plan(machine(64, *[4] * n_gpus), meta, NOTHING_MEASURED, PlanRequest())
    assert plan.fits


def test_every_figure_says_where_it_comes_from() -> None:
    meta = meta_named(MIXTRAL)
    left = make_plan(machine(32, 8), meta, NOTHING_MEASURED, PlanRequest()).left
    copied = left.copied_bytes, left.next_bytes
    point = ComputePoint("experts/f16/1", "GPU0", 4096, 512, 300 * MIB, *copied)
    measured = Measured({"GPU0": 200 * MIB}, (point,))
    plan = make_plan(machine(32, 8), meta, measured, PlanRequest())
    gpu, ram = plan.memory
    assert (gpu.compute.basis, gpu.compute.n_bytes) == ("measured", 300 * MIB)
    # what was measured on the demo model, and the quantized input of two experts' last matrix
    pool = 512 * 2 * 14336 * 36 // 32
    names = {name.split(".")[1] for name in plan.placement.cpu_expert_tensors}
    graphs = (len(plan.placement.cpu_expert_layers) + len(names)) * GRAPHS_BYTES
    overhead = 200 * MIB + pool + graphs
    assert (gpu.overhead.basis, gpu.overhead.n_bytes) == ("interpolated", overhead)
    assert (gpu.weights.basis, gpu.kv.basis, ram.compute.basis) == ("formula",) * 3


def test_what_was_measured_makes_room() -> None:
    """362 MiB less of overhead than assumed: more of the experts."""
    meta = meta_named(MIXTRAL)
    before, after = (
        make_plan(machine(32, 8), meta, known, PlanRequest()).memory[0].weights.n_bytes
        for known in (NOTHING_MEASURED, Measured({"GPU0": 150 * MIB}))
    )
    assert 300 * MIB < after - before < 362 * MIB + 60 * MIB


def test_planning_does_little_work() -> None:
    """Two unequal cards; most of it is the search for a longer context that fits as well.

    Calls are counted, as seconds depend on what else the machine does. Half a million take 0.1 s.
    """
    meta = meta_named(MIXTRAL)
    n_calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal n_calls
        n_calls += event == "call"

    sys.setprofile(count)
    try:
        make_plan(machine(32, 12, 8), meta, NOTHING_MEASURED, PlanRequest())
    finally:
        sys.setprofile(None)
    assert 0 < n_calls < 800_000  # 540,000 on Python 3.11


def test_planning_imports_nothing_heavy() -> None:
    heavy = "{'numpy', 'llama_cpp', 'rich', 'click', 'huggingface_hub', 'jinja2'}"
    code = f"import sys, localmoe.planner.plan; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


if __name__ == "__main__":
    TABLE.write_text(table(), "utf-8")


@pytest.mark.parametrize(
    ("n_ctx", "kv_type", "batch_invariant", "flash"),
    [
        (1024, "f16", True, "off"),
        (1024, "q8_0", True, "on"),
        (32768, "q8_0", True, "on"),
        (32768, "f16", False, "auto"),  # the scores of 512 tokens would take 2 GiB
    ],
)
def test_answers_are_alike_where_there_is_room_for_it(
    n_ctx: int, kv_type: KvType, batch_invariant: bool, flash: str
) -> None:
    wanted = PlanRequest(n_ctx=n_ctx, n_seq=4, kv_type=kv_type)
    plain = make_plan(machine(64), meta_named(MIXTRAL), NOTHING_MEASURED, wanted)
    plan = make_plan(
        machine(64), meta_named(MIXTRAL), NOTHING_MEASURED, replace(wanted, batch_invariant=True)
    )
    assert (plan.placement.batch_invariant, plan.placement.flash_attention) == (
        batch_invariant,
        flash,
    )
    assert not plain.placement.batch_invariant
    more = plan.memory[-1].compute.n_bytes - plain.memory[-1].compute.n_bytes
    assert (more > 0) is (flash == "off")
