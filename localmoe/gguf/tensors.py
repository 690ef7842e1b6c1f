"""The tensors of a model and what each is for, told by its name.

Names: LLM_TENSOR_NAMES (src/llama-arch.cpp). Weights and biases of one thing have one role.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .reader import Header

Role: TypeAlias = Literal[
    "attention", "router", "experts", "shared_experts", "dense_ffn", "embedding", "output", "norm",
    "recurrent", "other",
]  # fmt: skip

BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")
SPLIT_EXPERT = re.compile(r"^blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight$")
"""Layer, kind and number of an expert in the layout of before April 2024, a tensor for each."""
EXPERT_NAME = r"ffn_(up|down|gate|gate_up)_(ch|)exps"
"""Names of merged expert tensors, fused and "ch" variants included (src/llama-arch.cpp); as a
regular expression that llama.cpp takes in an override, too."""
# of a block's tensors, the first that matches the name behind "blk.N."
BLOCK_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("shared_experts", re.compile(r"ffn_\w+_shexp\b")),
    ("router", re.compile(r"ffn_gate_inp\b|exp_probs_b\b|ffn_gate_tid2eid\b")),
    ("experts", re.compile(rf"{EXPERT_NAME}\b|ffn_(?:gate|up|down|gate_up)\.\d+\.")),
    ("recurrent", re.compile(r"ssm_|shortconv\.|time_mix_|channel_mix_")),
    ("norm", re.compile(r"\w*norm\w*\.(?:weight|bias)$")),
    ("dense_ffn", re.compile(r"ffn_(?:gate|up|down)\b")),
    ("attention", re.compile(r"attn_")),
)
MODEL_ROLES: dict[str, Role] = {
    "token_embd": "embedding", "per_layer_token_embd": "embedding", "position_embd": "embedding",
    "token_types": "embedding", "output": "output", "output_norm": "norm",
    "token_embd_norm": "norm", "per_layer_proj_norm": "norm",
}  # fmt: skip


def is_merged_expert(name: str) -> bool:
    """Whether a tensor holds one matrix of all experts of a layer."""
    return re.search(EXPERT_NAME, name) is not None


def experts_of_layer(layer: int) -> str:
    """The regular expression for a layer's expert tensors."""
    return rf"^blk\.{layer}\.{EXPERT_NAME}"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor: `shape` has the row length first, `offset` counts from the start of its file."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_values: int
    n_bytes: int
    offset: int
    shard: int
    layer: int | None
    role: Role


def list_tensors(headers: Iterable[Header]) -> tuple[TensorInfo, ...]:
    """The tensors of all files of a model, in the files' order."""
    tensors = tuple(_of_files(headers))
    recurrent = {t.layer for t in tensors if t.role == "recurrent"}
    full = {t.layer for t in tensors if _part(t.name).startswith(("attn_q.", "attn_k."))}
    return tuple(_in_recurrent_layer(t) if t.layer in recurrent - full else t for t in tensors)


def _of_files(headers: Iterable[Header]) -> Iterator[TensorInfo]:
    for shard, header in enumerate(headers):
        for raw in header.tensors:
            block = BLOCK.match(raw.name)
            yield TensorInfo(
                raw.name, raw.type, raw.shape, raw.n_values, raw.n_bytes,
                header.data_offset + raw.offset, shard,
                int(block[1]) if block else None, _role(raw.name),
            )  # fmt: skip


def _role(name: str) -> Role:
    block = BLOCK.match(name)
    if not block:
        return MODEL_ROLES.get(name.split(".")[0], "other")
    return next((role for role, pattern in BLOCK_ROLES if pattern.match(block[2])), "other")


def _in_recurrent_layer(tensor: TensorInfo) -> TensorInfo:
    """Linear attention keeps its projections under attention's names (attn_qkv, attn_gate)."""
    if tensor.role != "attention":
        return tensor
    return TensorInfo(
        tensor.name, tensor.type, tensor.shape, tensor.n_values, tensor.n_bytes, tensor.offset,
        tensor.shard, tensor.layer, "recurrent",
    )  # fmt: skip


def _part(name: str) -> str:
    block = BLOCK.match(name)
    return block[2] if block else name


def attention_layers(tensors: Iterable[TensorInfo]) -> frozenset[int]:
    """Layers with keys of their own, so with a KV cache (hybrids have few of them)."""
    return frozenset(
        t.layer for t in tensors
        if t.layer is not None and t.role == "attention"
        and _part(t.name).startswith(("attn_k.", "attn_qkv.", "attn_kv_a_mqa.", "attn_kv."))
    )  # fmt: skip


def recurrent_layers(tensors: Iterable[TensorInfo]) -> tuple[int, ...]:
    """Layers that keep a state of fixed size instead of keys and values."""
    return tuple(
        sorted({t.layer for t in tensors if t.role == "recurrent" and t.layer is not None})
    )


def has_split_experts(tensors: Iterable[TensorInfo]) -> bool:
    """Whether this is the early layout, which llama.cpp refuses since October 2024."""
    names = [t.name for t in tensors]
    return any(map(SPLIT_EXPERT.match, names)) and not any(map(is_merged_expert, names))
