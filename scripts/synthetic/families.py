"""Other Mixture-of-Experts families: headers that llama.cpp loads, in the models' own sizes.

Each family is the published model of that shape; tensors are those that the architecture's
load_arch_tensors asks for (src/models/*.cpp). The vocabulary has the right number of tokens and
made-up texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .gguf_writer import TYPES, Blueprint, Tensor, Typed, Value
from .quants import FILE_TYPES, Quant

Row = tuple[str, tuple[int, ...], str]  # name behind "blk.N.", shape, fill

# what llama-quantize takes where rows don't divide into blocks of 256 (tensor_type_fallback)
NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q8_0", "Q6_K": "Q8_0"}


@dataclass(frozen=True, slots=True)
class Family:
    """`layer(family, i)` gives the rows of layer i; `kv` are keys without the architecture."""

    architecture: str
    n_layers: int
    n_embd: int
    n_vocab: int
    n_experts: int
    n_experts_used: int
    layer: Callable[[Family, int], Iterator[Row]]
    kv: dict[str, Value]
    tied: bool = False
    output_norm: str = "output_norm"
    extra: tuple[Row, ...] = ()


def with_layers(family: Family, n_layers: int) -> Family:
    """The family with fewer layers, and its lists by layer cut to them."""
    kv = {key: _shortened(value, family.n_layers, n_layers) for key, value in family.kv.items()}
    return replace(family, n_layers=n_layers, kv=kv)


def blueprint(family: Family, quant: str) -> Blueprint:
    """The file of this family."""
    rule = Quant(quant, family.n_layers, family.n_experts)
    rows: list[Row] = [("token_embd.weight", (family.n_embd, family.n_vocab), "embedding")]
    for i in range(family.n_layers):
        rows += [(f"blk.{i}.{name}", shape, fill) for name, shape, fill in family.layer(family, i)]
    rows += [(f"{family.output_norm}.weight", (family.n_embd,), "ones"), *family.extra]
    if not family.tied:
        rows.append(("output.weight", (family.n_embd, family.n_vocab), "reader"))
    tensors = tuple(Tensor(n, shape, _type(rule, n, shape), fill) for n, shape, fill in rows)
    return Blueprint(_metadata(family, quant), tensors)


def _shortened(value: Value, n_before: int, n_layers: int) -> Value:
    if isinstance(value, list) and len(value) == n_before:
        return value[:n_layers]
    if isinstance(value, Typed) and isinstance(value.value, list):
        return Typed(value.type, value.value[:n_layers])
    return value


def _type(rule: Quant, name: str, shape: tuple[int, ...]) -> str:
    """Norms, routers, biases and convolutions stay in full precision."""
    part, layer = name.split(".")[-2], 0
    if name.startswith("blk."):
        part, layer = name.split(".")[2], int(name.split(".")[1])
    plain = ("norm", "ffn_gate_inp", "conv1d", "shortconv.conv", "sinks", "ssm_a", "ssm_d", "scale")
    if len(shape) == 1 or name.endswith(".bias") or any(word in name for word in plain):
        return "F32"
    if rule.name == "MXFP4" and "_exps" not in part:  # MXFP4_MOE: the experts alone
        return "Q8_0"
    wanted = rule.type_of(part, layer)
    return NARROW.get(wanted, wanted) if shape[0] % TYPES[wanted][1] else wanted


def _metadata(family: Family, quant: str) -> dict[str, Value]:
    arch = family.architecture
    sizes: dict[str, Value] = {
        "block_count": family.n_layers,
        "embedding_length": family.n_embd,
        "vocab_size": family.n_vocab,
        "expert_count": family.n_experts,
        "expert_used_count": family.n_experts_used,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    return {
        "general.architecture": arch,
        "general.name": f"{arch}, random weights",
        "general.file_type": FILE_TYPES[quant],
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in {**sizes, **family.kv}.items()},
        **_vocabulary(family.n_vocab),
    }


def _vocabulary(n_vocab: int) -> dict[str, Value]:
    """Byte-level BPE: GPT-2's letters for the 256 bytes, then tokens that never come up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    fill = [f"token{i}" for i in range(n_vocab - 258)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*letters, *fill, "<|start|>", "<|end|>"],
        "tokenizer.ggml.token_type": [1] * (n_vocab - 2) + [3, 3],
        "tokenizer.ggml.merges": ["t o", "k e"],
        "tokenizer.ggml.bos_token_id": n_vocab - 2,
        "tokenizer.ggml.eos_token_id": n_vocab - 1,
    }


