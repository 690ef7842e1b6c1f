from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import localmoe, one_line_error

from localmoe import LocalMoE
from localmoe.catalog.catalog import model_aliases
from localmoe.cli.config import TEMPLATE
from localmoe.config.environment import engine_environment
from localmoe.config.settings import load_settings, parse_size
from localmoe.errors import UsageError
from localmoe.loading import is_sampling_value


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


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("LOCALMOE_TOP_K", "many", "LOCALMOE_TOP_K must be a whole number, not 'many'."),
        ("LOCALMOE_TOP_K", "9" * 5000, "LOCALMOE_TOP_K must be a whole number of fewer digits"),
        ("LOCALMOE_TEMP", "inf", "LOCALMOE_TEMP must be a number, not 'inf'."),
        ("LOCALMOE_PLAIN", "maybe", "LOCALMOE_PLAIN must be yes or no, not 'maybe'."),
        ("LOCALMOE_KV_TYPE", "q3", "LOCALMOE_KV_TYPE must be f32, f16"),
        ("LOCALMOE_N_GPU_LAYERS", "most", "must be auto or all or a whole number, not 'most'."),
        ("LOCALMOE_RAM", "some", "LOCALMOE_RAM: 'some' is not a size. Write it like 8GiB"),
        ("LOCALMOE_STOP", "a\0", "LOCALMOE_STOP: it holds a NUL character."),
        ("LOCALMOE_TEMPRATURE", "1", "Did you mean LOCALMOE_TEMPERATURE?"),
        ("LOCALMOE_CONTEXT_SIZE", "1", "Did you mean LOCALMOE_CTX_SIZE?"),
        ("LOCALMOE_temp", "1", "Did you mean LOCALMOE_TEMP?"),
        ("LOCALMOE_STATES", "1", "Did you mean LOCALMOE_STATE?"),
        ("LOCALMOE_FLUX", "1", "LOCALMOE_FLUX: no setting is called that. Unset it."),
        ("LOCALMOE_GRAMMAR", "a.gbnf", "can be set on the command line only. Say --grammar there."),
        ("LOCALMOE_JSON_SCHEMA", "{}", "Say --json-schema there."),
    ],
)
def test_a_bad_variable_is_named(variable: str, value: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings({}, {variable: value})
    assert variable in str(caught.value)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["LOCALMOE_TEMP", "LOCALMOE_TEMPERATURE"])
def test_a_variable_is_called_like_the_option_or_the_setting(name: str) -> None:
    env = {name: "0.7", "LOCALMOE_STATE": "/a", "LOCALMOE_CONFIG": "/b", "LOCALMOE_FLUX": ""}
    assert load_settings({}, env).temperature == 0.7


def test_two_variables_of_one_setting_must_agree() -> None:
    env = {"LOCALMOE_TEMP": "0.7", "LOCALMOE_TEMPERATURE": "0.7"}
    assert load_settings({}, env).temperature == 0.7
    with pytest.raises(UsageError, match="LOCALMOE_TEMP and LOCALMOE_TEMPERATURE say different"):
        load_settings({}, {**env, "LOCALMOE_TEMPERATURE": "1"})


def test_the_variable_in_the_template_is_one_that_is_read() -> None:
    found = re.search(r"(LOCALMOE_\w+)=([\d.]+)", TEMPLATE)
    assert found
    assert load_settings({}, {found[1]: found[2]}).temperature == float(found[2])


def test_a_list_of_the_wrong_things_names_the_first() -> None:
    with pytest.raises(UsageError, match=r"stop must be text, not 1\.$"):
        load_settings({"stop": (1, 2)}, {})


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"ctx_size": "8k"}, 8192),
        ({"ctx_size": "32K"}, 32768),
        ({"ctx_size": 0}, 0),
        ({"ctx_size": "0"}, 0),
        ({"max_tokens": -1}, None),
        ({"top_k": -1}, 0),
        ({"top_p": 0}, 0),
    ],
)
def test_values_mean_what_others_mean_by_them(given: dict[str, Any], value: int | None) -> None:
    (name,) = given
    assert getattr(load_settings(given, {}), name) == value


