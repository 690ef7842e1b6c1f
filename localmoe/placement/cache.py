"""Bytes of the KV cache and of recurrent states, layer by layer, as llama.cpp lays them out. Pure.

Sources: src/llama-kv-cache.cpp, src/llama-memory-recurrent.cpp, src/llama-hparams.cpp.
"""

from __future__ import annotations

from ..engine.protocol import KvType
from ..gguf.model_meta import ModelMeta, head_dims

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