# ---- parts that families share -----------------------------------------------------------------


def _ones(*names: str, size: int) -> Iterator[Row]:
    for name in names:
        yield f"{name}.weight", (size,), "ones"


def _attention(d: int, n_heads: int, n_kv: int, head_dim: int, gated: int = 1) -> Iterator[Row]:
    yield "attn_q.weight", (d, n_heads * head_dim * gated), "reader"
    yield "attn_k.weight", (d, n_kv * head_dim), "reader"
    yield "attn_v.weight", (d, n_kv * head_dim), "reader"
    yield "attn_output.weight", (n_heads * head_dim, d), "writer"


def _experts(family: Family, n_ff: int, fused: bool = False) -> Iterator[Row]:
    d, n = family.n_embd, family.n_experts
    yield "ffn_gate_inp.weight", (d, n), "reader"
    if fused:
        yield "ffn_gate_up_exps.weight", (d, 2 * n_ff, n), "reader"
    else:
        yield "ffn_gate_exps.weight", (d, n_ff, n), "reader"
        yield "ffn_up_exps.weight", (d, n_ff, n), "reader"
    yield "ffn_down_exps.weight", (n_ff, d, n), "writer"


def _dense(d: int, n_ff: int, suffix: str = "") -> Iterator[Row]:
    yield f"ffn_gate{suffix}.weight", (d, n_ff), "reader"
    yield f"ffn_up{suffix}.weight", (d, n_ff), "reader"
    yield f"ffn_down{suffix}.weight", (n_ff, d), "writer"


# ---- the families ------------------------------------------------------------------------------


def _qwen3moe(family: Family, i: int) -> Iterator[Row]:
    yield from _ones("attn_norm", "ffn_norm", size=family.n_embd)
    yield from _attention(family.n_embd, 32, 4, 128)
    yield from _ones("attn_q_norm", "attn_k_norm", size=128)
    yield from _experts(family, 768)


def _gpt_oss(family: Family, i: int) -> Iterator[Row]:
    d, n = family.n_embd, family.n_experts
    yield from _ones("attn_norm", "post_attention_norm", size=d)
    yield from _attention(d, 64, 8, 64)
    for part, size in (("q", 4096), ("k", 512), ("v", 512), ("output", d)):
        yield f"attn_{part}.bias", (size,), "zeros"
    yield "attn_sinks.weight", (64,), "zeros"
    yield from _experts(family, 2880)
    yield "ffn_gate_inp.bias", (n,), "zeros"
    for part, size in (("gate", 2880), ("up", 2880), ("down", d)):
        yield f"ffn_{part}_exps.bias", (size, n), "zeros"


def _deepseek2(family: Family, i: int) -> Iterator[Row]:
    d, n_heads, q_rank, kv_rank, rope = family.n_embd, 20, 768, 512, 64
    yield from _ones("attn_norm", "ffn_norm", size=d)
    yield from _ones("attn_q_a_norm", size=q_rank)
    yield from _ones("attn_kv_a_norm", size=kv_rank)
    yield "attn_q_a.weight", (d, q_rank), "reader"
    yield "attn_q_b.weight", (q_rank, n_heads * 256), "reader"
    yield "attn_kv_a_mqa.weight", (d, kv_rank + rope), "reader"
    yield "attn_k_b.weight", (192, kv_rank, n_heads), "reader"
    yield "attn_v_b.weight", (kv_rank, 256, n_heads), "reader"
    yield "attn_output.weight", (n_heads * 256, d), "writer"
    if i == 0:
        yield from _dense(d, 10240)
    else:
        yield from _experts(family, 1536)
        yield "exp_probs_b.bias", (family.n_experts,), "zeros"
        yield from _dense(d, 1536, "_shexp")


def _gemma4(family: Family, i: int) -> Iterator[Row]:
    d, windowed = family.n_embd, bool((i + 1) % 6)
    head_dim, n_kv = (256, 8) if windowed else (512, 2)
    norms = ("attn", "ffn", "post_attention", "post_ffw")
    yield from _ones(*(f"{name}_norm" for name in norms), size=d)
    yield from _ones("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2", size=d)
    yield from _ones("attn_q_norm", "attn_k_norm", size=head_dim)
    # layers that see everything use their keys as values
    rows = _attention(d, 16, n_kv, head_dim)
    yield from (row for row in rows if windowed or row[0] != "attn_v.weight")
    yield "layer_output_scale.weight", (1,), "ones"
    yield from _dense(d, 2112)
    yield from _experts(family, 704, fused=True)
    yield "ffn_gate_inp.scale", (d,), "ones"


