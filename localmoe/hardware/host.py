"""What can be known of the machine before llama.cpp is asked: memory, processor, cards, build."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from .cpu import Processor, memory_limits, processor
from .gpus import Cards, all_cards
from .system import SystemAccess, read_text, tool_path

PACKAGE = "llama-cpp-python"

# libggml-<this>.so in the package's folder, and the backend's name (ggml-backend-reg.cpp)
LIBRARY_BACKENDS = {
    "cpu": "CPU", "cuda": "CUDA", "hip": "ROCm", "vulkan": "Vulkan", "metal": "MTL", "sycl": "SYCL",
}  # fmt: skip

VISIBILITY = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "GGML_VK_VISIBLE_DEVICES",
)


@dataclass(frozen=True, slots=True)
class Ram:
    """RAM in bytes: all that the machine has, and what this process may use and can get of it.

    Cached files count as available, swap doesn't count at all.
    """

    machine_bytes: int
    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Host:
    """The machine without llama.cpp's view of it. `visibility` are variables that hide GPUs from
    it; `pip` is the command that installs packages beside this one."""

    system: str
    ram: Ram
    processor: Processor
    cards: Cards = Cards()
    llama_version: str = ""
    llama_backends: frozenset[str] = frozenset()
    visibility: Mapping[str, str] = field(default_factory=dict)
    pip: str = "pip"


def host_of(sources: SystemAccess) -> Host:
    """Look at the machine. No child of ours may hold a context on a GPU meanwhile."""
    return Host(
        system=sources.system,
        ram=ram_of(sources),
        processor=processor(sources),
        cards=all_cards(sources),
        llama_version=llama_version(),
        llama_backends=llama_backends(sources),
        visibility={name: sources.env[name] for name in VISIBILITY if name in sources.env},
        pip=pip_command(sources),
    )


def ram_of(sources: SystemAccess) -> Ram:
    """RAM within the limits of the control groups."""
    total = machine_total = _meminfo(sources, "MemTotal")
    available = _meminfo(sources, "MemAvailable")
    if not machine_total or not available:  # not Linux
        memory = psutil.virtual_memory()
        total = machine_total = memory.total
        available = memory.available
    for limit, used in memory_limits(sources):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return Ram(machine_total, total, available)


def _meminfo(sources: SystemAccess, name: str) -> int:
    """A line of /proc/meminfo in bytes, 0 where there is none."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", read_text(sources.proc / "meminfo"), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def llama_version() -> str:
    """The version of llama-cpp-python that is installed; empty where none is."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return ""


def llama_backends(sources: SystemAccess) -> frozenset[str]:
    """Backends by the libraries that lie in the package; nothing is loaded."""
    folder = sources.llama_folder or _package_folder()
    if folder is None:
        return frozenset()
    stems = (re.match(r"(?:lib)?ggml-([a-z]+)", path.name) for path in (folder / "lib").glob("*"))
    return frozenset(LIBRARY_BACKENDS[m[1]] for m in stems if m and m[1] in LIBRARY_BACKENDS)


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def pip_command(sources: SystemAccess) -> str:
    """How packages are installed where this package is: pip, or uv where there is no pip."""
    here = Path(sys.executable)
    pip = tool_path("pip", sources)
    if pip and Path(pip).parent == here.parent:
        return "pip"
    windows = os.name == "nt"
    quoted = f'"{here}"' if windows else shlex.quote(str(here))
    if importlib.util.find_spec("pip"):
        return f"{'& ' if windows else ''}{quoted} -m pip"
    return f"uv pip --python {quoted}"
