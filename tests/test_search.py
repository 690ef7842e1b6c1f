"""Which candidate is taken for which work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from make_model import FAMILIES, SHAPES, make_model

from localmoe.engine.rates import Bandwidths, DeviceRates
from localmoe.errors import DoesNotFit, gib
from localmoe.gguf.model_meta import ModelMeta, read_meta
from localmoe.hardware.machine import Gpu, Machine
from localmoe.perf.cost_model import Speeds
from localmoe.perf.figures import NOTHING_MEASURED
from localmoe.planner.plan import Plan, make_plan
from localmoe.planner.request import PlanRequest
from localmoe.planner.search import (
    JOBS,
    N_MEASURED,
    FreeParameters,
    Job,
    Workload,
    fallbacks,
    job_of,
    pinned_bytes,
    plans_of,
    promising_requests,
    requests_of,
    search,
    within,
)

GIB = 1 << 30
# an H100 with 16 cores beside it (docs/notes/forecast.md)
H100 = Bandwidths(
    (
        DeviceRates("CPU", 16, 97e9, 2e-6, 2e9, 4e9),
        DeviceRates("CUDA0", 0, 3.35e12, 3e-6, 1e12, 1e13, 50e9, 7.3e9, 20e-6),
    )
)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ModelMeta:
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    return read_meta(make_model(path, SHAPES["mixtral-8x7b"], "Q4_K", header_only=True)[0])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ModelMeta:
    """Of its experts 16 of 96 tensors are half as large again as the others."""
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    return read_meta(make_model(path, SHAPES["mixtral-8x7b"], "Q4_K_M", header_only=True)[0])


def machine(vram_gib: int, ram_gib: int = 64) -> Machine:
    gpus = (Gpu("CUDA0", "a card", vram_gib * GIB, vram_gib * GIB),) if vram_gib else ()
    return Machine(ram_gib * GIB, ram_gib * GIB, 16, gpus)


def searched(
    meta: ModelMeta,
    on: Machine,
    workload: Workload,
    request: PlanRequest = PlanRequest(),  # noqa: B008
    is_open: FreeParameters = FreeParameters(),  # noqa: B008
    job: Job | None = None,
) -> Plan:
    requests = requests_of(request, bool(on.gpus), is_open, workload)
    names = tuple(gpu.name for gpu in on.gpus)
    return search(
        requests,
        job or JOBS[workload],
        meta,
        names,
        Speeds(H100),
        lambda r: make_plan(on, meta, NOTHING_MEASURED, r),
    )


@pytest.mark.parametrize("vram_gib", [8, 12, 16, 24])
def test_conversations_get_fast_prompts_and_single_answers_fast_generation(
    mixtral: ModelMeta, vram_gib: int
) -> None:
    run, chat = (searched(mixtral, machine(vram_gib), w) for w in ("run", "chat"))  # type: ignore[arg-type]
    assert run.forecast
    assert chat.forecast
    assert chat.placement.n_ubatch > run.placement.n_ubatch
    assert chat.placement.load_mode == "pinned"
    assert pinned_bytes(chat) > 0
    assert chat.forecast.prompt_tps > 2 * run.forecast.prompt_tps
    assert run.forecast.generation_tps >= chat.forecast.generation_tps
    for plan in (run, chat):
        assert all(memory.total_bytes <= memory.budget_bytes for memory in plan.memory)


def test_the_choice_is_told_with_what_was_not_taken(mixtral: ModelMeta) -> None:
    plan = searched(mixtral, machine(16), "chat")
    in_ram = gib(plan.memory[-1].weights.n_bytes)
    values = f"micro-batch {plan.placement.n_ubatch}, {in_ram} in RAM pinned, "
    assert plan.reasons[-1].startswith(values)
    assert sum("by forecast" in text for text in plan.rejected) == 7


@pytest.mark.parametrize("vram_gib", [8, 16])
def test_a_single_long_prompt_gets_a_large_micro_batch(mixtral: ModelMeta, vram_gib: int) -> None:
    """Where its length is known: each micro-batch copies the experts in RAM anew."""
    short, long = (
        searched(mixtral, machine(vram_gib), "run", job=job_of("run", n)).placement.n_ubatch
        for n in (100, 3000)
    )
    assert short <= 512
    assert long >= 1024


def test_the_larger_experts_go_to_the_gpu_where_that_leaves_less_in_ram(mixed: ModelMeta) -> None:
    """For copies of the largest one in RAM there is room kept on the GPU."""
    request = PlanRequest(n_ubatch=128, vram_bytes=((24 << 30) - (200 << 20),))
    plain = make_plan(machine(24), mixed, NOTHING_MEASURED, request)
    plan = searched(mixed, machine(24), "run", request, FreeParameters(n_ubatch=False))
    assert plan.left.copied_bytes < plain.left.copied_bytes
    assert plan.memory[-1].weights.n_bytes < plain.memory[-1].weights.n_bytes
    gpu = plan.memory[0]
    assert gpu.total_bytes <= gpu.budget_bytes


@pytest.mark.parametrize(("vram_gib", "n_each"), [(8, 1), (24, 2)])
def test_it_is_tried_where_the_larger_experts_fit(
    mixed: ModelMeta, vram_gib: int, n_each: int
) -> None:
    plan = searched(
        mixed, machine(vram_gib), "run", PlanRequest(n_ubatch=128), FreeParameters(False)
    )
    assert 1 + sum("by forecast" in text for text in plan.rejected) == 2 * n_each  # mapped, pinned
    fixed = PlanRequest(n_ubatch=128, n_cpu_moe=8)
    found = searched(mixed, machine(24), "run", fixed, FreeParameters(False))
    assert sum("by forecast" in text for text in found.rejected) == 1


def test_it_is_not_taken_where_whole_layers_are_in_ram_then(tmp_path: Path) -> None:
    """With the larger experts among them."""
    path = make_model(tmp_path / "m.gguf", FAMILIES["granitehybrid"], "Q5_K_M", header_only=True)[0]
    meta = read_meta(path)
    n_bytes = int(sum(t.n_bytes for t in meta.tensors) * 0.35) + (600 << 20)
    on = Machine(128 * GIB, 128 * GIB, 16, (Gpu("CUDA0", "a card", n_bytes, n_bytes),))

    def planned(request: PlanRequest) -> Plan:
        return make_plan(on, meta, NOTHING_MEASURED, request)

    plain = planned(PlanRequest(n_ubatch=2048))
    smaller = {t.n_bytes for t in meta.tensors if t.role == "experts"} - {plain.left.copied_bytes}
    other = planned(PlanRequest(n_ubatch=2048, largest_in_ram=max(smaller)))
    assert (plain.kind, other.kind) == ("experts", "layers")  # else nothing was shown
    assert list(plans_of(PlanRequest(n_ubatch=2048), meta, planned)) == [plain]


def test_a_job_is_of_the_size_that_is_known() -> None:
    assert job_of("run") == JOBS["run"]
    task = job_of("run", n_prompt=3000, n_generated=16).task
    assert (task.n_prompt, task.n_generated) == (3000, 16)
    assert job_of("run", n_generated=100_000).task == JOBS["run"].task  # most answers end before
    assert job_of("chat", n_prompt=3000) == JOBS["chat"]


def test_the_edge_from_which_experts_are_copied_is_where_that_is_faster(mixtral: ModelMeta) -> None:
    """llama.cpp's is 32. Over PCIe 5 from pinned pages 8 tokens were 1.4 times as fast copied
    (34 to 24 tok/s; docs/notes/batching.md), over a slow link not even 32 are worth it."""
    for workload in ("run", "chat", "batch"):
        pinned = searched(mixtral, machine(16), workload, PlanRequest(load_mode="pinned"))  # type: ignore[arg-type]
        assert 4 <= pinned.placement.offload_min_batch <= 8
    mapped = PlanRequest(load_mode="mmap", n_ubatch=512)
    slow = searched(mixtral, machine(16), "batch", mapped, FreeParameters(False, False)).placement
    assert 32 < slow.offload_min_batch <= 128
    whole = searched(mixtral, machine(48), "chat").placement
    assert whole.offload_min_batch == 0


def test_short_prompts_of_many_sequences_fill_a_large_micro_batch(mixtral: ModelMeta) -> None:
    """64 of 128 tokens at 512 a step took 2.2 s on an H100, at 4,096 a step 1.1 s."""
    crowded = replace(PlanRequest(), n_seq=64, n_ctx=192)
    for vram_gib in (8, 16, 48):
        assert searched(mixtral, machine(vram_gib), "batch", crowded).placement.n_ubatch >= 1024


def test_with_everything_on_the_gpu_nothing_is_pinned(mixtral: ModelMeta) -> None:
    plan = searched(mixtral, machine(48), "chat")
    assert pinned_bytes(plan) == 0
    assert plan.placement.cpu_expert_layers == ()


def test_what_a_person_fixed_stays(mixtral: ModelMeta) -> None:
    fixed = PlanRequest(n_ubatch=768, load_mode="mmap")
    plan = searched(
        mixtral, machine(16), "chat", fixed, FreeParameters(n_ubatch=False, load_mode=False)
    )
    assert (plan.placement.n_ubatch, plan.placement.load_mode) == (768, "mmap")
    assert not any("by forecast" in text for text in plan.rejected)


def test_without_a_gpu_there_is_one_candidate(mixtral: ModelMeta) -> None:
    assert list(requests_of(PlanRequest(), False, FreeParameters())) == [PlanRequest()]
    plan = searched(mixtral, machine(0), "chat")
    assert plan.placement.load_mode == "mmap"
    assert plan.forecast


def test_what_fits_nowhere_is_refused_as_by_a_plan(mixtral: ModelMeta) -> None:
    with pytest.raises(DoesNotFit) as by_search:
        searched(mixtral, machine(8, ram_gib=16), "chat")
    with pytest.raises(DoesNotFit) as by_plan:
        make_plan(machine(8, 16), mixtral, NOTHING_MEASURED, PlanRequest())
    assert str(by_search.value) == str(by_plan.value)


def test_a_job_is_cut_to_what_the_context_holds() -> None:
    task = within(JOBS["chat"].task, 1024)
    assert task.n_prompt + task.n_generated <= 1024
    whole = JOBS["chat"].task
    ratio = whole.n_prompt / whole.n_generated
    assert task.n_prompt / task.n_generated == pytest.approx(ratio, rel=0.05)


def test_of_many_requests_few_are_measured_and_the_best_is_among_them(mixtral: ModelMeta) -> None:
    on = machine(16)
    batch_shape = [
        r
        for n in (1, 2, 4, 8, 16, 32, 64)
        for r in requests_of(PlanRequest(n_seq=n, n_ctx=256), True, FreeParameters(), "batch")
    ]

    def planned(request: PlanRequest) -> Plan:
        return make_plan(on, mixtral, NOTHING_MEASURED, request)

    asked = JOBS["batch"], mixtral, ("CUDA0",), Speeds(H100)
    few = promising_requests(batch_shape, *asked, planned)
    assert len(batch_shape) == 56
    assert len(few) == N_MEASURED
    assert search(few, *asked, planned).placement == search(batch_shape, *asked, planned).placement
    assert promising_requests(batch_shape[:8], *asked, planned) == batch_shape[:8]


def test_what_is_open_gives_way_before_a_refusal() -> None:
    wishes = list(fallbacks(PlanRequest(), FreeParameters()))
    assert [(w.kv_type, w.n_ctx) for w, _ in wishes] == [
        ("f16", None),
        ("q8_0", None),
        ("q8_0", 2048),
    ]
    assert wishes[0][1] == ""
    assert all(why for _, why in wishes[1:])
    fixed = PlanRequest(n_ctx=8192)
    assert [w.kv_type for w, _ in fallbacks(fixed, FreeParameters())] == ["f16", "q8_0"]
    assert [w for w, _ in fallbacks(fixed, FreeParameters(kv_type=False))] == [fixed]
