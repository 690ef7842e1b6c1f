"""How many tokens two sequences have in common at their beginning."""

from __future__ import annotations

from collections.abc import Sequence

MIN_SHARED_TOKENS = 32
"""Tokens: beginnings shorter than that, such as a prompt format's own, change no order, and nobody
waits for another to compute them."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    at, step, end = 0, 16, min(len(a), len(b))
    while at < end:
        stop = min(at + step, end)
        if tuple(a[at:stop]) == tuple(b[at:stop]):
            at, step = stop, 2 * step
        elif stop - at == 1:
            break
        else:
            end, step = stop, (stop - at) // 2
    return at
