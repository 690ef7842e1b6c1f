from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import localmoe, one_line_error

from localmoe import LocalMoE
from localmoe.config import engine_environment, load_settings, parse_size
from localmoe.errors import UsageError
from localmoe.load import is_sampling_value


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


# ---- the config file -----------------------------------------------------------------------------


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the config file is looked for."""
    monkeypatch.setenv("LOCALMOE_CONFIG", str(tmp_path))
    return tmp_path / "config.yaml"


CONFIG = """\
temp: 0.5
top-k: 7
vram: 8GiB
think: off
stop: [a, b]
models:
  mixtral:
    ctx_size: 8192
    temp: 0.6
  mixtral:Q5_K_M: {ctx-size: 4096}
  user/repo: {seed: 5}
"""


def test_the_file_is_read_under_everything_else(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(CONFIG)
    settings = load_settings({})
    assert (settings.temperature, settings.top_k, settings.vram) == (0.5, 7, (8 << 30,))
    assert (settings.think, settings.stop, settings.ctx_size) == ("off", ("a", "b"), None)
    monkeypatch.setenv("LOCALMOE_TOP_K", "8")
    assert load_settings({}).top_k == 8
    assert load_settings({"top_k": 9}).top_k == 9


@pytest.mark.parametrize(
    ("model", "ctx_size", "temperature", "seed"),
    [
        ("mixtral", 8192, 0.6, None),
        ("Mixtral", 8192, 0.6, None),
        ("mixtral-8x7b-instruct", 8192, 0.6, None),
        ("mixtral:Q4_K_M", 8192, 0.6, None),
        ("mixtral:Q5_K_M", 4096, 0.6, None),
        ("user/repo", None, 0.5, 5),
        ("user/repo:Q8_0", None, 0.5, 5),
        ("demo", None, 0.5, None),
    ],
)
def test_a_model_has_settings_of_its_own(
    config: Path, model: str, ctx_size: int | None, temperature: float, seed: int | None
) -> None:
    config.write_text(CONFIG)
    settings = load_settings({}, model=model)
    assert (settings.ctx_size, settings.temperature, settings.seed) == (ctx_size, temperature, seed)


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        ("temp: 1\ntmep: 2", 2, "Did you mean temp?"),
        ("ctx-sise: 2", 1, "Did you mean ctx_size?"),
        ("temp: warm", 1, "temp: "),
        ("temp: 1\n\ntop_p: 7", 3, "top_p: "),
        ("temp: true", 1, "no value"),
        ("temp: {a: 1}", 1, "no value"),
        ("temp: 1\ntemperature: 2", 2, "twice"),
        ("json_schema: '{}'", 1, "command line"),
        ("models: [mixtral]", 1, "models"),
        ("models:\n  mixtral: 5", 2, "no settings"),
        ("models:\n  mixtral:\n    temp: 0.1\n    ctx: 5", 4, "Did you mean ctx_size?"),
        ("models:\n  mixtrl: {}", 2, "Did you mean mixtral?"),
        ("temp: [", 1, ""),
        ("- temp", 1, ""),
        ("temp: 1\x00", 1, ""),
    ],
)
def test_nonsense_in_the_file_is_refused_by_its_line(
    config: Path, text: str, line: int, sentence: str
) -> None:
    config.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_settings({}, model="demo")
    assert str(caught.value).startswith(f"{config}:{line}")
    assert sentence in str(caught.value)


def test_where_each_value_comes_from_is_shown(config: Path) -> None:
    config.write_text(CONFIG)
    env = {"LOCALMOE_TOP_K": "9"}
    shown = localmoe("config", "show", "mixtral", "--seed", "3", "--json", env=env)
    origins = {row["name"]: (row["value"], row["from"]) for row in json.loads(shown.stdout)}
    assert origins["ctx_size"] == (8192, f"{config}:8")
    assert origins["top_k"] == (9, "LOCALMOE_TOP_K")
    assert origins["seed"] == (3, "the command line")
    assert origins["kv_type"] == ("f16", "default")
    assert f"{config}:9" in localmoe("config", "show", "mixtral").stdout


def test_a_broken_file_is_one_line_and_can_be_mended(config: Path) -> None:
    config.write_text("tmep: 1\n")
    assert f"{config}:1" in one_line_error(localmoe("run", "demo", "Hi!"), 2)
    assert localmoe("config", "path").stdout.strip() == str(config)
    assert localmoe("doctor").returncode in (0, 1)
    editor = f"{sys.executable} {config.parent / 'editor.py'}"
    program = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text({!r})"
    (config.parent / "editor.py").write_text(program.format("temp: 9\n"))
    mended = localmoe("config", "edit", env={"EDITOR": editor, "VISUAL": editor})
    assert mended.returncode == 0, mended.stderr
    assert config.read_text() == "temp: 9\n"


def test_nonsense_is_not_saved_and_not_lost(config: Path) -> None:
    config.write_text("temp: 1\n")
    script = config.parent / "editor.py"
    script.write_text("import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('temp: hot')")
    editor = f"{sys.executable} {script}"
    result = localmoe("config", "edit", env={"EDITOR": editor, "VISUAL": editor})
    assert ".draft" in one_line_error(result, 2)
    assert config.read_text() == "temp: 1\n"
    assert (config.parent / "config.yaml.draft").read_text() == "temp: hot"


def test_a_program_uses_the_file_too(config: Path) -> None:
    config.write_text("models:\n  demo: {max_tokens: 2, temp: 0}\n")
    with LocalMoE("demo") as moe:
        assert moe.chat([{"role": "user", "content": "Hi!"}]).usage.completion_tokens == 2


# ---- what a header says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "counts"),
    [
        ("temperature", 0.3, True), ("temperature", -1.0, False), ("temperature", 1e9, False),
        ("top_k", 20, True), ("top_k", -5, False), ("top_p", 0.0, False), ("top_p", "x", False),
        ("min_p", float("nan"), False), ("repeat_penalty", 0.0, False), ("top_k", True, False),
        ("repeat_last_n", 64, True), ("repeat_last_n", -1, False),
        ("repeat_last_n", 2**40, False),
    ],
)  # fmt: skip
def test_a_header_can_set_what_a_person_could(name: str, value: object, counts: bool) -> None:
    assert is_sampling_value(name, value) == counts
