"""The loop of plan and probe: with the real engine, and with probes that say what is asked."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from make_model import FAMILIES, SHAPES, make_model

from localmoe.config.environment import engine_environment
from localmoe.config.settings import load_settings
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import BufferSizes, Placement
from localmoe.errors import DoesNotFit
from localmoe.gguf.demo import DEMO as DEMO_FILE
from localmoe.gguf.model_meta import read_meta
from localmoe.hardware.machine import Gpu, Machine
from localmoe.perf.figures import NOTHING_MEASURED, Measured
from localmoe.planner.fit import MAX_PROBES, cache_excess, fit, overhead_bytes
from localmoe.planner.plan import make_plan
from localmoe.planner.planner import Planner
from localmoe.planner.request import PlanRequest

GIB, MIB = 1 << 30, 1 << 20
DEMO = read_meta(DEMO_FILE)
LAPTOP = Machine(16 * GIB, 12 * GIB, 4)
CARD = Gpu("CUDA0", "a card", 8 * GIB, 8 * GIB, free_from="driver")
DESKTOP = Machine(32 * GIB, 24 * GIB, 8, (CARD,))


def test_one_probe_of_the_real_engine_measures_every_buffer(engine: EngineProcess) -> None:
    path = str(DEMO_FILE)
    fitted = fit(LAPTOP, DEMO, NOTHING_MEASURED, PlanRequest(), lambda p: engine.probe(path, p))
    assert fitted.n_probes == 1
    assert fitted.plan.memory[0].compute.basis == "measured"
    again = fit(LAPTOP, DEMO, fitted.measured, PlanRequest(), pytest.fail)
    assert again.n_probes == 0
    assert again.plan == fitted.plan


def test_a_probe_that_needs_more_moves_experts_off_the_card() -> None:
    """The first plan has all on the card by formula; measured, its buffers leave no room."""

    def probe(place: Placement) -> BufferSizes:
        return BufferSizes({"CUDA0": 90 * MIB, "CPU": MIB}, {}, 0)

    small = Machine(32 * GIB, 24 * GIB, 8, (Gpu("CUDA0", "", GIB, 610 * MIB, free_from="driver"),))
    first = make_plan(small, DEMO, NOTHING_MEASURED, PlanRequest())
    assert not first.placement.cpu_expert_layers
    fitted = fit(small, DEMO, NOTHING_MEASURED, PlanRequest(), probe)
    assert 1 < fitted.n_probes <= MAX_PROBES
    assert fitted.plan.placement.cpu_expert_layers
    assert all(m.total_bytes <= m.budget_bytes for m in fitted.plan.memory)


def test_what_was_measured_holds_for_the_largest_tensor_that_was_left_in_ram(
    tmp_path: Path,
) -> None:
    """llama.cpp keeps room for its copy. Of a Q4_K_M file's experts some are a third larger: plans
    of one context and micro-batch for several budgets were 79 MiB too low and 90 too high."""
    path = make_model(tmp_path / "m.gguf", SHAPES["mixtral-8x7b"], "Q4_K_M", header_only=True)[0]
    meta, measured, left = read_meta(path), NOTHING_MEASURED, set[int]()
    sizes = {t.name: t.n_bytes for t in meta.tensors if t.role == "experts"}

    def probe(place: Placement) -> BufferSizes:
        layers = tuple(f"blk.{n}." for n in place.cpu_expert_layers)
        in_ram = [n for name, n in sizes.items()
                  if name.startswith(layers) or name in place.cpu_expert_tensors]  # fmt: skip
        left.add(max(in_ram, default=0))
        return BufferSizes({"CUDA0": 500 * MIB + max(in_ram, default=0), "CPU": MIB}, {}, 0)

    requests = PlanRequest(), PlanRequest(largest_in_ram=min(sizes.values()))
    for tenths, request in product((120, 160, 121, 200, 240), requests):
        card = Gpu("CUDA0", "", 24 * GIB, tenths * GIB // 10, free_from="driver")
        fitted = fit(Machine(64 * GIB, 60 * GIB, 8, (card,)), meta, measured, request, probe)
        measured, gpu = fitted.measured, fitted.plan.memory[0]
        assert gpu.compute.n_bytes == probe(fitted.plan.placement).compute_bytes["CUDA0"]
        assert gpu.total_bytes <= gpu.budget_bytes
    assert left == set(sizes.values())


def test_and_for_the_next_smaller_size_which_some_models_have_room_for_too(tmp_path: Path) -> None:
    """As compute.copied_experts_bytes has it for many small experts: Gemma 4 came out 61 MiB over
    its budget by what was measured for another plan, whose next size was smaller."""
    path = make_model(tmp_path / "m.gguf", FAMILIES["gemma4"], "Q4_K_M", header_only=True)[0]
    meta, measured = read_meta(path), Measured({"CUDA0": 300 * MIB})
    experts = [t for t in meta.tensors if t.role == "experts"]

    def probe(place: Placement) -> BufferSizes:
        sizes = {
            t.n_bytes
            for t in experts
            if t.layer in place.cpu_expert_layers or t.name in place.cpu_expert_tensors
        }
        copies = sum(sorted(sizes, reverse=True)[:2])
        return BufferSizes({"CUDA0": 200 * MIB + copies, "CPU": MIB}, {}, 0)

    total = sum(t.n_bytes for t in meta.tensors)
    for share in (1.046, 0.3, 0.5, 0.7, 0.9):
        card = Gpu("CUDA0", "", 80 * GIB, int(total * share), free_from="driver")
        fitted = fit(Machine(64 * GIB, 60 * GIB, 8, (card,)), meta, measured, PlanRequest(), probe)
        measured, gpu = fitted.measured, fitted.plan.memory[0]
        if fitted.plan.kind == "experts":
            assert gpu.compute.n_bytes == probe(fitted.plan.placement).compute_bytes["CUDA0"]
        assert gpu.total_bytes <= gpu.budget_bytes


def test_what_can_t_fit_is_refused_after_the_probes() -> None:
    with pytest.raises(DoesNotFit):
        fit(
            Machine(GIB, 8 * MIB, 1),
            DEMO,
            NOTHING_MEASURED,
            PlanRequest(),
            lambda place: BufferSizes({"CPU": MIB}, {}, 0),
        )


def test_a_cache_of_an_unknown_kind_counts_where_the_cache_is() -> None:
    plan = make_plan(DESKTOP, DEMO, NOTHING_MEASURED, PlanRequest())
    planned = sum(memory.kv.n_bytes for memory in plan.memory)
    assert cache_excess(plan, planned) == {}
    assert cache_excess(plan, planned + 1000) == {}  # rounding
    assert cache_excess(plan, planned + 10 * MIB) == {"CUDA0": 10 * MIB, "RAM": 0}


def test_llama_cpps_cache_is_the_formulas(engine: EngineProcess) -> None:
    plan = make_plan(LAPTOP, DEMO, NOTHING_MEASURED, PlanRequest())
    sizes = engine.probe(str(DEMO_FILE), plan.placement)
    assert sizes.cache_bytes == sum(memory.kv.n_bytes for memory in plan.memory)


def test_overhead_is_what_is_gone_beside_what_is_known() -> None:
    plan = make_plan(DESKTOP, DEMO, NOTHING_MEASURED, PlanRequest(n_gpu_layers="all"))
    card = plan.memory[0]
    known = card.total_bytes - card.overhead.n_bytes
    during = Gpu("CUDA0", "", 8 * GIB, 8 * GIB - known - 333 * MIB, free_from="driver")
    assert overhead_bytes(DESKTOP, Machine(1, 1, 1, (during,)), plan) == {"CUDA0": 333 * MIB}
    unknown = Machine(1, 1, 1, (Gpu("CUDA0", "", GIB, GIB, free_from="llama.cpp"),))
    assert overhead_bytes(unknown, unknown, plan) == {}


def test_a_plan_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMOE_STATE", str(tmp_path))
    with Planner(load_settings({})) as planner:
        first = planner.plan(DEMO_FILE, DEMO)
    kept = list((tmp_path / "measured").glob("*.json"))
    assert len(kept) == 2  # buffers of this model, and rates of this machine
    before = [path.stat().st_mtime_ns for path in kept]
    with Planner(load_settings({})) as planner:
        second = planner.plan(DEMO_FILE, DEMO)
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert second.memory[0].compute == first.memory[0].compute
    assert engine_environment()["LOCALMOE_STATE"] == str(tmp_path)
