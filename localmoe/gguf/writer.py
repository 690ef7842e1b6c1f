"""The bytes of a GGUF header, put together from those of another one.

Metadata is copied entry by entry as it stands in the file, so that nothing is lost in reading and
writing it again. The format is ggml's (docs/gguf.md).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import BinaryIO

from .reader import SCALARS, TENSOR_TYPES, TYPE_ARRAY, TYPE_STRING, ByteReader, Header, RawTensor

PREAMBLE_BYTES = 24  # magic, version, number of tensors, number of keys
TYPE_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


def raw_entries(stream: BinaryIO, header: Header) -> dict[str, bytes]:
    """Every metadata entry by key: the bytes of its key, its type and its value.

    `header` is what read_header made of this stream. Raises ModelFileError where the two differ.
    """
    stream.seek(0)
    cursor = ByteReader(stream, header.file_bytes, header.name)
    cursor.at = PREAMBLE_BYTES
    entries = {}
    for key in header.kv:
        start = cursor.at
        cursor.string()
        _skip_value(cursor)
        entries[key] = bytes(cursor.buffer[start : cursor.at])
    return entries


def _skip_value(cursor: ByteReader) -> None:
    kind, n = cursor.take("I"), 1
    if kind == TYPE_ARRAY:
        kind, n = cursor.take("I"), cursor.take("Q")
    if kind == TYPE_STRING:
        cursor.strings(n)
    elif kind in SCALARS:
        cursor.raw(n * struct.calcsize("<" + SCALARS[kind]))
    else:
        raise cursor.refuse("was changed while it was read")


def text_entry(key: str, text: str) -> bytes:
    """The metadata entry of a text."""
    return _string(key) + struct.pack("<I", TYPE_STRING) + _string(text)


def encode_header(
    version: int, entries: Sequence[bytes], tensors: Sequence[RawTensor], alignment: int
) -> bytes:
    """Everything before the weights, padded to where they begin."""
    out = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(entries)), *entries]
    for tensor in tensors:
        n_dims = len(tensor.shape)
        out.append(_string(tensor.name))
        out.append(struct.pack(f"<I{n_dims}Q", n_dims, *tensor.shape))
        out.append(struct.pack("<IQ", TYPE_NUMBERS[tensor.type], tensor.offset))
    head = b"".join(out)
    return head.ljust(padded(len(head), alignment), b"\0")


def tensor_offsets(tensors: Iterable[RawTensor], alignment: int) -> tuple[RawTensor, ...]:
    """The tensors one behind the other, each padded to the alignment."""
    placed, offset = [], 0
    for t in tensors:
        placed.append(RawTensor(t.name, t.type, t.shape, t.n_bytes, offset))
        offset += padded(t.n_bytes, alignment)
    return tuple(placed)


def padded(n_bytes: int, alignment: int) -> int:
    """Up to the next multiple of the alignment."""
    return -(-n_bytes // alignment) * alignment


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw
