"""What this process is told by its environment: folders, the Hub, what an engine inherits.

The only reader of os.environ; everything else is handed what it needs.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from string import Template

import platformdirs

from ..files import read_regular
from ..hub.types import HubAccess, ProxySettings
from .sources import FILE_NAME

PREFIX = "LOCALMOE_"
FOLDERS = ("STATE", "CONFIG")
"""Variables that are no settings."""
HUB = "https://huggingface.co"
YES = ("1", "true", "yes", "on")  # what huggingface_hub takes for it (constants.py)
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY", re.IGNORECASE)
NOT_TEXT = re.compile("[\0\ud800-\udfff]")
ENGINE_NAMES = frozenset([
    "PATH", "HOME", "USER", "LOGNAME", "USERPROFILE", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP",
    "TMP", "SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "APPDATA", "LOCALAPPDATA",
    "PROGRAMDATA", "PROGRAMFILES", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_CONFIG_DIRS",
    "XDG_DATA_HOME", "XDG_DATA_DIRS", "XDG_RUNTIME_DIR", "PYTHONPATH", "PYTHONHOME",
    "PYTHONUSERBASE", "PYTHONNOUSERSITE", "PYTHONUTF8", "PYTHONDONTWRITEBYTECODE",
    "PYTHONPYCACHEPREFIX", "__PYVENV_LAUNCHER__", "DRI_PRIME", "DISPLAY", "WAYLAND_DISPLAY",
    "CONDA_PREFIX", "VIRTUAL_ENV", "WSL_DISTRO_NAME", "WSL_INTEROP",
])  # fmt: skip
"""What an engine needs of the system: folders, the language, how Python and drivers are found."""
ENGINE_PREFIXES = (
    "GGML_", "LLAMA_", PREFIX,
    "LC_", "LD_", "DYLD_", "MALLOC_", "GLIBC_",
    "CUDA_", "CUBLAS_", "NVIDIA_", "NCCL_",
    "HIP_", "HSA_", "ROCR_", "ROCM_", "ROCBLAS_", "HIPBLASLT_", "TENSILE_", "AMD_", "GPU_",
    "VK_", "MESA_", "RADV_", "ANV_", "AMDVLK_",
    "SYCL_", "UR_", "ONEAPI_", "ZE_", "ZES_", "OCL_", "MTL_", "METAL_", "MUSA_",
    "OMP_", "GOMP_", "KMP_", "OPENBLAS_", "MKL_", "BLIS_",
)  # fmt: skip
"""llama.cpp and what it is built on: linking, CUDA, ROCm, Vulkan, SYCL, Metal, OpenMP, BLAS."""
ENGINE_DEFAULTS = {"GOMP_SPINCOUNT": "3000", "GGML_CUDA_REGISTER_HOST": "1"}
"""Compute threads that spin for long while they wait for each other lose most of their speed to
any other busy program (docs/notes/busy-machine.md)."""


def config_path() -> Path:
    """The file of a person's own settings, which need not be there."""
    return config_folder() / FILE_NAME


def process_environment() -> Mapping[str, str]:
    """The variables of this process."""
    return os.environ


def engine_environment(**wanted: str) -> dict[str, str]:
    """Returns the environment of an engine process, which needs little of this one's.

    Whatever nothing in an engine reads stays out, and what is called a secret, too. What suits
    llama.cpp, and what is `wanted` for a plan, count where nothing else was said.
    """
    env = {name: value for name, value in os.environ.items() if is_for_engine(name)}
    return {**ENGINE_DEFAULTS, **wanted, **env}


def is_for_engine(name: str) -> bool:
    """Whether an engine process is given this variable."""
    is_known = name.upper() in ENGINE_NAMES or name.startswith(ENGINE_PREFIXES)
    return is_known and not SECRET_NAMES.search(name)


def state_folder() -> Path:
    """Where measurements lie, which can be deleted at any time, and chats (sessions_folder)."""
    return Path(os.environ.get(PREFIX + "STATE") or platformdirs.user_state_path("localmoe"))


def sessions_folder() -> Path:
    """Where chats are kept."""
    return state_folder() / "sessions"


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
        proxies=proxy_settings(env),
        ca_file=optional_path(env.get("SSL_CERT_FILE")),
        ca_folder=optional_path(env.get("SSL_CERT_DIR")),
        has_symlinks=env.get("HF_HUB_DISABLE_SYMLINKS", "").lower() not in YES,
    )


def proxy_settings(env: Mapping[str, str]) -> ProxySettings:
    """The proxies that variables name (HTTPS_PROXY, ALL_PROXY, NO_PROXY), or else the system's."""
    said = {name: proxy_variable(env, name) for name in ("http", "https", "all", "no")}
    if "REQUEST_METHOD" in env:  # a CGI program: HTTP_PROXY is what its client sent
        said["http"] = env.get("http_proxy", "")
    if any(said.values()):
        return ProxySettings({name: said[name] for name in ("http", "https", "all")}, said["no"])
    if sys.platform in ("darwin", "win32"):
        from urllib.request import getproxies, proxy_bypass  # start-up, 70 ms

        return ProxySettings(getproxies(), bypasses=lambda host: bool(proxy_bypass(host)))
    return ProxySettings()


def proxy_variable(env: Mapping[str, str], name: str) -> str:
    """The variable in small letters counts before the one in capitals, even where it is empty."""
    name = f"{name}_proxy"
    return env.get(name, env.get(name.upper(), "")).strip()


def optional_path(text: str | None) -> Path | None:
    return Path(text) if text else None


def expanded(env: Mapping[str, str], path: str) -> Path:
    """Returns a path with `~` and `$NAME` resolved, as huggingface_hub resolves its variables."""
    return Path(Template(path).safe_substitute(env)).expanduser()


def hub_home(env: Mapping[str, str]) -> Path:
    """Returns Hugging Face's own folder."""
    caches = expanded(env, env.get("XDG_CACHE_HOME") or "~/.cache")
    said = env.get("HF_HOME")
    return expanded(env, said) if said else caches / "huggingface"


def hub_cache(env: Mapping[str, str]) -> Path:
    """The folder of downloaded models, which other tools share."""
    said = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE")
    return expanded(env, said) if said else hub_home(env) / "hub"


def hub_token(env: Mapping[str, str]) -> str | None:
    """The token of this person, from a variable or from where `hf auth login` keeps it."""
    said = env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN")
    if not said and env.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").lower() not in YES:
        path = env.get("HF_TOKEN_PATH")
        file = expanded(env, path) if path else hub_home(env) / "token"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            said = read_regular(file).decode("utf-8")
    # a line break that was pasted along would end up in a header
    return (said or "").replace("\r", "").replace("\n", "").strip() or None
