"""Settings: defaults, then config.yaml, then LOCALMOE_* variables, then the command line.

What is wrong with a value of a setting, in words of our own for each of pydantic's error types
(pydantic's docs, errors/validation_errors).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..engine.protocol import KvType
from ..errors import UsageError
from .environment import FOLDERS, NOT_TEXT, PREFIX, config_path, process_environment
from .sources import (
    MEND,
    ONE_COMMAND,
    ModelAliases,
    Said,
    file_key,
    names_of,
    read_config,
    setting_name,
)

SMALLEST_CONTEXT = 16
UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: 8GiB, 8G, 7500MiB; binary units, all of them.

    Raises UsageError.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        shown = ascii(text if len(text) <= 40 else f"{text[:40]}...")
        raise UsageError(f"{shown} is not a size.", "Write it like 8GiB or 7500MiB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_sizes(text: str) -> tuple[int, ...]:
    """Sizes with commas between them, one for each card."""
    return tuple(parse_size(part) for part in text.split(","))


_TOKENS = re.compile(r"(\d{1,12})\s*(k?)", re.IGNORECASE)


def parse_tokens(text: str) -> int:
    """Returns a number of tokens as people write it: 8192, 8k. Raises UsageError."""
    match = _TOKENS.fullmatch(text.strip())
    if not match:
        shown = ascii(text if len(text) <= 40 else f"{text[:40]}...")
        raise UsageError(f"{shown} is not a number of tokens.", "Write it like 8192 or 8k.")
    return int(match[1]) * (1024 if match[2] else 1)


def _check_context(n_tokens: int) -> int:
    if 0 < n_tokens < SMALLEST_CONTEXT:
        raise ValueError(f"it must be at least {SMALLEST_CONTEXT}, or 0 for the model's own")
    return n_tokens


def _if_minus_one(meaning: int | None) -> BeforeValidator:
    """llama.cpp and others write -1 where there is no limit."""
    return BeforeValidator(lambda value: meaning if value in (-1, "-1") else value)


def _if_text(parse: Any) -> BeforeValidator:
    def parsed(value: Any) -> Any:
        try:
            return parse(value) if isinstance(value, str) else value
        except UsageError as error:  # pydantic tells whose value it is where it is a ValueError
            raise ValueError(error) from None

    return BeforeValidator(parsed)


def _if_flag() -> BeforeValidator:
    """YAML reads a bare `on` or `off` as a truth value."""
    words = {True: "on", False: "off"}
    return BeforeValidator(lambda value: words[value] if isinstance(value, bool) else value)


def _check_text(text: str) -> str:
    bad = NOT_TEXT.search(text)
    if bad:
        what = "a NUL character" if bad[0] == "\0" else "bytes that are no UTF-8 text"
        raise ValueError(f"it holds {what}")
    return text


Text = Annotated[str, AfterValidator(_check_text)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Size = Annotated[int, _if_text(parse_size), Field(ge=0, le=2**62)]
Sizes = Annotated[tuple[Size, ...], _if_text(parse_sizes)]
Lines = Annotated[tuple[Text, ...], _if_text(lambda text: (text,))]
Tokens = Annotated[
    int, _if_text(parse_tokens), AfterValidator(_check_context), Field(ge=0, le=2**31 - 1)
]
Layers = Literal["auto", "all"] | Count


Think = Literal["on", "off", "hide", "low", "medium", "high"]


class Settings(BaseModel):
    """What a person can set; None leaves the choice to the model or to the plan.

    Sizes are bytes. A `ctx_size` of 0 is all that the model was trained for. `parallel` is how many
    requests a loaded model answers at once (`batch` finds that by itself). `n_gpu_layers` counts
    the output matrix as one layer more, as llama.cpp does.
    `think` says whether or how hard a reasoning model thinks and whether that is shown (None leaves
    it to its template), `on_full` what a chat does when its context is full, `save` whether it is
    kept, `plain` that Markdown stays text.
    `tune` lets a model be timed for some seconds the first time that it runs on this CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ctx_size: Tokens | None = None
    vram: Sizes | None = None
    ram: Size | None = None
    n_gpu_layers: Layers = "auto"
    n_cpu_moe: Count | None = None
    kv_type: KvType = "f16"
    threads: Annotated[int, Field(ge=1, le=512)] | None = None
    ubatch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    load_mode: Literal["auto", "mmap", "pinned"] = "auto"
    parallel: Annotated[int, Field(ge=1, le=256)] = 1
    max_tokens: Annotated[Annotated[int, Field(ge=1, le=2**31 - 1)] | None, _if_minus_one(None)] = (
        None
    )
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_k: Annotated[Count | None, _if_minus_one(0)] = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: Lines = ()
    system: Text | None = None
    json_schema: Text | None = None
    grammar: Text | None = None
    offline: bool = False
    think: Annotated[Think, _if_flag()] | None = None
    on_full: Literal["stop", "drop", "summarize"] = "drop"
    save: bool = True
    plain: bool = False
    tune: bool = True


