"""Settings: defaults, then LOCALMOE_* variables, then what the command line says.

The only reader of os.environ; everything else is handed what it needs.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .engine.protocol import KvType
from .errors import UsageError
from .models.remote import HubAccess

PREFIX = "LOCALMOE_"
HUB = "https://huggingface.co"
YES = ("1", "true", "yes", "on")  # what huggingface_hub takes for it (constants.py)
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY", re.IGNORECASE)
UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
ENGINE_DEFAULTS = {"GOMP_SPINCOUNT": "3000", "GGML_CUDA_REGISTER_HOST": "1"}
"""Compute threads that spin for long while they wait for each other lose most of their speed to
any other busy program (docs/notes/busy-machine.md)."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: 8GiB, 8G, 7500MiB; binary units, all of them.

    Raises UsageError.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{text!r} is not a size.", "Write it like 8GiB or 7500MiB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_sizes(text: str) -> tuple[int, ...]:
    """Sizes with commas between them, one for each card."""
    return tuple(parse_size(part) for part in text.split(","))


def _if_text(parse: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


Size = Annotated[int, _if_text(parse_size), Field(ge=0)]
Sizes = Annotated[tuple[Size, ...], _if_text(parse_sizes)]
Lines = Annotated[tuple[str, ...], _if_text(lambda text: (text,))]
Layers = Literal["auto", "all"] | Annotated[int, Field(ge=0)]


class Settings(BaseModel):
    """What a person can set; None leaves the choice to the model or to the plan.

    Sizes are bytes. `parallel` is how many requests a loaded model answers at once (`batch` finds
    that by itself). `n_gpu_layers` counts the output matrix as one layer more, as llama.cpp does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ctx_size: Annotated[int, Field(ge=16, le=2**31 - 1)] | None = None
    vram: Sizes | None = None
    ram: Size | None = None
    n_gpu_layers: Layers = "auto"
    n_cpu_moe: Annotated[int, Field(ge=0)] | None = None
    kv_type: KvType = "f16"
    threads: Annotated[int, Field(ge=1, le=512)] | None = None
    ubatch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    load_mode: Literal["auto", "mmap", "pinned"] = "auto"
    parallel: Annotated[int, Field(ge=1, le=256)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: int | None = None
    stop: Lines = ()
    system: str | None = None
    json_schema: str | None = None
    grammar: str | None = None
    offline: bool = False


def load_settings(given: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment with what was given on top. Raises UsageError.

    `given` may hold None for what was not said.
    """
    values: dict[str, Any] = {}
    for name in Settings.model_fields:
        text = (os.environ if env is None else env).get(PREFIX + name.upper())
        if text:
            values[name] = text
    from_env = set(values)
    said = {name: value for name, value in given.items() if value is not None and value != ()}
    try:
        return Settings(**{**values, **said})
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        shown = PREFIX + name.upper() if name in from_env - set(said) else name
        raise UsageError(f"{shown}: {problem['msg']}, not {problem['input']!r}.") from None


def engine_environment() -> dict[str, str]:
    """The environment of an engine process: this one's without anything secret, and what suits
    llama.cpp where nothing else was said."""
    env = {name: value for name, value in os.environ.items() if not SECRET_NAMES.search(name)}
    return {**ENGINE_DEFAULTS, **env}


def state_folder() -> Path:
    """Where measurements lie; what is there can be deleted at any time."""
    return Path(os.environ.get(PREFIX + "STATE") or platformdirs.user_state_path("localmoe"))


def config_folder() -> Path:
    """Where a person's own settings and models.yaml lie."""
    return Path(os.environ.get(PREFIX + "CONFIG") or platformdirs.user_config_path("localmoe"))


def hub_access(offline: bool = False) -> HubAccess:
    """The Hub as the variables say that all its tools obey: HF_ENDPOINT, HF_HUB_OFFLINE and so on
    (huggingface_hub, docs/source/en/package_reference/environment_variables.md)."""
    env = os.environ
    state = state_folder()
    return HubAccess(
        endpoint=(env.get("HF_ENDPOINT") or HUB).rstrip("/"),
        cache=hub_cache(env),
        headers=state / "headers",
        stamps=state / "verified",
        token=hub_token(env),
        offline=offline or env.get("HF_HUB_OFFLINE", "").lower() in YES,
    )


def hub_home(env: Mapping[str, str]) -> Path:
    caches = Path(env.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(env.get("HF_HOME") or caches / "huggingface").expanduser()


def hub_cache(env: Mapping[str, str]) -> Path:
    """The folder of downloaded models, which other tools share."""
    said = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE")
    return Path(said).expanduser() if said else hub_home(env) / "hub"


def hub_token(env: Mapping[str, str]) -> str | None:
    """The token of this person, from a variable or from where `hf auth login` keeps it."""
    said = env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN")
    if not said and env.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").lower() not in YES:
        file = Path(env.get("HF_TOKEN_PATH") or hub_home(env) / "token").expanduser()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            said = file.read_text("utf-8")
    # a line break that was pasted along would end up in a header
    return (said or "").replace("\r", "").replace("\n", "").strip() or None
