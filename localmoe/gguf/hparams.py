"""What a model keeps for each token or sequence: heads, latents, windows, recurrent states.

The facts as the header has them, for the arithmetic of the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .metadata import Metadata
from .tensors import TensorInfo, attention_layers, recurrent_layers


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention: the cache holds one latent of `kv_lora_rank` a token.

    `head_dim_k` and `head_dim_v` are those of the decompressed heads; None in early files, which
    cache decompressed heads.
    """

    kv_lora_rank: int
    q_lora_rank: int
    rope_dims: int
    head_dim_k: int | None
    head_dim_v: int | None


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """Layers that see `n_window` tokens back only, as far as the header tells which they are.

    `pattern`: every n-th layer sees all, or a flag for each layer (true: windowed), or None where
    the architecture fixes it. `n_shared_kv_layers` last layers use the cache of earlier ones.
    """

    n_window: int
    pattern: int | tuple[bool, ...] | None
    head_dim_k: int
    head_dim_v: int
    n_shared_kv_layers: int


@dataclass(frozen=True, slots=True)
class Recurrent:
    """State-space, linear attention and short convolution layers; 0 where a size isn't given."""

    layers: tuple[int, ...]
    conv_kernel: int
    inner_size: int
    state_size: int
    time_step_rank: int
    group_count: int
    shortconv_length: int


def read_kv_heads(
    keys: Metadata, tensors: Sequence[TensorInfo], n_heads: tuple[int, ...]
) -> tuple[int, ...]:
    """KV heads of each layer; 0 where a layer has no keys, whatever a single number says."""
    heads = keys.each_layer("attention.head_count_kv", len(n_heads)) or n_heads
    with_cache = attention_layers(tensors)
    if not with_cache:  # a vocabulary alone, or names of an architecture to come
        return heads
    return tuple(n if layer in with_cache else 0 for layer, n in enumerate(heads))


def read_mla(keys: Metadata) -> Mla | None:
    """Latent attention's sizes, or None for attention as usual."""
    rank = keys.size("attention.kv_lora_rank", 0)
    if not rank:
        return None
    return Mla(
        kv_lora_rank=rank,
        q_lora_rank=keys.size("attention.q_lora_rank", 0),
        rope_dims=keys.size("rope.dimension_count", 0),
        head_dim_k=keys.optional_size("attention.key_length_mla"),
        head_dim_v=keys.optional_size("attention.value_length_mla"),
    )


def read_sliding_window(
    keys: Metadata, n_layers: int, head_dim_k: int, head_dim_v: int
) -> SlidingWindow | None:
    """The window, or None where every layer sees everything."""
    n_window = keys.size("attention.sliding_window", 0)
    if not n_window:
        return None
    pattern: int | tuple[bool, ...] | None = None
    if "attention.sliding_window_pattern" in keys:
        flags = keys.each_layer("attention.sliding_window_pattern", n_layers)
        scalar = keys.is_scalar("attention.sliding_window_pattern")
        pattern = flags[0] if scalar else tuple(bool(flag) for flag in flags)
    return SlidingWindow(
        n_window=n_window,
        pattern=pattern,
        head_dim_k=keys.size("attention.key_length_swa", head_dim_k),
        head_dim_v=keys.size("attention.value_length_swa", head_dim_v),
        n_shared_kv_layers=keys.size("attention.shared_kv_layers", 0),
    )


def read_recurrent(keys: Metadata, tensors: Sequence[TensorInfo]) -> Recurrent | None:
    """What layers with a state of fixed size need, or None where there are none."""
    layers = recurrent_layers(tensors)
    if not layers:
        return None
    return Recurrent(
        layers=layers,
        conv_kernel=keys.size("ssm.conv_kernel", 0),
        inner_size=keys.size("ssm.inner_size", 0),
        state_size=keys.size("ssm.state_size", 0),
        time_step_rank=keys.size("ssm.time_step_rank", 0),
        group_count=keys.size("ssm.group_count", 0),
        shortconv_length=keys.size("shortconv.l_cache", 0),
    )
