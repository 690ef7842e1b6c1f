"""Our parser of GGUF headers: right on good files, short and harmless on bad ones."""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_model import FAMILIES, SHAPES, make_model
from synthetic import gguf_writer, mixtral
from synthetic.gguf_writer import KV_TYPES, Blueprint, Tensor, Typed
from synthetic.quants import QUANTS

from localmoe.errors import ModelFileError
from localmoe.gguf.model_meta import meta_of, read_meta
from localmoe.gguf.reader import Header, HeaderIncomplete, StringArray, read_header

TINY = replace(SHAPES["tiny"], n_vocab=260)
ONE = Blueprint({"general.architecture": "llama"}, (Tensor("a", (32,), "F32"),))


def parse(raw: bytes, file_bytes: int | None = None, name: str = "x.gguf") -> Header:
    return read_header(io.BytesIO(raw), file_bytes, name)


def whole(blueprint: Blueprint) -> bytes:
    """A file's bytes with zeros for weights."""
    n_bytes = sum(gguf_writer.padded(t.n_bytes) for t in blueprint.tensors)
    return gguf_writer.header(blueprint) + bytes(n_bytes)


# ---- good files --------------------------------------------------------------------------------


def check_agreement(path: Path) -> None:
    """Tensor for tensor and key for key what the gguf package reads."""
    reader = gguf.GGUFReader(path)
    with path.open("rb") as stream:
        header = read_header(stream, name=path.name)
    theirs = [
        (t.name, t.tensor_type.name, tuple(t.shape.tolist()), t.n_bytes, t.data_offset)
        for t in reader.tensors
    ]
    ours = [
        (t.name, t.type, t.shape, t.n_bytes, header.data_offset + t.offset) for t in header.tensors
    ]
    assert ours == theirs
    for key, value in header.kv.items():
        expected = reader.fields[key].contents()
        assert (
            value == expected if isinstance(value, (int, float, str)) else (list(value) == expected)
        ), key
    assert len(reader.fields) == len(header.kv) + 3  # it adds the version and two counts


@pytest.mark.parametrize("quant", QUANTS)
def test_agrees_with_the_gguf_package_on_every_quant(tmp_path: Path, quant: str) -> None:
    (path,) = make_model(tmp_path / "m.gguf", replace(TINY, n_layers=8), quant, header_only=True)
    check_agreement(path)


