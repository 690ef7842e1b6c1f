"""Repacked copies of a plan's matrices: how many RAM has room for, and what they are good for."""

from __future__ import annotations

from dataclasses import replace

from ..engine.protocol import RepackMode
from ..engine.rates import MARGIN, Tuning
from ..errors import gib
from ..gguf.model_meta import ModelMeta
from .forecast import touched_share
from .measured import Figure
from .plan import Plan
from .tuning import copies_within, repacked_ratio, step_ratio

RESERVE_BYTES, RESERVE_SHARE = 1 << 30, 0.05
"""What copies leave of RAM: they can't be given back like the pages of a file."""


def with_copies(plan: Plan, tuning: Tuning, meta: ModelMeta, in_idle: bool = False) -> Plan | None:
    """A plan for the CPU with as many repacked copies as RAM has room for; None where there are
    none to be had, or they don't make this many sequences faster. `in_idle` they are made while
    nobody asks, rather than before an answer, where they take long.

    Several sequences generate with experts' copies alone: a dense matrix takes other sums from
    four rows on than below (gemm and gemv in ggml/src/ggml-cpu/repack.cpp), and an answer should
    not depend on how many others are generated beside it.
    """
    place, ram = plan.placement, plan.memory[-1]
    if place.n_gpu_layers or step_ratio(tuning, place.n_seq) > 1 / MARGIN:
        return None
    mode: RepackMode = "all" if place.n_seq == 1 else "experts"
    reserve = max(RESERVE_BYTES, int(RESERVE_SHARE * ram.budget_bytes))
    room = ram.budget_bytes - ram.total_bytes - reserve
    copies = copies_within(tuning.repackable, mode, room)
    if not copies.n_bytes:
        return None
    repacked = Figure(copies.n_bytes, "measured")
    touched = touched_share(meta, place.n_seq)
    faster = 1 / repacked_ratio(tuning, mode, copies.n_layers, place.n_seq, touched)
    why = f"generating with repacked copies, about {faster:.1f} times as fast by a timing here"
    return replace(
        plan,
        placement=replace(
            place, repack=mode, n_repacked_layers=copies.n_layers, repack_in_idle=in_idle
        ),
        memory=(*plan.memory[:-1], replace(ram, repacked=repacked)),
        reasons=(*plan.reasons, f"{gib(copies.n_bytes)} of RAM for {why}"),
    )


def repack_seconds(plan: Plan, tuning: Tuning | None) -> float:
    """How long making a plan's copies takes."""
    n_bytes = plan.memory[-1].repacked.n_bytes
    return n_bytes / tuning.repack_bytes_per_s if tuning and n_bytes else 0.0