def _granitemoe(family: Family, i: int) -> Iterator[Row]:
    yield from _ones("attn_norm", "ffn_norm", size=family.n_embd)
    yield from _attention(family.n_embd, 16, 8, 64)
    yield from _experts(family, 512)


def _granitehybrid(family: Family, i: int) -> Iterator[Row]:
    d, inner, state, n_ssm = family.n_embd, 3072, 128, 48
    yield from _ones("attn_norm", "ffn_norm", size=d)
    if i % 10 == 5:
        yield from _attention(d, 12, 4, 128)
    else:
        yield "ssm_in.weight", (d, 2 * inner + 2 * state + n_ssm), "reader"
        yield "ssm_conv1d.weight", (4, inner + 2 * state), "reader"
        yield "ssm_conv1d.bias", (inner + 2 * state,), "zeros"
        yield "ssm_dt.bias", (n_ssm,), "zeros"
        yield "ssm_a", (1, n_ssm), "zeros"
        yield "ssm_d", (1, n_ssm), "zeros"
        yield "ssm_norm.weight", (inner, 1), "ones"
        yield "ssm_out.weight", (inner, d), "writer"
    yield from _experts(family, 512)
    yield from _dense(d, 1024, "_shexp")


def _olmoe(family: Family, i: int) -> Iterator[Row]:
    d = family.n_embd
    yield from _ones("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm", size=d)
    yield from _attention(d, 16, 16, 128)
    yield from _experts(family, 1024)


LFM2_ATTENTION = (2, 6, 10, 14, 18, 21)


def _lfm2moe(family: Family, i: int) -> Iterator[Row]:
    d = family.n_embd
    yield from _ones("attn_norm", "ffn_norm", size=d)
    if i in LFM2_ATTENTION:
        yield from _attention(d, 32, 8, 64)
        yield from _ones("attn_q_norm", "attn_k_norm", size=64)
    else:
        yield "shortconv.conv.weight", (3, d), "reader"
        yield "shortconv.in_proj.weight", (d, 3 * d), "reader"
        yield "shortconv.out_proj.weight", (d, d), "writer"
    if i < 2:
        yield from _dense(d, 7168)
    else:
        yield from _experts(family, 1792)
        yield "exp_probs_b.bias", (family.n_experts,), "zeros"


def _qwen35moe(family: Family, i: int) -> Iterator[Row]:
    d, n_k, n_v, state = family.n_embd, 16, 32, 128
    yield from _ones("attn_norm", "post_attention_norm", size=d)
    if (i + 1) % 4 == 0:
        yield from _attention(d, 16, 2, 256, gated=2)
        yield from _ones("attn_q_norm", "attn_k_norm", size=256)
    else:
        channels = (2 * n_k + n_v) * state
        yield "attn_qkv.weight", (d, channels), "reader"
        yield "attn_gate.weight", (d, n_v * state), "reader"
        yield "ssm_conv1d.weight", (4, channels), "reader"
        yield "ssm_dt.bias", (n_v,), "zeros"
        yield "ssm_a", (n_v,), "zeros"
        yield "ssm_beta.weight", (d, n_v), "reader"
        yield "ssm_alpha.weight", (d, n_v), "reader"
        yield from _ones("ssm_norm", size=state)
        yield "ssm_out.weight", (n_v * state, d), "writer"
    yield from _experts(family, 512)
    yield "ffn_gate_inp_shexp.weight", (d,), "reader"
    yield from _dense(d, 512, "_shexp")


def _heads(n_heads: int, n_kv: Value, key: int, value: int | None = None) -> dict[str, Value]:
    return {
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv,
        "attention.key_length": key,
        "attention.value_length": value or key,
    }


