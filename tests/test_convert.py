"""Early Mixtral files: what they become is what they were, and what would not run is refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_model import SHAPES
from synthetic import gguf_writer, mixtral
from synthetic.gguf_writer import KV_TYPES, Blueprint, Tensor, Typed
from synthetic.weights import RandomWeights

from localmoe.cli.convert import better_file, try_out
from localmoe.errors import LocalMoeError, ModelFileError, UsageError
from localmoe.gguf.merge_experts import merge_experts, plan_conversion, widened
from localmoe.gguf.model_meta import read_meta
from localmoe.gguf.reader import read_header

TINY = replace(SHAPES["tiny"], n_vocab=300)


class EqualRouters:
    """Random weights whose routers are the same numbers in every type: those that `type` can."""

    def __init__(self, type: str) -> None:
        self.type = type
        self.random = RandomWeights(TINY.n_embd, seed=3)

    def __call__(self, tensor: Tensor) -> Iterator[memoryview]:
        if "ffn_gate_inp" not in tensor.name:
            yield from self.random(tensor)
            return
        raw = b"".join(self.random(replace(tensor, type=self.type)))
        if tensor.type == self.type:
            yield memoryview(raw)
        else:
            yield memoryview(as_f32(raw, self.type).tobytes())


def as_f32(raw: bytes, type: str) -> np.ndarray:
    """By the gguf package, which knows nothing of ours."""
    return gguf.quants.dequantize(np.frombuffer(raw, np.uint8), gguf.GGMLQuantizationType[type])


def early_blueprint(
    quant: str = "Q8_0", router: str = "F16", shape: mixtral.MixtralShape = TINY
) -> Blueprint:
    """An early file with its tensors in no order."""
    blueprint = mixtral.blueprint(shape, quant, split_experts=True)
    tensors = [replace(t, type=router) if "gate_inp" in t.name else t for t in blueprint.tensors]
    random.Random(1).shuffle(tensors)
    return Blueprint(blueprint.kv, tuple(tensors))


def early_file(path: Path, blueprint: Blueprint | None = None, router: str = "F16") -> Path:
    gguf_writer.write(path, blueprint or early_blueprint(), EqualRouters(router))
    return path


def merged(path: Path, target: Path) -> Path:
    merge_experts(plan_conversion(path), target)
    return target


def tensor_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    raw = path.read_bytes()
    return {
        t.name: (t.type, t.shape, raw[t.offset : t.offset + t.n_bytes])
        for t in read_meta(path).tensors
    }


# ---- what becomes of it ------------------------------------------------------------------------

LOGITS = """
import sys, numpy as np, llama_cpp.llama_cpp as C
C.llama_backend_init()
for path in sys.argv[1:]:
    params = C.llama_model_default_params()
    params.use_extra_bufts = False
    model = C.llama_model_load_from_file(path.encode(), params)
    params = C.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 2, 2
    context = C.llama_init_from_model(model, params)
    n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
    batch = C.llama_batch_init(48, 0, 1)
    batch.n_tokens = 48
    for i in range(48):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = 3 + i * 5, i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, 1
    assert C.llama_decode(context, batch) == 0
    logits = np.ctypeslib.as_array(C.llama_get_logits(context), (48, n_vocab))
    assert np.isfinite(logits).all() and logits.std() > 0
    print(logits.tobytes().hex())
"""


def logits_of(*paths: Path) -> list[str]:
    """By llama.cpp itself, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOGITS, *map(str, paths)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.parametrize(
    ("quant", "router"),
    [("Q8_0", "F16"), ("Q4_K", "F16"), ("F16", "F16"), ("Q4_K_M", "BF16"), ("Q5_0", "F32")],
)
def test_it_is_the_file_that_it_would_have_been(tmp_path: Path, quant: str, router: str) -> None:
    """From a current file an early one, and back: tensors and logits are equal, bit for bit."""
    current, early = tmp_path / "current.gguf", tmp_path / "early.gguf"
    gguf_writer.write(current, mixtral.blueprint(TINY, quant), EqualRouters(router))
    early_file(early, early_blueprint(quant, router), router)
    new = merged(early, tmp_path / "new.gguf")
    assert tensor_bytes(new) == tensor_bytes(current)
    one, other = logits_of(current, new)
    assert one == other


