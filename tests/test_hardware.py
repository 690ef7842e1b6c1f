"""Invented machines, made of real files and real small programs, and the one that this runs on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from localmoe.config.environment import engine_environment
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Device, DeviceList
from localmoe.hardware.cpu import build_of, cpu_quota, memory_limits, processor
from localmoe.hardware.detect import detect, machine_of, n_cores, this_machine
from localmoe.hardware.gpus import Card, all_cards, visible_first
from localmoe.hardware.host import Host, host_of
from localmoe.hardware.machine import Machine
from localmoe.hardware.system import SystemAccess, clean, run_tool

GIB = 1 << 30
AVX512_FLAGS = "fpu pni ssse3 avx f16c fma avx2 bmi2 avx512f avx512_vnni"
FULL_INFO = "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | AVX512 = 1 | AVX512_VNNI = 1 | REPACK = 1 | "  # noqa: E501
CUDA_INFO = f"CUDA : ARCHS = 860,890 | USE_GRAPHS = 1 | {FULL_INFO}"
CPU_DEVICE = Device("CPU", "Some Processor", "cpu", 24 * GIB, 24 * GIB)
REINSTALL = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the programs are shell scripts")


class Invented:
    """A machine in a folder: 24 GiB of RAM, 16 cores of two threads, no GPU, no limits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {"PATH": str(root / "bin")}
        self.write("proc/meminfo", f"MemTotal: {24 << 20} kB\nMemAvailable: {20 << 20} kB\n")
        self.write("proc/cpuinfo", f"model name : Some CPU\nflags : {AVX512_FLAGS}\n")
        self.write("proc/self/cgroup", "0::/\n")
        for cpu in range(32):
            topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
            self.write(f"{topology}/thread_siblings_list", f"{cpu % 16},{cpu % 16 + 16}\n")
        (root / "bin").mkdir()
        (root / "llama").mkdir()

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}")

    def program(self, name: str, script: str) -> None:
        self.write(f"bin/{name}", f"#!/bin/sh\n{script}\n")
        (self.root / "bin" / name).chmod(0o755)

    def nvidia(self, *rows: str) -> None:
        text = "\\n".join(rows)
        self.program("nvidia-smi", f"printf '{text}\\n'")

    def pci(self, slot: str, vendor: str, device: str = "0x0001", **files: str | int) -> None:
        folder = f"sys/bus/pci/devices/{slot}"
        self.write(f"{folder}/vendor", f"{vendor}\n")
        self.write(f"{folder}/device", f"{device}\n")
        self.write(f"{folder}/class", "0x030000\n")
        for name, value in files.items():
            self.write(f"{folder}/{name}", f"{value}\n")

    def sources(self, **changes: object) -> SystemAccess:
        given = {
            "env": self.env, "proc": self.root / "proc", "sys": self.root / "sys",
            "system": "Linux", "arch": "x86_64", "cpus": frozenset(range(32)),
            "llama_folder": self.root / "llama", "tool_timeout_s": 5.0,
        }  # fmt: skip
        return SystemAccess(**{**given, **changes})  # type: ignore[arg-type]

    def machine(self, *devices: Device, info: str = FULL_INFO, **changes: object) -> Machine:
        return detect(lambda: DeviceList(1, (*devices, CPU_DEVICE), info), self.sources(**changes))


@pytest.fixture
def invented(tmp_path: Path) -> Invented:
    return Invented(tmp_path)


def row(
    n: int, name: str, total: object = 24564, free: object = 20000, version: str = "550.54"
) -> str:
    return f"0000000{n}:01:00.0, {name}, GPU-{n}0000000-aaaa, {total}, {free}, {version}"


def cuda(n: int, name: str, total_mib: int = 24210, free_mib: int = 19500) -> Device:
    return Device(f"CUDA{n}", name, "gpu", total_mib << 20, free_mib << 20)


def severities(machine: Machine) -> list[str]:
    return [finding.severity for finding in machine.findings]


# ---- memory and cores ----------------------------------------------------------------------------


