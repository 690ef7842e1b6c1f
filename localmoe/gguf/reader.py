"""Reads the header of a GGUF file: metadata and the tensor table, within bounds.

`read_header` reads a stream no further than its header goes, so the first megabytes of a remote
file are enough. It refuses what llama.cpp refuses (ggml/src/gguf.cpp) and what would make it
abort or hang, before llama.cpp sees the file. A file may come from anyone: no length is believed
before it is held against the file's length and our caps, and no text reaches a message before it is
made harmless. What the metadata means is model_meta.py's business.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias, overload

from ..errors import ModelFileError, model_file_error

# Our own caps; the largest headers in use have a few thousand tensors and 800,000 strings.
MAX_KEYS = 2**14
MAX_TENSORS = 2**16
MAX_ARRAY_ITEMS = 2**22
MAX_KEY_BYTES = 2**16 - 1  # docs/gguf.md
MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME less its NUL (ggml.h)
MAX_DIMS = 4  # GGML_MAX_DIMS (ggml.h)
MAX_VALUES = 2**63 - 1  # ggml counts values in an int64
# Alignments that llama.cpp loads: with less than 32 the CPU backend asserts on tensor addresses
# (TENSOR_ALIGNMENT, ggml-impl.h); more than a page is of no use to anyone.
DEFAULT_ALIGNMENT, MIN_ALIGNMENT, MAX_ALIGNMENT = 32, 32, 2**16

# enum gguf_type (gguf.h): number -> struct and array format
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
TYPE_UINT32, TYPE_BOOL, TYPE_STRING, TYPE_ARRAY = 4, 7, 8, 9

# enum ggml_type (ggml.h): number -> name, values in a block, bytes of a block (ggml-common.h)
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip

# What people mistake for a model: how it begins, what it is, what to do
IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "Try: git lfs pull"),
    (b"<!doctype html", "a web page, not a model", "Download it from the file's own link."),
    (b"<html", "a web page, not a model", "Download it from the file's own link."),
    (b"pk\x03\x04", "a PyTorch or zip archive, not GGUF", "Look for the model's GGUF version."),
    (b"\x80\x02", "a Python pickle, not GGUF", "Look for the model's GGUF version."),
    (b"tjgg", "of GGUF's predecessor of 2023, which no longer runs", "Download its GGUF version."),
    (b"lmgg", "of GGUF's predecessor of 2023, which no longer runs", "Download its GGUF version."),
    (b"fmgg", "of GGUF's predecessor of 2023, which no longer runs", "Download its GGUF version."),
    (b'{"error', "an error message from a server, not a model", "Download it again."),
    (bytes(16), "empty at its beginning: an unfinished download", "Download it again."),
)


KvValue: TypeAlias = "bool | int | float | str | array[Any] | StringArray"


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A row of the tensor table. `shape` has the row length first; `offset` is into the weights."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    offset: int

    @property
    def n_values(self) -> int:
        """The product of the shape."""
        n = 1
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True, slots=True)
class Header:
    """One file's header: what stands before the weights, and where those begin."""

    name: str
    version: int
    alignment: int
    kv: dict[str, KvValue]
    tensors: tuple[RawTensor, ...]
    data_offset: int
    file_bytes: int


def read_header(stream: BinaryIO, file_bytes: int | None = None, name: str = "") -> Header:
    """The header of the GGUF file that `stream` holds or begins with.

    `file_bytes` is the length of the whole file where the stream is only its beginning; tensors
    are checked against it. Raises ModelFileError: one line that names the file and the reason;
    HeaderIncomplete where more of the file must be read.
    """
    if file_bytes is None:
        file_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    cursor = ByteReader(stream, file_bytes, name)
    version, n_tensors, n_keys = _preamble(cursor)
    kv = _metadata(cursor, n_keys)
    alignment = _alignment(cursor, kv)
    tensors = _tensor_table(cursor, n_tensors)
    # without tensors there is no data section, and no padding before it
    data_offset = _padded(cursor.at, alignment) if tensors else cursor.at
    header = Header(name, version, alignment, kv, tensors, data_offset, file_bytes)
    _check_layout(header)
    return header


def _preamble(cursor: ByteReader) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    cursor.need(min(32, cursor.file_bytes))
    _check_magic(cursor)
    cursor.at = 4
    version = cursor.take("I")
    if version and not version & 0xFFFF:
        raise cursor.refuse("a big-endian GGUF file", "Download the little-endian version.")
    if version not in (2, 3):
        raise cursor.refuse(f"GGUF version {version}; versions 2 and 3 are known")
    n_tensors, n_keys = cursor.take("Q"), cursor.take("Q")
    for n, limit, what in ((n_tensors, MAX_TENSORS, "tensors"), (n_keys, MAX_KEYS, "keys")):
        if n > limit:
            raise cursor.refuse(f"damaged: it claims {n:,} {what}; the limit is {limit:,}")
    return version, n_tensors, n_keys


