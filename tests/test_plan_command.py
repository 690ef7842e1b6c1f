"""`localmoe plan` as a person and a script meet it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from make_model import SHAPES, make_model
from test_cli import localmoe, one_line_error


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Mixtral 8x7B as a header alone: 28 GB long and nearly empty."""
    path = tmp_path_factory.mktemp("plans") / "mixtral-8x7b.gguf"
    make_model(path, SHAPES["mixtral-8x7b"], "Q4_K_M", header_only=True)
    return str(path)


def test_json_has_what_is_promised(mixtral: str) -> None:
    result = localmoe("plan", mixtral, "--vram", "8GiB", "--ram", "32GiB", "--json")
    plan = json.loads(result.stdout)
    assert set(plan) >= {"fits", "placement", "memory", "forecast", "reasons", "alternatives"}
    assert set(plan["placement"]) >= {
        "n_gpu_layers", "cpu_expert_layers", "cpu_expert_tensors", "tensor_split", "n_ctx",
        "n_ctx_total", "n_seq", "kv_type", "n_ubatch", "n_threads", "load_mode", "repack",
    }  # fmt: skip
    card, ram = plan["memory"]
    for memory in (card, ram):
        parts = [f"{part}_bytes" for part in ("weights", "kv", "compute", "overhead", "repacked")]
        assert sum(memory[part] for part in parts) == memory["total_bytes"]
        assert memory["total_bytes"] <= memory["budget_bytes"]
    assert {"mapped_bytes", "pinned_bytes", "resident_bytes"} <= set(ram)
    assert card["budget_bytes"] == 8 << 30
    assert plan["placement"]["n_gpu_layers"] == 33


def test_a_person_sees_bars_layers_and_reasons_in_80_columns(mixtral: str) -> None:
    result = localmoe("plan", mixtral, "--vram", "12GiB,8GiB", "--ram", "32GiB", "--explain")
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("*"))
    assert [line.split()[0] for line in lines if " of " in line and "GiB" in line.split(" of ")[1]][
        :3
    ] == ["GPU0", "GPU1", "RAM"]
    assert any(set(line) <= set("#=+~.") and len(line) == 76 for line in lines if line)
    (layers,) = (line.split()[2] for line in lines if line.startswith("layer"))
    assert len(layers) == 32
    assert set(layers) <= set("Gper")
    assert "Not taken:" in lines
    assert "\x1b" not in result.stdout


def test_flags_for_llama_server_name_every_expert_in_ram(mixtral: str) -> None:
    options = ("--vram", "8GiB", "--ram", "32GiB", "-c", "8192", "-ctk", "q8_0")
    flags = localmoe("plan", mixtral, *options, "--print-flags").stdout
    plan = json.loads(localmoe("plan", mixtral, *options, "--json").stdout)["placement"]
    assert flags.startswith("llama-server -m ")
    assert "-ngl 33 -c 8192" in flags
    assert "-ctk q8_0 -ctv q8_0" in flags
    assert "--no-kv-unified" in flags
    assert flags.count("_(ch|)exps=CPU") == len(plan["cpu_expert_layers"])


def test_what_does_not_fit_is_refused_with_what_would(mixtral: str) -> None:
    result = localmoe("plan", mixtral, "--vram", "8GiB", "--ram", "16GiB")
    line = one_line_error(result, 3)
    assert "16.0 GiB" in line


def test_a_budget_within_the_machine_is_this_machine(tiny_model: Path) -> None:
    plan = json.loads(localmoe("plan", str(tiny_model), "--ram", "1GiB", "--json").stdout)
    (ram,) = plan["memory"]
    assert ram["budget_bytes"] == 1 << 30
    assert ram["basis"]["compute"] == "measured"


def test_shards_are_planned_and_run_together(tmp_path: Path) -> None:
    shape = replace(SHAPES["tiny"], n_vocab=32000)
    (whole,) = make_model(tmp_path / "whole.gguf", shape, "Q8_0")
    shards = make_model(tmp_path / "parts.gguf", shape, "Q8_0", shards=3)
    weights = {
        json.loads(localmoe("plan", str(path), "--json").stdout)["memory"][0]["weights_bytes"]
        for path in (whole, *shards)
    }
    assert len(weights) == 1
    answers = {
        localmoe("run", str(path), "Hi!", "-n", "5", "--temp", "0").stdout
        for path in (whole, shards[0])
    }
    assert len(answers) == 1
    assert answers != {""}


def test_a_smaller_cache_before_a_refusal(mixtral: str) -> None:
    """What the person left open gives way, and the plan says so; what they fixed does not."""
    whole = json.loads(localmoe("plan", mixtral, "--ram", "64GiB", "--json").stdout)
    ram = whole["memory"][-1]
    short = str(ram["total_bytes"] - ram["kv_bytes"] // 4)
    found = json.loads(localmoe("plan", mixtral, "--ram", short, "--json").stdout)
    assert found["placement"]["kv_type"] == "q8_0"
    assert found["placement"]["n_ctx"] == whole["placement"]["n_ctx"]
    assert any("at f16 nothing fits" in reason for reason in found["reasons"])
    line = one_line_error(localmoe("plan", mixtral, "--ram", short, "-ctk", "f16"), 3)
    assert "-ctk q8_0" in line
