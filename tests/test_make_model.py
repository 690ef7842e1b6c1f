"""Made model files: they run in llama.cpp, and route evenly."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_model as script
import numpy as np
import pytest
from gguf.quants import dequantize
from make_model import FAMILIES, SHAPES, make_model
from synthetic.gguf_writer import TYPES
from synthetic.quants import QUANTS
from synthetic.vocabulary import vocabulary
from synthetic.weights import random_blocks

from localmoe.gguf.model_meta import read_meta

TINY = replace(SHAPES["tiny"], n_layers=3)


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("deviation", [0.6, 0.03, 5e-5])
def test_random_weights_have_no_mean_and_the_right_size(type_name: str, deviation: float) -> None:
    import gguf

    n_blocks = 4099 * 256 // TYPES[type_name][1]
    raw = random_blocks(type_name, n_blocks, deviation, np.random.default_rng(1))
    kind = gguf.GGMLQuantizationType[type_name]
    flat = raw.view("<f4" if type_name == "F32" else "<f2" if type_name == "F16" else np.uint8)
    values = (
        flat
        if type_name in ("F32", "F16")
        else dequantize(raw.reshape(-1, TYPES[type_name][2]), kind)
    )
    spread = float(values.std(dtype=np.float64))
    assert 0.7 < spread / deviation < 1.45  # scales are powers of two
    assert abs(float(values.mean(dtype=np.float64))) < 0.01 * spread


def routing_in_a_child(path: Path) -> tuple[int, float]:
    """llama.cpp stays out of this process, as everywhere."""
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]; from pathlib import Path;"
        "from synthetic.routing import evenness, expert_logits;"
        "print(*evenness(expert_logits(Path(sys.argv[2]))))"
    )
    scripts = str(Path(script.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, scripts, str(path)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    fewest, largest = done.stdout.split()
    return int(fewest), float(largest)


@pytest.mark.parametrize("quant", ["Q4_K", "Q4_K_M", "Q8_0", "F16", "Q2_K"])
def test_routing_is_even_and_logits_are_finite(tmp_path: Path, quant: str) -> None:
    (path,) = make_model(tmp_path / "m.gguf", TINY, quant)
    fewest, largest = routing_in_a_child(path)
    assert fewest == 8
    assert largest <= 0.2


LOAD = """
import sys, llama_cpp.llama_cpp as C
C.llama_backend_init()
params = C.llama_model_default_params()
params.use_extra_bufts, params.load_mode, params.no_alloc = False, 0, True
model = C.llama_model_load_from_file(sys.argv[1].encode(), params)
context = C.llama_context_default_params()
context.n_ctx = 512
sys.exit(not (model and C.llama_init_from_model(model, context)))
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_takes_the_headers_of_every_family(tmp_path: Path, family: str) -> None:
    (path,) = make_model(tmp_path / "m.gguf", FAMILIES[family], "Q4_K_M", header_only=True)
    subprocess.run(
        [sys.executable, "-c", LOAD, str(path)], capture_output=True, check=True, timeout=60
    )


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    one, two, other = (
        make_model(tmp_path / f"{i}.gguf", TINY, seed=seed)[0].read_bytes()
        for i, seed in enumerate((1, 1, 2))
    )
    assert one == two != other


def test_the_early_layout_holds_the_same_weights(tmp_path: Path) -> None:
    (merged,) = make_model(tmp_path / "m.gguf", TINY)
    (split,) = make_model(tmp_path / "s.gguf", TINY, split_experts=True)
    whole = {t.name: read(merged, t.offset, t.n_bytes) for t in read_meta(merged).tensors}
    parts = {t.name: read(split, t.offset, t.n_bytes) for t in read_meta(split).tensors}
    for kind in ("gate", "up", "down"):
        joined = b"".join(parts[f"blk.1.ffn_{kind}.{expert}.weight"] for expert in range(8))
        assert joined == whole[f"blk.1.ffn_{kind}_exps.weight"]


def read(path: Path, offset: int, n_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(n_bytes)


def test_header_only_is_sparse_and_of_the_right_length(tmp_path: Path) -> None:
    (sparse,) = make_model(tmp_path / "s.gguf", TINY, header_only=True)
    (whole,) = make_model(tmp_path / "w.gguf", TINY)
    assert sparse.stat().st_size == whole.stat().st_size
    (large,) = make_model(tmp_path / "l.gguf", SHAPES["mixtral-8x7b"], "Q4_K", header_only=True)
    assert large.stat().st_size == pytest.approx(26.4e9, rel=0.01)
    assert large.stat().st_blocks * 512 < 8e6


# sizes of published files (GB, a sparse F16 file through llama-quantize --dry-run)
@pytest.mark.parametrize(
    ("quant", "gigabytes"),
    [("Q3_K_M", 22.55), ("Q4_K_M", 28.45), ("Q5_K_M", 33.23), ("Q8_0", 49.63)],
)
def test_mixes_are_llama_quantizes(tmp_path: Path, quant: str, gigabytes: float) -> None:
    (path,) = make_model(tmp_path / "m.gguf", SHAPES["mixtral-8x7b"], quant, header_only=True)
    assert path.stat().st_size / 1e9 == pytest.approx(gigabytes, abs=0.006)
    assert read_meta(path).quant_label == quant


def test_every_quant_is_labelled(tmp_path: Path) -> None:
    for quant in QUANTS:
        (path,) = make_model(tmp_path / "m.gguf", TINY, quant, header_only=True)
        assert read_meta(path).quant_label.startswith(quant)


def test_the_vocabulary_is_mistrals() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    import mistral_common

    data = Path(mistral_common.__file__).parent / "data"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizer.model.v1"))
    ours = vocabulary("v1", 32000)
    assert ours.tokens == [processor.id_to_piece(i) for i in range(32000)]
    assert ours.scores == pytest.approx([processor.get_score(i) for i in range(32000)])
    controls = [i for i in range(32000) if processor.is_control(i)]
    assert [i for i, kind in enumerate(ours.types) if kind == 3] == controls


def test_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    command = [sys.executable, script.__file__, str(path), "--layers", "1", "--vocab", "300"]
    done = subprocess.run(
        [*command, "--quant", "Q8_0", "--shards", "2", "--header-only"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    shards = sorted(tmp_path.glob("*.gguf"))
    assert all(shard.name in done.stdout for shard in shards)
    meta = read_meta(shards[0])
    assert (meta.n_layers, meta.tokenizer.n_vocab, meta.quant_label) == (1, 300, "Q8_0")
