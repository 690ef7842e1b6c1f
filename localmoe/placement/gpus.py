"""Devices that layers can go to: llama.cpp's, each with what its driver says is free. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..engine.protocol import Device
from .cards import Card, Vendor
from .processor import backend_of

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
class Gpu:
    """A device that layers can be placed on. `free_bytes` is what can still be allocated.

    `free_from` says whose figure that is: the driver's, read with no child of ours running, or
    llama.cpp's own, from which the context of the child that was asked is already gone. A
    `unified` GPU has no memory of its own: what it takes is gone from RAM, and `free_bytes` is
    never above what is available there.
    """

    name: str
    description: str
    total_bytes: int
    free_bytes: int
    kind: Literal["gpu", "igpu"] = "gpu"
    unified: bool = False
    free_from: Literal["driver", "llama.cpp"] = "llama.cpp"
    driver_version: str = ""


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
