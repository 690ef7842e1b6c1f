"""Messages as bytes: JSON in a frame of a four-byte big-endian length and that many bytes of UTF-8.

Never pickle: the engine reads untrusted files.
"""

from __future__ import annotations

import struct
from typing import Annotated, BinaryIO

from pydantic import Field, TypeAdapter

from .protocol import Message

MAX_FRAME_BYTES = 256 * 1024 * 1024
_LENGTH = struct.Struct(">I")
_codec: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


class ProtocolError(Exception):
    """Bytes that are not a message."""


def encode(message: Message) -> bytes:
    """A message as a frame."""
    payload = _codec.dump_json(message, exclude_defaults=False)
    return _LENGTH.pack(len(payload)) + payload


def read(stream: BinaryIO) -> Message | None:
    """The next message of a blocking stream; None at its end.

    Raises ProtocolError where a frame is cut short, too large or not a message.
    """
    head = stream.read(_LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise ProtocolError("a frame was cut short")
    (n_bytes,) = _LENGTH.unpack(head)
    if n_bytes > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {n_bytes} bytes; at most {MAX_FRAME_BYTES} are allowed")
    payload = stream.read(n_bytes)
    if len(payload) < n_bytes:
        raise ProtocolError("a frame was cut short")
    try:
        return _codec.validate_json(payload)
    except ValueError as error:
        raise ProtocolError(f"not a message: {error}") from error
