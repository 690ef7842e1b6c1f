"""Graphics cards as their drivers see them, matched with the devices that llama.cpp has.

What is free on a card is asked here, before a child of ours holds a context on it: llama.cpp's own
figure is read after that (ggml_backend_cuda_device_get_memory). nvidia-smi is run where it exists,
AMD's and Intel's drivers say it in sysfs, and Apple's chip is known by its name. Cards that
llama.cpp can't use are found, too.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..engine.protocol import Device
from .cpu import backend_of
from .machine import Gpu
from .system import SystemAccess, clean, read_number, read_text, run_tool, tool_path

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


def all_cards(sources: SystemAccess) -> Cards:
    """Every card that a driver or the bus shows. Takes no context on any of them."""
    nvidia, troubles = nvidia_cards(sources)
    on_bus = pci_cards(sources)
    if nvidia:
        on_bus = [card for card in on_bus if card.vendor != "nvidia"]
    tools = frozenset(name for name in BUILD_TOOLS if tool_path(name, sources))
    return Cards((*nvidia, *on_bus, *apple_cards(sources)), troubles, tools)


def nvidia_cards(sources: SystemAccess) -> tuple[list[Card], tuple[str, ...]]:
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


def pci_cards(sources: SystemAccess) -> list[Card]:
    """Cards on the PCI bus (Linux). Those given away to a virtual machine are left out."""
    folders = sorted((sources.sys / "bus/pci/devices").glob("*"))
    cards = (_pci_card(folder, sources) for folder in folders)
    return [card for card in cards if card is not None]


def _pci_card(folder: Path, sources: SystemAccess) -> Card | None:
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


def _amd_card(folder: Path, name: str, driver: str, sources: SystemAccess) -> Card:
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


def apple_cards(sources: SystemAccess) -> list[Card]:
    """The GPU of Apple silicon, which shares the machine's RAM."""
    if sources.system != "Darwin" or sources.arch != "arm64":
        return []
    ran = run_tool(["sysctl", "-n", "machdep.cpu.brand_string"], sources)
    return [Card("apple", clean(ran.output if ran else "") or "Apple GPU")]


GPU_KINDS = ("gpu", "igpu")

BACKEND_VENDORS: dict[str, Vendor] = {
    "CUDA": "nvidia",
    "ROCm": "amd",
    "HIP": "amd",
    "SYCL": "intel",
    "MTL": "apple",
    "Metal": "apple",
}
VENDOR_WORDS: dict[Vendor, str] = {
    "nvidia": "nvidia|geforce|quadro|tesla",
    "amd": r"\bamd\b|radeon|\bati\b",
    "intel": "intel|arc",
    "apple": "apple",
}

SAME_TOTAL = 0.1
"""A driver keeps up to so much of a card for itself: llama.cpp's total is smaller than its own."""


@dataclass(frozen=True, slots=True)
class Matched:
    """The GPUs to plan with, and the cards that none of llama.cpp's devices stands for."""

    gpus: tuple[Gpu, ...]
    unused: tuple[Card, ...]


def match_gpus(
    devices: Sequence[Device], cards: Sequence[Card], ram_bytes: int, available_bytes: int
) -> Matched:
    """Find each device's card by maker, name and total, the cards in the order of the bus.

    Like llama.cpp (llama_prepare_model_devices), a card that two backends see is used once, and
    integrated GPUs only where there is no other. `ram_bytes` is all RAM of the machine.
    """
    gpus: list[Gpu] = []
    taken: dict[int, str] = {}  # the card's place in the list, the backend that has it
    used: set[int] = set()
    for device in devices:
        if device.kind not in GPU_KINDS:
            continue
        same = [i for i, card in enumerate(cards) if is_same(card, device)]
        left = [i for i in same if i not in taken]
        backend = backend_of(device.name)
        if same and not left and any(taken[i] != backend for i in same):
            continue
        card = None
        if left:
            card = cards[left[0]]
            taken[left[0]] = backend
        used |= {i for i, other in enumerate(cards) if is_part(device, other)}
        gpus.append(_gpu(device, card, ram_bytes, available_bytes))
    discrete = [gpu for gpu in gpus if gpu.kind == "gpu"]
    unused = [card for i, card in enumerate(cards) if i not in taken and i not in used]
    return Matched(tuple(discrete or gpus), tuple(unused))


