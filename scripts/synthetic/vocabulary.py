"""Mistral's vocabularies, out of the SentencePiece files that mistral-common ships."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# mistral_common/data: V1 is Mixtral 8x7B's, V3 Mixtral 8x22B's
FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Pieces with scores and types; a type's number is the same in SentencePiece and in GGUF."""

    tokens: list[str]
    scores: list[float]
    types: list[int]


def vocabulary(version: str, n_vocab: int) -> Vocabulary:
    """The first `n_vocab` pieces: 512 still spell every text, through the byte pieces."""
    pieces = _pieces(version)
    if not 259 < n_vocab <= len(pieces):
        raise ValueError(f"n_vocab must be between 260 and {len(pieces)}, not {n_vocab}")
    tokens, scores, types = (list(column) for column in zip(*pieces[:n_vocab], strict=True))
    return Vocabulary(tokens, scores, types)


@cache
def _pieces(version: str) -> list[tuple[str, float, int]]:
    package = importlib.util.find_spec("mistral_common")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the vocabulary is mistral-common's; pip install mistral-common")
    path = Path(package.submodule_search_locations[0]) / "data" / FILES[version]
    return [_piece(raw) for field, raw in _fields(path.read_bytes()) if field == 1]


def _piece(message: bytes) -> tuple[str, float, int]:
    """sentencepiece_model.proto: ModelProto.SentencePiece {piece = 1, score = 2, type = 3}."""
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return fields[1].decode(), score, fields.get(3, b"\x01")[0]


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a protobuf message, undecoded; varints as one byte (enums are smaller)."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, end = _varint(message, at)
            yield field, bytes([value & 255])
        else:
            size, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            end = at + size
            yield field, message[at:end]
        at = end


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
