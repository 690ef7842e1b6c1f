"""Graphics cards as their drivers see them, whether llama.cpp can use them or not.

What is free on a card is asked here, before a child of ours holds a context on it: llama.cpp's own
figure is read after that (ggml_backend_cuda_device_get_memory). nvidia-smi is run where it exists,
AMD's and Intel's drivers say it in sysfs, Apple's chip is known by its name.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .sources import Sources, clean, read_number, read_text, run_tool, tool_path

Vendor = Literal["nvidia", "amd", "intel", "apple"]

MIB = 1 << 20
MAX_MIB = 1 << 24
"""More than 16 TiB on a card is a misprint."""

# nvidia-smi --help-query-gpu; the order of its lines is that of the PCI bus
NVIDIA_FIELDS = (
    "pci.bus_id", "name", "uuid", "memory.total", "memory.free", "driver_version",
)  # fmt: skip

PCI_PLACE = re.compile(r"[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7]$")
PCI_VENDORS: dict[int, Vendor] = {0x10DE: "nvidia", 0x1002: "amd", 0x8086: "intel"}
PCI_DISPLAYS = (0x0300, 0x0302, 0x0380, 0x1200)
"""PCI classes: VGA, 3D, other display, processing accelerator (pci.ids)."""

BUILD_TOOLS = ("nvcc", "hipcc", "glslc")
"""Compilers that llama.cpp's CUDA, HIP and Vulkan backends are built with."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as its driver sees it. Memory is in bytes, None where the driver doesn't say.

    `shared_bytes` is RAM that the card may use beside its own memory (amdgpu's GTT), and
    `shared_free_bytes` of it is unused. Without `has_driver` the card was found on the bus alone.
    """

    vendor: Vendor
    name: str
    bus_id: str = ""
    uuid: str = ""
    total_bytes: int | None = None
    free_bytes: int | None = None
    shared_bytes: int = 0
    shared_free_bytes: int = 0
    driver_version: str = ""
    has_driver: bool = True


@dataclass(frozen=True, slots=True)
class Cards:
    """All cards, what went wrong in looking for them, and the build tools on the PATH."""

    cards: tuple[Card, ...] = ()
    troubles: tuple[str, ...] = ()
    tools: frozenset[str] = frozenset()


def all_cards(sources: Sources) -> Cards:
    """Every card that a driver or the bus shows. Takes no context on any of them."""
    nvidia, troubles = nvidia_cards(sources)
    on_bus = pci_cards(sources)
    if nvidia:
        on_bus = [card for card in on_bus if card.vendor != "nvidia"]
    tools = frozenset(name for name in BUILD_TOOLS if tool_path(name, sources))
    return Cards((*nvidia, *on_bus, *apple_cards(sources)), troubles, tools)


def nvidia_cards(sources: Sources) -> tuple[list[Card], tuple[str, ...]]:
    """NVIDIA's cards from nvidia-smi in the order of the bus, and why there are none, if so."""
    query = f"--query-gpu={','.join(NVIDIA_FIELDS)}"
    ran = run_tool(["nvidia-smi", query, "--format=csv,noheader,nounits"], sources)
    if ran is None:
        return [], ()
    cards = list(_nvidia_rows(ran.output))
    if cards or "No devices were found" in ran.output:
        return cards, ()
    if ran.code is None:
        return [], (f"nvidia-smi did not come to an end in {sources.tool_timeout_s:g} s",)
    first = clean(next((line for line in ran.output.splitlines() if line.strip()), "nothing"))
    return [], (f"nvidia-smi says (exit code {ran.code}): {first}",)


def _nvidia_rows(output: str) -> Iterator[Card]:
    """Cards of nvidia-smi's lines; what isn't a line of a card is passed over."""
    lines = (line for line in output.splitlines() if "\0" not in line)
    try:
        rows = [[clean(cell) for cell in row] for row in csv.reader(lines)]
    except csv.Error:
        return
    for row in rows:
        if len(row) == len(NVIDIA_FIELDS) and (PCI_PLACE.match(row[0]) or row[2][:4] == "GPU-"):
            bus_id, name, uuid, total, free, version = row
            total_bytes, free_bytes = _mib(total), _mib(free)
            if total_bytes is None or free_bytes is None or free_bytes > total_bytes:
                free_bytes = None
            yield Card(
                "nvidia",
                name,
                bus_id.lower(),
                uuid,
                total_bytes,
                free_bytes,
                driver_version=version,
            )


def _mib(text: str) -> int | None:
    """Bytes of a number of MiB; None for `[N/A]`, `[Insufficient Permissions]` and misprints."""
    return int(text) * MIB if text.isdecimal() and int(text) <= MAX_MIB else None


def pci_cards(sources: Sources) -> list[Card]:
    """Cards on the PCI bus (Linux). Those given away to a virtual machine are left out."""
    folders = sorted((sources.sys / "bus/pci/devices").glob("*"))
    cards = (_pci_card(folder, sources) for folder in folders)
    return [card for card in cards if card is not None]


def _pci_card(folder: Path, sources: Sources) -> Card | None:
    vendor = PCI_VENDORS.get(read_number(folder / "vendor") or 0)
    driver = (folder / "driver").resolve().name if (folder / "driver").exists() else ""
    is_display = (read_number(folder / "class") or 0) >> 8 in PCI_DISPLAYS
    if vendor is None or not is_display or driver == "vfio-pci":
        return None
    # Intel's integrated GPUs sit on the first bus, their cards behind a bridge
    if vendor == "intel" and folder.name[5:7] == "00":
        return None
    number = (
        f"{read_text(folder / 'vendor').strip()[2:]}:{read_text(folder / 'device').strip()[2:]}"
    )
    name = clean(read_text(folder / "product_name"))
    names = {"nvidia": "NVIDIA GPU", "amd": "AMD GPU", "intel": "Intel GPU"}
    name = name or clean(f"{names[vendor]} {number}")
    if vendor == "nvidia":  # nvidia-smi would have named it
        return Card(vendor, name, folder.name, has_driver=False)
    if vendor == "intel":
        total = read_number(folder / "tile0/physical_vram_size_bytes")
        return Card(vendor, name, folder.name, total_bytes=total, has_driver=bool(driver))
    return _amd_card(folder, name, driver, sources)


def _amd_card(folder: Path, name: str, driver: str, sources: Sources) -> Card:
    """What amdgpu says of a card in bytes (Linux, Documentation/gpu/amdgpu/driver-misc.rst)."""
    total, free = _total_and_free(folder, "vram")
    shared, shared_free = _total_and_free(folder, "gtt")
    return Card(
        "amd",
        name,
        folder.name,
        total_bytes=total,
        free_bytes=free,
        shared_bytes=shared or 0,
        shared_free_bytes=shared_free or 0,
        driver_version=clean(read_text(sources.sys / "module/amdgpu/version")),
        has_driver=bool(driver) or total is not None,
    )


def _total_and_free(folder: Path, kind: str) -> tuple[int | None, int | None]:
    total = read_number(folder / f"mem_info_{kind}_total")
    used = read_number(folder / f"mem_info_{kind}_used")
    if total is None or not 0 < total <= MAX_MIB * MIB:
        return None, None
    return total, None if used is None else max(0, total - max(0, used))


def apple_cards(sources: Sources) -> list[Card]:
    """The GPU of Apple silicon, which shares the machine's RAM."""
    if sources.system != "Darwin" or sources.arch != "arm64":
        return []
    ran = run_tool(["sysctl", "-n", "machdep.cpu.brand_string"], sources)
    return [Card("apple", clean(ran.output if ran else "") or "Apple GPU")]
