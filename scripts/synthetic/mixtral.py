"""Mixtral's shape: metadata and tensors as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .gguf_writer import Blueprint, Tensor, Value
from .quants import FILE_TYPES, Quant
from .vocabulary import vocabulary


@dataclass(frozen=True, slots=True)
class MixtralShape:
    """Sizes are numbers of values; `n_ff` is the width of one expert."""

    name: str
    n_layers: int = 2
    n_embd: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    n_ff: int = 512
    n_experts: int = 8
    n_experts_used: int = 2
    n_vocab: int = 512
    context_length: int = 32768
    tokenizer: str = "v1"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_heads


SHAPES = {
    "tiny": MixtralShape("tiny"),
    "mixtral-1gb": MixtralShape(
        "mixtral-1gb", 19, 1024, n_heads=8, n_kv_heads=2, n_ff=3584, n_vocab=32000
    ),
    "mixtral-8x7b": MixtralShape(
        "mixtral-8x7b", 32, 4096, n_heads=32, n_kv_heads=8, n_ff=14336, n_vocab=32000
    ),
    "mixtral-8x22b": MixtralShape(
        "mixtral-8x22b", 56, 6144, n_heads=48, n_kv_heads=8, n_ff=16384, n_vocab=32768,
        context_length=65536, tokenizer="v3",
    ),
}  # fmt: skip

# What the templates of the original repositories say: V1 folds the system message into the first
# user turn and keeps blanks around the text, V3 has control tokens and no blanks before answers.
TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}"
    "{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "{% if turn.role == 'user' %}{% if loop.first and system is defined %}"
    "{{ '<open>' + system + '\\n\\n' + turn.content + '<close>' }}{% else %}"
    "{{ '<open>' + turn.content + '<close>' }}{% endif %}"
    "{% elif turn.role == 'assistant' %}{{ ' ' + turn.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are known') }}{% endif %}"
    "{% endfor %}"
)
BRACKETS = {"v1": (" [INST] ", " [/INST]"), "v3": ("[INST] ", "[/INST]")}


def blueprint(shape: MixtralShape, quant: str, split_experts: bool = False) -> Blueprint:
    """The file of this shape; `split_experts` gives the layout of before April 2024."""
    rule = Quant(quant, shape.n_layers, shape.n_experts)
    tensors = [Tensor("token_embd.weight", (shape.n_embd, shape.n_vocab),
                      rule.type_of("token_embd"), "embedding")]  # fmt: skip
    for layer in range(shape.n_layers):
        tensors += _layer(shape, rule, layer, split_experts)
    tensors += [
        Tensor("output_norm.weight", (shape.n_embd,), "F32", "ones"),
        Tensor("output.weight", (shape.n_embd, shape.n_vocab), rule.type_of("output")),
    ]
    return Blueprint(_metadata(shape, quant), tuple(tensors))


def _layer(shape: MixtralShape, rule: Quant, layer: int, split: bool) -> Iterator[Tensor]:
    d, d_kv = shape.n_embd, shape.n_kv_heads * shape.head_dim
    block = f"blk.{layer}."
    yield Tensor(block + "attn_norm.weight", (d,), "F32", "ones")
    for part, shape_of, fill in (
        ("attn_q", (d, d), "reader"),
        ("attn_k", (d, d_kv), "reader"),
        ("attn_v", (d, d_kv), "reader"),
        ("attn_output", (d, d), "writer"),
    ):
        yield Tensor(f"{block}{part}.weight", shape_of, rule.type_of(part, layer), fill)
    yield Tensor(block + "ffn_norm.weight", (d,), "F32", "ones")
    # the early layout has its routers in half precision
    router_type = "F16" if split else "F32"
    yield Tensor(block + "ffn_gate_inp.weight", (d, shape.n_experts), router_type)
    for part, rows, fill in (
        ("ffn_gate", (d, shape.n_ff), "reader"),
        ("ffn_down", (shape.n_ff, d), "writer"),
        ("ffn_up", (d, shape.n_ff), "reader"),
    ):
        merged = Tensor(f"{block}{part}_exps.weight", (*rows, shape.n_experts),
                        rule.type_of(part, layer), fill)  # fmt: skip
        yield from _split_experts(merged) if split else (merged,)


def _split_experts(merged: Tensor) -> Iterator[Tensor]:
    """blk.N.ffn_gate.E.weight: the same bytes as the merged tensor's, expert by expert."""
    for expert in range(merged.shape[2]):
        name = merged.name.replace("_exps.", f".{expert}.")
        skip = expert * merged.n_bytes // merged.shape[2]
        yield Tensor(name, merged.shape[:2], merged.type, merged.fill, merged.name, skip)


def _metadata(shape: MixtralShape, quant: str) -> dict[str, Value]:
    return {
        "general.architecture": "llama",
        "general.name": shape.name,
        "general.description": "Random weights in Mixtral's shape; it answers nonsense.",
        "llama.block_count": shape.n_layers,
        "llama.context_length": shape.context_length,
        "llama.embedding_length": shape.n_embd,
        "llama.feed_forward_length": shape.n_ff,
        "llama.attention.head_count": shape.n_heads,
        "llama.attention.head_count_kv": shape.n_kv_heads,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.rope.freq_base": 1e6,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.expert_count": shape.n_experts,
        "llama.expert_used_count": shape.n_experts_used,
        "llama.vocab_size": shape.n_vocab,
        "general.file_type": FILE_TYPES[quant],
        "general.quantization_version": 2,
        **_tokenizer(shape),
    }


def _tokenizer(shape: MixtralShape) -> dict[str, Value]:
    vocab = vocabulary(shape.tokenizer, shape.n_vocab)
    opening, closing = BRACKETS[shape.tokenizer]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": vocab.tokens,
        "tokenizer.ggml.scores": vocab.scores,
        "tokenizer.ggml.token_type": vocab.types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": TEMPLATE.replace("<open>", opening).replace("<close>", closing),
    }
