"""Taking values off a stream of little-endian bytes, within bounds; and the refusal of a file.

What is read may come from anyone: no length is believed before it is held against the file's
length and our caps, and no text reaches a message before it is made harmless.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, overload

from localmoe.errors import ModelFileError

MESSAGE_CHARS = 200  # message and hint together
NAME_CHARS = 60
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


def refusal(file: str, reason: str, hint: str = "") -> ModelFileError:
    """The error for a file: `reason` may quote what stands in it; it is made harmless here."""
    # of a long name the end says more: quant and shard
    shown = printable(file) if len(file) <= NAME_CHARS else "…" + printable(file[1 - NAME_CHARS :])
    message = printable(f"{shown}: {reason}" if shown else reason)
    room = MESSAGE_CHARS - (len(hint) + 2 if hint else 1)
    message = message if len(message) <= room else message[: room - 1] + "…"
    return ModelFileError(message if message.endswith((".", "?", "…")) else message + ".", hint)


def printable(text: str) -> str:
    """`text` without what could steer a terminal: controls, newlines, bidirectional marks."""
    return "".join(c if c.isprintable() else "?" for c in text)


class Cursor:
    """Takes little-endian values off a stream, reading it in large pieces and only as needed."""

    def __init__(self, stream: BinaryIO, file_bytes: int, name: str) -> None:
        self.stream = stream
        self.file_bytes = file_bytes
        self.name = name
        self.buffer = bytearray()
        self.at = 0

    def refuse(self, reason: str, hint: str = "") -> ModelFileError:
        return refusal(self.name, reason, hint)

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
