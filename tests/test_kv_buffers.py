"""Weights and caches by formula are llama.cpp's own, to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from make_model import FAMILIES, SHAPES, make_model
from native_memory import native_memory, recorded
from synthetic.families import Family, with_layers
from synthetic.mixtral import MixtralShape

from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import KvType, Placement
from localmoe.gguf.model_meta import ModelMeta, read_meta
from localmoe.planner.buffers import cache_bytes_by_layer, cell_bytes
from localmoe.planner.model_bytes import model_bytes
from localmoe.planner.request import PlanRequest

DEMO = Path(__file__).parent.parent / "localmoe/models/demo/demo.gguf"
MIXTRALS = {name: SHAPES[name] for name in ("mixtral-8x7b", "mixtral-8x22b")}
PUBLISHED = {**MIXTRALS, **FAMILIES}
# eight layers have every kind of layer of each family
SHORT = {
    name: replace(shape, n_layers=8) if isinstance(shape, MixtralShape) else with_layers(shape, 8)
    for name, shape in PUBLISHED.items()
}
MIB = 1 << 20


def written(folder: Path, shape: MixtralShape | Family) -> Path:
    """A header of a model that was quantized to Q4_K_M."""
    path = folder / "model.gguf"
    make_model(path, shape, "Q4_K_M", header_only=True)
    return path


def total_weights(meta: ModelMeta) -> int:
    """What a machine without a GPU holds."""
    sizes = model_bytes(meta, 4096, PlanRequest())
    layers = sum(layer.dense_bytes + layer.expert_bytes for layer in sizes.layers)
    return layers + sizes.embedding_bytes + sizes.output_in_ram_bytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_known_to_the_byte(name: str, tmp_path: Path) -> None:
    """Full sizes, 2k, 8k and 32k, f16 and q8_0, one and four sequences, as llama.cpp told them."""
    meta = read_meta(written(tmp_path, PUBLISHED[name]))
    rows = recorded(name)
    assert {row.n_ctx for row in rows} >= {2048, 8192, 32768}
    for row in rows:
        assert total_weights(meta) == row.weights
        assert sum(cache_bytes_by_layer(meta, row.n_ctx, row.n_seq, row.kv_type)) == row.cache, row


@pytest.mark.parametrize("name", [*SHORT, "demo"])
def test_this_llama_says_the_same(name: str, tmp_path: Path) -> None:
    path = DEMO if name == "demo" else written(tmp_path, SHORT[name])
    meta = read_meta(path)
    # with quantized keys llama.cpp's graph of this shape has more nodes than it makes room for,
    # and it aborts (graph_max_nodes, src/llama-context.cpp)
    second: KvType = "f16" if name == "granitemoe" else "q8_0"
    for n_ctx, n_seq, kv_type in ((2048, 1, "f16"), (1000, 4, "f16"), (8192, 1, second)):
        place = placement(n_ctx, n_seq, kv_type)  # type: ignore[arg-type]
        memory = native_memory(str(path), place)["CPU"]
        assert memory.weights == total_weights(meta)
        by_layer = cache_bytes_by_layer(meta, n_ctx, n_seq, place.kv_type)
        assert memory.cache == sum(by_layer), (n_ctx, n_seq, kv_type)


def placement(n_ctx: int, n_seq: int, kv_type: KvType) -> Placement:
    attention = "auto" if kv_type == "f16" else "on"
    return Placement(
        n_threads=1, n_ctx=n_ctx, n_seq=n_seq, kv_type=kv_type, flash_attention=attention
    )  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["deepseek2", "gemma4", "granitehybrid"])
def test_a_probe_of_the_engine_agrees(name: str, tmp_path: Path, engine: EngineProcess) -> None:
    """The product reads llama.cpp's log, which rounds to 0.01 MiB for each cache."""
    path = written(tmp_path, SHORT[name])
    meta = read_meta(path)
    exact = native_memory(str(path), placement(2048, 2, "f16"))["CPU"]
    probed = engine.probe(str(path), placement(2048, 2, "f16"))
    cache = sum(cache_bytes_by_layer(meta, 2048, 2, "f16"))
    assert abs(probed.cache_bytes - cache) <= 0.02 * MIB
    assert abs(sum(probed.compute_bytes.values()) - exact.compute) <= 0.01 * MIB
    assert abs(sum(probed.output_bytes.values()) - 2 * 4 * meta.tokenizer.n_vocab) <= 0.01 * MIB


def test_layers_that_share_a_cache_have_none(tmp_path: Path) -> None:
    """Gemma 4's small models: the last layers look into earlier ones' keys."""
    family = with_layers(FAMILIES["gemma4"], 12)
    family = replace(family, kv={**family.kv, "attention.shared_kv_layers": 5})
    meta = read_meta(written(tmp_path, family))
    assert [cell_bytes(meta, layer, "f16") == 0 for layer in range(12)] == [False] * 7 + [True] * 5


def test_layers_for_drafting_are_not_counted(tmp_path: Path) -> None:
    """GLM's last layer predicts a further token: neither loaded nor cached here."""
    whole = written(tmp_path, with_layers(FAMILIES["qwen35moe"], 8))
    plain = read_meta(whole)
    family = with_layers(FAMILIES["qwen35moe"], 8)
    family = replace(family, kv={**family.kv, "nextn_predict_layers": 1})
    meta = read_meta(written(tmp_path, family))
    assert meta.n_layers == 7
    assert total_weights(meta) < total_weights(plain)
    assert (
        cache_bytes_by_layer(meta, 2048, 1, "f16")
        == cache_bytes_by_layer(plain, 2048, 1, "f16")[:7]
    )
