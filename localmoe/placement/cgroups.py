"""What the control groups of this process allow: memory and processor time, both versions.

A group's limits hold for all groups below it, so every group from the process's own up to the
root counts. In a container the root that can be seen is the container's own group.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .sources import Sources, read_number, read_text

UNLIMITED = 1 << 60
"""Version 1 says "no limit" as a number close to 2^63."""


def memory_limits(sources: Sources) -> list[tuple[int, int]]:
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


def cpu_quota(sources: Sources) -> float | None:
    """Processors' worth of time that this process may use; None where that isn't limited."""
    quotas = [quota for group in groups(sources, "cpu") for quota in _quotas(group)]
    return min(quotas, default=None)


def groups(sources: Sources, controller: str) -> list[Path]:
    """The folders of this process's groups for a controller, those above them included."""
    found: dict[Path, None] = {}
    for root, inner in _places(sources, controller):
        parts = [part for part in inner.split("/") if part]
        if ".." in parts:  # seen from a namespace that the group lies outside of
            parts = []
        for n in range(len(parts), -1, -1):
            found.setdefault(root.joinpath(*parts[:n]))
    return [group for group in found if group.is_dir()]


def _places(sources: Sources, controller: str) -> Iterator[tuple[Path, str]]:
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