def _check_magic(cursor: ByteReader) -> None:
    start = bytes(cursor.buffer[:32])
    if start[:4] == b"GGUF":
        return
    if not start:
        raise cursor.refuse("empty, 0 bytes", "Download it again.")
    for beginning, what, hint in IMPOSTORS:
        if start.lstrip(b" \t\r\n\xef\xbb\xbf").lower().startswith(beginning):
            raise cursor.refuse(what, hint)
    if start[8:9] == b"{":  # the length of its JSON header, then that header
        raise cursor.refuse("safetensors, not GGUF", "Look for the model's GGUF version.")
    shown = start[:4].decode("ascii", "replace")
    raise cursor.refuse(f"not a GGUF file: it begins with {shown!r}")


def _metadata(cursor: ByteReader, n_keys: int) -> dict[str, KvValue]:
    kv: dict[str, KvValue] = {}
    for _ in range(n_keys):
        key = cursor.plain_name("key", MAX_KEY_BYTES)
        if key in kv:
            raise cursor.refuse(f"damaged: the key {key[:60]} comes twice")
        kind = cursor.take("I")
        if key == "general.alignment" and kind != TYPE_UINT32:
            raise cursor.refuse("damaged: general.alignment is not a u32")
        kv[key] = _array(cursor, key) if kind == TYPE_ARRAY else _scalar(cursor, key, kind)
    return kv


def _scalar(cursor: ByteReader, key: str, kind: int) -> KvValue:
    if kind == TYPE_STRING:
        return cursor.string().decode("utf-8", "replace")
    if kind not in SCALARS:
        raise cursor.refuse(f"damaged: the key {key[:60]} has the unknown type {kind}")
    value: KvValue = cursor.take(SCALARS[kind])
    return value


def _array(cursor: ByteReader, key: str) -> KvValue:
    kind, n = cursor.take("I"), cursor.take("Q")
    if n > MAX_ARRAY_ITEMS:
        limit = f"{MAX_ARRAY_ITEMS:,}"
        raise cursor.refuse(f"damaged: {key[:60]} claims {n:,} items; the limit is {limit}")
    if kind == TYPE_STRING:
        return cursor.strings(n)
    if kind == TYPE_ARRAY:
        raise cursor.refuse(f"{key[:60]} is an array of arrays, which llama.cpp doesn't read")
    if kind not in SCALARS:
        raise cursor.refuse(f"damaged: the key {key[:60]} has the unknown type {kind}")
    values: array[Any] = array("B" if kind == TYPE_BOOL else SCALARS[kind])
    values.frombytes(cursor.raw(n * values.itemsize))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _alignment(cursor: ByteReader, kv: dict[str, KvValue]) -> int:
    alignment = kv.get("general.alignment", DEFAULT_ALIGNMENT)
    assert isinstance(alignment, int)  # its type was checked when it was read
    if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.refuse(
            f"damaged: general.alignment is {alignment:,}, not a power of two from "
            f"{MIN_ALIGNMENT} to {MAX_ALIGNMENT:,}"
        )
    return alignment


