from __future__ import annotations

from typing import Any

import pytest

from localmoe.config import engine_environment, load_settings, parse_size
from localmoe.errors import UsageError


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        ("8 gb", 8 << 30),
        ("7500MiB", 7500 << 20),
        ("1.5K", 1536),
        ("512", 512),
        ("0", 0),
    ],
)
def test_sizes_read_as_people_write_them(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "8X", "-1G", "8GiBs", "1e3", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_flags_come_before_variables_and_those_before_defaults() -> None:
    env = {"LOCALMOE_CTX_SIZE": "2048", "LOCALMOE_TOP_K": "7", "LOCALMOE_VRAM": "8GiB,12GiB"}
    settings = load_settings({"ctx_size": 512, "temperature": None}, env)
    assert settings.ctx_size == 512
    assert settings.top_k == 7
    assert settings.vram == (8 << 30, 12 << 30)
    assert settings.temperature is None
    assert settings.kv_type == "f16"


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(UsageError, match="LOCALMOE_TOP_K"):
        load_settings({}, {"LOCALMOE_TOP_K": "many"})


@pytest.mark.parametrize(
    "given",
    [
        {"ctx_size": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"n_gpu_layers": "most"},
        {"n_gpu_layers": -1},
        {"kv_type": "q3"},
        {"max_tokens": 0},
        {"repeat_penalty": 0},
        {"no_such_setting": 1},
    ],
)
def test_bad_values_are_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        load_settings(given, {})


def test_layers_are_a_number_or_a_word() -> None:
    values = [load_settings({"n_gpu_layers": v}, {}).n_gpu_layers for v in ("12", "all", "auto")]
    assert values == [12, "all", "auto"]


def test_the_engine_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "DB_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    env = engine_environment()
    assert "secret" not in env.values()
    assert env["CUDA_VISIBLE_DEVICES"] == "1"


def test_threads_do_not_spin_unless_the_person_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert engine_environment()["GOMP_SPINCOUNT"] == "3000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "infinite")
    assert engine_environment()["GOMP_SPINCOUNT"] == "infinite"
