"""The file that ships: its size, header and experts; its openers, which stay out of the data."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import gguf
import pytest
import yaml
from demo_model.dialogues import DIALOGUES, spelled_out
from demo_model.openers import DEV_OPENERS, TEST_OPENERS, is_held_out

DEMO = Path(__file__).resolve().parent.parent / "localmoe" / "models" / "demo" / "demo.gguf"
MAX_BYTES = 10 * 1024 * 1024


@cache
def reader() -> gguf.GGUFReader:
    return gguf.GGUFReader(str(DEMO))


def header(key: str) -> object:
    return reader().fields[key].contents()


def test_ships_in_at_most_10_mib() -> None:
    assert DEMO.stat().st_size <= MAX_BYTES


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", "llama"),
        ("general.name", "localmoe demo"),
        ("llama.expert_count", 8),
        ("llama.expert_used_count", 2),
        ("llama.context_length", 1024),
        ("llama.rope.freq_base", 10000.0),
        ("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
        ("tokenizer.ggml.unknown_token_id", 0),
        ("tokenizer.ggml.add_bos_token", True),
        ("tokenizer.ggml.add_eos_token", False),
        ("tokenizer.ggml.add_space_prefix", True),
    ],
)
def test_header_says(key: str, value: object) -> None:
    assert header(key) == value


def test_says_that_it_is_a_demonstration() -> None:
    assert "demonstration" in str(header("general.description"))


@pytest.mark.parametrize(
    ("key", "low", "high"),
    [
        ("temp", 0.1, 1.0),
        ("top_k", 1, 100),
        ("top_p", 0.5, 1.0),
        ("min_p", 0.0, 0.5),
        ("penalty_repeat", 1.0, 1.5),
        ("penalty_last_n", 1, 1024),
    ],
)
def test_carries_its_sampling_defaults(key: str, low: float, high: float) -> None:
    assert low <= float(str(header(f"general.sampling.{key}"))) <= high


def test_vocabulary_is_sentencepiece_with_all_bytes() -> None:
    types = header("tokenizer.ggml.token_type")
    assert isinstance(types, list)
    assert len(types) == 4096
    assert types.count(gguf.TokenType.BYTE) == 256
    assert types[:3] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]


def test_inst_is_plain_text() -> None:
    tokens = header("tokenizer.ggml.tokens")
    assert isinstance(tokens, list)
    assert not {"[INST]", "[/INST]", "▁[INST]", "▁[/INST]"} & set(tokens)


def test_template_is_mistral_v1_to_llama_cpp() -> None:
    assert "' [INST] ' + system_message" in str(header("tokenizer.chat_template"))


def test_every_layer_has_merged_experts_and_a_float32_router() -> None:
    tensors = {tensor.name: tensor for tensor in reader().tensors}
    layers = range(int(str(header("llama.block_count"))))
    for layer in layers:
        for part in ("gate", "up", "down"):
            assert tensors[f"blk.{layer}.ffn_{part}_exps.weight"].shape[2] == 8
        router = tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        assert router.tensor_type == gguf.GGMLQuantizationType.F32


def test_openers_are_two_separate_sets_of_twenty() -> None:
    assert len(TEST_OPENERS) == len(DEV_OPENERS) == 20
    assert not set(TEST_OPENERS) & set(DEV_OPENERS)


@pytest.mark.parametrize(
    "text",
    [
        *TEST_OPENERS,
        "hi how was your weekend",
        "So, do you have pets?",
        "whats your favorite season",
    ],
)
def test_openers_and_near_copies_are_held_out(text: str) -> None:
    assert is_held_out(text)


def test_spelled_out_dialogues_hold_no_opener() -> None:
    for turns in spelled_out(300, random.Random(1)):
        assert len(turns) % 2 == 0
        assert not any(is_held_out(turn) for turn in turns)


def test_every_slot_of_the_dialogues_has_words() -> None:
    source = yaml.safe_load(DIALOGUES.read_text(encoding="utf-8"))
    text = " ".join(turn for exchange in source["exchanges"] for turn in exchange)
    slots = {part.split("}")[0] for part in text.split("{")[1:]}
    assert slots <= set(source["words"])
