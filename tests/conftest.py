"""What tests share: a clean environment, small models made on the spot, an engine that has one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
from make_model import SHAPES, make_model

from localmoe.config.environment import engine_environment
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Placement

# a shell lets what it runs in the background ignore Ctrl-C, and so would every program tested here
signal.signal(signal.SIGINT, signal.default_int_handler)

# how long an example takes says what else the machine does
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No test depends on what is set or was measured where it runs."""
    for name in list(os.environ):
        # pytest-xdist says how wide a screen is, which no test has
        if name.startswith(("LOCALMOE_", "HF_", "HUGGING_FACE_")) or name in ("COLUMNS", "LINES"):
            monkeypatch.delenv(name)
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("LOCALMOE_STATE", str(folder / "state"))
    monkeypatch.setenv("LOCALMOE_CONFIG", str(folder / "config"))
    monkeypatch.setenv("HF_HOME", str(folder / "huggingface"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of a few MB with random weights and Mixtral's vocabulary; it talks nonsense."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    shape = replace(SHAPES["tiny"], n_vocab=32000, context_length=8192)
    make_model(path, shape, "Q8_0")
    return path


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    with EngineProcess(engine_environment()) as engine:
        yield engine


@pytest.fixture(scope="module")
def tiny_engine(tiny_model: Path) -> Iterator[EngineProcess]:
    """An engine with the tiny model, for two sequences of 512 tokens."""
    with EngineProcess(engine_environment()) as engine:
        engine.load(str(tiny_model), Placement(n_threads=2, n_ctx=512, n_seq=2))
        yield engine
