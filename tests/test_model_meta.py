"""What a model is, from its headers: counts, roles, exact bytes, refusals."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from make_model import FAMILIES, SHAPES, make_model
from synthetic import gguf_writer, mixtral
from synthetic.gguf_writer import Blueprint, Tensor, Typed, Value

from localmoe.errors import ModelFileError
from localmoe.gguf.architectures import ARCHITECTURES
from localmoe.gguf.file_kinds import NO_GENERATION
from localmoe.gguf.model_meta import ModelMeta, TypeTotal, meta_of, read_meta
from localmoe.gguf.reader import read_header

TINY = replace(SHAPES["tiny"], n_vocab=260)


def meta_with(kv: dict[str, Value | None], tensors: tuple[Tensor, ...] | None = None) -> ModelMeta:
    """The tiny model with other metadata (None removes a key), and other tensors."""
    plan = mixtral.blueprint(TINY, "Q4_K")
    merged = {k: v for k, v in {**plan.kv, **kv}.items() if v is not None}
    blueprint = Blueprint(merged, plan.tensors if tensors is None else tensors)
    n_bytes = sum(gguf_writer.padded(t.n_bytes) for t in blueprint.tensors)
    head = gguf_writer.header(blueprint)
    return meta_of([read_header(io.BytesIO(head), len(head) + n_bytes, "x.gguf")])


@pytest.fixture(scope="module")
def mixtral_8x7b(tmp_path_factory: pytest.TempPathFactory) -> ModelMeta:
    path = tmp_path_factory.mktemp("models") / "mixtral-8x7b.Q4_K_M.gguf"
    make_model(path, SHAPES["mixtral-8x7b"], "Q4_K_M", header_only=True)
    return read_meta(path)


def test_mixtral_is_what_its_card_says(mixtral_8x7b: ModelMeta) -> None:
    meta = mixtral_8x7b
    assert meta.is_moe
    assert (meta.architecture, meta.n_layers, meta.n_embd) == ("llama", 32, 4096)
    assert (meta.n_experts, meta.n_experts_used, meta.n_shared_experts) == (8, 2, 0)
    assert (meta.n_ff, meta.n_ff_expert) == (14336, 14336)  # the header has only the first
    assert (meta.n_heads, meta.n_kv_heads) == ((32,) * 32, (8,) * 32)
    assert (meta.head_dim_k, meta.head_dim_v, meta.context_length) == (128, 128, 32768)
    assert (meta.n_params, meta.n_active_params) == (46_702_792_704, 12_879_925_248)
    assert (meta.mla, meta.sliding_window, meta.recurrent) == (None, None, None)


def test_mixtral_takes_the_bytes_of_the_published_file(mixtral_8x7b: ModelMeta) -> None:
    meta = mixtral_8x7b
    assert meta.file_bytes == pytest.approx(28_448_468_384, abs=10_000)  # but for its metadata
    assert meta.quant_label == "Q4_K_M"
    assert meta.quant_mix["Q4_K"].n_tensors == 113
    assert meta.quant_mix["F32"].n_tensors == 97
    assert next(iter(meta.quant_mix)) == "Q4_K"
    assert sum(total.n_bytes for total in meta.quant_mix.values()) == meta.weights_bytes
    assert sum(meta.bytes_by_role.values()) == meta.weights_bytes
    assert meta.bytes_by_role["router"] == 32 * 4096 * 8 * 4
    in_layers = sum(sum(layer.values()) for layer in meta.layer_bytes)
    outside = sum(t.n_bytes for t in meta.tensors if t.layer is None)
    assert in_layers + outside == meta.weights_bytes
    # layer 0 has its ffn_down in Q6_K, layer 6 in Q4_K
    assert meta.layer_bytes[0]["experts"] > meta.layer_bytes[4]["experts"] == 3 * 264_241_152


def test_mixtrals_tokenizer(mixtral_8x7b: ModelMeta) -> None:
    tokenizer = mixtral_8x7b.tokenizer
    assert (tokenizer.model, tokenizer.n_vocab) == ("llama", 32000)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert (tokenizer.eot_id, tokenizer.pad_id, tokenizer.add_space_prefix) == (None, None, None)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, False)
    assert tokenizer.control_tokens == ("<s>", "</s>")
    assert "[INST]" in mixtral_8x7b.chat_template


def test_control_tokens_of_8x22b(tmp_path: Path) -> None:
    (path,) = make_model(tmp_path / "m.gguf", SHAPES["mixtral-8x22b"], "Q4_K_M", header_only=True)
    meta = read_meta(path)
    assert {"[INST]", "[/INST]", "<s>"} <= set(meta.tokenizer.control_tokens)
    assert meta.n_params == pytest.approx(141e9, rel=0.01)
    assert meta.n_active_params == pytest.approx(39e9, rel=0.01)


def test_shards_are_one_model_whichever_is_named(tmp_path: Path) -> None:
    (single,) = make_model(tmp_path / "m.gguf", TINY)
    shards = make_model(tmp_path / "s.gguf", TINY, shards=3)
    assert [p.name for p in shards] == [f"s-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole, joined = read_meta(single), read_meta(shards[1])
    assert joined == read_meta(shards[0])
    assert joined.paths == tuple(shards)
    assert joined.file_bytes == sum(p.stat().st_size for p in shards)
    assert [t.name for t in joined.tensors] == [t.name for t in whole.tensors]
    assert [t.n_bytes for t in joined.tensors] == [t.n_bytes for t in whole.tensors]
    assert {t.shard for t in joined.tensors} == {0, 1, 2}
    for tensor, same in zip(whole.tensors, joined.tensors, strict=True):
        assert read_bytes(single, tensor.offset, tensor.n_bytes) == read_bytes(
            shards[same.shard], same.offset, same.n_bytes
        )


def read_bytes(path: Path, offset: int, n_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(n_bytes)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = make_model(tmp_path / "s.gguf", TINY, shards=3)
    shards[2].unlink()
    with pytest.raises(ModelFileError, match=r"shard 3 of 3 is missing.*s-00003-of-00003\.gguf"):
        read_meta(shards[0])


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    shards = make_model(tmp_path / "s.gguf", TINY, shards=3)
    shards[1].write_bytes(shards[2].read_bytes())
    with pytest.raises(ModelFileError, match="00002.*not shard 2 of 3 by its header"):
        read_meta(shards[0])
    renamed = shards[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelFileError, match=r"one of 3 shards, whose name should end in"):
        read_meta(renamed)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"gone\.gguf: no such file"):
        read_meta(tmp_path / "gone.gguf")
    with pytest.raises(ModelFileError, match="directory"):
        read_meta(tmp_path)


def test_the_early_layout_is_recognised(tmp_path: Path) -> None:
    (path,) = make_model(tmp_path / "m.gguf", TINY, split_experts=True)
    (merged,) = make_model(tmp_path / "n.gguf", TINY)
    meta, other = read_meta(path), read_meta(merged)
    assert meta.legacy_split_experts
    assert not other.legacy_split_experts
    assert meta.bytes_by_role["experts"] == other.bytes_by_role["experts"]
    assert (meta.n_params, meta.n_active_params) == (other.n_params, other.n_active_params)
    assert other.refusal is None
    assert meta.refusal is not None
    assert "early layout" in meta.refusal.message
    assert "localmoe convert" in meta.refusal.hint
    assert len(str(meta.refusal)) <= 200


ROLES = {
    "token_embd.weight": "embedding", "output.weight": "output", "output_norm.weight": "norm",
    "rope_freqs.weight": "other", "blk.0.attn_norm.weight": "norm",
    "blk.0.attn_q.weight": "attention", "blk.0.attn_q.bias": "attention",
    "blk.0.attn_q_norm.weight": "norm", "blk.0.attn_kv_a_mqa.weight": "attention",
    "blk.0.attn_kv_a_norm.weight": "norm", "blk.0.attn_sinks.weight": "attention",
    "blk.0.ffn_gate_inp.weight": "router", "blk.0.ffn_gate_inp.bias": "router",
    "blk.0.exp_probs_b.bias": "router", "blk.0.ffn_gate_inp_shexp.weight": "shared_experts",
    "blk.0.ffn_up_shexp.weight": "shared_experts", "blk.0.ffn_gate_exps.weight": "experts",
    "blk.0.ffn_gate_up_exps.weight": "experts", "blk.0.ffn_down_exps.bias": "experts",
    "blk.0.ffn_up_chexps.weight": "experts", "blk.0.ffn_down.7.weight": "experts",
    "blk.0.ffn_down.weight": "dense_ffn", "blk.0.ffn_gate.bias": "dense_ffn",
    "blk.0.post_ffw_norm_2.weight": "norm", "blk.0.ssm_in.weight": "recurrent",
    "blk.0.ssm_norm.weight": "recurrent", "blk.0.shortconv.conv.weight": "recurrent",
    "blk.0.nextn.eh_proj.weight": "other",
}  # fmt: skip


def test_roles_by_name() -> None:
    tensors = tuple(Tensor(name, (32,), "F32") for name in ROLES)
    assert {t.name: t.role for t in meta_with({}, tensors).tensors} == ROLES


def test_layers_without_attention_have_no_kv_heads() -> None:
    tensors = (
        Tensor("blk.0.attn_qkv.weight", (32,), "F32"), Tensor("blk.0.ssm_a", (32,), "F32"),
        Tensor("blk.1.attn_q.weight", (32,), "F32"), Tensor("blk.1.attn_k.weight", (32,), "F32"),
    )  # fmt: skip
    meta = meta_with({"llama.ssm.state_size": 128, "llama.ssm.conv_kernel": 4}, tensors)
    assert meta.n_kv_heads == (0, 2)
    assert meta.recurrent is not None
    assert (meta.recurrent.layers, meta.recurrent.state_size) == ((0,), 128)
    assert [t.role for t in meta.tensors] == ["recurrent", "recurrent", "attention", "attention"]


def test_heads_by_layer_and_windows() -> None:
    meta = meta_with({
        "llama.attention.head_count": [4, 8], "llama.attention.head_count_kv": [2, 1],
        "llama.attention.key_length": 48, "llama.attention.value_length": 40,
        "llama.attention.sliding_window": 128, "llama.attention.key_length_swa": 64,
        "llama.attention.sliding_window_pattern": Typed("bool", [1, 0]),
        "llama.expert_shared_count": 1, "llama.expert_feed_forward_length": 96,
    })  # fmt: skip
    assert (meta.n_heads, meta.n_kv_heads) == ((4, 8), (2, 1))
    assert (meta.head_dim_k, meta.head_dim_v) == (48, 40)
    assert (meta.n_shared_experts, meta.n_ff, meta.n_ff_expert) == (1, 512, 96)
    window = meta.sliding_window
    assert window is not None
    assert (window.n_window, window.pattern) == (128, (True, False))
    assert (window.head_dim_k, window.head_dim_v) == (64, 40)


def test_latent_attention() -> None:
    meta = meta_with({
        "llama.attention.kv_lora_rank": 512, "llama.attention.q_lora_rank": 768,
        "llama.attention.key_length_mla": 256, "llama.attention.value_length_mla": 256,
    })  # fmt: skip
    assert meta.mla is not None
    assert (meta.mla.kv_lora_rank, meta.mla.q_lora_rank, meta.mla.rope_dims) == (512, 768, 64)
    assert (meta.mla.head_dim_k, meta.mla.head_dim_v) == (256, 256)


# billions of parameters as the families' cards give them: all and active
CARDS = {
    "qwen3moe": (30.5, 3.3), "gpt-oss": (20.9, 3.6), "deepseek2": (29.9, 3.6),
    "gemma4": (25.2, 3.8), "granitemoe": (1.33, 0.43), "granitehybrid": (6.9, 1.47),
    "olmoe": (6.9, 1.3), "lfm2moe": (8.3, 1.5), "qwen35moe": (34.7, 3.2),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_the_parameters_of_their_cards(tmp_path: Path, family: str) -> None:
    (path,) = make_model(tmp_path / "m.gguf", FAMILIES[family], "Q8_0", header_only=True)
    meta = read_meta(path)
    total, active = CARDS[family]
    assert meta.architecture == family
    assert meta.n_params / 1e9 == pytest.approx(total, rel=0.01)
    # cards differ in whether they count embeddings
    assert meta.n_active_params / 1e9 == pytest.approx(active, rel=0.2)
    assert not any(t.role == "other" and t.n_bytes > 4096 for t in meta.tensors)


def test_hybrids_have_a_cache_in_few_layers(tmp_path: Path) -> None:
    with_cache = {
        "granitehybrid": [5, 15, 25, 35], "lfm2moe": [2, 6, 10, 14, 18, 21],
        "qwen35moe": list(range(3, 40, 4)),
    }  # fmt: skip
    for family, layers in with_cache.items():
        (path,) = make_model(tmp_path / "m.gguf", FAMILIES[family], "Q4_K_M", header_only=True)
        meta = read_meta(path)
        assert [i for i, n in enumerate(meta.n_kv_heads) if n] == layers
        assert meta.recurrent is not None
        assert set(meta.recurrent.layers) == set(range(meta.n_layers)) - set(layers)


def test_drafting_layers_are_counted_apart() -> None:
    meta = meta_with({"llama.nextn_predict_layers": 1})
    assert (meta.n_layers, meta.n_nextn_layers) == (1, 1)
    assert (len(meta.n_heads), len(meta.layer_bytes)) == (1, 2)


def test_sampling_defaults() -> None:
    meta = meta_with({"general.sampling.temp": 0.5, "general.sampling.top_k": Typed("i32", 20)})
    assert meta.sampling == {"temp": 0.5, "top_k": 20}
    assert meta_with({}).sampling == {}


def test_the_label_follows_the_tensors_where_the_header_is_wrong() -> None:
    assert meta_with({}).quant_label == "Q4_K_S"
    assert meta_with({"general.file_type": 7}).quant_label == "Q4_K"
    assert meta_with({"general.file_type": None}).quant_label == "Q4_K"
    assert meta_with({}, (Tensor("a", (32, 2), "Q8_0"),)).quant_mix == {"Q8_0": TypeTotal(1, 68)}


REFUSED: dict[str, tuple[dict[str, Value | None], str]] = {
    "no architecture": ({"general.architecture": None}, "no general.architecture"),
    "projector": ({"general.architecture": "clip"}, "a projector for images"),
    "adapter": ({"general.type": "adapter"}, "an adapter (LoRA)"),
    "no layers": ({"llama.block_count": 0}, "0 layers"),
    "many layers": ({"llama.block_count": 2**31}, "2,147,483,648 layers"),
    "layers missing": ({"llama.block_count": None}, "no llama.block_count"),
    "layers as text": ({"llama.block_count": "two"}, "llama.block_count is not a size"),
    "experts without used": ({"llama.expert_used_count": None}, "0 of 8 experts are used"),
    "used without experts": ({"llama.expert_count": None}, "2 of 0 experts are used"),
    "more used": ({"llama.expert_used_count": 9}, "9 of 8 experts are used"),
    "many experts": ({"llama.expert_count": 2000}, "2,000 experts"),
    "odd groups": ({"llama.expert_group_count": 3}, "8 experts in 3 groups"),
    "many heads": ({"llama.attention.head_count": [1, 2, 3]}, "has 3 items for 2 layers"),
    "epsilon nan": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
    "epsilon inf": ({"llama.attention.layer_norm_rms_epsilon": float("inf")}, "epsilon is inf"),
    "epsilon < 0": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0"),
    "rope nan": ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base is nan"),
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
    "vocabulary of numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "no vocabulary"),
    "empty vocabulary": ({"tokenizer.ggml.tokens": Typed("i32", [])}, "no vocabulary"),
    "duplicate tokens": ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "1 of its 3 tokens come tw"),
    "no byte tokens": ({"tokenizer.ggml.tokens": ["a", "b"]}, "254 byte tokens missing"),
    "few scores": ({"tokenizer.ggml.scores": [0.5]}, "scores doesn't fit 260 tokens"),
    "wrong types": ({"tokenizer.ggml.token_type": ["1"]}, "token_type doesn't fit 260 tokens"),
}  # fmt: skip


# general.type, general.architecture, the name of a tensor -> what the file is
OTHER_KINDS = {
    "imatrix": ("imatrix", "llama", "blk.0.attn_q.weight.in_sum2", "an importance matrix"),
    "imatrix by tensor": (None, "llama", "blk.0.attn_q.weight.in_sum2", "an importance matrix"),
    "adapter": ("adapter", "llama", "blk.0.attn_q.weight.lora_a", "an adapter (LoRA)"),
    "adapter by tensor": (None, "llama", "blk.0.attn_q.weight.lora_a", "an adapter (LoRA)"),
    "projector": ("mmproj", "clip", "v.blk.0.attn_q.weight", "a projector"),
    "projector by tensor": (None, "llama", "v.blk.0.attn_q.weight", "a projector"),
    "diffusion": (None, "flux", "double_blocks.0.img_attn.qkv.weight", "a diffusion model for"),
    "diffusion by tensor": (None, "x", "model.diffusion_model.out.weight", "a diffusion model for"),
    "control vector": (None, "controlvector", "direction.1", "a control vector"),
    "speech": (None, "whisper", "encoder.conv1.weight", "a model for speech"),
}


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_files_beside_models_are_said_what_they_are(case: str) -> None:
    general_type, architecture, tensor, sentence = OTHER_KINDS[case]
    kv = {"general.type": general_type, "general.architecture": architecture}
    blueprint = Blueprint({k: v for k, v in kv.items() if v}, (Tensor(tensor, (32,), "F32"),))
    head = gguf_writer.header(blueprint)
    header = read_header(io.BytesIO(head), len(head) + 128, "x.gguf")
    with pytest.raises(ModelFileError) as caught:
        meta_of([header])
    assert caught.value.message.startswith(f"x.gguf: {sentence}")


def test_a_vocabulary_alone_is_said_to_be_one() -> None:
    with pytest.raises(ModelFileError, match="a vocabulary alone, without weights"):
        meta_with({}, ())


@pytest.mark.parametrize(
    ("kv", "sentence"),
    [
        ({"llama.attention.causal": False}, "without causal attention"),
        ({"llama.pooling_type": 3}, "an embedding model"),
        ({"llama.pooling_type": 4}, "a reranking model"),
    ],
)
def test_models_that_write_no_text_are_refused(kv: dict[str, Value | None], sentence: str) -> None:
    refusal = meta_with(kv).refusal
    assert refusal is not None
    assert sentence in refusal.message


def test_models_that_write_text_are_not_refused() -> None:
    assert meta_with({"llama.attention.causal": True, "llama.pooling_type": 0}).refusal is None


@pytest.mark.parametrize("architecture", sorted(NO_GENERATION))
def test_encoders_are_refused_by_their_architecture(architecture: str) -> None:
    plan = mixtral.blueprint(TINY, "Q4_K")
    kv = {k.replace("llama.", f"{architecture}."): v for k, v in plan.kv.items()}
    blueprint = Blueprint({**kv, "general.architecture": architecture}, plan.tensors)
    head = gguf_writer.header(blueprint)
    n_bytes = sum(gguf_writer.padded(t.n_bytes) for t in blueprint.tensors)
    meta = meta_of([read_header(io.BytesIO(head), len(head) + n_bytes, "x.gguf")])
    assert architecture in ARCHITECTURES
    assert NO_GENERATION[architecture] in str(meta.refusal)
    assert len(str(meta.refusal)) <= 200


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_would_abort_llama_cpp(case: str) -> None:
    kv, sentence = REFUSED[case]
    with pytest.raises(ModelFileError) as caught:
        meta_with(kv)
    assert sentence in caught.value.message
    assert caught.value.message.startswith("x.gguf: ")
    assert len(str(caught.value)) <= 200


def test_empty_token_texts_are_llama_cpps_own_business() -> None:
    tokens = ["", "a", ""]
    kv: dict[str, Value | None] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.bos_token_id": 7,
    }  # fmt: skip
    meta = meta_with(kv)
    assert meta.tokenizer.n_vocab == 3
    assert meta.tokenizer.bos_id is None  # outside the vocabulary