@pytest.mark.parametrize("preset", SHAPES)
def test_agrees_with_the_gguf_package_on_every_preset(tmp_path: Path, preset: str) -> None:
    # one with all its tokens is enough: the package takes a second for them
    n_vocab = 32000 if preset == "mixtral-8x7b" else 512
    shape = replace(SHAPES[preset], n_vocab=n_vocab)
    (path,) = make_model(tmp_path / "m.gguf", shape, "Q4_K_M", header_only=True)
    check_agreement(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_gguf_package_on_every_family(tmp_path: Path, family: str) -> None:
    # with few tokens: the package reads a quarter of a million of them in seconds
    shape = replace(FAMILIES[family], n_vocab=512)
    quant = "MXFP4" if family == "gpt-oss" else "Q4_K_M"
    (path,) = make_model(tmp_path / "m.gguf", shape, quant, header_only=True)
    check_agreement(path)


@pytest.mark.parametrize(
    "options", [{"version": 2}, {"split_experts": True}, {"shards": 3}, {"seed": 5}]
)
def test_agrees_with_the_gguf_package_on_every_layout(
    tmp_path: Path, options: dict[str, int]
) -> None:
    for path in make_model(tmp_path / "m.gguf", TINY, **options):  # type: ignore[arg-type]
        check_agreement(path)


def test_all_types_of_metadata(tmp_path: Path) -> None:
    scalars = {f"a.{name}": Typed(name, 1) for name in KV_TYPES}
    arrays = {f"b.{name}": Typed(name, [1, 0, 1]) for name in KV_TYPES}
    empty = {f"c.{name}": Typed(name, []) for name in KV_TYPES}
    texts = {"d": "naïve 🙂", "e": ["", "a\nb", "🙂"], "f": -0.5}
    path = tmp_path / "kv.gguf"
    path.write_bytes(whole(Blueprint({**ONE.kv, **scalars, **arrays, **empty, **texts}, ())))
    check_agreement(path)


def test_the_table_of_tensor_types_is_the_gguf_packages() -> None:
    from localmoe.gguf.reader import TENSOR_TYPES

    ours = {number: sizes for number, (_, *sizes) in TENSOR_TYPES.items()}
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # never in files; the package has an older size
            assert ours[int(kind)] == list(sizes), kind
            assert TENSOR_TYPES[int(kind)][0] == kind.name


def test_the_beginning_of_a_remote_file_is_enough(tmp_path: Path) -> None:
    (path,) = make_model(tmp_path / "m.gguf", SHAPES["mixtral-8x7b"], "Q4_K_M", header_only=True)
    n_bytes = path.stat().st_size
    with path.open("rb") as stream:
        beginning = stream.read(4 * 2**20)
    header = parse(beginning, n_bytes)
    assert header.file_bytes == n_bytes > 28e9
    assert len(header.tensors) == 323
    with pytest.raises(HeaderIncomplete, match="only part of its header"):
        parse(beginning[:500_000], n_bytes)


def test_reads_a_large_header_fast(tmp_path: Path) -> None:
    n = 262_144
    blueprint = mixtral.blueprint(TINY, "Q4_K")
    few = blueprint.kv
    tokens = few["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    kv = {
        **few,
        "tokenizer.ggml.tokens": [*tokens, *(f"token{i}" for i in range(len(tokens), n))],
        "tokenizer.ggml.scores": Typed("f32", [0.0] * n),
        "tokenizer.ggml.token_type": [1] * n,
        "tokenizer.ggml.merges": [f"to ken{i}" for i in range(2 * n)],
    }
    raw = gguf_writer.header(Blueprint(kv, blueprint.tensors))
    meta = meta_of([parse(raw, 1 << 30)])
    assert meta.tokenizer.n_vocab == n


def test_strings_are_a_sequence() -> None:
    raw = gguf_writer.header(Blueprint({**ONE.kv, "s": ["a", "", "ü"]}, ()))
    strings = parse(raw).kv["s"]
    assert isinstance(strings, StringArray)
    assert list(strings) == ["a", "", "ü"] == strings[:]
    assert (strings[-1], strings.raw(2), strings.index("ü")) == ("ü", b"\xc3\xbc", 2)
    with pytest.raises(IndexError):
        strings[3]


# ---- bad files, by name ------------------------------------------------------------------------


def with_kv(**kv: gguf_writer.Value) -> bytes:
    return whole(Blueprint({**ONE.kv, **{k.replace("__", "."): v for k, v in kv.items()}}, ()))


def with_tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: str = "a") -> bytes:
    raw = name.encode()
    row = struct.pack("<Q", len(raw)) + raw + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    head = gguf_writer.header(Blueprint(ONE.kv, ()))
    head = head[:8] + struct.pack("<Q", 1) + head[16:].rstrip(b"\0")
    return head + row + struct.pack("<IQ", kind, offset) + bytes(4096)


def claim(n_items: int, kind: int = 4) -> bytes:
    """A file whose second key is an array that says it has `n_items` items."""
    array = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, n_items)
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + array + bytes(64)


def twice(raw: bytes, first: bytes, second: bytes) -> bytes:
    assert len(first) == len(second)
    return raw.replace(first, second)


TWO_KEYS = with_kv(abc=1, abd=2)
TWO_TENSORS = whole(Blueprint({}, (Tensor("abc", (8,), "F32"), Tensor("abd", (8,), "F32"))))

