"""What an engine is started with for a plan."""

from __future__ import annotations

import pytest

from localmoe.config.environment import engine_environment
from localmoe.engine.protocol import Placement
from localmoe.loading import environment_of


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