def test_tensors_larger_than_a_piece_are_whole(tmp_path: Path) -> None:
    shape = replace(TINY, n_layers=1, n_ff=2816, n_vocab=9000)
    blueprint = early_blueprint("F16", shape=shape)
    early = early_file(tmp_path / "early.gguf", blueprint)
    new = tensor_bytes(merged(early, tmp_path / "new.gguf"))
    old = tensor_bytes(early)
    assert len(old["blk.0.ffn_up.0.weight"][2]) > 2**20
    for kind in ("gate", "up", "down"):
        parts = [old[f"blk.0.ffn_{kind}.{expert}.weight"][2] for expert in range(8)]
        assert new[f"blk.0.ffn_{kind}_exps.weight"][2] == b"".join(parts)
    assert new["token_embd.weight"] == old["token_embd.weight"]


def test_ten_and_more_experts_go_by_number_not_by_text(tmp_path: Path) -> None:
    early = early_file(
        tmp_path / "e.gguf", early_blueprint(shape=replace(TINY, n_layers=1, n_experts=12))
    )
    new = tensor_bytes(merged(early, tmp_path / "new.gguf"))
    old = tensor_bytes(early)
    parts = [old[f"blk.0.ffn_up.{expert}.weight"][2] for expert in range(12)]
    assert new["blk.0.ffn_up_exps.weight"][2] == b"".join(parts)


def test_every_value_of_half_precision_is_widened_exactly() -> None:
    every = np.arange(2**16, dtype="<u2")
    for type in ("F16", "BF16"):
        ours = np.frombuffer(widened(memoryview(every).cast("B"), type), "<f4")
        theirs = as_f32(every.tobytes(), type)
        numbers = ~np.isnan(theirs)
        assert np.isnan(ours[~numbers]).all()
        assert (ours[numbers].view("<u4") == theirs[numbers].view("<u4")).all()


@pytest.mark.parametrize("version", [2, 3])
def test_all_metadata_is_kept_byte_for_byte(tmp_path: Path, version: int) -> None:
    blueprint = early_blueprint()
    scalars = {f"a.{name}": Typed(name, 1) for name in KV_TYPES}
    arrays = {f"b.{name}": Typed(name, [1, 0, 1]) for name in KV_TYPES}
    texts = {"c": "na\udcffve 🙂", "d": ["", "a\nb", "🙂"], "e": Typed("f64", []), "f": [True]}
    blueprint.kv.update({**scalars, **arrays, **texts})
    early, new = tmp_path / "early.gguf", tmp_path / "new.gguf"
    gguf_writer.write(early, blueprint, EqualRouters("F16"), version=version)
    merged(early, new)
    head = new.read_bytes()
    for key, value in blueprint.kv.items():
        entry = len(key).to_bytes(8, "little") + key.encode() + gguf_writer.encode(value)
        assert head.count(entry) == 1, key
    with new.open("rb") as stream:
        header = read_header(stream)
    assert header.version == version
    added = {key: header.kv[key] for key in header.kv.keys() - blueprint.kv.keys()}
    assert added == {
        "general.converted.by": "localmoe 0.1.0: experts merged, routers in F32",
        "general.converted.from": f"early.gguf, {early.stat().st_size:,} bytes",
    }


