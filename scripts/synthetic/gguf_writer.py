"""Writes GGUF files: metadata, tensor table, and weights from wherever they come.

The format is ggml/docs/gguf.md's. Integers are written as u32 and lists of them as i32, as the
converters of llama.cpp do; `Typed` writes any other type.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT (gguf.h)

# enum ggml_type (ggml.h): name -> (number, values in a block, bytes of a block)
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q5_0": (6, 32, 22),
    "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "BF16": (30, 1, 2), "MXFP4": (39, 32, 17),
}  # fmt: skip

# enum gguf_type (gguf.h): name -> (number, struct format)
KV_TYPES = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"),
    "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"),
    "f64": (12, "d"),
}  # fmt: skip
KV_STRING, KV_ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Typed:
    """A value or a list of values of a GGUF type that Python's own types don't name."""

    type: str
    value: int | float | Sequence[int] | Sequence[float]


Value = bool | int | float | str | list[int] | list[float] | list[str] | list[bool] | Typed


@dataclass(frozen=True, slots=True)
class Tensor:
    """A row of the tensor table, and how to fill it.

    `shape` is in ggml's order (row length first). `stream` and `skip` say which random bytes fill
    it: tensors of one stream at different skips are parts of one larger tensor.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    fill: str = "reader"
    stream: str = ""
    skip: int = 0

    @property
    def n_bytes(self) -> int:
        """Raises ValueError where rows don't divide into blocks."""
        _, block_values, block_bytes = TYPES[self.type]
        if self.shape[0] % block_values:
            raise ValueError(f"{self.name}: rows of {self.shape[0]} don't divide into {self.type}")
        n_values = 1
        for n in self.shape:
            n_values *= n
        return n_values // block_values * block_bytes


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A whole model file before it is written."""

    kv: dict[str, Value]
    tensors: tuple[Tensor, ...]


Weights = Callable[[Tensor], Iterable[memoryview]]


def write(
    path: Path, blueprint: Blueprint, weights: Weights | None, shards: int = 1, version: int = 3
) -> list[Path]:
    """Write the file, or its shards, and say where they are; without weights they are sparse."""
    parts = [blueprint] if shards == 1 else list(_split(blueprint, shards))
    paths = [path] if shards == 1 else [_shard_path(path, i, shards) for i in range(shards)]
    for part, where in zip(parts, paths, strict=True):
        _write_one(where, part, weights, version)
    return paths


def _write_one(path: Path, blueprint: Blueprint, weights: Weights | None, version: int) -> None:
    head = header(blueprint, version)
    with path.open("wb", buffering=0) as file:
        file.write(head)
        if weights is None:
            file.truncate(len(head) + sum(padded(t.n_bytes) for t in blueprint.tensors))
            return
        for tensor in blueprint.tensors:
            for chunk in weights(tensor):
                file.write(chunk)
            file.write(bytes(padded(tensor.n_bytes) - tensor.n_bytes))


def header(blueprint: Blueprint, version: int = 3) -> bytes:
    """Everything before the weights, padded to where they begin."""
    out = [b"GGUF", struct.pack("<IQQ", version, len(blueprint.tensors), len(blueprint.kv))]
    for key, value in blueprint.kv.items():
        out += [_string(key), encode(value)]
    offset = 0
    for tensor in blueprint.tensors:
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        number = struct.pack("<IQ", TYPES[tensor.type][0], offset)
        out += [_string(tensor.name), shape, number]
        offset += padded(tensor.n_bytes)
    head = b"".join(out)
    return head + bytes(padded(len(head)) - len(head))


def padded(n_bytes: int) -> int:
    """Up to the next multiple of the alignment."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def encode(value: Value) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(value, Typed):
        number, form = KV_TYPES[value.type]
        if isinstance(value.value, (int, float)):
            return struct.pack("<I" + form, number, value.value)
        n = len(value.value)
        return struct.pack(f"<IIQ{n}{form}", KV_ARRAY, number, n, *value.value)
    if isinstance(value, str):
        return struct.pack("<I", KV_STRING) + _string(value)
    if isinstance(value, list):
        return _encode_list(value)
    return encode(Typed(_scalar_type(value), value))


def _encode_list(values: list[int] | list[float] | list[str] | list[bool]) -> bytes:
    if values and isinstance(values[0], str):
        head = struct.pack("<IIQ", KV_ARRAY, KV_STRING, len(values))
        return head + b"".join(map(_string, values))
    kind = _scalar_type(values[0]) if values else "i32"
    return encode(Typed("i32" if kind == "u32" else kind, values))


def _scalar_type(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    return "u32" if isinstance(value, int) else "f32"


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _shard_path(path: Path, index: int, count: int) -> Path:
    """As llama_split_path (llama.cpp) names them: numbers count from 1 here, split.no from 0."""
    return path.with_name(f"{path.stem}-{index + 1:05d}-of-{count:05d}.gguf")


def _split(blueprint: Blueprint, count: int) -> Iterator[Blueprint]:
    """Equal runs of tensors; the first shard carries all metadata, as llama-gguf-split does."""
    n = len(blueprint.tensors)
    for i in range(count):
        kv: dict[str, Value] = {
            **(blueprint.kv if i == 0 else {}),
            "split.no": Typed("u16", i),
            "split.count": Typed("u16", count),
            "split.tensors.count": Typed("i32", n),
        }
        yield Blueprint(kv, blueprint.tensors[n * i // count : n * (i + 1) // count])