def make_group(folder: Path, limit: object, used: int, inactive_file: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\nactive_file 0\n")


def test_a_machine_without_gpu_or_limit_is_whole_and_nothing_is_wrong(invented: Invented) -> None:
    machine = invented.machine()
    assert (machine.ram_total_bytes, machine.ram_available_bytes) == (24 * GIB, 20 * GIB)
    assert (machine.n_cores, machine.gpus, machine.findings) == (16, (), ())
    assert machine.cpu_features == {
        "SSE3", "SSSE3", "AVX", "AVX2", "F16C", "FMA", "BMI2", "AVX512", "AVX512_VNNI"
    }  # fmt: skip


def test_a_4_gib_group_on_a_24_gib_machine_counts_and_is_named(invented: Invented) -> None:
    group = invented.root / "sys/fs/cgroup"
    make_group(group, 4 * GIB, used=600 << 20, inactive_file=200 << 20)
    machine = invented.machine()
    assert machine.ram_total_bytes == 4 * GIB
    assert machine.ram_available_bytes == 4 * GIB - (400 << 20)
    assert severities(machine) == ["warning"]
    assert "4.0 GiB of RAM; the machine has 24.0 GiB" in machine.findings[0].what


def test_of_nested_groups_each_counts_and_of_others_none(invented: Invented) -> None:
    root = invented.root / "sys/fs/cgroup"
    invented.write("proc/self/cgroup", "0::/user/app/inner\n")
    make_group(root / "user", 8 * GIB, used=7 * GIB, inactive_file=0)
    make_group(root / "user/app", "max", used=1, inactive_file=0)
    make_group(root / "user/app/inner", 6 * GIB, used=GIB, inactive_file=GIB // 2)
    make_group(root / "user/other", 1, used=0, inactive_file=0)
    ram = host_of(invented.sources()).ram
    assert ram.total_bytes == 6 * GIB
    assert ram.available_bytes == GIB  # what the outer group has left


def test_memory_high_is_a_limit_too(invented: Invented) -> None:
    make_group(invented.root / "sys/fs/cgroup", "max", used=0, inactive_file=0)
    invented.write("sys/fs/cgroup/memory.high", f"{3 * GIB}\n")
    assert memory_limits(invented.sources()) == [(3 * GIB, 0)]


def test_version_1_counts_the_pages_of_groups_below(invented: Invented) -> None:
    folder = "sys/fs/cgroup/memory/docker/abc"
    invented.write("proc/self/cgroup", "5:cpu,cpuacct:/other\n4:memory:/docker/abc\n0::/\n")
    invented.write(f"{folder}/memory.limit_in_bytes", 2 * GIB)
    invented.write(f"{folder}/memory.usage_in_bytes", GIB)
    stat = f"inactive_file 0\ntotal_inactive_file {GIB // 2}\nactive_file 7\ntotal_active_file 8\n"
    invented.write(f"{folder}/memory.stat", stat)
    assert memory_limits(invented.sources()) == [(2 * GIB, GIB // 2 - 8)]


def test_version_1_knows_limits_above_what_a_container_sees(invented: Invented) -> None:
    folder = "sys/fs/cgroup/memory"
    invented.write(f"{folder}/memory.limit_in_bytes", 9223372036854771712)
    invented.write(f"{folder}/memory.usage_in_bytes", 0)
    invented.write(f"{folder}/memory.stat", f"hierarchical_memory_limit {GIB}\n")
    assert memory_limits(invented.sources()) == [(GIB, 0)]


@pytest.mark.parametrize("text", ["", "garbage", "\x00\xff::::", "4:memory:/../../etc\n0::/../x"])
def test_odd_group_files_limit_nothing(invented: Invented, text: str) -> None:
    invented.write("proc/self/cgroup", text)
    make_group(invented.root / "sys/fs/cgroup", "what", used=1, inactive_file=0)
    assert memory_limits(invented.sources()) == []
    assert cpu_quota(invented.sources()) is None


def test_a_quota_of_2_of_16_cores_counts_and_is_named(invented: Invented) -> None:
    invented.write("sys/fs/cgroup/cpu.max", "200000 100000\n")
    machine = invented.machine()
    assert machine.n_cores == 2
    assert severities(machine) == ["note"]
    assert "Of 16 cores 2 may be used here: a control group's quota" in machine.findings[0].what


@pytest.mark.parametrize(
    ("quota", "period", "n"), [(-1, 100000, 16), (350000, 100000, 3), (20000, 100000, 1)]
)
def test_quotas_of_version_1(invented: Invented, quota: int, period: int, n: int) -> None:
    invented.write("proc/self/cgroup", "5:cpu,cpuacct:/box\n")
    invented.write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", quota)
    invented.write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", period)
    assert n_cores(invented.sources()) == n


def test_two_threads_of_a_core_are_one(invented: Invented) -> None:
    assert n_cores(invented.sources(cpus=frozenset({3, 19}))) == 1
    assert n_cores(invented.sources(cpus=frozenset({3, 4, 20}))) == 2
    finding = invented.machine(cpus=frozenset({3})).findings[0]
    assert (finding.severity, "affinity" in finding.what) == ("note", True)


def test_this_machine_is_real() -> None:
    machine = this_machine()
    assert 0 < machine.ram_available_bytes <= machine.ram_total_bytes
    assert machine.ram_total_bytes <= psutil.virtual_memory().total
    assert 1 <= n_cores() <= (psutil.cpu_count() or 1)


# ---- processor -----------------------------------------------------------------------------------


def test_a_build_without_avx2_on_a_cpu_that_has_it(invented: Invented) -> None:
    machine = invented.machine(info="CPU : SSE3 = 1 | SSSE3 = 1 | LLAMAFILE = 1 | ")
    assert machine.build.features == {"SSE3", "SSSE3", "LLAMAFILE"}
    assert severities(machine) == ["warning"]
    assert "WITHOUT AVX, AVX2, FMA and F16C" in machine.findings[0].what
    assert machine.findings[0].command.startswith('CMAKE_ARGS="-DGGML_NATIVE=on" ')


def test_a_rebuild_keeps_the_gpu_backends_of_the_build(invented: Invented) -> None:
    machine = invented.machine(info="CUDA : ARCHS = 890 | CPU : SSE3 = 1 | ")
    assert machine.findings[0].command.startswith('CMAKE_ARGS="-DGGML_CUDA=on" ')


def test_one_command_mends_the_gpu_and_the_features(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA X"))
    machine = invented.machine(info="CPU : SSE3 = 1 | ")
    (command,) = {finding.command for finding in machine.findings}
    assert command.startswith('CMAKE_ARGS="-DGGML_CUDA=on" ')


def test_missing_avx512_alone_is_a_note(invented: Invented) -> None:
    machine = invented.machine(info=FULL_INFO.replace("AVX512", "X"))
    assert severities(machine) == ["note"]


def test_a_build_for_a_newer_cpu_is_an_error(invented: Invented) -> None:
    invented.write("proc/cpuinfo", "flags : pni ssse3 avx\n")
    finding = invented.machine().findings[0]
    assert finding.severity == "error"
    assert "AVX2, FMA, F16C and AVX512, which this processor lacks" in finding.what


def test_an_arm_cpu(invented: Invented) -> None:
    invented.write("proc/cpuinfo", "Features\t: fp asimd asimdhp asimddp i8mm\n")
    machine = invented.machine(info="CPU : NEON = 1 | ARM_FMA = 1 | ", arch="aarch64")
    assert machine.cpu_features == {"NEON", "FP16_VA", "DOTPROD", "MATMUL_INT8"}
    assert "WITHOUT DOTPROD" in machine.findings[0].what


def test_unknown_features_find_nothing(invented: Invented) -> None:
    invented.write("proc/cpuinfo", "")
    assert invented.machine().findings == ()
    assert invented.machine(info="").findings == ()


def test_system_info_of_several_backends() -> None:
    build = build_of(CUDA_INFO, ["CUDA0", "Vulkan0", "CPU"], "1.2")
    assert build.backends == {"CUDA", "Vulkan", "CPU"}
    assert "ARCHS" not in build.features
    assert "AVX2" in build.features


@pytest.mark.parametrize("info", ["", "|||", " : ", "CPU", "CPU : = | \x1b[31m = 1", "=" * 99])
def test_odd_system_info_is_survived(info: str) -> None:
    assert all(name.isprintable() for name in build_of(info, []).features)


def test_apple_silicon(invented: Invented) -> None:
    invented.program(
        "sysctl",
        '[ "$1" = -n ] && { echo Apple M2; exit; }\n'
        "printf 'machdep.cpu.brand_string: Apple M2\\nhw.perflevel0.physicalcpu: 4\\n"
        "hw.optional.arm.FEAT_DotProd: 1\\n'; exit 1",
    )
    sources = invented.sources(system="Darwin", arch="arm64")
    assert processor(sources).features == {"NEON", "DOTPROD"}
    metal = Device("MTL0", "Apple M2", "gpu", 16 * GIB, 16 * GIB)
    info = "MTL : EMBED_LIBRARY = 1 | CPU : NEON = 1 | DOTPROD = 1 | "
    mac = {"system": "Darwin", "arch": "arm64"}
    assert invented.machine(metal, info=info, **mac).gpus[0].unified
    without = invented.machine(info="CPU : NEON = 1 | DOTPROD = 1 | ", **mac)
    assert "Apple M2 is NOT USED" in without.findings[0].what
    assert "-DGGML_METAL=on" in without.findings[0].command


# ---- GPUs ----------------------------------------------------------------------------------------


def test_one_nvidia_gpu_has_what_its_driver_says_is_free(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA GeForce RTX 4090", 24564, 24100))
    machine = invented.machine(cuda(0, "NVIDIA GeForce RTX 4090"), info=CUDA_INFO)
    (gpu,) = machine.gpus
    assert (gpu.total_bytes, gpu.free_bytes) == (24210 << 20, 24100 << 20)
    assert (gpu.free_from, gpu.driver_version) == ("driver", "550.54")
    assert (gpu.kind, gpu.unified) == ("gpu", False)
    assert machine.findings == ()


def test_the_driver_is_asked_before_llama(invented: Invented) -> None:
    invented.program("nvidia-smi", f"echo driver >> {invented.root}/order")

    def ask() -> DeviceList:
        with (invented.root / "order").open("a") as file:
            file.write("llama\n")
        return DeviceList(1, (CPU_DEVICE,), FULL_INFO)

    detect(ask, invented.sources())
    assert (invented.root / "order").read_text() == "driver\nllama\n"


def test_two_unequal_gpus_are_matched_by_name_not_by_order(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA GeForce RTX 3060", 12288, 11000), row(2, "NVIDIA B", 24564, 200))
    devices = cuda(0, "NVIDIA B"), cuda(1, "NVIDIA GeForce RTX 3060", 12000)
    machine = invented.machine(*devices, info=CUDA_INFO)
    assert [gpu.free_bytes >> 20 for gpu in machine.gpus] == [200, 11000]
    assert severities(machine) == ["note"]
    assert "Other programs hold 23.4 GiB of NVIDIA B's 23.6 GiB" in machine.findings[0].what


def test_equal_gpus_are_matched_in_the_order_of_the_bus(invented: Invented) -> None:
    invented.nvidia(*(row(n, "NVIDIA X", free=20000 + n) for n in (1, 2, 3)))
    machine = invented.machine(*(cuda(n, "NVIDIA X") for n in range(3)), info=CUDA_INFO)
    assert [gpu.free_bytes >> 20 for gpu in machine.gpus] == [20001, 20002, 20003]


@pytest.mark.parametrize(
    ("visible", "order"),
    [("1", "bac"), ("2,0", "cab"), ("GPU-3", "cab"), ("", "abc"), ("1,nonsense,2", "bac")],
)
def test_visible_devices_come_first(visible: str, order: str) -> None:
    cards = [Card("nvidia", name, uuid=f"GPU-{n}") for n, name in enumerate("abc", 1)]
    found = visible_first(cards, {"CUDA_VISIBLE_DEVICES": visible})
    assert "".join(card.name for card in found) == order


def test_a_gpu_that_a_variable_hides_is_a_note(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA X"), row(2, "NVIDIA X", free=7000))
    invented.env["CUDA_VISIBLE_DEVICES"] = "1"
    machine = invented.machine(cuda(0, "NVIDIA X"), info=CUDA_INFO)
    assert machine.gpus[0].free_bytes == 7000 << 20
    hidden = [finding.what for finding in machine.findings if "hidden" in finding.what]
    assert hidden == ["NVIDIA X (24.0 GiB) is hidden from llama.cpp by CUDA_VISIBLE_DEVICES=1."]
    assert "warning" not in severities(machine)


def test_a_gpu_that_the_build_cannot_use_is_loud(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA GeForce RTX 4090"), row(2, "NVIDIA B"))
    host = host_of(invented.sources())
    machine = invented.machine()
    assert machine.gpus == ()
    (finding,) = machine.findings
    assert finding.severity == "warning"
    assert finding.what == (
        "NVIDIA GeForce RTX 4090 (24.0 GiB) and NVIDIA B (24.0 GiB) are NOT USED: "
        "this build of llama.cpp has no CUDA or Vulkan."
    )
    assert "the CUDA toolkit (nvcc is not on the PATH)" in finding.how_to_mend
    assert finding.command.startswith('CMAKE_ARGS="-DGGML_CUDA=on" ')
    assert finding.command.endswith(f"{REINSTALL[4:]} llama-cpp-python=={host.llama_version}")


def test_the_command_uses_the_pip_of_this_environment(invented: Invented) -> None:
    pip = Path(sys.executable).parent / "pip"
    if not pip.exists():
        pytest.skip("an environment without pip")
    host = host_of(invented.sources(env={"PATH": str(pip.parent)}))
    assert host.pip == "pip"
    assert "pip" in host_of(invented.sources()).pip


def test_a_build_with_cuda_that_sees_no_gpu_blames_the_driver(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA X", version="470.1"))
    (finding,) = invented.machine(info=CUDA_INFO).findings
    assert (finding.severity, "470.1" in finding.how_to_mend) == ("warning", True)
    assert "llama.cpp has CUDA, but doesn't see it" in finding.what


def test_a_backend_is_known_by_its_library(invented: Invented) -> None:
    invented.write("llama/lib/libggml-vulkan.so.0.25.3", "")
    assert invented.machine().build.backends == {"CPU", "Vulkan"}


def test_an_nvidia_gpu_without_driver_is_named(invented: Invented) -> None:
    invented.pci("0000:01:00.0", "0x10de", "0x2684")
    (finding,) = invented.machine().findings
    assert "NVIDIA GPU 10de:2684 is NOT USED: no driver answers" in finding.what
    assert "--gpus all" in finding.how_to_mend
    # seen by llama.cpp all the same: a container without nvidia-smi
    machine = invented.machine(cuda(0, "NVIDIA X"), info=CUDA_INFO)
    assert machine.findings == ()
    assert (machine.gpus[0].free_bytes, machine.gpus[0].free_from) == (19500 << 20, "llama.cpp")


def test_an_amd_card(invented: Invented) -> None:
    memory = {"mem_info_vram_total": 24 * GIB, "mem_info_vram_used": GIB}
    shared = {"mem_info_gtt_total": 12 * GIB, "mem_info_gtt_used": 0}
    invented.pci("0000:03:00.0", "0x1002", "0x744c", **memory, **shared)
    device = Device("ROCm0", "AMD Radeon RX 7900 XTX", "gpu", 24 * GIB, 22 * GIB)
    machine = invented.machine(device, info=f"ROCm : NO_VMM = 1 | {FULL_INFO}")
    (gpu,) = machine.gpus
    assert (gpu.free_bytes, gpu.free_from, gpu.unified) == (23 * GIB, "driver", False)
    assert machine.findings == ()
    unused = invented.machine().findings[0]
    assert unused.severity == "warning"
    assert "AMD GPU 1002:744c (24.0 GiB) is NOT USED" in unused.what
    assert "-DGGML_VULKAN=on" in unused.command
    invented.program("hipcc", "exit 0")
    assert "-DGGML_HIP=on" in invented.machine().findings[0].command


def test_an_integrated_amd_gpu_shares_ram(invented: Invented) -> None:
    memory = {"mem_info_vram_total": GIB // 2, "mem_info_vram_used": GIB // 4}
    shared = {"mem_info_gtt_total": 12 * GIB, "mem_info_gtt_used": GIB}
    invented.pci("0000:04:00.0", "0x1002", **memory, **shared)
    device = Device("Vulkan0", "AMD Radeon 780M (RADV PHOENIX)", "igpu", 12 * GIB + GIB // 2, GIB)
    (gpu,) = invented.machine(device).gpus
    assert (gpu.unified, gpu.kind) == (True, "igpu")
    assert gpu.free_bytes == 11 * GIB + GIB // 4
    assert severities(invented.machine()) == ["note"]


def test_a_small_integrated_gpu_is_not_worth_a_word(invented: Invented) -> None:
    invented.pci("0000:04:00.0", "0x1002", mem_info_vram_total=GIB // 2, mem_info_gtt_total=GIB)
    invented.pci("0000:00:02.0", "0x8086")
    assert invented.machine().findings == ()


def test_an_intel_card_is_named_and_one_lent_to_a_guest_is_not(invented: Invented) -> None:
    invented.pci("0000:03:00.0", "0x8086", "0x56a0")
    folder = invented.root / "sys/bus/pci/devices/0000:03:00.0"
    for driver, n_cards in (("xe", 1), ("vfio-pci", 0)):
        (invented.root / driver).mkdir()
        (folder / "driver").unlink(missing_ok=True)
        (folder / "driver").symlink_to(invented.root / driver)
        assert len(all_cards(invented.sources()).cards) == n_cards
        if n_cards:
            assert "Intel GPU 8086:56a0 is NOT USED" in invented.machine().findings[0].what


def test_a_unified_gpu_has_no_more_than_what_ram_has(invented: Invented) -> None:
    device = Device("Vulkan0", "Intel(R) Arc(tm) Graphics", "igpu", 22 * GIB, 22 * GIB)
    (gpu,) = invented.machine(device).gpus
    assert (gpu.unified, gpu.free_bytes) == (True, 20 * GIB)


def test_memory_that_the_driver_does_not_tell(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA GB10", "[N/A]", "[N/A]"))
    shared = invented.machine(cuda(0, "NVIDIA GB10", 24 << 10), info=CUDA_INFO).gpus[0]
    own = invented.machine(cuda(0, "NVIDIA GB10", 12 << 10, 9000), info=CUDA_INFO).gpus[0]
    assert (shared.unified, shared.free_from, shared.driver_version) == (
        True,
        "llama.cpp",
        "550.54",
    )
    assert (own.unified, own.free_bytes) == (False, 9000 << 20)


def test_an_integrated_gpu_is_left_out_beside_a_card(invented: Invented) -> None:
    igpu = Device("Vulkan1", "Intel(R) UHD Graphics", "igpu", 12 * GIB, 12 * GIB)
    card = Device("Vulkan0", "NVIDIA X", "gpu", 24564 << 20, 24000 << 20)
    assert [gpu.name for gpu in invented.machine(igpu, card).gpus] == ["Vulkan0"]


def test_a_card_that_two_backends_see_is_used_once(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA X"))
    twice = cuda(0, "NVIDIA X"), Device("Vulkan0", "NVIDIA X", "gpu", 24564 << 20, 20000 << 20)
    assert [gpu.name for gpu in invented.machine(*twice, info=CUDA_INFO).gpus] == ["CUDA0"]


def test_a_part_of_a_card_has_llamas_figure(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA A100", 40960, 40000))
    part = cuda(0, "NVIDIA A100 MIG 1g.5gb", 4864, 4700)
    machine = invented.machine(part, info=CUDA_INFO)
    assert (machine.gpus[0].free_bytes >> 20, machine.findings) == (4700, ())


# ---- tools that misbehave ------------------------------------------------------------------------


def test_a_hanging_nvidia_smi_is_left_after_its_time(invented: Invented) -> None:
    sleep = shutil.which("sleep")
    invented.program("nvidia-smi", f"{sleep} 60\necho late")  # the shell's child holds the pipe
    machine = invented.machine(cuda(0, "NVIDIA X"), info=CUDA_INFO, tool_timeout_s=0.2)
    assert machine.gpus[0].free_from == "llama.cpp"
    assert "nvidia-smi did not come to an end in 0.2 s" in machine.findings[0].what


@pytest.mark.parametrize(
    "script",
    [
        "printf 'NVIDIA-SMI has failed: \\033[31mno driver\\n'; exit 9",
        "printf '\\000\\377\\376garbage,,,\\n'",
        "printf '1, 2, 3, 4, 5, 6\\n'",
        "printf '\"unclosed, '",
        "exit 1",
        "kill -9 $$",
        "while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done",
    ],
)
def test_a_broken_nvidia_smi_is_a_warning(invented: Invented, script: str) -> None:
    invented.program("nvidia-smi", script)
    machine = invented.machine(cuda(0, "NVIDIA X"), info=CUDA_INFO)
    assert machine.gpus[0].free_bytes == 19500 << 20
    assert severities(machine) == ["warning"]
    assert machine.findings[0].what.isprintable()


@pytest.mark.parametrize(
    ("total", "free"), [("-5", "3"), ("9" * 30, "1"), ("24564", "99999"), ("24564", "[N/A]")]
)
def test_misprinted_memory_is_not_believed(invented: Invented, total: str, free: str) -> None:
    invented.nvidia(row(1, "NVIDIA X", total, free))
    (gpu,) = invented.machine(cuda(0, "NVIDIA X"), info=CUDA_INFO).gpus
    assert (gpu.free_bytes, gpu.free_from) == (19500 << 20, "llama.cpp")


def test_no_devices_is_no_trouble(invented: Invented) -> None:
    invented.program("nvidia-smi", "echo No devices were found; exit 6")
    assert invented.machine().findings == ()


def test_a_program_of_the_working_directory_is_not_run(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA X"))
    place = os.path.relpath(invented.root / "bin")
    assert run_tool(["nvidia-smi"], invented.sources(env={"PATH": place})) is None


def test_a_program_that_cannot_start_is_survived(invented: Invented) -> None:
    invented.write("bin/nvidia-smi", "#!/no/such/interpreter\n")
    (invented.root / "bin/nvidia-smi").chmod(0o755)
    assert severities(invented.machine()) == ["warning"]


def test_names_are_cleaned() -> None:
    assert clean("a\x1b[31m\u202eb\n  c" + "x" * 200) == ("a[31mb c" + "x" * 200)[:80]


# ---- for real ------------------------------------------------------------------------------------


def test_this_machine_is_known() -> None:
    env = engine_environment()
    with EngineProcess(env) as engine:
        machine = detect(engine.devices, SystemAccess(env=env))
    assert "CPU" in machine.build.backends
    assert machine.build.version
    assert machine.build.features


def test_llama_that_does_not_start_is_an_error() -> None:
    host: Host = host_of(SystemAccess(env=engine_environment()))
    machine = machine_of(host, None, broken="libcudart.so.12: not found.")
    assert machine.findings[0].severity == "error"
    assert "libcudart.so.12" in machine.findings[0].what
    assert "llama-cpp-python==" in machine.findings[0].command


@pytest.fixture
def real_group() -> list[Path]:
    """Groups of this machine with 2 GiB of RAM and half a processor, where they can be made."""
    roots = {"memory": Path("/sys/fs/cgroup/memory"), "cpu": Path("/sys/fs/cgroup/cpu")}
    if (Path("/sys/fs/cgroup") / "cgroup.controllers").exists():
        roots = {"both": Path("/sys/fs/cgroup")}
    limits = {
        "memory.limit_in_bytes": 2 * GIB, "memory.max": 2 * GIB,
        "cpu.cfs_quota_us": 50000, "cpu.max": "50000 100000",
    }  # fmt: skip
    made = []
    try:
        for root in roots.values():
            group = root / f"localmoe-test-{os.getpid()}"
            group.mkdir()
            made.append(group)
            for name, value in limits.items():
                if (group / name).exists():
                    (group / name).write_text(f"{value}")
        if not any((g / "memory.max").exists() or (g / "memory.stat").exists() for g in made):
            raise OSError
        yield made  # type: ignore[misc]
    except OSError:
        pytest.skip("control groups can't be made here")
    finally:
        for group in made:
            group.rmdir()


def test_in_a_real_group(real_group: list[Path]) -> None:
    enter = "".join(f"echo $$ > {group}/cgroup.procs; " for group in real_group)
    code = (
        "from localmoe.hardware.detect import this_machine; m = this_machine();"
        "print(m.ram_total_bytes, m.ram_available_bytes, m.n_cores)"
    )
    script = f'{enter}exec {sys.executable} -c "{code}"'
    out = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    total, available, cores = map(int, out.split())
    assert (total, cores) == (2 * GIB, 1)
    assert 1.8 * GIB < available < 2 * GIB
