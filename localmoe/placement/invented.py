"""A machine that one might buy: this one, with the memory that was asked for. Pure."""

from __future__ import annotations

from dataclasses import replace

from .gpus import Gpu
from .hardware import Machine
from .request import PlanRequest


def machine_like(machine: Machine, request: PlanRequest) -> Machine:
    """The machine itself where the budgets are within what it has, else one that has them."""
    asked = request.vram_bytes or ()
    has_cards = len(asked) <= len(machine.gpus) and all(
        budget <= gpu.total_bytes for budget, gpu in zip(asked, machine.gpus, strict=False)
    )
    if not has_cards:
        cards = [Gpu(f"GPU{n}", "a card to be bought", size, size) for n, size in enumerate(asked)]
        machine = replace(machine, gpus=tuple(cards))
    ram = request.ram_bytes
    if ram and ram > machine.ram_total_bytes:
        machine = replace(machine, ram_total_bytes=ram, ram_available_bytes=ram)
    return machine