def visible_first(cards: Sequence[Card], env: Mapping[str, str]) -> list[Card]:
    """Cards in the order that CUDA_VISIBLE_DEVICES gives NVIDIA's, those that it hides at the end.

    It counts the fastest card first, unless CUDA_DEVICE_ORDER says PCI_BUS_ID; for equal cards,
    the only ones that names and totals can't tell apart, that is the order of the bus as well.
    """
    nvidia = [card for card in cards if card.vendor == "nvidia"]
    chosen: list[Card] = []
    for word in env.get("CUDA_VISIBLE_DEVICES", "").split(","):
        word = word.strip()
        if word.isdecimal() and int(word) < len(nvidia):
            chosen.append(nvidia[int(word)])
        elif word.startswith("GPU-"):
            chosen += [card for card in nvidia if card.uuid.startswith(word)]
        else:
            break
    return [*chosen, *(card for card in cards if card not in chosen)]


def vendor_of(device: Device) -> Vendor | None:
    """Who made a device: some backends are of one maker, Vulkan's devices say it in words."""
    known = BACKEND_VENDORS.get(backend_of(device.name))
    words = device.description.lower()
    return known or next((v for v, p in VENDOR_WORDS.items() if re.search(p, words)), None)


def is_same(card: Card, device: Device) -> bool:
    """Whether a device of llama.cpp may be this card."""
    if vendor_of(device) != card.vendor:
        return False
    # a part of a card (MIG) has the card's name with more behind it
    named = card.vendor == "nvidia" and card.has_driver
    if named and card.name.lower() != device.description.strip().lower():
        return False
    totals = _totals(card)
    return not totals or any(is_near(device.total_bytes, total) for total in totals)


def is_part(device: Device, card: Card) -> bool:
    """Whether a device is a part of a card (MIG), whose memory the card's doesn't tell."""
    return vendor_of(device) == card.vendor and device.description.startswith(f"{card.name} MIG")


def is_near(a: int, b: int) -> bool:
    """Whether two counts of memory may be of one card."""
    return abs(a - b) <= SAME_TOTAL * max(a, b)


def _totals(card: Card) -> list[int]:
    """What a backend may take for a card's total: its own memory, the shared one, or both."""
    own, shared = card.total_bytes or 0, card.shared_bytes
    return [total for total in (own, shared, own + shared) if total] if own else []


def _gpu(device: Device, card: Card | None, ram_bytes: int, available_bytes: int) -> Gpu:
    free, by_driver = _free(device, card)
    unified = _is_unified(device, card, ram_bytes)
    return Gpu(
        device.name,
        device.description,
        device.total_bytes,
        max(0, min(free, device.total_bytes, available_bytes if unified else free)),
        "igpu" if device.kind == "igpu" else "gpu",
        unified,
        "driver" if by_driver else "llama.cpp",
        card.driver_version if card else "",
    )


def _free(device: Device, card: Card | None) -> tuple[int, bool]:
    """Free bytes of a device, and whether its driver said so."""
    if card is None or card.free_bytes is None:
        return device.free_bytes, False
    own, shared = card.total_bytes or 0, card.shared_bytes
    free_of_total = {
        own + shared: card.free_bytes + card.shared_free_bytes,
        shared: card.shared_free_bytes,
        own: card.free_bytes,
    }
    nearest = min(free_of_total, key=lambda total: abs(device.total_bytes - total))
    return free_of_total[nearest], True


def _is_unified(device: Device, card: Card | None, ram_bytes: int) -> bool:
    """Whether a device computes in the machine's RAM."""
    if card is None:
        return device.kind == "igpu"
    if card.vendor == "apple":
        return True
    if card.total_bytes is None:  # NVIDIA's boards with shared memory say [N/A]
        return device.kind == "igpu" or (
            card.vendor == "nvidia" and card.has_driver and is_near(device.total_bytes, ram_bytes)
        )
    # an integrated GPU's own part (AMD's carve-out) is RAM that the system doesn't have
    return not is_near(device.total_bytes, card.total_bytes)
