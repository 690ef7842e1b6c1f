"""The machine: memory that may be used here (within cgroup limits), cores, and devices."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
GPU_KINDS = ("gpu", "igpu")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device that layers can be placed on. `free_bytes` is what can still be allocated."""

    name: str
    description: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to place a model on. Memory is in bytes, `n_cores` are physical ones."""

    ram_total_bytes: int
    ram_available_bytes: int
    n_cores: int
    gpus: tuple[Gpu, ...] = ()


def this_machine(gpus: Iterable[Gpu] = (), cgroup_root: Path = CGROUP_ROOT) -> Machine:
    """The machine that this process runs on, as far as this process may use it."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit, used in cgroup_limits(cgroup_root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return Machine(total, available, n_cores(), tuple(gpus))


def n_cores() -> int:
    """Physical cores that this process may run on; logical ones add nothing to matrix products."""
    logical = psutil.cpu_count(logical=True) or 1
    physical = psutil.cpu_count(logical=False) or logical
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
        physical = min(physical, max(1, allowed * physical // logical))
    return max(1, physical)


def cgroup_limits(root: Path = CGROUP_ROOT) -> list[tuple[int, int]]:
    """(limit, used) in bytes of every memory cgroup that this process is in, both versions.

    Pages of files that are mapped or cached can be dropped, so they don't count as used.
    """
    groups = [*_groups(root), *_groups(root / "memory")]
    found = []
    for group in groups:
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes")
        if limit is not None and limit < 1 << 60:
            found.append((limit, max(0, (used or 0) - _droppable(group))))
    return found


def _groups(root: Path) -> list[Path]:
    """The cgroup of this process below a root, and all above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(":", 2)[2] for line in lines if line.count(":") >= 2}
    groups = {root}
    for path in paths:
        group = root / path.strip("/")
        groups |= {group, *(parent for parent in group.parents if root in parent.parents)}
    return [group for group in groups if group.is_dir()]


def _droppable(group: Path) -> int:
    try:
        rows = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        stat = {row[0]: int(row[1]) for row in rows if len(row) == 2}
    except (OSError, ValueError):
        return 0
    return stat.get("inactive_file", 0) + stat.get("active_file", 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
