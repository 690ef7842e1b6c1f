"""`doctor`: what this machine has, what is wrong with it, and how to mend it."""

from __future__ import annotations

import os
import platform
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..catalog.catalog import model_aliases
from ..config.environment import (
    config_folder,
    config_path,
    engine_environment,
    hub_access,
    state_folder,
)
from ..config.settings import load_settings
from ..engine.client import EngineProcess
from ..errors import EngineError, LocalMoeError
from ..hardware.detect import machine_of
from ..hardware.host import host_of
from ..hardware.machine import Finding
from ..hardware.system import SystemAccess
from ..hub.installed import InstalledModels
from ..terminal import console
from .config import check
from .options import json_option

if TYPE_CHECKING:
    from ..engine.protocol import DeviceList
    from ..hardware.host import Host
    from ..hardware.machine import Finding, Gpu, Machine

WIDTH = 80
ENGINE_TIMEOUT_S = 60.0
"""Eight cards whose driver isn't kept loaded take some 15 s."""

MIN_FREE_BYTES = 10 << 30
"""Less than this on the disk of the models has no room for a small Mixture-of-Experts model."""


FOLDER_USES = {
    "models": (os.W_OK, "No model can be fetched", "HF_HUB_CACHE"),
    "settings": (os.R_OK, "No settings can be read", "LOCALMOE_CONFIG"),
    "state": (os.W_OK, "Neither chats nor measurements are kept", "LOCALMOE_STATE"),
}
"""For each folder: the access that it needs, what is lost without, the variable that moves it."""


