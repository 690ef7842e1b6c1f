"""What an engine is started with for a plan, and how many engines a command starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from engine_starts import ENGINE, count_engine_starts
from standin_hub import StandInHub

from localmoe.callbacks import LoadCallbacks
from localmoe.catalog.model_name import ModelName
from localmoe.catalog.resolve import ModelResolver, ResolvedModel
from localmoe.cli import run_command
from localmoe.config.environment import engine_environment
from localmoe.config.settings import Settings, load_settings
from localmoe.engine.protocol import Placement
from localmoe.errors import ModelFileError
from localmoe.gguf.demo import DEMO
from localmoe.gguf.model_meta import read_meta
from localmoe.loading import environment_of, load_found, open_engine
from localmoe.planner.measuring import MeasuringEngine

ON_CPU = {"ctx_size": 512, "n_gpu_layers": 0, "tune": False}
REPO = "maker/Many-GGUF"


def test_a_plan_that_splits_the_work_says_so_in_the_engines_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    split = Placement(n_threads=16, n_gpu_layers=33, cpu_expert_layers=(0,), offload_min_batch=6)
    env = environment_of(split)
    assert (env["GGML_OP_OFFLOAD_MIN_BATCH"], env["GOMP_SPINCOUNT"]) == ("6", "300000")
    assert environment_of(Placement(n_threads=16, n_gpu_layers=33)) == engine_environment()


def test_what_a_person_set_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", "48")
    env = environment_of(Placement(n_threads=16, n_gpu_layers=33, offload_min_batch=6))
    assert (env["GGML_OP_OFFLOAD_MIN_BATCH"], env["GOMP_SPINCOUNT"]) == ("48", "7")


@pytest.fixture
def two_quants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository of which two quants are installed, so that one has to be chosen by a plan."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("LOCALMOE_STATE", str(tmp_path / "state"))
    with StandInHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add_repo(REPO, dict.fromkeys(("m.Q6_K.gguf", "m.IQ1_S.gguf"), DEMO))
        for label in ("Q6_K", "IQ1_S"):
            assert run_command(["pull", f"{REPO}:{label}", "-q"]) == 0
    return REPO


def settings(**changes: object) -> Settings:
    return load_settings({**ON_CPU, "offline": True, **changes})


def test_a_run_starts_one_engine_on_the_cpu() -> None:
    with count_engine_starts() as n_starts:
        arguments = ["run", "demo", "hi", "-n", "4", "-c", "512", "-ngl", "0", "--no-tune", "-q"]
        assert run_command(arguments) == 0
    assert n_starts == [1]


def test_the_engine_that_chose_a_quant_on_the_cpu_loads_it(two_quants: str) -> None:
    with count_engine_starts() as n_starts, open_engine(two_quants, settings()) as loaded:
        assert loaded.loaded.n_ctx == 512
        assert loaded.engine.is_alive
    assert n_starts == [1]


def test_a_conversation_goes_on_in_the_engine_that_chose_its_quant(
    two_quants: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "said").write_text("hi\n")
    with (tmp_path / "said").open() as said, count_engine_starts() as n_starts:
        monkeypatch.setattr("sys.stdin", said)
        arguments = ["chat", two_quants, "-n", "4", "-ngl", "0", "--no-tune", "-q"]
        assert run_command(arguments) == 0
    assert n_starts == [1]


def test_a_batch_goes_on_in_the_engine_that_planned_it(tmp_path: Path) -> None:
    """One engine has the vocabulary for the check, one plans and then loads."""
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "hi"}) + "\n")
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    with count_engine_starts() as n_starts:
        arguments = ["batch", "demo", *files, "-n", "4", "-ngl", "0", "--no-tune", "-q"]
        assert run_command(arguments) == 0
    assert n_starts == [2]


def test_an_engine_that_died_since_it_planned_is_replaced() -> None:
    measuring = MeasuringEngine()
    measuring.process.kill()
    found = ResolvedModel(ModelName(str(DEMO), path=DEMO), DEMO, read_meta(DEMO))
    with load_found(found, settings(), LoadCallbacks(), measuring=measuring) as loaded:
        assert loaded.engine.is_alive


def test_an_engine_that_is_handed_on_ends_where_loading_is_refused(tmp_path: Path) -> None:
    measuring = MeasuringEngine()
    odd = tmp_path / "odd\udcff.gguf"  # no path that llama.cpp can be given
    meta = read_meta(DEMO)
    found = ResolvedModel(ModelName(str(odd), path=odd), odd, replace(meta, paths=(odd,)))
    with pytest.raises(ModelFileError):
        load_found(found, settings(), LoadCallbacks(), measuring=measuring)
    assert not psutil.pid_exists(measuring.process.pid)


def test_a_resolver_closes_an_engine_that_nobody_took(two_quants: str) -> None:
    with ModelResolver(settings()) as finder:
        finder.find(two_quants)
        assert len(engines()) == 1
    assert engines() == []


def engines() -> list[psutil.Process]:
    """The engine processes that this process has."""
    return [child for child in psutil.Process().children() if ENGINE in str(child.cmdline())]
