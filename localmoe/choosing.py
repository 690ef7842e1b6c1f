"""Which quant of a model: the best one that suits this machine, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import DoesNotFit, LocalMoeError, ModelFileError, gib
from .models.quants import Quant, rank
from .placement.hardware import Machine

RECOMMENDED = "Q4_K_M"
"""Mixtral's perplexity at it is 1.5 % above that at 8 bits, and 0.9 points more are gained by a
sixth more bytes to fetch, to hold and to read for each token (models/quants.py has the table)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A quant and why it is the one, in a sentence; "" where there was nothing to choose."""

    quant: Quant
    why: str


def choose(quants: Sequence[Quant], check: Callable[[Quant], None]) -> Choice:
    """The best quant up to the recommended one that `check` lets through.

    `check` raises DoesNotFit or ModelFileError. Raises DoesNotFit where nothing is let through.
    """
    refusals: list[LocalMoeError] = []
    for quant in in_order(quants):
        try:
            check(quant)
        except (DoesNotFit, ModelFileError) as error:
            refusals.append(error)
            continue
        return Choice(quant, reason(quant, refusals[:1]))
    what = "No quant of it runs here"
    raise DoesNotFit(f"{what}; of the smallest: {refusals[-1].message}", "See: localmoe list")


def in_order(quants: Sequence[Quant]) -> list[Quant]:
    """The recommended one and those below it, best first; only where there is none, those above.

    With an importance matrix (i1) it counts as the same, and comes behind what stands before it.
    """
    limit = rank(RECOMMENDED)
    ranks = {quant.stem: min(rank(quant.label), limit) for quant in quants if is_near(quant)}
    if not ranks:
        return sorted(quants, key=lambda quant: quant.n_bytes)
    below = [quant for quant in quants if quant.stem in ranks]
    return sorted(below, key=lambda quant: -ranks[quant.stem])


def is_near(quant: Quant) -> bool:
    return rank(quant.label) < rank(RECOMMENDED) + 1


def reason(quant: Quant, refused: Sequence[LocalMoeError]) -> str:
    size = gib(quant.n_bytes)
    if not refused:
        return f"{quant.label} ({size}): a larger one would gain little and cost speed."
    return f"{quant.label} ({size}) is the best that fits: {refused[0].message}"


def check_bytes(n_bytes: int, machine: Machine) -> None:
    """Raises DoesNotFit where weights alone are more than all memory: no header is needed then."""
    memory = machine.ram_available_bytes + sum(g.free_bytes for g in machine.gpus if not g.unified)
    if n_bytes > memory:
        raise DoesNotFit(f"Its weights take {gib(n_bytes)}; {gib(memory)} of memory are free.")