@dataclass(frozen=True, slots=True)
class Checkup:
    """All that `doctor` tells: the machine, how llama.cpp sees it, folders and their room."""

    host: Host
    machine: Machine
    devices: DeviceList | None
    folders: Mapping[str, Path]
    models_free_bytes: int
    settings: tuple[Finding, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong, the worst first."""
        found = (*self.settings, *self.machine.findings)
        return (
            *sorted(found, key=is_no_error),
            *disk_findings(self.folders, self.models_free_bytes),
        )

    @property
    def can_run(self) -> bool:
        """Whether models can run on this machine."""
        return all(finding.severity != "error" for finding in self.findings)


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """What this machine has, what is wrong, how to mend it.

    Exits with 0 where a model can run, warnings or not, and with 1 where nothing can.
    """
    checkup = examine()
    if as_json:
        console.document(report(checkup))
    else:
        console.lines([*facts(checkup), "", *advice(checkup.findings)])
    return 0 if checkup.can_run else 1


def examine() -> Checkup:
    """Look at the machine first and ask llama.cpp second: its child takes memory of the GPUs."""
    env = engine_environment()
    host = host_of(SystemAccess(env=env))
    devices, broken = ask_llama(env)
    folders = folders_of()
    room = InstalledModels(hub_access()).free_bytes()
    settings = (*settings_findings(), *folder_findings(folders))
    return Checkup(host, machine_of(host, devices, broken), devices, folders, room, settings)


def ask_llama(
    env: Mapping[str, str], timeout_s: float = ENGINE_TIMEOUT_S
) -> tuple[DeviceList | None, str]:
    """The devices that llama.cpp sees, or why it doesn't say. With a bad driver it may hang."""
    with EngineProcess(env) as engine:
        late = threading.Timer(timeout_s, engine.kill)
        late.daemon = True
        late.start()
        try:
            return engine.devices(), ""
        except EngineError as error:
            ran_out = not late.is_alive()
            return None, f"no answer in {timeout_s:g} s." if ran_out else error.message
        finally:
            late.cancel()


# ---- folders -------------------------------------------------------------------------------------


def folders_of() -> dict[str, Path]:
    """Where things lie: models in the Hugging Face cache, the rest in the platform's folders."""
    return {"models": hub_access().cache, "settings": config_folder(), "state": state_folder()}


def settings_findings() -> Iterator[Finding]:
    """What stands in the config file, or in a variable, and makes no sense."""
    try:
        load_settings({}, aliases=model_aliases)
    except LocalMoeError as error:  # every command that takes settings ends like this
        yield Finding("error", error.message, error.hint or "Change it there.")
        return
    try:
        check(config_path())
    except LocalMoeError as error:  # of a single model
        yield Finding("warning", error.message, error.hint or "Change it there.")


def is_no_error(finding: Finding) -> bool:
    """Whether a finding keeps nothing from running."""
    return finding.severity != "error"


def folder_findings(folders: Mapping[str, Path]) -> Iterator[Finding]:
    """Folders that can't be used. Raises nothing, and writes nothing to find out."""
    for name, (access, loss, variable) in FOLDER_USES.items():
        place = folders[name]
        while not os.path.lexists(place):  # what is missing is made when it is needed
            place = place.parent
        why = "is not a folder" if not place.is_dir() else "may not be used by this account"
        if not place.is_dir() or not os.access(place, access | os.X_OK):
            what = f"{loss}: {place} {why}."
            yield Finding("warning", what, f"Mend that, or choose another folder: set {variable}.")


def disk_findings(folders: Mapping[str, Path], free: int) -> Iterator[Finding]:
    """A disk without room for models. Raises nothing, and writes nothing to find out."""
    if free < MIN_FREE_BYTES:
        what = f"The disk of {folders['models']} has only {console.size(free)} free."
        yield Finding("note", what, "Make room, or keep models elsewhere: set HF_HUB_CACHE.")


# ---- one document --------------------------------------------------------------------------------


def report(checkup: Checkup) -> dict[str, Any]:
    """What --json says: sizes in bytes, features in llama.cpp's names."""
    host, machine = checkup.host, checkup.machine
    return {
        "localmoe": __version__,
        "can_run": checkup.can_run,
        "findings": [asdict(finding) for finding in checkup.findings],
        "system": {"name": host.system, "arch": platform.machine(), "release": platform.release()},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "ram": asdict(host.ram),
        "cpu": {
            "name": host.processor.name,
            "n_cores": machine.n_cores,
            "n_physical_cores": host.processor.n_physical,
            "quota": host.processor.quota,
            "features": sorted(machine.cpu_features),
        },
        "gpus": [asdict(gpu) for gpu in machine.gpus],
        "cards": [asdict(card) for card in host.cards.cards],
        "llama_cpp": {
            "version": machine.build.version,
            "backends": sorted(machine.build.backends),
            "features": sorted(machine.build.features),
            "devices": [asdict(device) for device in checkup.devices.devices]
            if checkup.devices
            else [],
        },
        "folders": {name: str(path) for name, path in checkup.folders.items()},
        "models_free_bytes": checkup.models_free_bytes,
    }


# ---- lines ---------------------------------------------------------------------------------------


def facts(checkup: Checkup) -> Iterator[str]:
    """What the machine has, a name and its value a line."""
    rows = [
        ("System", f"{checkup.host.system} {platform.release()}, {platform.machine()}"),
        ("RAM", ram_line(checkup)),
        ("CPU", cpu_line(checkup)),
        ("", feature_line(checkup.machine)),
        *(("GPU", gpu_line(gpu)) for gpu in checkup.machine.gpus),
        *([] if checkup.machine.gpus else [("GPU", "none that llama.cpp can use")]),
        ("llama.cpp", llama_line(checkup.machine)),
        ("localmoe", f"{__version__}, Python {platform.python_version()} ({sys.executable})"),
        ("Models", f"{checkup.folders['models']}, {console.size(checkup.models_free_bytes)} free"),
        ("Settings", str(checkup.folders["settings"])),
        ("State", str(checkup.folders["state"])),
    ]
    for name, value in rows:
        if value:
            yield from row(name, value)


def ram_line(checkup: Checkup) -> str:
    """RAM in a line, with the limit of a control group."""
    ram = checkup.host.ram
    size = console.size
    line = f"{size(ram.total_bytes)}, {size(ram.available_bytes)} available"
    if ram.total_bytes < ram.machine_bytes:
        line += f" (a control group's limit; the machine has {size(ram.machine_bytes)})"
    return line


def cpu_line(checkup: Checkup) -> str:
    """The processor and its cores in a line."""
    cpu = checkup.host.processor
    cores = "1 core" if cpu.n_physical == 1 else f"{cpu.n_physical} cores"
    used = f", {cpu.n_usable} to be used" if cpu.n_usable != cpu.n_physical else ""
    return f"{cpu.name}, {cores}{used}"


def feature_line(machine: Machine) -> str:
    """Features that llama.cpp uses here, and those of the processor that it doesn't."""
    used = sorted(machine.cpu_features & machine.build.features)
    idle = sorted(machine.cpu_features - machine.build.features)
    parts = [f"used by llama.cpp: {' '.join(used)}"] if used else []
    if machine.build.features and idle:
        parts.append(f"not used: {' '.join(idle)}")
    return "; ".join(parts)


def gpu_line(gpu: Gpu) -> str:
    """A GPU and its memory in a line."""
    free = f"{console.size(gpu.free_bytes)} of {console.size(gpu.total_bytes)} free"
    if gpu.free_from == "llama.cpp":
        free += " by llama.cpp's own count"
    driver = f", driver {gpu.driver_version}" if gpu.driver_version else ""
    shared = ", shares the machine's RAM" if gpu.unified else ""
    return f"{gpu.name}: {gpu.description}, {free}{shared}{driver}"


def llama_line(machine: Machine) -> str:
    """llama.cpp's version and backends in a line."""
    backends = ", ".join(sorted(machine.build.backends)) or "unknown"
    return f"llama-cpp-python {machine.build.version or 'is missing'}, backends: {backends}"


def row(name: str, value: str) -> list[str]:
    """A name and a value, which goes on in further lines under itself."""
    return textwrap.wrap(
        value,
        WIDTH,
        initial_indent=f"{name:<11}",
        subsequent_indent=" " * 11,
        break_long_words=False,
        break_on_hyphens=False,
    )


def advice(findings: tuple[Finding, ...]) -> Iterator[str]:
    """What is wrong and how to mend it. A command has a line of its own, whole, to be copied."""
    if not findings:
        yield "Nothing is wrong."
    for finding in findings:
        yield from row(finding.severity.upper(), finding.what)
        yield from row("", finding.how_to_mend)
        if finding.command:
            yield from ("", f"  {finding.command}")
        yield ""