MALFORMED = {
    "empty": (b"", "empty, 0 bytes"),
    "html": (b"\n<!DOCTYPE HTML><html>...", "a web page, not a model"),
    "html without doctype": (b"<html lang=en>", "a web page, not a model"),
    "server error": (b'{"error":"Repository not found"}', "an error message from a server"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    "zip": (b"PK\x03\x04" + bytes(30), "a PyTorch or zip archive"),
    "pickle": (b"\x80\x02}q" + bytes(30), "a Python pickle"),
    "safetensors": (struct.pack("<Q", 99) + b'{"__metadata__"', "safetensors, not GGUF"),
    "ggjt": (b"tjgg\x03\0\0\0" + bytes(40), "GGUF's predecessor"),
    "zeros": (bytes(4096), "an unfinished download"),
    "garbage": (b"\x1b[2Jabcdefgh", "not a GGUF file: it begins with "),
    "magic only": (b"GGUF", "cut short: the file has 4 bytes"),
    "version 0": (struct.pack("<4sIQQ", b"GGUF", 0, 0, 0), "GGUF version 0;"),
    "version 1": (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "GGUF version 1;"),
    "version 4": (struct.pack("<4sIQQ", b"GGUF", 4, 0, 0), "GGUF version 4;"),
    "big endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "a big-endian GGUF file"),
    "many tensors": (struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 0), "claims 9,223,372,036,854"),
    "many keys": (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**40), "1,099,511,627,776 keys"),
    "long key": (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**50), "a string of 1,125,899,906"),
    "long array": (claim(2**40), "k claims 1,099,511,627,776 items"),
    "array past the end": (claim(2**20), "cut short: the file has 113 bytes"),
    "strings past the end": (claim(2**20, 8), "cut short: the file has 113 bytes"),
    "array of arrays": (claim(1, 9), "k is an array of arrays"),
    "array of unknowns": (claim(1, 77), "the key k has the unknown type 77"),
    "same key": (twice(TWO_KEYS, b"abd", b"abc"), "the key abc comes twice"),
    "unprintable key": (twice(TWO_KEYS, b"abd", b"a\x1bd"), r"a key named 'a\x1bd'"),
    "same tensor": (twice(TWO_TENSORS, b"abd", b"abc"), "the tensor abc comes twice"),
    "alignment 0": (with_kv(general__alignment=0), "general.alignment is 0"),
    "alignment 1": (with_kv(general__alignment=1), "general.alignment is 1"),
    "alignment 48": (with_kv(general__alignment=48), "general.alignment is 48"),
    "alignment huge": (with_kv(general__alignment=2**31), "general.alignment is 2,147,483,648"),
    "alignment text": (with_kv(general__alignment="32"), "general.alignment is not a u32"),
    "no dimensions": (with_tensor(()), "the tensor a has 0 dimensions"),
    "five dimensions": (with_tensor((1,) * 5), "the tensor a has 5 dimensions"),
    "dimension 0": (with_tensor((4, 0)), "the tensor a has the shape [4, 0]"),
    "dimension negative": (with_tensor((2**64 - 4,)), "the tensor a has the shape"),
    "overflow": (with_tensor((2**32, 2**32)), "the tensor a has the shape"),
    "unknown type": (with_tensor((32,), 4), "the tensor a has type 4, unknown"),
    "broken rows": (with_tensor((40,), 12), "rows of a have 40 values, not a multiple of 256"),
    "wrong offset": (with_tensor((8,), 0, 64), "a lies at 64, expected at 0"),
    "long tensor name": (with_tensor((8,), name="n" * 64), "a string of 64 bytes"),
    "weights missing": (with_tensor((2**20,)), "its tensors need 4,194,"),
}  # fmt: skip


def check_error(error: ModelFileError, name: str = "x.gguf") -> None:
    """One harmless line that names the file."""
    assert len(str(error)) <= 200
    assert str(error).isprintable()
    assert error.message.startswith(f"{name}: ")


@pytest.mark.parametrize("case", MALFORMED)
def test_says_what_is_wrong(case: str) -> None:
    raw, sentence = MALFORMED[case]
    with pytest.raises(ModelFileError) as caught:
        parse(raw)
    check_error(caught.value)
    assert sentence in caught.value.message


def test_a_file_cut_short_is_told_with_both_sizes(tmp_path: Path) -> None:
    (path,) = make_model(tmp_path / "m.gguf", TINY)
    n_bytes = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(n_bytes - 1000)
    with pytest.raises(ModelFileError) as caught:
        read_meta(path)
    assert f"cut short: the file has {n_bytes - 1000:,} bytes" in caught.value.message
    assert f"its tensors need {n_bytes:,}" in caught.value.message


def test_hostile_names_do_not_reach_the_message() -> None:
    with pytest.raises(ModelFileError) as caught:
        parse(b"", name="\x1b[31mmodel\u202e\n" + "n" * 300 + "-00001-of-00002.gguf")
    message = str(caught.value)
    assert len(message) <= 200
    assert message.isprintable()
    assert "-00001-of-00002.gguf: empty" in message
    with pytest.raises(ModelFileError) as caught:
        parse(b"", name="\x1b[31mmodel\u202e\ud800\n.gguf")
    assert caught.value.message.startswith("?[31mmodel???.gguf: empty")


