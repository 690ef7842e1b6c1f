"""The processor: cores that this process may use, its features, and limits of control groups.

A group's limits, of memory and of processor time, hold for all groups below it, in both versions.
So every group from the process's own up to the root counts. In a container the root that can be
seen is the container's own group.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from .machine import Build
from .system import SystemAccess, clean, read_number, read_text, run_tool

UNLIMITED = 1 << 60
"""Version 1 says "no limit" as a number close to 2^63."""


def memory_limits(sources: SystemAccess) -> list[tuple[int, int]]:
    """(limit, used) in bytes of every memory group that this process is in.

    Pages of files that are mapped or cached can be dropped, so they don't count as used. Swap is
    not counted at all: a model that is swapped out doesn't run.
    """
    found = []
    for group in groups(sources, "memory"):
        stat = _stat(group)
        limit = min(_limits(group, stat), default=UNLIMITED)
        used = read_number(group / "memory.current")
        if used is None:
            used = read_number(group / "memory.usage_in_bytes") or 0
        if limit < UNLIMITED:
            found.append((limit, max(0, used - _droppable(stat))))
    return found


def cpu_quota(sources: SystemAccess) -> float | None:
    """Processors' worth of time that this process may use; None where that isn't limited."""
    quotas = [quota for group in groups(sources, "cpu") for quota in _quotas(group)]
    return min(quotas, default=None)


def groups(sources: SystemAccess, controller: str) -> list[Path]:
    """The folders of this process's groups for a controller, those above them included."""
    found: dict[Path, None] = {}
    for root, inner in _places(sources, controller):
        parts = [part for part in inner.split("/") if part]
        if ".." in parts:  # seen from a namespace that the group lies outside of
            parts = []
        for n in range(len(parts), -1, -1):
            found.setdefault(root.joinpath(*parts[:n]))
    return [group for group in found if group.is_dir()]


def _places(sources: SystemAccess, controller: str) -> Iterator[tuple[Path, str]]:
    """(mount, path below it) that may hold a controller (man 7 cgroups, /proc/[pid]/cgroup)."""
    mounts = sources.sys / "fs/cgroup"
    yield from ((mounts, ""), (mounts / controller, ""))
    for line in read_text(sources.proc / "self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, colon, path = rest.partition(":")
        if not colon:
            continue
        if number == "0" and not names:
            yield from ((mounts, path), (mounts / "unified", path))
        elif controller in names.split(","):
            yield from ((mounts / controller, path), (mounts / names, path))


def _limits(group: Path, stat: dict[str, int]) -> list[int]:
    """Limits of a group; beyond `memory.high` it is slowed down to a crawl, so that is one too."""
    numbers = [
        read_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
    ]
    return [n for n in (*numbers, stat.get("hierarchical_memory_limit")) if n is not None]


def _stat(group: Path) -> dict[str, int]:
    rows = (line.split() for line in read_text(group / "memory.stat").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}


def _droppable(stat: dict[str, int]) -> int:
    """Cached pages of files. Version 1 sums over the groups below under names with `total_`."""
    names = ("inactive_file", "active_file")
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in names)


def _quotas(group: Path) -> Iterator[float]:
    """Quotas of a group in processors; `max` and -1 stand for none."""
    fields = read_text(group / "cpu.max").split()
    if len(fields) == 2 and all(field.isdecimal() for field in fields) and int(fields[1]):
        yield int(fields[0]) / int(fields[1])
    quota = read_number(group / "cpu.cfs_quota_us")
    period = read_number(group / "cpu.cfs_period_us")
    if quota is not None and period and quota > 0:
        yield quota / period


# Features in llama.cpp's names (ggml_backend_cpu_get_features in ggml-cpu.cpp) as /proc/cpuinfo and
# sysctl call them (in lower case)
FLAGS = {
    "SSE3": {"pni", "sse3"},
    "SSSE3": {"ssse3"},
    "AVX": {"avx", "avx1.0"},
    "AVX2": {"avx2"},
    "F16C": {"f16c"},
    "FMA": {"fma"},
    "BMI2": {"bmi2"},
    "AVX_VNNI": {"avx_vnni"},
    "AVX512": {"avx512f"},
    "AVX512_VBMI": {"avx512vbmi", "avx512_vbmi"},
    "AVX512_VNNI": {"avx512_vnni", "avx512vnni"},
    "AVX512_BF16": {"avx512_bf16"},
    "AMX_INT8": {"amx_int8"},
    "NEON": {"asimd", "neon"},
    "FP16_VA": {"asimdhp"},
    "DOTPROD": {"asimddp"},
    "MATMUL_INT8": {"i8mm"},
    "SVE": {"sve"},
}

# IsProcessorFeaturePresent (winnt.h, PF_*); Windows has no number for FMA and F16C
WINDOWS_FEATURES = {
    "SSE3": 13, "NEON": 19, "SSSE3": 36, "AVX": 39, "AVX2": 40, "AVX512": 41, "DOTPROD": 43,
}  # fmt: skip

MAC_KEYS = (
    "machdep.cpu.brand_string",
    "machdep.cpu.features",
    "machdep.cpu.leaf7_features",
    "hw.perflevel0.physicalcpu",
    "hw.optional.arm.FEAT_DotProd",
    "hw.optional.arm.FEAT_I8MM",
    "sysctl.proc_translated",
)


@dataclass(frozen=True, slots=True)
class Processor:
    """The processor as it is here. `features` are in llama.cpp's names, empty where unknown.

    `n_physical` cores are there, `n_usable` of them within affinity and quota. `quota` is the
    control group's, in processors. `translated`: an x86 program on Apple silicon.
    """

    name: str
    features: frozenset[str]
    n_physical: int
    n_usable: int
    quota: float | None = None
    translated: bool = False


def processor(sources: SystemAccess) -> Processor:
    """The processor that this process runs on, as far as it may use it."""
    mac = _mac_facts(sources) if sources.system == "Darwin" else {}
    name, features = _linux_facts(sources)
    if mac:
        name, features = mac.get(MAC_KEYS[0], ""), _mac_features(mac)
    elif sources.system == "Windows":
        features = _windows_features()
    n_physical, n_allowed = _cores(sources, mac)
    quota = cpu_quota(sources)
    # rounded down: a thread that is stopped by the quota keeps all others waiting
    n_usable = n_allowed if quota is None else min(n_allowed, int(quota))
    translated = mac.get("sysctl.proc_translated") == "1"
    return Processor(clean(name), features, n_physical, max(1, n_usable), quota, translated)


def _cores(sources: SystemAccess, mac: dict[str, str]) -> tuple[int, int]:
    """Physical cores that there are, and those among the logical ones this process may run on.

    Logical ones beyond them add nothing to matrix products. Of Apple's only the fast ones count,
    as in llama.cpp (common/common.cpp, common_cpu_get_num_physical_cores).
    """
    allowed = _allowed_cpus(sources)
    siblings = _siblings(sources)
    if siblings:
        return len(set(siblings.values())), len({siblings.get(cpu, str(cpu)) for cpu in allowed})
    logical = psutil.cpu_count(logical=True) or 1
    physical = psutil.cpu_count(logical=False) or logical
    if mac.get("hw.perflevel0.physicalcpu", "").isdecimal():
        physical = max(1, int(mac["hw.perflevel0.physicalcpu"]))
    return physical, min(physical, max(1, len(allowed) * physical // logical))


def _allowed_cpus(sources: SystemAccess) -> frozenset[int]:
    if sources.cpus is not None:
        return sources.cpus
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(psutil.cpu_count(logical=True) or 1))


def _siblings(sources: SystemAccess) -> dict[int, str]:
    """For each logical processor the core that it is part of (Linux, sysfs topology)."""
    found = {}
    for folder in (sources.sys / "devices/system/cpu").glob("cpu[0-9]*"):
        package = read_number(folder / "topology/physical_package_id")
        core = read_number(folder / "topology/core_id")
        threads = read_text(folder / "topology/thread_siblings_list").strip()
        if threads or core is not None:
            found[int(folder.name[3:])] = threads or f"{package}:{core}"
    return found


def _linux_facts(sources: SystemAccess) -> tuple[str, frozenset[str]]:
    text = read_text(sources.proc / "cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    name = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
    words = flags[1].lower().split() if flags else []
    return (name[1] if name else sources.arch), _named(words)


def _named(flags: Iterable[str]) -> frozenset[str]:
    present = set(flags)
    return frozenset(name for name, spellings in FLAGS.items() if spellings & present)


def _mac_facts(sources: SystemAccess) -> dict[str, str]:
    """Values of sysctl; keys that this processor doesn't have are left out."""
    ran = run_tool(["sysctl", *MAC_KEYS], sources)
    rows = (line.partition(": ") for line in (ran.output if ran else "").splitlines())
    return {key: value.strip() for key, colon, value in rows if colon}


def _mac_features(mac: dict[str, str]) -> frozenset[str]:
    flags = [*mac.get(MAC_KEYS[1], "").lower().split(), *mac.get(MAC_KEYS[2], "").lower().split()]
    if not flags and mac.get(MAC_KEYS[0], "").startswith("Apple"):
        flags = ["neon"]
    flags += ["asimddp"] * (mac.get("hw.optional.arm.FEAT_DotProd") == "1")
    flags += ["i8mm"] * (mac.get("hw.optional.arm.FEAT_I8MM") == "1")
    return _named(flags)


def _windows_features() -> frozenset[str]:
    libraries = getattr(ctypes, "windll", None)
    if libraries is None:
        return frozenset()
    has = libraries.kernel32.IsProcessorFeaturePresent
    return frozenset(name for name, number in WINDOWS_FEATURES.items() if has(number))


def build_of(system_info: str, device_names: Iterable[str], version: str = "") -> Build:
    """What llama.cpp's own line says of its build, like `CUDA : ARCHS = 900 | CPU : AVX2 = 1 | `.

    Backends without features (Vulkan) are known by their devices: `Vulkan0`.
    """
    backends = {backend_of(name) for name in device_names}
    features, backend = set(), ""
    for field in system_info.split("|"):
        head, colon, rest = field.partition(" : ")
        if colon:
            backend = clean(head)
            backends.add(backend)
        name, equals, value = (rest if colon else field).partition("=")
        if equals and backend == "CPU" and value.strip() != "0":
            features.add(clean(name))
    return Build(version, frozenset(backends), frozenset(features))


def backend_of(device_name: str) -> str:
    """The backend of a device by its name: `CUDA0` is a device of CUDA."""
    return clean(device_name).rstrip("0123456789")
