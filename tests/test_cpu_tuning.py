"""What a model's own timing decides, and the timing itself on the demo model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from make_model import SHAPES, make_model
from pydantic import TypeAdapter
from test_cli import localmoe

from localmoe.engine.client import EngineProcess
from localmoe.engine.native.model_benchmark import clearly_fastest
from localmoe.engine.protocol import Placement
from localmoe.engine.rates import MARGIN, RepackableLayer, StepTime, Tuning
from localmoe.gguf.demo import DEMO
from localmoe.gguf.model_meta import ModelMeta, read_meta
from localmoe.hardware.machine import Machine
from localmoe.perf.cost_model import Speeds, cost_model_of, forecast
from localmoe.perf.cpu_tuning import (
    UNTUNED,
    TuningRecord,
    best_threads,
    best_ubatch,
    copies_within,
    is_busy,
    repacked_ratio,
    step_ratio,
    threads_to_try,
)
from localmoe.perf.figures import NOTHING_MEASURED
from localmoe.perf.store import MeasurementKey, MeasurementStore
from localmoe.planner.plan import Plan, make_plan
from localmoe.planner.request import PlanRequest
from localmoe.planner.search import (
    JOBS,
    RESERVE_BYTES,
    RESERVE_SHARE,
    Workload,
    job_of,
    repack_seconds,
    search,
    variants,
    with_copies,
)

GIB = 1 << 30
KEY = MeasurementKey("machine", "build", "model")
LAYERS = tuple(RepackableLayer(700 << 20, 20 << 20) for _ in range(32)) + (
    RepackableLayer(0, 100 << 20),
)


def times(n_threads: int, repacked: bool, **seconds: float) -> tuple[StepTime, ...]:
    """Times by number of tokens, written like t1=0.1."""
    return tuple(StepTime(n_threads, int(n[1:]), repacked, s) for n, s in seconds.items())


TUNING = Tuning(
    n_layers=2,
    n_threads=8,
    times=(
        *times(8, False, t1=0.010, t4=0.030, t8=0.045, t16=0.06, t32=0.08, t512=0.4, t1024=0.7),
        *times(8, True, t1=0.006, t4=0.018, t8=0.027, t16=0.042, t32=0.08),
    ),
    repackable=LAYERS,
    repack_bytes_per_s=5e9,
)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ModelMeta:
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    return read_meta(make_model(path, SHAPES["mixtral-8x7b"], "Q4_K", header_only=True)[0])


def planned(meta: ModelMeta, ram_gib: float, **values: int) -> Plan:
    machine = Machine(int(ram_gib * GIB), int(ram_gib * GIB), 8)
    return make_plan(machine, meta, NOTHING_MEASURED, PlanRequest(**values))  # type: ignore[arg-type]


# ---- decisions ----


def test_threads_are_all_cores_unless_fewer_are_clearly_faster() -> None:
    assert threads_to_try(8) == (8, 6, 4)
    assert threads_to_try(1) == (1,)
    close = (*times(8, False, t1=0.0100), *times(4, False, t1=0.0095))
    faster = (*times(8, False, t1=0.0100), *times(4, False, t1=0.0080))
    assert clearly_fastest(close) == 8
    assert clearly_fastest(faster) == 4
    assert best_threads(replace(TUNING, n_threads=4, times=faster)) == 4


def test_times_of_other_numbers_of_threads_are_not_compared() -> None:
    """Copies looked twice as fast beside the time of half the threads."""
    some = (
        *times(8, False, t1=0.010),
        *times(6, False, t1=0.012),
        *times(4, False, t1=0.018),
        *times(8, True, t1=0.010),
    )
    assert step_ratio(replace(TUNING, times=some), 1) == 1.0


def test_a_busy_machine_decides_nothing_and_is_timed_again() -> None:
    """Beside a busy program one thread of two looked best, and was kept."""
    times_then = (*times(2, False, t1=0.02, t512=1.0, t1024=1.1), *times(1, False, t1=0.008))
    busy = replace(TUNING, n_threads=1, times=times_then, others_share=0.4)
    assert best_threads(busy) == 2
    assert best_ubatch(busy, 512) == 512
    assert step_ratio(replace(TUNING, others_share=0.4), 1) == 1.0
    kept = TuningRecord(busy)
    assert not kept.is_final
    assert kept.or_better(TUNING) == TuningRecord(TUNING, 2)
    assert kept.or_better(TUNING).is_final
    busier = replace(busy, others_share=0.9)
    assert kept.or_better(busier).tuning == busy
    assert kept.or_better(busier).or_better(busier).is_final  # it may always be busy here


def test_a_larger_micro_batch_must_be_clearly_faster() -> None:
    assert best_ubatch(TUNING, 512) == 1024  # 0.68 ms a token against 0.78
    slower = replace(TUNING, times=times(8, False, t1=0.01, t512=0.4, t1024=0.78))
    assert best_ubatch(slower, 512) == 512
    assert best_ubatch(replace(TUNING, times=times(8, False, t1=0.01)), 512) == 512


def test_repacked_copies_gain_for_few_tokens() -> None:
    assert step_ratio(TUNING, 1) == pytest.approx(0.6)
    assert step_ratio(TUNING, 3) == pytest.approx(0.6)  # as for 4
    assert step_ratio(TUNING, 32) == 1.0
    assert step_ratio(TUNING, 64) == 1.0
    half = repacked_ratio(TUNING, "all", 16, 1, 0.25)
    assert 0.78 < half < 0.84
    assert repacked_ratio(TUNING, "all", 33, 1, 0.25) == pytest.approx(0.6)
    assert repacked_ratio(TUNING, "off", 0, 1, 0.25) == 1.0
    # of dense matrices a token reads all, of experts a quarter
    assert repacked_ratio(TUNING, "experts", 33, 1, 0.25) > repacked_ratio(
        TUNING, "experts", 33, 1, 1.0
    )


def test_copies_take_whole_layers_as_far_as_ram_reaches() -> None:
    some = copies_within(LAYERS, "all", 10 << 30)
    assert (some.n_layers, some.n_bytes) == (14, 14 * (720 << 20))
    assert copies_within(LAYERS, "experts", 100 << 30).n_bytes == 32 * (700 << 20)
    assert copies_within(LAYERS, "all", 1 << 20).mode == "off"
    assert copies_within(LAYERS, "off", 100 << 30).mode == "off"


# ---- plans ----


@pytest.mark.parametrize(("ram_gib", "n_layers"), [(64, 33), (40, None), (26, 0)])
def test_a_plan_takes_the_ram_that_is_left(
    mixtral: ModelMeta, ram_gib: float, n_layers: int | None
) -> None:
    plain = planned(mixtral, ram_gib)
    plan = with_copies(plain, TUNING, mixtral)
    if n_layers == 0:
        assert plan is None
        return
    assert plan
    ram = plan.memory[-1]
    assert plan.placement.repack == "all"
    assert ram.total_bytes <= ram.budget_bytes
    assert ram.repacked.n_bytes > 0
    assert ram.total_bytes == plain.memory[-1].total_bytes + ram.repacked.n_bytes
    if n_layers:
        assert plan.placement.n_repacked_layers == n_layers
    else:  # partly, and one layer more would be too much
        assert 0 < plan.placement.n_repacked_layers < 32
        reserve = max(RESERVE_BYTES, RESERVE_SHARE * ram.budget_bytes)
        assert reserve <= ram.budget_bytes - ram.total_bytes < reserve + (720 << 20)


@pytest.mark.parametrize(("workload", "in_idle"), [("chat", True), ("run", False)])
def test_only_a_conversation_has_copies_made_between_questions(
    mixtral: ModelMeta, workload: Workload, in_idle: bool
) -> None:
    """A single answer takes them only where it is sooner done with them, made first."""
    job = replace(JOBS[workload], loads=0.0)  # so that copies are worth it for both
    found = variants(planned(mixtral, 64), TUNING, mixtral, job)
    assert [p.placement.repack_in_idle for p in found] == [False, in_idle]


def test_several_sequences_have_copies_of_experts_alone(mixtral: ModelMeta) -> None:
    plan = with_copies(planned(mixtral, 64, n_seq=8), TUNING, mixtral)
    assert plan
    assert plan.placement.repack == "experts"
    assert with_copies(planned(mixtral, 64, n_seq=32), TUNING, mixtral) is None  # no gain by then


def test_the_search_weighs_what_copies_cost(mixtral: ModelMeta) -> None:
    machine = Machine(64 * GIB, 64 * GIB, 8)
    speeds = Speeds(tuning=TUNING)

    def repack_for(job_tokens: int) -> str:
        plan = search(
            [PlanRequest()],
            job_of("run", 16, job_tokens),
            mixtral,
            (),
            speeds,
            lambda r: make_plan(machine, mixtral, NOTHING_MEASURED, r),
        )
        return plan.placement.repack

    assert repack_for(256) == "all"
    assert repack_for(2) == "off"  # 22 GiB to repack for two tokens
    plan = with_copies(planned(mixtral, 64), TUNING, mixtral)
    assert plan
    assert repack_seconds(plan, TUNING) == pytest.approx(plan.memory[-1].repacked.n_bytes / 5e9)
    assert JOBS["chat"].loads < 1


def test_a_forecast_knows_of_copies(mixtral: ModelMeta) -> None:
    plain = planned(mixtral, 64)
    plan = with_copies(plain, TUNING, mixtral)
    assert plan
    slow, fast = (
        forecast(cost_model_of(p.placement, mixtral, Speeds().bandwidths, (), tuning=TUNING))
        for p in (plain, plan)
    )
    assert fast.generation_tps == pytest.approx(slow.generation_tps / 0.6)
    assert fast.prompt_tps == slow.prompt_tps


# ---- kept ----


def test_what_was_timed_is_kept_for_machine_build_and_model(tmp_path: Path) -> None:
    store = MeasurementStore(tmp_path)
    assert store.timing(KEY) is None
    store.write_timing(KEY, TuningRecord(TUNING))
    assert store.timing(KEY) == TuningRecord(TUNING)
    assert store.timing(replace(KEY, model="other")) is None
    assert store.timing(replace(KEY, build="other")) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"n_layers": 1}', '{"times": "x"}'])
def test_a_damaged_file_is_none(tmp_path: Path, text: str) -> None:
    store = MeasurementStore(tmp_path)
    store.write_timing(KEY, TuningRecord(TUNING))
    next(tmp_path.glob("[!.]*")).write_text(text)
    assert store.timing(KEY) is None


def test_a_model_that_could_not_be_timed_is_tried_again_but_not_for_ever(tmp_path: Path) -> None:
    MeasurementStore(tmp_path).write_timing(KEY, TuningRecord(UNTUNED))
    found = MeasurementStore(tmp_path).timing(KEY)
    assert found == TuningRecord(UNTUNED)
    assert not found.is_final
    assert found.or_better(UNTUNED).or_better(UNTUNED).is_final
    busy = TuningRecord(replace(TUNING, others_share=0.9))
    assert busy.or_better(UNTUNED).tuning == busy.tuning  # a failure is no better timing


# ---- timed ----


def test_a_model_is_timed_by_its_first_layers(engine: EngineProcess) -> None:
    found = engine.tune(str(DEMO), [2, 1], 30.0)
    assert [t.n_threads for t in found.times[:2]] == [2, 1]
    assert {t.n_tokens for t in found.times if not t.repacked} >= {1, 4, 8, 16, 32, 512, 1024}
    assert {t.n_tokens for t in found.times if t.repacked} == {1, 4, 8, 16, 32}
    assert len(found.repackable) == read_meta(DEMO).n_layers + 1
    assert found.repack_bytes_per_s > 0
    assert all(t.seconds > 0 for t in found.times)
    assert found.n_threads in (1, 2)
    assert 0 <= found.others_share <= 1
    loaded = engine.load(str(DEMO), Placement(n_threads=2))  # it has no model of it
    assert loaded.n_ctx > 0


def test_what_there_is_no_time_for_is_left_out(engine: EngineProcess) -> None:
    found = engine.tune(str(DEMO), [2, 1], 0.0)
    assert [(t.n_threads, t.n_tokens, t.repacked) for t in found.times] == [(2, 1, False)]
    assert best_threads(found) == 2
    assert step_ratio(found, 1) == 1.0


def test_a_model_is_timed_once_and_its_plan_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of Mixtral's 1 GB shape, large enough to be worth it."""
    monkeypatch.setenv("LOCALMOE_STATE", str(tmp_path / "state"))
    path = make_model(tmp_path / "m.gguf", replace(SHAPES["mixtral-1gb"], n_layers=2), "Q4_K")[0]

    def kept() -> dict[Path, float]:
        found = (tmp_path / "state").rglob("*.json")
        return {f: f.stat().st_mtime for f in found if '"others_share"' in f.read_text()}

    def run(*options: str) -> None:
        result = localmoe("run", str(path), "Hi", "-n", "4", *options)
        assert result.returncode == 0, result.stderr

    run("--no-tune")
    assert kept() == {}
    run()
    before = kept()
    assert len(before) == 1
    busy = any('"n_tries": 1' in f.read_text() and is_disturbed(f) for f in before)
    run()
    assert kept() == before or busy  # a disturbed timing is repeated another time
    plan = json.loads(localmoe("plan", str(path), "--json").stdout)
    ram = plan["memory"][-1]
    gains = step_ratio(read_tuning(next(iter(before))), 1) < 1 / MARGIN
    assert (plan["placement"]["repack"] == "all") == gains
    assert (ram["repacked_bytes"] > 0) == gains
    plain = json.loads(localmoe("plan", str(path), "--json", "--no-tune").stdout)
    assert plain["placement"]["repack"] == "off"


def read_tuning(path: Path) -> Tuning:
    return TypeAdapter(TuningRecord).validate_json(path.read_text()).tuning


def is_disturbed(path: Path) -> bool:
    return is_busy(read_tuning(path))