def test_alignment_is_kept_and_others_read_the_file(tmp_path: Path) -> None:
    """A file of the gguf package's own writer, aligned to 256 bytes, with one odd tensor."""
    early = tmp_path / "early.gguf"
    writer = gguf.GGUFWriter(early, "llama")
    writer.add_custom_alignment(256)
    for key, value in mixtral.blueprint(replace(TINY, n_layers=1), "F32").kv.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int) and not isinstance(value, bool):
            writer.add_uint32(key, value)
    vocabulary = [*(chr(97 + i) for i in range(20)), *(f"<0x{i:02X}>" for i in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary)
    writer.add_token_scores([0.0] * len(vocabulary))
    writer.add_token_types([1] * 20 + [6] * 256)
    rng = np.random.default_rng(1)
    values = {}
    for tensor in early_blueprint("F32", shape=replace(TINY, n_layers=1)).tensors:
        kind = np.float16 if tensor.type == "F16" else np.float32
        values[tensor.name] = rng.standard_normal(tensor.shape[::-1], np.float32).astype(kind)
    values["odd.weight"] = np.arange(7, dtype=np.float32)
    for name, array in values.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(merged(early, tmp_path / "new.gguf"))
    found = {t.name: t for t in reader.tensors}
    assert reader.alignment == 256
    assert all(t.data_offset % 256 == 0 for t in reader.tensors)
    ups = np.stack([values[f"blk.0.ffn_up.{expert}.weight"] for expert in range(8)])
    assert (found["blk.0.ffn_up_exps.weight"].data == ups).all()
    assert (found["blk.0.ffn_gate_inp.weight"].data == values["blk.0.ffn_gate_inp.weight"]).all()
    assert (found["odd.weight"].data == values["odd.weight"]).all()


def test_shards_become_one_file(tmp_path: Path) -> None:
    whole = merged(early_file(tmp_path / "whole.gguf"), tmp_path / "one.gguf")
    shards = gguf_writer.write(tmp_path / "s.gguf", early_blueprint(), EqualRouters("F16"), 3)
    new = merged(shards[1], tmp_path / "new.gguf")
    assert tensor_bytes(new) == tensor_bytes(whole)
    with new.open("rb") as stream:
        kv = read_header(stream).kv
    assert not any(key.startswith("split.") for key in kv)
    assert str(kv["general.converted.from"]).startswith("s-00001-of-00003.gguf (3 shards), ")


def test_another_base_of_positions_is_kept_and_told(tmp_path: Path) -> None:
    blueprint = early_blueprint()
    blueprint.kv["llama.rope.freq_base"] = 10000.0
    conversion = plan_conversion(early_file(tmp_path / "e.gguf", blueprint))
    (warning,) = conversion.warnings
    assert "10,000 and kept" in warning
    assert not plan_conversion(early_file(tmp_path / "f.gguf")).warnings


# ---- what is refused ---------------------------------------------------------------------------


def one_tensor(which: str, /, **change: object) -> Callable[[Blueprint], Blueprint]:
    """The early file with one tensor changed."""

    def changed(blueprint: Blueprint) -> Blueprint:
        assert which in {t.name for t in blueprint.tensors}
        tensors = [
            replace(t, **change) if t.name == which else t  # type: ignore[arg-type]
            for t in blueprint.tensors
        ]
        return Blueprint(blueprint.kv, tuple(tensors))

    return changed


def without(pattern: str) -> Callable[[Blueprint], Blueprint]:
    return lambda b: Blueprint(
        {key: value for key, value in b.kv.items() if not re.search(pattern, key)},
        tuple(t for t in b.tensors if not re.search(pattern, t.name)),
    )


def with_key(key: str, value: gguf_writer.Value) -> Callable[[Blueprint], Blueprint]:
    return lambda b: Blueprint({**b.kv, key: value}, b.tensors)


def with_tensor(name: str) -> Callable[[Blueprint], Blueprint]:
    return lambda b: Blueprint(b.kv, (*b.tensors, Tensor(name, (256, 512), "Q8_0")))


def of_architecture(name: str) -> Callable[[Blueprint], Blueprint]:
    return lambda b: Blueprint(
        {k.replace("llama.", f"{name}."): name if v == "llama" else v for k, v in b.kv.items()},
        b.tensors,
    )


EXPERT, ROUTER = "blk.1.ffn_down.3.weight", "blk.1.ffn_gate_inp.weight"
REFUSED = {
    "types": (one_tensor(EXPERT, type="Q4_0"), "experts of layer 1 differ in type (Q4_0, Q8_0)"),
    "shape": (one_tensor(EXPERT, shape=(512, 512)), "shape [512, 512], expected [512, 256]"),
    "dimensions": (one_tensor(EXPERT, shape=(512, 128, 2)), "has the shape [512, 128, 2]"),
    "expert missing": (without(r"blk\.1\.ffn_down\.3"), "layer 1 are not one each from 0 to 7"),
    "expert 9": (one_tensor(EXPERT, name="blk.1.ffn_down.9.weight"), "not one each from 0 to 7"),
    "expert twice": (one_tensor(EXPERT, name="blk.1.ffn_down.02.weight"), "not one each from 0"),
    "expert_count": (with_key("llama.expert_count", 4), "not one each from 0 to 3"),
    "no expert_count": (without("expert.*_count"), "no llama.expert_count"),
    "kind missing": (without(r"blk\.0\.ffn_up"), "no ffn_up experts in layer 0"),
    "a layer too many": (with_tensor("blk.7.ffn_up.0.weight"), "unexpected ffn_up experts in"),
    "merged and not": (with_tensor("blk.0.ffn_up_exps.weight"), "stands beside separate experts"),
    "dense beside": (with_tensor("blk.0.ffn_up.weight"), "stands beside separate experts"),
    "a bias": (with_tensor("blk.0.ffn_up.0.bias"), "stands beside separate experts"),
    "no router": (without(r"blk\.1\.ffn_gate_inp"), "no blk.1.ffn_gate_inp.weight"),
    "router type": (one_tensor(ROUTER, type="Q8_0"), "is of type Q8_0, expected F16 or F32"),
    "router shape": (one_tensor(ROUTER, shape=(256, 4)), "[256, 4], expected [256, 8]"),
    "no rope base": (without("freq_base"), "no llama.rope.freq_base in its header"),
    "rope base 0": (with_key("llama.rope.freq_base", 0.0), "no llama.rope.freq_base in its header"),
    "rope base int": (with_key("llama.rope.freq_base", 10**6), "no llama.rope.freq_base"),
    "grok": (of_architecture("grok"), "early layout of grok; only Mixtral's can be converted"),
    "not early": (lambda b: mixtral.blueprint(TINY, "Q8_0"), "needs no conversion: its experts"),
    "dense": (without(r"ffn_.*\.\d+\.|gate_inp|expert"), "needs no conversion: it has no experts"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_run_is_refused(tmp_path: Path, case: str) -> None:
    change, sentence = REFUSED[case]
    path = tmp_path / "early.gguf"
    gguf_writer.write(path, change(early_blueprint()), None)
    with pytest.raises(ModelFileError) as caught:
        plan_conversion(path)
    check_error(caught.value)
    assert sentence in str(caught.value)
    assert "localmoe " in caught.value.hint


def check_error(error: ModelFileError) -> None:
    text = str(error)
    assert text.startswith("early.gguf: ")
    assert len(text) <= 200
    assert text.isprintable()


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        plan_conversion(tmp_path / "early.gguf")


SMALL = early_blueprint(shape=replace(TINY, n_layers=1, n_vocab=260))
HEAD = gguf_writer.header(SMALL)
# keys and the tensor table; the vocabulary in between is long and dull
PLACES = st.integers(0, 900) | st.integers(len(HEAD) - 2600, len(HEAD) - 1)


@given(st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_refused_or_converted(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    """Nothing but ModelFileError comes of it, and no more is written than was announced."""
    head = bytearray(HEAD)
    for at, value in flips:
        head[at] = value
    path, target = tmp_path / "early.gguf", tmp_path / "new.gguf"
    path.write_bytes(head)
    os.truncate(path, len(HEAD) + sum(gguf_writer.padded(t.n_bytes) for t in SMALL.tensors))
    target.unlink(missing_ok=True)
    try:
        conversion = plan_conversion(path)
    except ModelFileError as error:
        check_error(error)
        return
    merge_experts(conversion, target)
    assert target.stat().st_size == conversion.n_bytes
    assert not read_meta(target).legacy_split_experts


# ---- what can go wrong while it is written -----------------------------------------------------


@pytest.fixture
def early(tmp_path: Path) -> Path:
    return early_file(tmp_path / "early.gguf")


def nothing_but(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("after", [1, 20, 60])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, LocalMoeError])
def test_whatever_ends_it_leaves_nothing(
    early: Path, after: int, kind: Callable[[str], BaseException]
) -> None:
    calls = iter(range(1000))

    def report(n_bytes: int) -> None:
        if next(calls) == after:
            raise kind("stop")

    before = early.read_bytes()
    with pytest.raises(type(kind("stop"))):
        merge_experts(plan_conversion(early), early.with_name("new.gguf"), report)
    nothing_but(early.parent, "early.gguf")
    assert early.read_bytes() == before


def test_it_gets_its_name_after_the_check(early: Path) -> None:
    target = early.with_name("new.gguf")
    seen = []

    def check(path: Path) -> None:
        seen.append((path.name, read_meta(path).legacy_split_experts, target.exists()))

    def fail(path: Path) -> None:
        raise LocalMoeError("it doesn't run")

    conversion = plan_conversion(early)
    with pytest.raises(LocalMoeError, match="it doesn't run"):
        merge_experts(conversion, target, check=fail)
    nothing_but(early.parent, "early.gguf")
    merge_experts(conversion, target, check=check)
    ((name, *rest),) = seen
    assert re.fullmatch(r"\.new\.gguf\.[0-9a-f]{8}\.new", name)
    assert rest == [False, False]
    nothing_but(early.parent, "early.gguf", "new.gguf")


def test_progress_ends_at_the_files_length(early: Path) -> None:
    conversion = plan_conversion(early)
    told: list[int] = []
    merge_experts(conversion, early.with_name("new.gguf"), told.append)
    assert told == sorted(told)
    assert 0 <= conversion.n_bytes - told[-1] < 32


def test_what_is_there_is_not_overwritten(early: Path) -> None:
    conversion = plan_conversion(early)
    for target in (early, early.with_name("taken.gguf"), early.with_name("dangling.gguf")):
        if target.name == "taken.gguf":
            target.write_text("mine")
        if target.name == "dangling.gguf":
            target.symlink_to("nowhere")
        with pytest.raises(UsageError, match="exists already"):
            merge_experts(conversion, target)
    assert early.with_name("taken.gguf").read_text() == "mine"
    nothing_but(early.parent, "early.gguf", "taken.gguf", "dangling.gguf")


def test_what_appears_meanwhile_is_not_overwritten(early: Path) -> None:
    target = early.with_name("new.gguf")
    with pytest.raises(LocalMoeError, match="another process writes it too"):
        merge_experts(plan_conversion(early), target, check=lambda path: target.touch())
    assert target.read_bytes() == b""
    nothing_but(early.parent, "early.gguf", "new.gguf")


def test_of_two_at_once_one_is_told(early: Path) -> None:
    conversion, target = plan_conversion(early), early.with_name("new.gguf")

    def other(path: Path) -> None:
        merge_experts(conversion, target)

    with pytest.raises(LocalMoeError, match="another process writes it too"):
        merge_experts(conversion, target, check=other)
    assert target.stat().st_size == conversion.n_bytes
    nothing_but(early.parent, "early.gguf", "new.gguf")


def test_room_is_looked_for_first(early: Path) -> None:
    free = shutil.disk_usage(early.parent).free
    conversion = replace(plan_conversion(early), n_bytes=2 * free + 2**40)
    told: list[int] = []
    with pytest.raises(LocalMoeError, match=r"new\.gguf needs [\d.]+ GiB of disk; [\d.]+ GiB are"):
        merge_experts(conversion, early.with_name("new.gguf"), told.append)
    assert told == []
    nothing_but(early.parent, "early.gguf")


def test_a_source_cut_short_meanwhile_is_told(early: Path) -> None:
    conversion = plan_conversion(early)
    os.truncate(early, early.stat().st_size // 2)
    with pytest.raises(ModelFileError, match="cut short while it was read"):
        merge_experts(conversion, early.with_name("new.gguf"))
    early.unlink()
    with pytest.raises(ModelFileError, match="early.gguf: can't be read: No such file"):
        merge_experts(conversion, early.with_name("new.gguf"))
    nothing_but(early.parent)


def test_a_folder_that_is_not_there_is_told(early: Path) -> None:
    with pytest.raises(LocalMoeError, match="can't be written: No such file or directory"):
        merge_experts(plan_conversion(early), early.parent / "none" / "new.gguf")


CHILD = """
import sys
from pathlib import Path
from localmoe.gguf.merge_experts import merge_experts, plan_conversion
if sys.argv[3:]:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
merge_experts(plan_conversion(sys.argv[1]), Path(sys.argv[2]), 
    lambda n: print(" " * 9000, flush=True))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_disk_that_takes_no_more_leaves_nothing(early: Path) -> None:
    target = early.with_name("new.gguf")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(early), str(target), str(2**20)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "new.gguf can't be written: File too large." in done.stderr.splitlines()[-1]
    nothing_but(early.parent, "early.gguf")


def test_a_kill_leaves_no_file_and_the_next_one_succeeds(early: Path) -> None:
    target = early.with_name("new.gguf")
    wanted = merged(early, early.with_name("wanted.gguf")).read_bytes()
    for n_lines in random.Random(4).sample(range(1, 75), 10):  # of 75 that it would print
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(early), str(target)], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout
            for _ in range(n_lines):  # a pipe holds about seven, so it is not far ahead
                child.stdout.readline()
            child.kill()
        if target.exists():  # it was done before the kill came
            assert n_lines > 60
            assert target.read_bytes() == wanted
            target.unlink()
        else:
            (left,) = early.parent.glob(".new.gguf.*.new")
            assert left.stat().st_size <= len(wanted)
    assert merged(early, target).read_bytes() == wanted
    nothing_but(early.parent, "early.gguf", "new.gguf", "wanted.gguf")


# ---- the command -------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "localmoe"]


def localmoe(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, cwd=folder, timeout=60
    )


def test_the_command_ends_with_a_file_that_answers(early: Path) -> None:
    result = localmoe("convert", "early.gguf", folder=early.parent)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    assert re.match(r"early-merged\.gguf is here, [\d.]+ MiB, tried out\. Next: localmoe run", line)
    command = line.rpartition("localmoe ")[2].split()
    answered = localmoe(*command, "Hi!", "-n", "3", "-c", "256", folder=early.parent)
    assert answered.returncode == 0
    nothing_but(early.parent, "early.gguf", "early-merged.gguf")
    again = localmoe("convert", "early.gguf", folder=early.parent)
    assert again.returncode == 2
    assert again.stderr.startswith("localmoe: early-merged.gguf exists already.")


SAME = "mixtral-8x7b-instruct-v0.1.Q4_K_M.gguf"
BETTER = "The catalog has a better file, made after April 2024: Mixtral 8x7B Instruct v0.1"


@pytest.mark.parametrize(
    ("file", "name", "quant", "told"),
    [
        (SAME, "x", "Q4_K_M", f"{BETTER} Q4_K_M, 28.4 GB: localmoe pull mixtral:Q4_K_M."),
        ("a.gguf", "mistralai_mixtral-8x7b-instruct-v0.1", "Q2_K", f"{BETTER}: localmoe pull mix"),
        (SAME.replace("Q4_K_M", "Q3_K_M"), "x", "Q3_K_M", f"{BETTER}: localmoe pull mixtral."),
        ("a.gguf", "Mixtral-8x7B-Instruct-v0.1-limarp", "Q4_K_M", ""),
        (SAME, "x", "Q8_0", ""),  # as good
    ],
)
def test_a_better_file_is_known_by_name_size_and_quant(
    tmp_path: Path, file: str, name: str, quant: str, told: str
) -> None:
    blueprint = mixtral.blueprint(SHAPES["mixtral-8x7b"], quant, split_experts=True)
    blueprint.kv["general.name"] = name
    gguf_writer.write(tmp_path / file, blueprint, None)
    found = better_file(read_meta(tmp_path / file))
    assert found.startswith(told)
    assert bool(found) == bool(told)


def test_a_model_of_another_size_is_another_model(tmp_path: Path) -> None:
    gguf_writer.write(tmp_path / SAME, early_blueprint("Q4_K_M"), None)
    assert better_file(read_meta(tmp_path / SAME)) == ""


def test_the_command_says_first_that_there_is_better(tmp_path: Path) -> None:
    blueprint = mixtral.blueprint(SHAPES["mixtral-8x7b"], "Q4_K_M", split_experts=True)
    blueprint.kv["llama.rope.freq_base"] = 10000.0
    gguf_writer.write(tmp_path / SAME, blueprint, None)
    (tmp_path / "taken.gguf").touch()  # so that it ends before 26 GB are written
    result = localmoe("convert", SAME, "-o", "taken.gguf", folder=tmp_path)
    assert result.returncode == 2
    better, warning, error = result.stderr.splitlines()
    assert better == f"{BETTER} Q4_K_M, 28.4 GB: localmoe pull mixtral:Q4_K_M. Converting anyway."
    assert warning.startswith("localmoe: warning: llama.rope.freq_base is 10,000 and kept")
    assert error.startswith("localmoe: taken.gguf exists already.")


def test_the_next_command_can_be_pasted(early: Path) -> None:
    result = localmoe("convert", "early.gguf", "-o", "new one.gguf", folder=early.parent)
    assert result.stdout.endswith("Next: localmoe run 'new one.gguf'\n")


def test_the_command_answers_in_json(early: Path) -> None:
    result = localmoe("convert", str(early), "--json", folder=early.parent)
    target = early.with_name("early-merged.gguf")
    assert json.loads(result.stdout) == {
        "source": [str(early)],
        "target": str(target),
        "n_bytes": target.stat().st_size,
        "n_merged": 6,
        "n_widened": 2,
        "tried_out": True,
        "better": "",
        "warnings": [],
    }


def test_a_file_that_llama_cpp_refuses_does_not_stay(tmp_path: Path) -> None:
    blueprint = without("output_norm")(early_blueprint())
    path = early_file(tmp_path / "early.gguf", blueprint)
    result = localmoe("convert", str(path), folder=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("localmoe: What early.gguf became doesn't run, and was removed")
    assert "output_norm" in result.stderr
    assert result.stderr.count("\n") == 1
    nothing_but(tmp_path, "early.gguf")


def test_what_is_larger_than_memory_is_only_opened(early: Path, tmp_path: Path) -> None:
    conversion = replace(plan_conversion(early), n_bytes=2**60)
    whole = merged(early, tmp_path / "whole.gguf")
    assert try_out(whole, conversion, None) is False
    bad = early_file(tmp_path / "bad.gguf", without("output_norm")(early_blueprint()))
    with pytest.raises(LocalMoeError, match="doesn't run, and was removed"):
        try_out(merged(bad, tmp_path / "new.gguf"), conversion, None)


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    result = localmoe("convert", "none.gguf", folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "localmoe: none.gguf: no such file.\n"
