"""Lines of files of any size, read with bounded memory.

A line that is longer than what is allowed is read past in pieces and never held; it still counts,
and has a digest, so that every line after it has its right number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import BinaryIO

MAX_LINE_BYTES = 16 << 20
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file, counted from 1, at byte `offset`; `n_bytes` has its line end in it.

    `raw` is the line without its end, or None where it is too long. `whole` says that a line end
    was there. `digest` is that of the line without its end.
    """

    number: int
    offset: int
    n_bytes: int
    raw: bytes | None
    whole: bool
    digest: bytes


def read_lines(stream: BinaryIO, max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Every line of a stream from where it stands, blank ones too; offsets count from there."""
    number = offset = 0
    while raw := stream.readline(max_bytes + 2):
        number += 1
        if raw.endswith(b"\n") or len(raw) < max_bytes + 2:
            text = raw.removesuffix(b"\n").removesuffix(b"\r")
            kept = text if len(text) <= max_bytes else None
            yield Line(number, offset, len(raw), kept, raw.endswith(b"\n"), digest(text))
            offset += len(raw)
        else:
            line = _pass_by(stream, raw, number, offset)
            yield line
            offset += line.n_bytes


def _pass_by(stream: BinaryIO, begun: bytes, number: int, offset: int) -> Line:
    """The rest of a line that is too long, of which only the digest and the length are kept."""
    hashed, n_bytes, last = blake2b(begun, digest_size=16), len(begun), begun
    while not last.endswith(b"\n") and (piece := stream.readline(PIECE_BYTES)):
        hashed.update(piece)
        n_bytes += len(piece)
        last = piece
    return Line(number, offset, n_bytes, None, last.endswith(b"\n"), hashed.digest())


def digest(*parts: bytes) -> bytes:
    """16 bytes that stand for some texts, and for where one ends and the next begins."""
    hashed = blake2b(digest_size=16)
    for part in parts[:-1]:
        hashed.update(len(part).to_bytes(8, "big") + part)
    hashed.update(parts[-1])
    return hashed.digest()