@pytest.mark.parametrize(
    "given",
    [
        {"ctx_size": 15},
        {"ctx_size": "8q"},
        {"max_tokens": -2},
        {"top_k": -2},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": -0.1},
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


@pytest.mark.parametrize(
    "name",
    ["HTTPS_PROXY", "http_proxy", "ALL_PROXY", "DATABASE_URL", "PGPASS", "SSH_AUTH_SOCK", "MY_OWN"],
)
def test_what_an_engine_does_not_read_stays_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://me:secret@proxy:3128")
    assert name not in engine_environment()


@pytest.mark.parametrize(
    "name",
    ["PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "GGML_VK_VISIBLE_DEVICES"]
    + ["LLAMA_LOG_COLORS", "OMP_NUM_THREADS", "HIP_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION"]
    + ["VK_ICD_FILENAMES", "XDG_DATA_DIRS", "CUDA_CACHE_PATH", "ROCR_VISIBLE_DEVICES"],
)
def test_what_llama_cpp_reads_reaches_the_engine(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "some value")
    assert engine_environment()[name] == "some value"


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
    settings = load_settings({}, model=model, aliases=model_aliases)
    assert (settings.ctx_size, settings.temperature, settings.seed) == (ctx_size, temperature, seed)


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        ("temp: 1\ntmep: 2", 2, "Did you mean temp?"),
        ("ctx-sise: 2", 1, "Did you mean ctx_size?"),
        ("temp: warm", 1, "temp must be a number, not 'warm'. Mend it: localmoe config edit"),
        ("temp: 1\n\ntop_p: 7", 3, "top_p must be at most 1, not 7."),
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
        load_settings({}, model="demo", aliases=model_aliases)
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
    draft = config.parent / "config.yaml.draft"
    assert draft.read_text() == "temp: hot"
    # the next time goes on with it
    script.write_text(
        "import sys, pathlib; file = pathlib.Path(sys.argv[1])\n"
        "file.write_text(file.read_text().replace('hot', '0.2'))"
    )
    again = localmoe("config", "edit", env={"EDITOR": editor, "VISUAL": editor})
    assert again.returncode == 0
    assert "what you wrote last time" in again.stderr
    assert config.read_text() == "temp: 0.2"
    assert not draft.exists()


@pytest.mark.parametrize(
    "editor", ["nosucheditor", f"{sys.executable} -c 'import sys; sys.exit(3)'", "vi 'a"]
)
@pytest.mark.parametrize("is_there", [True, False])
def test_an_editor_that_fails_is_one_line_and_leaves_nothing(
    config: Path, editor: str, is_there: bool
) -> None:
    if is_there:
        config.write_text("temp: 1\n")
    result = localmoe("config", "edit", env={"EDITOR": editor, "VISUAL": editor})
    error = one_line_error(result, 2)
    assert error.endswith(f"Set EDITOR, or write {config} yourself.\n")
    assert "Errno" not in error
    assert list(config.parent.iterdir()) == ([config] if is_there else [])


@pytest.mark.parametrize(
    ("text", "left"), [("temp: 1\n", ["config.yaml"]), ("temp: hot", ["config.yaml"]), (None, [])]
)
def test_what_was_not_changed_leaves_no_draft(
    config: Path, text: str | None, left: list[str]
) -> None:
    if text is not None:
        config.write_text(text)
    editor = f"{sys.executable} -c ''"
    result = localmoe("config", "edit", env={"EDITOR": editor, "VISUAL": editor})
    assert "Nothing was changed." in result.stderr
    assert result.returncode == (2 if text == "temp: hot" else 0)
    assert [path.name for path in config.parent.iterdir()] == left


def test_a_folder_that_cannot_be_written_is_one_line(config: Path) -> None:
    folder = config.parent / "file"
    folder.write_text("")
    result = localmoe("config", "edit", env={"LOCALMOE_CONFIG": str(folder / "below")})
    assert str(folder) in one_line_error(result, 2)


def test_a_program_uses_the_file_too(config: Path) -> None:
    config.write_text("models:\n  demo: {max_tokens: 2, temp: 0}\n")
    with LocalMoE("demo") as moe:
        assert moe.chat([{"role": "user", "content": "Hi!"}]).usage.completion_tokens == 2


# ---- what a header says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "counts"),
    [
        ("temperature", 0.3, True), ("temperature", -1.0, False), ("temperature", 1e9, False),
        ("top_k", 20, True), ("top_k", -5, False), ("top_p", -0.1, False), ("top_p", "x", False),
        ("min_p", float("nan"), False), ("repeat_penalty", 0.0, False), ("top_k", True, False),
        ("repeat_last_n", 64, True), ("repeat_last_n", -1, False),
        ("repeat_last_n", 2**40, False),
    ],
)  # fmt: skip
def test_a_header_can_set_what_a_person_could(name: str, value: object, counts: bool) -> None:
    assert is_sampling_value(name, value) == counts
