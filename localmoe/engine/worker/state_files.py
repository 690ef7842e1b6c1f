"""States of sequences in files: what a cache holds of some tokens, to be held again later.

A file is, in this machine's byte order:

    magic, checksum of all that follows up to the data     8 + 4 bytes
    length of the head, number of tokens, length of data   4 + 4 + 8 bytes
    head: JSON of what a model must agree with             as long as it says
    tokens, checksums of the data's blocks                 4 bytes each
    data, from the next multiple of 4096 on                llama_state_seq_get_data's

llama.cpp believes what it is given, so nothing reaches it that is not as it was written: every
block has its CRC-32, taken by several threads at the speed of memory. The data is written from the
cache into the mapped file, and from there into the cache again, with no copy between.

A recurrent state can't be cut, and of a sliding window llama.cpp writes only what is in sight of
the last token. Such a state is of use to a prompt that begins with all of its tokens, as that of a
chat that goes on does; model.keep sees to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import struct
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ...files import atomic_file, open_regular
from ..native.llama import ggml
from ..prefix import MIN_SHARED_TOKENS, common_prefix
from .kv_slots import KvSlots
from .model import NativeModel

MAGIC = b"LMSTATE1"
FRONT = struct.Struct("=8sIIIQ")
CHECKED_FROM = 12  # the front, behind the checksum
ALIGN = 4096
BLOCK_BYTES = 4 << 20
MAX_HEAD_BYTES = 1 << 16
MAX_FRONT_BYTES = 256 << 20


class StateMismatch(Exception):
    """A state that can't be written, or doesn't suit; the message says why."""


class StateFiles:
    """Takes states of a model's sequences to files and back. Nothing it does raises an error: what
    can't be is 0 tokens and a reason."""

    def __init__(self, model: NativeModel, slots: KvSlots) -> None:
        self._model = model
        self._slots = slots

    def save(
        self, path: Path, key: str, tokens: tuple[int, ...], room_bytes: int
    ) -> tuple[int, int, str]:
        """Write what is held of the longest beginning of `tokens`: how many those are, the bytes
        of the file, and why there is none."""
        try:
            return self._save(path, key, tokens, room_bytes)
        except StateMismatch as error:
            return 0, 0, str(error)
        except OSError as error:
            return 0, 0, f"{path} can't be written: {error.strerror}"

    def restore(self, path: Path, key: str) -> tuple[int, str]:
        """Hold again what a file has: how many tokens, and why none."""
        try:
            with open_regular(path) as file, contextlib.closing(open_state(file)) as state:
                state.check(key, state_layout_of(self._model))
                if len(state.tokens) >= self._model.n_ctx:
                    raise StateMismatch(
                        f"{len(state.tokens)} tokens are more than the context holds"
                    )
                state.check_data()
                return self._hold(state), ""
        except StateMismatch as error:
            return 0, str(error)
        except OSError as error:
            return 0, f"{path} can't be read: {error.strerror}"

    def _save(
        self, path: Path, key: str, tokens: tuple[int, ...], room_bytes: int
    ) -> tuple[int, int, str]:
        context, held = self._model.context, self._slots.free
        n_held = {n: common_prefix(found, tokens) for n, found in held.items()}
        sequence = max(n_held, key=lambda n: n_held[n], default=-1)
        n_tokens = n_held.get(sequence, 0)
        if n_tokens < MIN_SHARED_TOKENS:
            raise StateMismatch(f"only {n_tokens} of its tokens are held")
        can_cut = self._model.can_share and context.first_position(sequence) == 0
        if n_tokens < len(held[sequence]) and not can_cut:
            raise StateMismatch(f"what is held can't be cut to the {n_tokens} tokens in common")
        self._slots.shorten(sequence, n_tokens)
        data_bytes = ggml.llama_state_seq_get_size(context.handle, sequence)
        layout = StateFileLayout.of(
            key, state_layout_of(self._model), tokens[:n_tokens], data_bytes
        )
        if layout.n_bytes > room_bytes:
            return 0, layout.n_bytes, "there is no room for it"

        def fill(whole: npt.NDArray[np.uint8]) -> None:
            data = whole[layout.data_at :]
            n_written = ggml.llama_state_seq_get_data(
                context.handle, _pointer(data), data_bytes, sequence
            )
            if n_written != data_bytes:
                raise StateMismatch(f"llama.cpp gave {n_written} bytes of {data_bytes}")
            front = layout.front(checksums(data))
            whole[: len(front)] = np.frombuffer(front, np.uint8)

        write_file(path, layout.n_bytes, fill)
        return n_tokens, layout.n_bytes, ""

    def _hold(self, state: OpenStateFile) -> int:
        """Let a free sequence have it, at the cost of what that holds. Raises Unfit."""
        context = self._model.context

        def fill(sequence: int) -> bool:
            taken = ggml.llama_state_seq_set_data(
                context.handle, _pointer(state.data), len(state.data), sequence
            )
            is_all = context.last_position(sequence) == len(state.tokens) - 1
            return bool(taken == len(state.data)) and is_all

        if not self._slots.fill(state.tokens, fill):
            raise StateMismatch("llama.cpp refused it")
        return len(state.tokens)


