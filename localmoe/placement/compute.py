"""Bytes of the buffers that a micro-batch is computed in: measured, interpolated or by formula. Pure.

On one kind of placement the size is n_ubatch x (a + b x n_ctx) + c to within a few bytes: every
token has its hidden states (a) and its row of the attention mask (b x n_ctx); c doesn't depend on
either (docs/notes/compute-buffers.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..models.meta import ModelMeta
from .measured import Basis, ComputePoint, Figure

FLOAT = 4
MASK = 2  # bytes of an entry of the attention mask: f16


def compute_bytes(points: Sequence[ComputePoint], n_ctx: int, n_ubatch: int) -> Figure | None:
    """The size at a context and micro-batch from points of the same kind; None with too few.

    A point there is "measured"; of two contexts and two micro-batches the plane is "interpolated".
    """
    sizes = {(p.n_ctx, p.n_ubatch): p.n_bytes for p in points}
    if (n_ctx, n_ubatch) in sizes:
        return Figure(sizes[n_ctx, n_ubatch], "measured")
    square = widest_square(sizes, n_ctx, n_ubatch)
    if square is None:
        return None
    (c0, c1), (u0, u1) = square
    along = (n_ctx - c0) / (c1 - c0)
    at_u0 = sizes[c0, u0] + along * (sizes[c1, u0] - sizes[c0, u0])
    at_u1 = sizes[c0, u1] + along * (sizes[c1, u1] - sizes[c0, u1])
    basis: Basis = "interpolated"
    return Figure(round(at_u0 + (n_ubatch - u0) / (u1 - u0) * (at_u1 - at_u0)), basis)


def widest_square(
    sizes: dict[tuple[int, int], int], n_ctx: int, n_ubatch: int
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Two contexts and two micro-batches that were measured crosswise; the widest of each."""
    contexts, micro_batches = ({key[i] for key in sizes} for i in (0, 1))
    squares = [
        ((c0, c1), (u0, u1))
        for c0 in contexts
        for c1 in contexts
        for u0 in micro_batches
        for u1 in micro_batches
        if c0 < c1 and u0 < u1 and all((c, u) in sizes for c in (c0, c1) for u in (u0, u1))
    ]
    return max(squares, key=lambda s: (s[0][1] - s[0][0]) * (s[1][1] - s[1][0]), default=None)


def estimated_bytes(meta: ModelMeta, n_ctx: int, n_ubatch: int, n_seq: int) -> int:
    """By formula: for each token the experts' inner states and some hidden states, its row of
    the mask; the logits of a token a sequence. Right to 1 % for Mixtral, a guess for others."""
    inner = 3 * max(1, meta.n_experts_used) * meta.n_ff_expert
    per_token = FLOAT * (inner + 4 * meta.n_embd) + MASK * n_ctx * n_seq
    return n_ubatch * per_token + FLOAT * meta.tokenizer.n_vocab * n_seq


def copied_experts_bytes(meta: ModelMeta) -> int:
    """What a GPU keeps free to copy experts from RAM into: the largest expert tensor."""
    return max((t.n_bytes for t in meta.tensors if t.role == "experts"), default=0)