FAMILIES = {
    "qwen3moe": Family(
        "qwen3moe", 48, 2048, 151936, 128, 8, _qwen3moe,
        {**_heads(32, 4, 128), "context_length": 262144, "feed_forward_length": 6144,
         "expert_feed_forward_length": 768, "rope.freq_base": 1e7},
    ),
    "gpt-oss": Family(
        "gpt-oss", 24, 2880, 201088, 32, 4, _gpt_oss,
        {**_heads(64, 8, 64), "context_length": 131072, "feed_forward_length": 2880,
         "expert_feed_forward_length": 2880, "attention.sliding_window": 128,
         "rope.freq_base": 150000.0, "rope.dimension_count": 64,
         "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0,
         "rope.scaling.original_context_length": 4096},
    ),
    "deepseek2": Family(
        "deepseek2", 47, 2048, 154880, 64, 4, _deepseek2,
        {**_heads(20, 1, 576, 512), "context_length": 202752, "feed_forward_length": 10240,
         "expert_feed_forward_length": 1536, "expert_shared_count": 1,
         "leading_dense_block_count": 1, "attention.q_lora_rank": 768,
         "attention.kv_lora_rank": 512, "attention.key_length_mla": 256,
         "attention.value_length_mla": 256, "rope.dimension_count": 64, "rope.freq_base": 1e6,
         "expert_weights_scale": 1.8, "expert_weights_norm": True, "expert_gating_func": 2},
    ),
    "gemma4": Family(
        "gemma4", 30, 2816, 262144, 128, 8, _gemma4,
        {**_heads(16, [8 if (i + 1) % 6 else 2 for i in range(30)], 512),
         "context_length": 262144, "feed_forward_length": 2112,
         "expert_feed_forward_length": 704, "attention.sliding_window": 1024,
         "attention.sliding_window_pattern": Typed("bool", [(i + 1) % 6 != 0 for i in range(30)]),
         "attention.key_length_swa": 256, "attention.value_length_swa": 256,
         "attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0,
         "rope.dimension_count": 512, "rope.dimension_count_swa": 256, "rope.freq_base": 1e6,
         "rope.freq_base_swa": 1e4, "final_logit_softcapping": 30.0},
        tied=True, extra=(("rope_freqs.weight", (256,), "ones"),),
    ),
    "granitemoe": Family(
        "granitemoe", 24, 1024, 49155, 32, 8, _granitemoe,
        {**_heads(16, 8, 64), "context_length": 131072, "feed_forward_length": 512,
         "rope.dimension_count": 64, "rope.freq_base": 1.5e6, "logit_scale": 6.0,
         "residual_scale": 0.22, "embedding_scale": 12.0, "attention.scale": 0.015625},
        tied=True,
    ),
    "granitehybrid": Family(
        "granitehybrid", 40, 1536, 100352, 64, 6, _granitehybrid,
        {**_heads(12, [4 if i % 10 == 5 else 0 for i in range(40)], 128),
         "context_length": 131072, "feed_forward_length": 512,
         "expert_shared_feed_forward_length": 1024, "rope.dimension_count": 128,
         "rope.scaling.finetuned": False, "logit_scale": 6.0, "residual_scale": 0.22,
         "embedding_scale": 12.0, "attention.scale": 0.0078125, "ssm.conv_kernel": 4,
         "ssm.inner_size": 3072, "ssm.state_size": 128, "ssm.time_step_rank": 48,
         "ssm.group_count": 1},
        tied=True,
    ),
    "olmoe": Family(
        "olmoe", 16, 2048, 50304, 64, 8, _olmoe,
        {**_heads(16, 16, 128), "context_length": 4096, "feed_forward_length": 1024,
         "rope.freq_base": 1e4},
    ),
    "lfm2moe": Family(
        "lfm2moe", 24, 2048, 65536, 32, 4, _lfm2moe,
        {**_heads(32, [8 if i in LFM2_ATTENTION else 0 for i in range(24)], 64),
         "context_length": 128000, "feed_forward_length": 7168,
         "expert_feed_forward_length": 1792, "leading_dense_block_count": 2,
         "expert_gating_func": 2, "shortconv.l_cache": 3, "rope.freq_base": 1e6},
        tied=True, output_norm="token_embd_norm",
    ),
    "qwen35moe": Family(
        "qwen35moe", 40, 2048, 248320, 256, 8, _qwen35moe,
        {**_heads(16, 2, 256), "context_length": 262144, "expert_feed_forward_length": 512,
         "expert_shared_feed_forward_length": 512, "rope.dimension_count": 64,
         "rope.dimension_sections": [11, 11, 10, 0], "rope.freq_base": 1e7,
         "full_attention_interval": 4, "ssm.conv_kernel": 4, "ssm.inner_size": 4096,
         "ssm.state_size": 128, "ssm.time_step_rank": 32, "ssm.group_count": 16},
    ),
}  # fmt: skip
