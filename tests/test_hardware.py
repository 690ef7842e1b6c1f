from __future__ import annotations

from pathlib import Path

import psutil

from localmoe.placement.hardware import cgroup_limits, n_cores, this_machine


def make_group(folder: Path, limit: str, used: int, inactive_file: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\nactive_file 0\n")


def test_without_a_cgroup_the_machine_is_whole(tmp_path: Path) -> None:
    machine = this_machine(cgroup_root=tmp_path)
    assert machine.ram_total_bytes == psutil.virtual_memory().total
    assert 0 < machine.ram_available_bytes <= machine.ram_total_bytes


def test_a_cgroup_limits_memory_and_files_do_not_count(tmp_path: Path) -> None:
    make_group(tmp_path, str(1 << 30), used=600 << 20, inactive_file=200 << 20)
    machine = this_machine(cgroup_root=tmp_path)
    assert machine.ram_total_bytes == 1 << 30
    assert machine.ram_available_bytes == (1024 - 400) << 20


def test_an_unlimited_cgroup_limits_nothing(tmp_path: Path) -> None:
    make_group(tmp_path, "max", used=1, inactive_file=0)
    assert cgroup_limits(tmp_path) == []


def test_cgroup_v1_is_read_too(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("1000000")
    (folder / "memory.usage_in_bytes").write_text("400000")
    assert cgroup_limits(tmp_path) == [(1_000_000, 400_000)]


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= n_cores() <= (psutil.cpu_count() or 1)