def load_settings(
    given: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
    model: str | None = None,
    called: Callable[[str], str] = str,
    aliases: ModelAliases | None = None,
) -> Settings:
    """Settings with what was given on top. Raises UsageError.

    `given` may hold None for what was not said. `model`, a name, takes what config.yaml says of
    it. With an `env`, that stands for the variables, and no file is read. `called` gives what the
    person who gave a setting calls it, `aliases` what names of models mean.
    """
    return settings_of(settings_said(given, env, model, aliases), called)


def settings_said(
    given: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
    model: str | None = None,
    aliases: ModelAliases | None = None,
) -> dict[str, Said]:
    """Every setting that was made, and where: what is nearest to the command counts."""
    said: dict[str, Said] = {}
    if env is None:
        env = process_environment()
        said = config_said(model, aliases)
    said.update(variables_said(env))
    for name, value in given.items():
        if value is not None and value != ():
            said[name] = Said(value, "")
    return said


def variables_said(env: Mapping[str, str]) -> dict[str, Said]:
    """What LOCALMOE_* variables say. Raises UsageError for one that nothing obeys."""
    said: dict[str, Said] = {}
    for variable, text in env.items():
        key = variable.removeprefix(PREFIX)
        if key == variable or key in FOLDERS or not text:
            continue
        name = setting_name(key.lower())
        if name not in Settings.model_fields or key != key.upper():
            raise _unknown_variable(variable)
        if name in ONE_COMMAND:
            hint = f"Say --{name.replace('_', '-')} there."
            raise UsageError(f"{variable} can be set on the command line only.", hint)
        if name in said and said[name].value != text:
            raise UsageError(
                f"{said[name].where} and {variable} say different things.", "Unset one."
            )
        said[name] = Said(text, variable)
    return said


def _unknown_variable(variable: str) -> UsageError:
    names = [name for name in Settings.model_fields if name not in ONE_COMMAND]
    known = [name.upper() for name in (*map(file_key, names), *names, *FOLDERS)]
    key = variable.removeprefix(PREFIX).upper()[:40]
    hint = "Unset it. Names are those of the long options, like LOCALMOE_CTX_SIZE."
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        hint = f"Did you mean {PREFIX}{near[0]}?"
    return UsageError(f"{variable[:60]}: no setting is called that.", hint)


def config_said(model: str | None, aliases: ModelAliases | None) -> dict[str, Said]:
    """What the config file says, of a model by its name. Raises UsageError."""
    file = read_config(config_path(), Settings.model_fields, aliases)
    # which name the catalog has for it is asked only where it matters
    return file.said(names_of(model, aliases() if aliases else {}) if model and file.models else ())


def settings_of(said: Mapping[str, Said], called: Callable[[str], str] = str) -> Settings:
    """The settings, checked. Raises UsageError naming where a bad one was said."""
    try:
        return Settings(**{name: one.value for name, one in said.items()})
    except ValidationError as error:
        problems = error.errors()
        name = str(problems[0]["loc"][0])
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name[:40], Settings.model_fields, n=1)
            hint = f"Did you mean {near[0]}?" if near else ""
            raise UsageError(f"There is no setting {name[:60]}.", hint) from None
        where, hint = said[name].where, ""
        shown = where or called(name)
        if ":" in where:
            shown, hint = f"{where}: {file_key(name)}", MEND
        its_own = [one for one in problems if one["loc"][0] == name]
        raise bad_value(shown, its_own, hint) from None


MAX_SHOWN = 60
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "bool": "yes or no",
    "string": "text",
    "tuple": "text or a list",
}
"""By how pydantic's types begin (int_parsing, int_type, int_from_float, ...)."""
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def bad_value(shown: str, problems: Sequence[Mapping[str, Any]], hint: str = "") -> UsageError:
    """The error for a setting that a person knows as `shown`. `problems` are pydantic's, of which
    a value that may be one thing or another has one for each; `hint` is for where none is nearer.
    """
    first = problems[0]
    cause = first.get("ctx", {}).get("error")
    if cause is not None:  # said by a check of our own
        said = cause.args[0]
        if isinstance(said, UsageError):
            return UsageError(f"{shown}: {said.message}", said.hint or hint)
        return UsageError(f"{shown}: {said}.", hint)
    words = dict.fromkeys(_must_be(one) for one in problems if one["input"] is first["input"])
    return UsageError(f"{shown} must be {' or '.join(words)}, not {_short(first['input'])}.", hint)


def _must_be(problem: Mapping[str, Any]) -> str:
    kind, context = str(problem["type"]), problem.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind in BOUNDS:
        words, key = BOUNDS[kind]
        return f"{words} {_number(context[key])}"
    if kind == "int_parsing_size":
        return "a whole number of fewer digits"
    return WORDS.get(kind.partition("_")[0], "something else")


def _number(value: float) -> str:
    return f"{int(value) if value == int(value) else value:,}"


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