def _tensor_table(cursor: ByteReader, n_tensors: int) -> tuple[RawTensor, ...]:
    tensors: dict[str, RawTensor] = {}
    for _ in range(n_tensors):
        name = cursor.plain_name("tensor", MAX_TENSOR_NAME_BYTES)
        if name in tensors:
            raise cursor.refuse(f"damaged: the tensor {name} comes twice")
        n_dims = cursor.take("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise cursor.refuse(f"damaged: the tensor {name} has {n_dims:,} dimensions")
        shape = tuple(cursor.take("Q") for _ in range(n_dims))
        kind, offset = cursor.take("I"), cursor.take("Q")
        tensors[name] = _tensor(cursor, name, shape, kind, offset)
    return tuple(tensors.values())


def _tensor(
    cursor: ByteReader, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> RawTensor:
    if kind not in TENSOR_TYPES:
        raise cursor.refuse(f"the tensor {name} has type {kind}, unknown to this llama.cpp")
    type_name, block_values, block_bytes = TENSOR_TYPES[kind]
    n_values = 1
    for size in shape:
        n_values *= size
    if not 0 < n_values <= MAX_VALUES:
        raise cursor.refuse(f"damaged: the tensor {name} has the shape {list(shape)}")
    if shape[0] % block_values:
        raise cursor.refuse(
            f"damaged: rows of {name} have {shape[0]:,} values, not a multiple of {block_values}"
        )
    return RawTensor(name, type_name, shape, n_values // block_values * block_bytes, offset)


def _check_layout(header: Header) -> None:
    """Tensors lie one behind the other, each padded to the alignment, and within the file."""
    expected = end = 0
    for tensor in header.tensors:
        if tensor.offset != expected:
            reason = f"damaged: {tensor.name} lies at {tensor.offset:,}, expected at {expected:,}"
            raise model_file_error(header.name, reason)
        end = tensor.offset + tensor.n_bytes
        expected = _padded(end, header.alignment)
    if header.tensors and header.data_offset + end > header.file_bytes:
        needed = header.data_offset + end
        reason = f"cut short: the file has {header.file_bytes:,} bytes, its tensors need {needed:,}"
        raise model_file_error(header.name, reason, "Download it again.")


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


READ_BYTES = 2**20  # at a time
# Our own caps; the largest headers in use hold 30 MB, most of it one JSON text.
MAX_HEADER_BYTES = 128 * 2**20
MAX_STRING_BYTES = 32 * 2**20


class HeaderIncomplete(ModelFileError):
    """The stream ends inside the header although the file goes on: more of it must be read."""


class StringArray(Sequence[str]):
    """An array of strings, decoded one by one when asked for."""

    __slots__ = ("_ends", "_raw")

    def __init__(self, raw: bytes, ends: array[int]) -> None:
        self._raw = raw  # each string behind its 8 bytes of length
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def raw(self, index: int) -> bytes:
        """The bytes of one string."""
        start = self._ends[index - 1] if index else 0
        return self._raw[start + 8 : self._ends[index]]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.raw(index % len(self)).decode("utf-8", "replace")

    def raws(self) -> Iterator[bytes]:
        """The bytes of every string, in order."""
        start, raw = 0, self._raw
        for end in self._ends:
            yield raw[start + 8 : end]
            start = end


class ByteReader:
    """Takes little-endian values off a stream, reading it in large pieces and only as needed."""

    def __init__(self, stream: BinaryIO, file_bytes: int, name: str) -> None:
        self.stream = stream
        self.file_bytes = file_bytes
        self.name = name
        self.buffer = bytearray()
        self.at = 0

    def refuse(self, reason: str, hint: str = "") -> ModelFileError:
        """The error for this file, with a reason."""
        return model_file_error(self.name, reason, hint)

    def need(self, n_bytes: int) -> None:
        """Have `n_bytes` from here on in the buffer."""
        end = self.at + n_bytes
        if end <= len(self.buffer):
            return
        if end > self.file_bytes:
            raise self.refuse(
                f"cut short: the file has {self.file_bytes:,} bytes, its header alone needs "
                f"{end:,} or more",
                "Download it again.",
            )
        if end > MAX_HEADER_BYTES:
            raise self.refuse(f"its header is larger than {MAX_HEADER_BYTES:,} bytes")
        while len(self.buffer) < end:
            piece = self.stream.read(max(READ_BYTES, end - len(self.buffer)))
            if not piece:
                raise HeaderIncomplete(
                    self.refuse(
                        f"its first {len(self.buffer):,} bytes are only part of its header"
                    ).message
                )
            self.buffer += piece

    def take(self, form: str) -> Any:
        """One scalar, of a struct format of one letter."""
        size = struct.calcsize("<" + form)
        self.need(size)
        (value,) = struct.unpack_from("<" + form, self.buffer, self.at)
        self.at += size
        return value

    def raw(self, n_bytes: int) -> bytes:
        """The next `n_bytes` as they are."""
        self.need(n_bytes)
        self.at += n_bytes
        return bytes(self.buffer[self.at - n_bytes : self.at])

    def string(self, limit: int = MAX_STRING_BYTES) -> bytes:
        """A string's bytes, behind their number."""
        n_bytes = self.take("Q")
        if n_bytes > limit:
            raise self.refuse(f"damaged: a string of {n_bytes:,} bytes in its header")
        return self.raw(n_bytes)

    def plain_name(self, what: str, limit: int) -> str:
        """A key's or a tensor's name: printable ASCII, as the format demands."""
        raw = self.string(limit)
        name = raw.decode("ascii", "replace")
        if not raw or not name.isprintable() or not raw.isascii():
            raise self.refuse(f"damaged: a {what} named {name[:40]!r}")
        return name

    def strings(self, n: int) -> StringArray:
        """`n` strings, their lengths walked and their text left alone."""
        start, ends = self.at, array("I")
        unpack, at = struct.Struct("<Q").unpack_from, self.at
        buffer = self.buffer  # grows in place
        while len(ends) < n:
            self.need(8)
            try:
                for _ in range(n - len(ends)):
                    at = self.at + 8 + unpack(buffer, self.at)[0]
                    if at > len(buffer):
                        break
                    self.at = at
                    ends.append(at - start)
                else:
                    break
            except struct.error:
                continue
            if at - self.at - 8 > MAX_STRING_BYTES:
                raise self.refuse(f"damaged: a string of {at - self.at - 8:,} bytes in its header")
            self.need(at - self.at)
        return StringArray(bytes(buffer[start : self.at]), ends)
