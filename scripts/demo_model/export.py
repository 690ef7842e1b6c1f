"""Writes the trained model as GGUF and quantizes it through llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import sentencepiece

from demo_model.model import NORM_EPSILON, ROPE_BASE, DemoModel, Shape

NAME = "localmoe demo"
DESCRIPTION = (
    "A small demonstration model that ships with localmoe. It chats about everyday things in short"
    " English sentences, knows nothing, and shows that an installation works."
)
LICENSE = "mit"
# What the model is sampled with unless a user says otherwise; chosen with the development openers.
SAMPLING = {
    "temp": 0.4,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "penalty_repeat": 1.1,
    "penalty_last_n": 64,
}

# Mistral's Instruct format, version 1, as Jinja: the system prompt goes before the first user
# message, each turn is a piece of its own, and roles must alternate.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported, with an initial optional system message') }}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501


def write_gguf(
    model: DemoModel, tokenizer: sentencepiece.SentencePieceProcessor, path: Path
) -> None:
    """The model in float16 (norms, routers: float32) with merged experts and the whole header."""
    writer = gguf.GGUFWriter(str(path), "llama")
    _add_header(writer, model)
    _add_shape(writer, model.shape)
    _add_vocabulary(writer, tokenizer)
    for name, array in _tensors(model):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_header(writer: gguf.GGUFWriter, model: DemoModel) -> None:
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license(LICENSE)
    parameters = sum(p.numel() for p in model.parameters())
    writer.add_size_label(f"{parameters / 1e6:.0f}M")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_float32("general.sampling.temp", SAMPLING["temp"])
    writer.add_int32("general.sampling.top_k", int(SAMPLING["top_k"]))
    writer.add_float32("general.sampling.top_p", SAMPLING["top_p"])
    writer.add_float32("general.sampling.min_p", SAMPLING["min_p"])
    writer.add_float32("general.sampling.penalty_repeat", SAMPLING["penalty_repeat"])
    writer.add_int32("general.sampling.penalty_last_n", int(SAMPLING["penalty_last_n"]))


def _add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_expert_used)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(shape.n_vocab)


def _add_vocabulary(
    writer: gguf.GGUFWriter, tokenizer: sentencepiece.SentencePieceProcessor
) -> None:
    pieces = range(tokenizer.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([tokenizer.id_to_piece(i).encode() for i in pieces])
    writer.add_token_scores([tokenizer.get_score(i) for i in pieces])
    writer.add_token_types([_token_type(tokenizer, i) for i in pieces])
    writer.add_bos_token_id(tokenizer.bos_id())
    writer.add_eos_token_id(tokenizer.eos_id())
    writer.add_unk_token_id(tokenizer.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def _token_type(tokenizer: sentencepiece.SentencePieceProcessor, token: int) -> gguf.TokenType:
    if tokenizer.is_unknown(token):
        return gguf.TokenType.UNKNOWN
    if tokenizer.is_control(token):
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if tokenizer.is_byte(token) else gguf.TokenType.NORMAL


def _tensors(model: DemoModel) -> list[tuple[str, np.ndarray]]:
    shape = model.shape
    tensors = [
        ("token_embd.weight", _half(model.embedding.weight)),
        ("output_norm.weight", _single(model.norm.weight)),
    ]
    for i, layer in enumerate(model.layers):
        experts, block = layer.experts, f"blk.{i}"
        stacked = (shape.n_expert, shape.n_ff, shape.n_embd)
        down = experts.down.weight.view(shape.n_embd, shape.n_expert, shape.n_ff).transpose(0, 1)
        tensors += [
            (f"{block}.attn_norm.weight", _single(layer.attention_norm.weight)),
            (f"{block}.attn_q.weight", _half(layer.attention.q.weight)),
            (f"{block}.attn_k.weight", _half(layer.attention.k.weight)),
            (f"{block}.attn_v.weight", _half(layer.attention.v.weight)),
            (f"{block}.attn_output.weight", _half(layer.attention.o.weight)),
            (f"{block}.ffn_norm.weight", _single(layer.experts_norm.weight)),
            (f"{block}.ffn_gate_inp.weight", _single(experts.router.weight)),
            (f"{block}.ffn_gate_exps.weight", _half(experts.gate.weight.view(stacked))),
            (f"{block}.ffn_up_exps.weight", _half(experts.up.weight.view(stacked))),
            (f"{block}.ffn_down_exps.weight", _half(down)),
        ]
    return tensors


def _half(tensor: object) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy().astype(np.float16))  # type: ignore[attr-defined]


def _single(tensor: object) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy().astype(np.float32))  # type: ignore[attr-defined]


def quantize(source: Path, target: Path, kinds: dict[str, str], base: str = "Q4_K_S") -> None:
    """`source` quantized by llama.cpp to `base`; `kinds` has other types by tensor pattern.

    Raises RuntimeError when the quantizer refuses.
    """
    from llama_cpp import llama_cpp as c

    overrides = (c.llama_model_tensor_override * (len(kinds) + 1))()
    for override, (pattern, kind) in zip(overrides, kinds.items(), strict=False):
        override.pattern = pattern.encode()
        override.type = gguf.GGMLQuantizationType[kind].value
    params = c.llama_model_quantize_default_params()
    params.ftype = gguf.LlamaFileType[f"MOSTLY_{base}"].value
    params.nthread = 0
    params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    if (
        c.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
        != 0
    ):
        raise RuntimeError(f"llama.cpp could not quantize {source}")
