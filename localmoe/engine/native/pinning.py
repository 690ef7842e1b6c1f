"""Pins experts in place: locks pages of the mapped model file, so that a GPU copies fast.

llama.cpp's own pinned loading allocates new pinned memory (1.5 to 2.5 GB/s) and reads the file into
it with one thread. The pages are in RAM already, as the mapping: registering them goes at some
30 GB/s, needs no second copy, and leaves what the CPU computes with untouched. A backend offers it
as `ggml_backend_register_host_buffer` (ggml-cuda.cu), when GGML_CUDA_REGISTER_HOST is set.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...files import open_regular
from ..protocol import FileSpan

MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, slots=True)
class Mapping:
    """Part of a file in this process's memory: `n_bytes` from `start` on lie at `address`."""

    path: str
    address: int
    start: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class HostMemory:
    """A backend's two functions: lock pages for its devices, and let them go."""

    register: Callable[[int, int], bool]
    unregister: Callable[[int], None]


class PinnedPages:
    """What is registered of a model's mapping: nothing without `memory`. Release it before the
    mapping goes."""

    def __init__(self, memory: HostMemory | None = None) -> None:
        self._memory = memory
        self._held: dict[FileSpan, int] = {}

    @property
    def n_bytes(self) -> int:
        """Bytes that a GPU copies at full speed."""
        return sum(span.n_bytes for span in self._held)

    def pin(self, spans: Iterable[FileSpan]) -> None:
        """Register spans; one that the driver refuses stays as it is, and is copied slowly."""
        if self._memory is None:
            return
        mappings = list(mapped())
        for span in joined(spans):
            address = address_of(span, mappings)
            if address is not None and self._memory.register(address, span.n_bytes):
                self._held[span] = address

    def release(self) -> None:
        """Unlocks all pages."""
        for address in self._held.values():
            assert self._memory is not None
            self._memory.unregister(address)
        self._held.clear()


def joined(spans: Iterable[FileSpan]) -> list[FileSpan]:
    """Spans in order, those that share a page made one.

    A copy may not reach over two registrations (cudaErrorInvalidValue), so none divides a tensor.
    """
    result: list[FileSpan] = []
    for span in sorted(spans, key=lambda span: (span.path, span.start)):
        last = result[-1] if result else None
        if last and last.path == span.path and span.start - _end(last) < mmap.PAGESIZE:
            result[-1] = FileSpan(last.path, last.start, max(_end(last), _end(span)) - last.start)
        else:
            result.append(span)
    return result


def mapped(maps: Path = MAPS) -> Iterator[Mapping]:
    """Files mapped into this process; nothing where the system does not tell (Linux does)."""
    try:
        lines = maps.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5].startswith("/"):
            first, last = (int(edge, 16) for edge in fields[0].split("-"))
            # the kernel writes a newline in a name as \012, and nothing else so
            path = fields[5].replace("\\012", "\n")
            yield Mapping(path, first, int(fields[2], 16), last - first)


def address_of(span: FileSpan, mappings: Iterable[Mapping]) -> int | None:
    """Where all of a span lies in memory."""
    path = os.path.realpath(span.path)
    for mapping in mappings:
        offset = span.start - mapping.start
        if mapping.path == path and offset >= 0 and offset + span.n_bytes <= mapping.n_bytes:
            return mapping.address + offset
    return None


def can_pin(memory: HostMemory, path: str) -> bool:
    """Whether a page of this very file can be registered: the driver, its version and the file
    system all have a say, and asking costs nothing. `path` must not be empty."""
    with open_regular(Path(path)) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        address = next((m.address for m in mapped() if m.path == os.path.realpath(path)), None)
        if address is None or not memory.register(address, mmap.PAGESIZE):
            return False
        memory.unregister(address)
        return True


def _end(span: FileSpan) -> int:
    return span.start + span.n_bytes
