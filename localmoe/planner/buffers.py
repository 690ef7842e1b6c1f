"""Bytes of the KV cache, of recurrent states and of compute buffers, as llama.cpp has them. Pure.

The first two are computed layer by layer (src/llama-kv-cache.cpp, src/llama-memory-recurrent.cpp,
src/llama-hparams.cpp). Compute buffers are measured, interpolated or taken by formula: on the CPU,
and on GPUs that hold everything, the size is n_ubatch x (a + b x n_ctx) + c to the byte. Every
token has its hidden states (a) and its row of the attention mask (b x n_ctx); c depends on neither.
With experts in RAM it isn't (docs/notes/compute-buffers.md): measure those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.protocol import KvType
from ..gguf.model_meta import ModelMeta, head_dims
from ..perf.figures import ComputePoint, Figure

CELL_PADDING = 256
"""A sequence's cells come in steps of so many (src/llama-context.cpp)."""

# values and bytes of a block (ggml/src/ggml-common.h)
KV_BLOCKS: dict[KvType, tuple[int, int]] = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24),
    "q5_0": (32, 22), "q4_1": (32, 20), "q4_0": (32, 18),
}  # fmt: skip
STATE_BYTES = 4  # recurrent states are 32-bit floats


def cache_bytes_by_layer(
    meta: ModelMeta, n_ctx: int, n_seq: int, kv_type: KvType, n_cells: int = 0
) -> tuple[int, ...]:
    """What each layer keeps, in bytes: for `n_seq` sequences of `n_ctx` tokens, or in `n_cells`
    cells that they share."""
    n_streams = 1 if n_cells else n_seq
    cells = -(-(n_cells or n_ctx) // CELL_PADDING) * CELL_PADDING * n_streams
    recurrent = set(meta.recurrent.layers) if meta.recurrent else set()
    state_bytes = recurrent_state_bytes(meta) * n_seq
    return tuple(
        cells * cell_bytes(meta, layer, kv_type) + (state_bytes if layer in recurrent else 0)
        for layer in range(meta.n_layers)
    )


def cell_bytes(meta: ModelMeta, layer: int, kv_type: KvType) -> int:
    """One token's K and V in one layer. Latent attention (MLA) keeps no V of its own."""
    n_heads = meta.n_kv_heads[layer]
    if n_heads == 0 or shares_cache(meta, layer):
        return 0
    dim_k, dim_v = head_dims(meta, layer)
    keeps_v = meta.mla is None or meta.mla.head_dim_k is None
    rows = [n_heads * dim_k, *([n_heads * dim_v] if keeps_v else [])]
    n_values, n_bytes = KV_BLOCKS[kv_type]
    return sum(row // n_values * n_bytes for row in rows)


def can_hold_cache(meta: ModelMeta, kv_type: KvType) -> bool:
    """Returns whether every head is a whole number of a type's blocks.

    llama.cpp refuses others as it makes the context (src/llama-context.cpp).
    """
    n_values, _ = KV_BLOCKS[kv_type]
    layers = (layer for layer, n in enumerate(meta.n_kv_heads[: meta.n_layers]) if n)
    return all(dim % n_values == 0 for layer in layers for dim in head_dims(meta, layer))


def shares_cache(meta: ModelMeta, layer: int) -> bool:
    """Whether a layer looks into an earlier layer's cache instead of having one."""
    window = meta.sliding_window
    return window is not None and layer >= meta.n_layers - window.n_shared_kv_layers


def recurrent_state_bytes(meta: ModelMeta) -> int:
    """One sequence's state in one recurrent layer: convolution and state space."""
    r = meta.recurrent
    if r is None:
        return 0
    if r.shortconv_length:
        return STATE_BYTES * meta.n_embd * (r.shortconv_length - 1)
    convolution = max(0, r.conv_kernel - 1) * (r.inner_size + 2 * r.group_count * r.state_size)
    return STATE_BYTES * (convolution + r.state_size * r.inner_size)


FLOAT = 4
MASK = 2
"""Bytes of an entry of the attention mask: f16, with flash attention."""
CELLS = 256
"""A sequence's cells come in multiples of it."""
PIPELINE_COPIES = 4
"""Copies of a graph's inputs where several GPUs hold everything (GGML_SCHED_MAX_COPIES)."""


def compute_bytes(points: Sequence[ComputePoint], n_ctx: int, n_ubatch: int) -> Figure | None:
    """The size at a context and micro-batch from points of the same kind; None with too few.

    A point there is "measured"; of two contexts and two micro-batches the plane is "interpolated".
    """
    sizes = {(p.n_ctx, p.n_ubatch): p.n_bytes for p in points}
    if (n_ctx, n_ubatch) in sizes:
        return Figure(sizes[n_ctx, n_ubatch], "measured")
    square = widest_square(sizes)
    if square is None:
        return None
    (c0, c1), (u0, u1) = square
    along = (n_ctx - c0) / (c1 - c0)
    at_u0 = sizes[c0, u0] + along * (sizes[c1, u0] - sizes[c0, u0])
    at_u1 = sizes[c0, u1] + along * (sizes[c1, u1] - sizes[c0, u1])
    n_bytes = round(at_u0 + (n_ubatch - u0) / (u1 - u0) * (at_u1 - at_u0))
    return Figure(max(0, n_bytes), "interpolated")


def widest_square(
    sizes: dict[tuple[int, int], int],
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Two contexts and two micro-batches that were measured crosswise; the widest of each."""
    contexts, micro_batches = (sorted({key[i] for key in sizes}) for i in (0, 1))
    squares = [
        ((c0, c1), (u0, u1))
        for c0 in contexts
        for c1 in contexts
        for u0 in micro_batches
        for u1 in micro_batches
        if c0 < c1 and u0 < u1 and all((c, u) in sizes for c in (c0, c1) for u in (u0, u1))
    ]
    return max(squares, key=lambda s: (s[0][1] - s[0][0]) * (s[1][1] - s[1][0]), default=None)


@dataclass(frozen=True, slots=True)
class MicroBatchShape:
    """What a micro-batch is: `n_ctx` tokens of context for each of `n_seq` sequences. Without
    flash attention it `has_scores`, of every token for every one of its context."""

    n_ctx: int
    n_ubatch: int
    n_seq: int
    has_scores: bool = False


def estimated_bytes(meta: ModelMeta, work: MicroBatchShape, on_gpu: bool = False) -> int:
    """The buffer of a device that computes whole layers, by formula.

    At least llama.cpp's own figure less 3 %, and at most half as much again: exact for Mixtral, too
    much where a layer's parts fit into each other's room (OLMoE, Granite).
    """
    n_values = values_per_token(meta)
    if on_gpu and has_ffn_beside_experts(meta):
        n_values = max(n_values, (3 * meta.n_experts_used + 2) * meta.n_embd)
    n_bytes = FLOAT * n_values + mask_bytes(meta, work)
    if work.has_scores:
        queries = max(meta.n_heads, default=0) * meta.head_dim_k
        attention = scores_bytes(meta, work.n_ctx) + FLOAT * (3 * queries + 4 * meta.n_embd)
        # the mask is there all the time, and is of f32 then
        n_bytes = max(n_bytes + mask_bytes(meta, work), attention)
    return work.n_ubatch * n_bytes


def scores_bytes(meta: ModelMeta, n_ctx: int) -> int:
    """A token's attention scores in all heads of a layer, and its row of a mask of f32."""
    n_cells = -(-n_ctx // CELLS) * CELLS
    return FLOAT * n_cells * (max(meta.n_heads, default=0) + 1)


def values_per_token(meta: ModelMeta) -> int:
    """Values alive at once for a token, in the part of a layer where they are most.

    Sizes of the tensors of build_moe_ffn, build_ffn and build_attn (src/llama-graph.cpp), with as
    many of them as ggml's allocator keeps: gate, up and product of the experts; their outputs twice
    (weighted and not) beside one product; queries, their output and its projection.
    """
    n_used, n_embd = max(1, meta.n_experts_used), meta.n_embd
    inner = n_used * meta.n_ff_expert
    outputs = n_used * n_embd if meta.is_moe else 0
    queries = max(meta.n_heads, default=0) * meta.head_dim_k
    return max(
        3 * inner + 4 * n_embd,
        2 * outputs + inner + 3 * n_embd,
        3 * meta.n_ff + 4 * n_embd,
        3 * queries + 4 * n_embd,
    )


def has_ffn_beside_experts(meta: ModelMeta) -> bool:
    """Whether layers have a shared expert or a plain FFN as well. With CUDA the experts' outputs
    were seen to stay a third time beside it (Gemma 4, Qwen 3.5), with the CPU backend not."""
    beside = {"shared_experts", "dense_ffn"}
    return any("experts" in roles and beside & set(roles) for roles in meta.layer_bytes)


def mask_bytes(meta: ModelMeta, work: MicroBatchShape) -> int:
    """A token's row of the attention mask; windowed layers have a mask of their own.

    A row is as long as one sequence's context: sequences don't see each other.
    """
    return MASK * work.n_ctx * (2 if meta.sliding_window else 1)


def input_bytes(meta: ModelMeta, work: MicroBatchShape) -> int:
    """What RAM holds for GPUs that do the computing: embeddings and masks on their way there."""
    return work.n_ubatch * (2 * FLOAT * meta.n_embd + mask_bytes(meta, work))


def pipeline_bytes(meta: ModelMeta, work: MicroBatchShape, is_first: bool) -> int:
    """What several GPUs that hold everything take more, each: further copies of their inputs.

    llama.cpp lets them work on several micro-batches at once (pipeline_parallel).
    """
    hidden = work.n_ubatch * FLOAT * meta.n_embd
    masks = work.n_ubatch * mask_bytes(meta, work)
    handed_on = 0 if is_first else PIPELINE_COPIES * hidden
    return (PIPELINE_COPIES - 1) * (masks + hidden) + handed_on


def logits_bytes(meta: ModelMeta, n_seq: int) -> int:
    """The output buffer in RAM: logits of one token a sequence."""
    return FLOAT * meta.tokenizer.n_vocab * n_seq


def copied_experts_bytes(meta: ModelMeta, n_gpus: int, largest: int) -> int:
    """What the first GPU keeps free to copy experts from RAM into, where the batch is computed.

    The largest tensor. The next smaller one too where its room can't be used again: with many
    small experts, whose outputs are wider than they are, and where other GPUs wait for the result.
    """
    experts = {t.n_bytes for t in meta.tensors if t.role == "experts"}
    sizes = sorted((size for size in experts if size <= largest), reverse=True)
    wide = meta.n_embd > meta.n_ff_expert
    return sum(sizes[: 2 if wide or n_gpus > 1 else 1])