def state_layout_of(model: NativeModel) -> dict[str, Any]:
    """All that a state's bytes depend on beside the model's file.

    Not the size of the context, unless its rotary factors are others for a longer one (llama.cpp,
    src/llama-model.cpp, get_rope_factors). Whether V is transposed the data says itself, where
    flash attention is for llama.cpp to choose.
    """
    place = model.placement
    return {
        "build": version("llama_cpp_python"),
        "byte_order": sys.byteorder,
        "kv_type": place.kv_type,
        "flash_attention": place.flash_attention,
        "n_streams": 1 if place.kv_unified else place.n_seq,
        "is_long": _is_long(model),
    }


def _is_long(model: NativeModel) -> bool:
    handle = ggml.llama_get_model(model.context.handle)
    architecture = _fact(handle, "general.architecture")
    n_trained = _fact(handle, f"{architecture}.rope.scaling.original_context_length")
    return n_trained.isdigit() and 0 < int(n_trained) < model.context.n_ctx


def _fact(handle: Any, name: str) -> str:
    """A value of the model's header as text; empty where there is none."""
    text = ctypes.create_string_buffer(256)
    found = ggml.llama_model_meta_val_str(handle, name.encode(), text, len(text))
    return text.value.decode("utf-8", "replace") if found >= 0 else ""


# ---- files ----


@dataclass(frozen=True, slots=True)
class StateFileLayout:
    """Where things lie in a file that is about to be written."""

    head: bytes
    tokens: bytes
    data_at: int
    data_bytes: int

    @classmethod
    def of(
        cls, key: str, layout: dict[str, Any], tokens: tuple[int, ...], data_bytes: int
    ) -> StateFileLayout:
        """Lays out the file of a state."""
        head = json.dumps({"key": key, "layout": layout}, sort_keys=True).encode()
        ids = np.array(tokens, np.int32).tobytes()
        return cls(head, ids, data_at(len(head), len(tokens), data_bytes), data_bytes)

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.data_at + self.data_bytes

    def front(self, sums: npt.NDArray[np.uint32]) -> bytes:
        """All that comes before the data."""
        body = self.head + self.tokens + sums.tobytes()
        fields = len(self.head), len(self.tokens) // 4, self.data_bytes
        unchecked = FRONT.pack(MAGIC, 0, *fields) + body
        checksum = zlib.crc32(unchecked[CHECKED_FROM:])
        return FRONT.pack(MAGIC, checksum, *fields) + body


