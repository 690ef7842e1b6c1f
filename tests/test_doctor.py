"""`localmoe doctor`: laid out for invented machines, and run for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from test_hardware import CPU_DEVICE, CUDA_INFO, FULL_INFO, GIB, Invented, cuda, make_group, row

from localmoe.config.environment import hub_access, hub_cache
from localmoe.engine.protocol import DeviceList
from localmoe.hardware.detect import machine_of
from localmoe.hardware.host import host_of
from localmoe.hardware.machine import Finding

doctor = import_module("localmoe.cli.doctor")  # the package has the command under this name

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the programs are shell scripts")


@pytest.fixture
def invented(tmp_path: Path) -> Invented:
    return Invented(tmp_path)


def check(
    invented: Invented, *devices: object, info: str = FULL_INFO, broken: str = "", free: int = 99
) -> doctor.Checkup:
    host = host_of(invented.sources())
    listed = None if broken else DeviceList(1, (*devices, CPU_DEVICE), info)
    folders = {name: Path("/somewhere") / name for name in ("models", "settings", "state")}
    return doctor.Checkup(host, machine_of(host, listed, broken), listed, folders, free * GIB)


def text_of(checkup: doctor.Checkup) -> str:
    return "\n".join([*doctor.facts(checkup), *doctor.advice(checkup.findings)])


def run_doctor(
    *arguments: str, path: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **variables}
    if path:
        env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
    command = [sys.executable, "-m", "localmoe", "doctor", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


# ---- invented machines ---------------------------------------------------------------------------


def test_a_machine_in_order(invented: Invented) -> None:
    text = text_of(check(invented))
    assert "24.00 GiB, 20.00 GiB available" in text
    assert "Some CPU, 16 cores" in text
    assert "none that llama.cpp can use" in text
    assert text.endswith("Nothing is wrong.")


def test_a_gpu_in_order(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA X", free=24000))
    text = text_of(check(invented, cuda(0, "NVIDIA X"), info=CUDA_INFO))
    assert "CUDA0: NVIDIA X, 23.44 GiB of 23.64 GiB free, driver 550.54" in text
    assert "backends: CPU, CUDA" in text


def test_a_figure_of_llamas_own_is_marked(invented: Invented) -> None:
    text = text_of(check(invented, cuda(0, "NVIDIA X"), info=CUDA_INFO))
    assert "free by llama.cpp's own count" in " ".join(text.split())


def test_all_that_can_be_wrong_is_told_with_its_command(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA GeForce RTX 4090"))
    invented.write("sys/fs/cgroup/cpu.max", "200000 100000\n")
    make_group(invented.root / "sys/fs/cgroup", 4 * GIB, used=GIB, inactive_file=0)
    checkup = check(invented, info="CPU : SSE3 = 1 | ", free=1)
    severities = [finding.severity for finding in checkup.findings]
    assert severities == ["warning", "warning", "warning", "note", "note"]
    assert checkup.can_run
    text = text_of(checkup)
    for words in ("NOT USED", "WITHOUT AVX", "a control group's limit", "2 to be used", "1.00 GiB"):
        assert words in " ".join(text.split())
    commands = [line.strip() for line in text.splitlines() if "CMAKE_ARGS" in line]
    assert commands == [finding.command for finding in checkup.findings if finding.command]


def test_lines_fit_80_columns_but_for_commands_and_paths(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA GeForce RTX 4090 " + "Ti " * 15))
    lines = text_of(check(invented, free=1)).splitlines()
    assert all(len(line) <= 80 for line in lines if "CMAKE" not in line and "(/" not in line)


def test_llama_that_does_not_start_leaves_nothing_to_run(invented: Invented) -> None:
    checkup = check(invented, broken="libcudart.so.12: cannot open shared object file.")
    assert not checkup.can_run
    assert checkup.findings[0].severity == "error"
    assert "ERROR      llama.cpp does not start: libcudart.so.12" in text_of(checkup)
    missing = replace(checkup.host, llama_version="")
    finding = machine_of(missing, None, "no module").findings[0]
    assert finding.what == "llama-cpp-python is not installed."
    assert finding.command.endswith("install llama-cpp-python")


def test_the_document_has_what_the_lines_have(invented: Invented) -> None:
    invented.nvidia(row(1, "NVIDIA X"))
    document = json.loads(json.dumps(doctor.report(check(invented, cuda(0, "NVIDIA X")))))
    assert document["gpus"][0]["free_from"] == "driver"
    assert document["cards"][0]["driver_version"] == "550.54"
    assert document["ram"]["machine_bytes"] == 24 * GIB
    assert document["llama_cpp"]["devices"][1]["kind"] == "cpu"
    assert document["can_run"]


def test_advice_on_nothing_is_a_sentence() -> None:
    assert list(doctor.advice(())) == ["Nothing is wrong."]
    lines = list(doctor.advice((Finding("note", "A thing.", "Do this:", "do --this"),)))
    assert lines == ["NOTE       A thing.", "           Do this:", "", "  do --this", ""]


def test_folders_follow_the_hubs_variables() -> None:
    assert hub_cache({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert hub_cache({"HF_HUB_CACHE": "$SCRATCH/x", "SCRATCH": "/s"}) == Path("/s/x")
    assert hub_cache({"HF_HOME": "${SCRATCH}/x", "SCRATCH": "/s"}) == Path("/s/x/hub")
    assert hub_cache({"HF_HUB_CACHE": "$NONE/x"}) == Path("$NONE/x")
    assert hub_cache({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}) == Path("/b/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert hub_cache({}) == Path.home() / ".cache/huggingface/hub"
    assert doctor.folders_of()["models"] == hub_access().cache


def test_an_engine_that_hangs_is_given_up() -> None:
    devices, broken = doctor.ask_llama(dict(os.environ), timeout_s=0)
    assert (devices, broken) == (None, "no answer in 0 s.")


# ---- for real ------------------------------------------------------------------------------------


def test_doctor_runs() -> None:
    ran = run_doctor()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\x1b" not in ran.stdout
    for name in ("RAM", "CPU", "GPU", "llama.cpp", "Models"):
        assert f"\n{name}" in ran.stdout


def test_doctor_prints_one_document() -> None:
    ran = run_doctor("--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    document = json.loads(ran.stdout)
    assert document["can_run"]
    assert "CPU" in document["llama_cpp"]["backends"]


def test_a_gpu_that_this_build_cannot_use_is_named(invented: Invented) -> None:
    document = json.loads(run_doctor("--json").stdout)
    if {"CUDA", "Vulkan"} & set(document["llama_cpp"]["backends"]):
        pytest.skip("this build can use NVIDIA's GPUs")
    invented.nvidia(row(1, "NVIDIA GeForce RTX 4090"))
    ran = run_doctor(path=str(invented.root / "bin"))
    assert ran.returncode == 0
    words = " ".join(ran.stdout.split())
    assert "WARNING NVIDIA GeForce RTX 4090 (24.0 GiB) is NOT USED" in words
    assert f"llama-cpp-python=={document['llama_cpp']['version']}\n" in ran.stdout


def test_without_llama_cpp_doctor_says_so_and_exits_with_1(tmp_path: Path) -> None:
    broken = tmp_path / "llama_cpp"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open it')\n")
    ran = run_doctor("--json", PYTHONPATH=str(tmp_path))
    assert ran.returncode == 1
    document = json.loads(ran.stdout)
    assert not document["can_run"]
    assert "libcudart.so.12" in document["findings"][0]["what"]


@pytest.mark.parametrize(
    ("text", "line", "severity"),
    [("temp: 1\ntmep: 2\n", 2, "error"), ("models:\n  demo:\n    temp: hot\n", 3, "warning")],
)
def test_a_config_file_that_makes_no_sense_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int, severity: str
) -> None:
    """An error where no command can do with it, a warning where one model is concerned."""
    monkeypatch.setenv("LOCALMOE_CONFIG", str(tmp_path))
    assert list(doctor.settings_findings()) == []
    (tmp_path / "config.yaml").write_text(text)
    ran = run_doctor("--json")
    assert ran.returncode == (1 if severity == "error" else 0)
    found = json.loads(ran.stdout)["findings"]
    told = [one for one in found if one["what"].startswith(f"{tmp_path / 'config.yaml'}:{line}: ")]
    assert [one["severity"] for one in told] == [severity]


def test_a_folder_that_can_not_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folders = {name: tmp_path / name / "deep" for name in ("models", "settings", "state")}
    assert list(doctor.folder_findings(folders)) == []
    (finding,) = doctor.folder_findings({**folders, "state": tmp_path / "file" / "deep"})
    assert finding.severity == "warning"
    assert finding.what.endswith("file is not a folder.")
    assert "LOCALMOE_STATE" in finding.how_to_mend