def test_hostile_sizes_cost_neither_time_nor_memory() -> None:
    cases = [
        claim(2**40), claim(2**40, 8), claim(2**22, 12), claim(2**22, 8), claim(2**64 - 1),
        struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**64 - 1),
        with_tensor((2**62,)), with_tensor((2**15,) * 4),
    ]  # fmt: skip
    tracemalloc.start()
    for raw in cases:
        # the file says it is large, so lengths alone don't give it away
        for file_bytes in (len(raw), 2**50):
            with pytest.raises(ModelFileError):
                parse(raw, file_bytes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_an_endless_stream_is_left_at_the_cap() -> None:
    class Endless(io.RawIOBase):
        n_read = 0

        def seek(self, *_: int) -> int:
            return 0

        def read(self, n: int = -1) -> bytes:
            start = struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**14) if not self.n_read else b""
            self.n_read += n
            key = struct.pack("<Q", 1) + b"k" + struct.pack("<IQ", 8, 2**24)
            return (start + key).ljust(n, b"a")

    stream = Endless()
    with pytest.raises(ModelFileError):
        read_header(stream, 2**50, "x.gguf")  # type: ignore[arg-type]
    assert stream.n_read < 2**28


# ---- bad files, at random ----------------------------------------------------------------------

GOOD = whole(mixtral.blueprint(replace(TINY, n_layers=1), "Q4_K"))
HEAD = len(gguf_writer.header(mixtral.blueprint(replace(TINY, n_layers=1), "Q4_K")))


def check_outcome(raw: bytes, file_bytes: int | None = None) -> None:
    """It parses, or it is refused in one harmless line; nothing else."""
    try:
        header = parse(raw, file_bytes)
        meta = meta_of([header])
        assert meta.weights_bytes <= (file_bytes or len(raw))
    except ModelFileError as error:
        check_error(error)


def test_the_good_file_parses() -> None:
    assert meta_of([parse(GOOD)]).n_experts == 8


@given(st.integers(0, HEAD + 100))
@settings(max_examples=300)
def test_any_truncation(n_bytes: int) -> None:
    with pytest.raises(ModelFileError) as caught:
        parse(GOOD[:n_bytes])
    check_error(caught.value)
    if n_bytes < HEAD - 32:  # what is missing may be no more than the padding before the data
        with pytest.raises(HeaderIncomplete if n_bytes > 4 else ModelFileError):
            parse(GOOD[:n_bytes], len(GOOD))


@given(st.lists(st.tuples(st.integers(0, HEAD - 1), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=500)
def test_any_flipped_bytes(flips: list[tuple[int, int]]) -> None:
    raw = bytearray(GOOD)
    for at, value in flips:
        raw[at] = value
    check_outcome(bytes(raw))


@given(st.integers(0, HEAD // 8 - 1), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
@settings(max_examples=300)
def test_any_word_replaced(index: int, value: int) -> None:
    raw = bytearray(GOOD)
    struct.pack_into("<Q", raw, index * 8, value)
    check_outcome(bytes(raw))
    check_outcome(bytes(raw), 2**45)


@given(st.binary(max_size=400), st.sampled_from([b"", b"GGUF", b"GGUF\x03\0\0\0"]))
@settings(max_examples=300)
def test_any_garbage(raw: bytes, start: bytes) -> None:
    check_outcome(start + raw)


VALUES: list[Callable[[st.DataObject], gguf_writer.Value]] = [
    lambda data: data.draw(st.integers(0, 2**32 - 1)),
    lambda data: data.draw(st.floats(width=32)),
    lambda data: data.draw(st.text(max_size=20)),
    lambda data: data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4)),
    lambda data: data.draw(st.lists(st.text(max_size=3), min_size=1, max_size=4)),
    lambda data: data.draw(st.booleans()),
    lambda data: Typed("i64", data.draw(st.integers(-(2**63), 2**63 - 1))),
]


@given(st.data())
@settings(max_examples=400)
def test_any_value_for_any_key(data: st.DataObject) -> None:
    blueprint = mixtral.blueprint(replace(TINY, n_layers=1), "Q4_K")
    extra = ["llama.attention.kv_lora_rank", "llama.attention.sliding_window", "split.count",
             "llama.attention.sliding_window_pattern", "llama.attention.key_length",
             "llama.expert_group_count", "general.type", "llama.nextn_predict_layers",
             "llama.expert_feed_forward_length", "general.sampling.temp"]  # fmt: skip
    for key in data.draw(st.lists(st.sampled_from([*blueprint.kv, *extra]), max_size=3)):
        blueprint.kv[key] = data.draw(st.sampled_from(VALUES))(data)
    check_outcome(whole(blueprint))