def data_at(head_bytes: int, n_tokens: int, data_bytes: int) -> int:
    """Returns where the data begins behind the front of a file."""
    front = FRONT.size + head_bytes + 4 * (n_tokens + n_blocks(data_bytes))
    return -(-front // ALIGN) * ALIGN


def n_blocks(n_bytes: int) -> int:
    """Returns how many blocks with a checksum some bytes have."""
    return -(-n_bytes // BLOCK_BYTES)


@dataclass(slots=True)
class OpenStateFile:
    """A file that was opened and whose front is sound; close it."""

    head: dict[str, Any]
    tokens: list[int]
    sums: npt.NDArray[np.uint32]
    data: npt.NDArray[np.uint8]

    def check(self, key: str, layout: dict[str, Any]) -> None:
        """Raises Unfit where it is another model's, or laid out in another way."""
        if self.head.get("key") != key:
            raise StateMismatch("it is of another model file")
        found = self.head.get("layout")
        if not isinstance(found, dict) or found != layout:
            old = found if isinstance(found, dict) else {}
            names = [name for name in layout if old.get(name) != layout[name]]
            raise StateMismatch(f"it was made with another {', '.join(names) or 'layout'}")

    def check_data(self) -> None:
        """Raises Unfit where a byte is not as it was written."""
        if not np.array_equal(checksums(self.data), self.sums):
            raise StateMismatch("it is damaged")

    def close(self) -> None:
        """Lets the mapping go."""
        self.data = np.zeros(0, np.uint8)  # the mapping goes with the last who looks at it


def open_state(file: BinaryIO) -> OpenStateFile:
    """Read the front of a file and map its data. Raises Unfit for what isn't a whole state."""
    n_file = os.fstat(file.fileno()).st_size
    start = file.read(FRONT.size)
    if len(start) < FRONT.size or not start.startswith(MAGIC):
        raise StateMismatch("it is no state")
    _, checksum, n_head, n_tokens, data_bytes = FRONT.unpack(start)
    n_body = n_head + 4 * (n_tokens + n_blocks(data_bytes))
    at = data_at(n_head, n_tokens, data_bytes)
    if n_head > MAX_HEAD_BYTES or n_body > MAX_FRONT_BYTES or n_file != at + data_bytes:
        raise StateMismatch("it is cut short")
    body = file.read(n_body)
    if zlib.crc32(start[CHECKED_FROM:] + body) != checksum or not n_tokens or not data_bytes:
        raise StateMismatch("it is damaged")
    try:
        head = json.loads(body[:n_head])
    except (ValueError, RecursionError):
        raise StateMismatch("it is damaged") from None
    numbers = np.frombuffer(body, np.uint32, offset=n_head)
    tokens, sums = numbers[:n_tokens].tolist(), numbers[n_tokens:]
    whole = mmap.mmap(file.fileno(), n_file, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_WILLNEED"):
        whole.madvise(mmap.MADV_WILLNEED)
    return OpenStateFile(head, tokens, sums, np.frombuffer(whole, np.uint8, offset=at))


def checksums(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """CRC-32 of each block."""
    starts, view = range(0, len(data), BLOCK_BYTES), data.data
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # crc32 needs no Python
        sums = pool.map(lambda at: zlib.crc32(view[at : at + BLOCK_BYTES]), starts)
        return np.fromiter(sums, np.uint32, len(starts))


def write_file(path: Path, n_bytes: int, fill: Callable[[npt.NDArray[np.uint8]], None]) -> None:
    """A file of this size, mapped for `fill`, that takes the name `path` once it is on disk; until
    then, and where anything fails, what had that name stays as it was."""
    with atomic_file(path, durable=True, mode=0o600) as file:
        allocate(file, n_bytes)
        whole = mmap.mmap(file.fileno(), n_bytes)
        fill(np.frombuffer(whole, np.uint8))
        whole.flush()
        whole.close()  # Windows renames nothing that is mapped


def allocate(file: BinaryIO, n_bytes: int) -> None:
    """Take the room for a file, as a mapped page that finds none ends the process. Raises OSError
    where there isn't so much."""
    if hasattr(os, "posix_fallocate"):
        with contextlib.suppress(OSError):  # not every file system can, and zeros tell what is full
            os.posix_fallocate(file.fileno(), 0, n_bytes)
            return
    zeros = bytes(BLOCK_BYTES)
    for n_left in range(n_bytes, 0, -BLOCK_BYTES):
        file.write(zeros[:n_left])
    file.flush()


def _pointer(array: npt.NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
