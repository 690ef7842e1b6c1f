"""Weights in two orders: what is repacked, when it is used, and that answers stay what they are."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from make_model import SHAPES, make_model

from localmoe.engine.native import llama
from localmoe.engine.native.llama import ggml
from localmoe.engine.native.model_benchmark import repackable
from localmoe.engine.native.repack import (
    OBJECT_BYTES,
    GgmlTensor,
    is_plain_product,
    matrices,
    repack_type,
    repacked,
)
from localmoe.engine.protocol import Delta, Placement, RepackMode, Request, Sampling
from localmoe.engine.worker.model import NativeModel
from localmoe.engine.worker.scheduler import Scheduler
from localmoe.perf.cpu_tuning import copies_within

PROMPT = list(range(300, 340))

llama.log_to(lambda level, text: None)
needs_repacking = pytest.mark.skipif(repack_type() is None, reason="this build can't repack")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of some MB in Q4_K, which every CPU with AVX2 or NEON repacks."""
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    return make_model(path, SHAPES["tiny"], "Q4_K")[0]


@pytest.fixture
def weights(model: Path) -> Iterator[llama.LlamaModel]:
    loaded = llama.LlamaModel(str(model))
    yield loaded
    loaded.free()


def test_the_struct_is_this_builds() -> None:
    assert ctypes.sizeof(GgmlTensor) + OBJECT_BYTES == ggml.ggml_tensor_overhead()


def test_matrices_are_those_that_are_multiplied_with(weights: llama.LlamaModel) -> None:
    names = [tensor.name.decode() for tensor in matrices(weights)]
    assert len(names) == len(set(names))
    assert {"blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight", "output.weight"} <= set(names)
    assert not {"token_embd.weight", "blk.0.attn_norm.weight"} & set(names)


def test_tied_embeddings_are_left_alone(tmp_path: Path) -> None:
    """They are looked up as rows too, which repacked ones can't be."""
    from localmoe.gguf.demo import DEMO

    demo = llama.LlamaModel(str(DEMO))
    assert "token_embd.weight" not in [t.name.decode() for t in matrices(demo)]
    demo.free()


@needs_repacking
def test_copies_are_whole_before_they_are_used(weights: llama.LlamaModel) -> None:
    tensors = {t.name: t for t in matrices(weights)}
    copies = repacked(weights, "all", 99)
    one = tensors[b"blk.0.ffn_down_exps.weight"]
    where = one.data
    copies.use(True)
    assert one.data == where  # not there yet
    copies.make_some(2)
    assert not copies.is_whole
    copies.make_all(2)
    copies.use(True)
    assert one.data != where
    copies.use(False)
    assert one.data == where
    copies.use(True)
    copies.free()
    assert one.data == where


@needs_repacking
@pytest.mark.parametrize(("mode", "n_layers"), [("off", 99), ("experts", 1), ("all", 1)])
def test_what_is_copied(weights: llama.LlamaModel, mode: str, n_layers: int) -> None:
    copies = repacked(weights, mode, n_layers)  # type: ignore[arg-type]
    names = {twin.name for twin in copies._twins}
    copies.free()
    assert not any(name.startswith("blk.1.") for name in names)
    assert bool(names) == (mode != "off")
    assert ("blk.0.attn_q.weight" in names) == (mode == "all")


@needs_repacking
@pytest.mark.parametrize("mode", ["experts", "all"])
def test_copies_are_what_the_plan_counts(weights: llama.LlamaModel, mode: RepackMode) -> None:
    """Outside of layers too: the output matrix was copied beside what a plan had room for."""
    layers = repackable(matrices(weights))
    for n_layers in range(1, len(layers) + 1):
        copies = repacked(weights, mode, n_layers)
        assert copies.n_bytes == copies_within(layers[:n_layers], mode, 1 << 40).n_bytes
        copies.free()


def logits(
    loaded: NativeModel, token: int, position: int, generating: bool
) -> npt.NDArray[np.float32]:
    batch = loaded.batch
    batch.tokens[0], batch.positions[0], batch.wants_logits[0] = token, position, 1
    assert loaded.decode(1, generating=generating)
    return loaded.context.logits(0).copy()


@needs_repacking
def test_answers_are_what_they_were_but_for_rounding(model: Path) -> None:
    """Prompts with the file's own weights, bit for bit; answers with the copies."""
    plain = NativeModel(str(model), Placement(n_threads=2, n_ctx=512))
    twice = NativeModel(
        str(model), Placement(n_threads=2, n_ctx=512, repack="all", n_repacked_layers=99)
    )
    assert twice.lacks_copies
    for position, token in enumerate(PROMPT):
        a, b = (logits(m, token, position, generating=False) for m in (plain, twice))
        assert np.array_equal(a, b)
    assert twice.lacks_copies
    a, b = (logits(m, 500, len(PROMPT), generating=True) for m in (plain, twice))
    assert not twice.lacks_copies
    assert not np.array_equal(a, b)  # other kernels were used
    assert np.abs(a - b).max() < 0.05 * a.std()
    # and back
    c, d = (logits(m, 501, len(PROMPT) + 1, generating=False) for m in (plain, twice))
    assert np.abs(c - d).max() < 0.05 * c.std()
    plain.free()
    twice.free()


@needs_repacking
@pytest.mark.parametrize(
    ("in_idle", "most_wait_s", "seed", "is_made_first"),
    [
        (True, 0.0, None, False),
        (True, 60.0, None, True),
        (True, 0.0, 7, True),  # the same request is to give the same answer
        (False, 0.0, None, True),  # the plan reckoned with them
    ],
)
def test_a_question_does_not_wait_long_for_copies(
    model: Path, in_idle: bool, most_wait_s: float, seed: int | None, is_made_first: bool
) -> None:
    place = Placement(
        n_threads=2, n_ctx=512, repack="all", n_repacked_layers=99, repack_in_idle=in_idle
    )
    loaded = NativeModel(str(model), place)
    scheduler = Scheduler(loaded, most_wait_s)
    scheduler.add(1, Request(tuple(PROMPT), Sampling(seed=seed), 8))
    news: list[object] = []
    while not scheduler.idle:
        news += scheduler.step()
    assert isinstance(news[-1], Delta)
    assert news[-1].finish_reason in ("length", "stop")
    assert loaded.lacks_copies is not is_made_first
    while loaded.lacks_copies:  # as the worker does while nobody asks
        loaded.make_copies()
    assert loaded.copies_left_s == 0
    loaded.free()


@pytest.mark.parametrize(
    ("kind", "shape", "is_plain"),
    [
        (b"MUL_MAT", (512, 128, 1, 1), True),
        (b"MUL_MAT", (512, 128, 16, 1), False),  # a matrix for each head, as in DeepSeek's MLA
        (b"MUL_MAT_ID", (512, 128, 8, 1), True),
        (b"ADD", (512, 128, 1, 1), False),
    ],
)
def test_products_that_repacked_weights_have_a_kernel_for(
    kind: bytes, shape: tuple[int, ...], is_plain: bool
) -> None:
    """On others llama.cpp aborts (ggml-cpu/repack.cpp)."""
    operations = {ggml.ggml_op_name(n): n for n in range(96)}
    weights, tokens, node = GgmlTensor(), GgmlTensor(), GgmlTensor()
    weights.ne[:] = shape
    node.op = operations[kind]
    node.src[0], node.src[1] = ctypes.addressof(weights), ctypes.addressof(tokens)
    assert is_plain_product(node) == is_plain
    tokens.type = 1  # f16
    assert not is_plain_product(node)
