"""Early Mixtral files, which llama.cpp no longer loads, become files that run.

Laid end to end in the order of their numbers, the experts' bytes are the merged tensor of today's
files: rows of a quant end with an expert. Routers become F32, as converters write them today; in
half precision llama.cpp would round what goes in. All else stays as it is.

`plan_conversion(path)` reads headers and refuses what would not run; `convert` copies.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import __version__
from ..errors import LocalMoeError, ModelFileError, UsageError, gib
from .cursor import refusal
from .early import EarlyLayout, check_rope_base, early_layout
from .gguf import Header, RawTensor, read_header
from .gguf_writer import encode_header, lay_out, padded, raw_entries, text_entry
from .meta import ModelMeta, meta_of, read_meta
from .tensors import TensorInfo
from .unfinished import Unfinished

BY, FROM = "general.converted.by", "general.converted.from"
CHUNK_BYTES = 2**20  # docs/notes/convert.md
KERNEL_BYTES = 2**24  # a Ctrl-C is answered between two of these


@dataclass(frozen=True, slots=True)
class Span:
    """A run of bytes of a file."""

    path: Path
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A row of the new tensor table and the bytes that become it, in order.

    `from_type` is another type than the row's where values must be widened.
    """

    row: RawTensor
    sources: tuple[Span, ...]
    from_type: str

    @property
    def is_merged(self) -> bool:
        return len(self.sources) > 1

    @property
    def is_widened(self) -> bool:
        return self.from_type != self.row.type


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion, decided to the byte. `meta` is the source's; `n_bytes` the new file's length.

    `warnings` are sentences about what can be converted and may still be wrong.
    """

    meta: ModelMeta
    tensors: tuple[OutputTensor, ...]
    header: bytes
    alignment: int
    n_bytes: int
    warnings: tuple[str, ...]


def plan_conversion(path: Path | str) -> Conversion:
    """What becomes of the early file at `path`, from its headers alone; any shard may be named.

    Raises ModelFileError for what needs no conversion, and for what would not run after it.
    """
    meta = read_meta(path)
    layout = early_layout(meta)
    header, entries = _read_entries(meta.paths[0])
    warnings = check_rope_base(header)
    planned = tuple(_outputs(meta, layout))
    rows = lay_out((t.row for t in planned), header.alignment)
    tensors = tuple(replace(t, row=row) for row, t in zip(rows, planned, strict=True))
    head = encode_header(header.version, _kept(entries, meta), rows, header.alignment)
    n_bytes = len(head) + padded(rows[-1].offset + rows[-1].n_bytes, header.alignment)
    meta_of([read_header(io.BytesIO(head), n_bytes, header.name)])  # what it refuses can't run
    return Conversion(meta, tensors, head, header.alignment, n_bytes, warnings)


def convert(
    conversion: Conversion,
    target: Path,
    on_progress: Callable[[int], None] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write the new file beside its final name, and give it that name when all of it is on disk.

    `on_progress` is given the bytes written so far. `check` is given the finished file before it
    gets its name; what it raises ends the conversion. Whatever ends it, nothing is left behind;
    what a killed process left is replaced. The source is only read. Raises UsageError where
    `target` exists, LocalMoeError where there is no room for it or a disk fails.
    """
    try:
        if target.exists() or target.is_symlink():
            raise UsageError(
                f"{target} exists already.", "Remove it, or take another name: -o FILE"
            )
        with Unfinished(target) as unfinished:
            _check_room(conversion, target)
            _write(conversion, unfinished.file, on_progress or (lambda n_bytes: None))
            unfinished.complete()
            if check:
                check(unfinished.path)
            unfinished.rename()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        hint = "Try: -o FILE in another folder or on another disk"
        raise LocalMoeError(f"{target} can't be written: {reason}.", hint) from None


def _read_entries(path: Path) -> tuple[Header, dict[str, bytes]]:
    try:
        with path.open("rb") as stream:
            header = read_header(stream, name=path.name)
            return header, raw_entries(stream, header)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ModelFileError:
    return refusal(path.name, f"can't be read: {error.strerror or type(error).__name__}")


def _check_room(conversion: Conversion, target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < conversion.n_bytes:
        needed = f"{target.name} needs {gib(conversion.n_bytes)} of disk"
        raise LocalMoeError(f"{needed}; {gib(free)} are free.", "Try: -o FILE on another disk")


# ---- what becomes of it ------------------------------------------------------------------------


def _outputs(meta: ModelMeta, layout: EarlyLayout) -> Iterator[OutputTensor]:
    """In the source's order; a merged tensor takes the place of its first expert."""
    done = set()
    for t in meta.tensors:
        group = layout.groups.get(t.name)
        if group is None:
            row = RawTensor(t.name, t.type, t.shape, t.n_bytes, 0)
            if t.name in layout.routers:
                row = RawTensor(t.name, "F32", t.shape, 4 * t.n_values, 0)
            yield OutputTensor(row, (_span(meta, t),), t.type)
        elif group.name not in done:
            done.add(group.name)
            n_experts = len(group.experts)
            row = RawTensor(group.name, t.type, (*t.shape, n_experts), t.n_bytes * n_experts, 0)
            yield OutputTensor(row, tuple(_span(meta, e) for e in group.experts), t.type)


def _span(meta: ModelMeta, tensor: TensorInfo) -> Span:
    return Span(meta.paths[tensor.shard], tensor.offset, tensor.n_bytes)


def _kept(entries: Mapping[str, bytes], meta: ModelMeta) -> list[bytes]:
    """All metadata as it was, but that of shards; and where the file comes from.

    By name and length, not by hash: for a hash all of the source would be read a second time,
    and a download was held against its hash when it was made.
    """
    dropped = {BY, FROM, *(key for key in entries if key.startswith("split."))}
    kept = [raw for key, raw in entries.items() if key not in dropped]
    shards = f" ({len(meta.paths)} shards)" if len(meta.paths) > 1 else ""
    origin = f"{meta.paths[0].name}{shards}, {meta.file_bytes:,} bytes"
    what = f"localmoe {__version__}: experts merged, routers in F32"
    return [*kept, text_entry(BY, what), text_entry(FROM, origin)]


# ---- copying -----------------------------------------------------------------------------------


def _write(conversion: Conversion, out: BinaryIO, report: Callable[[int], None]) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    n_done = out.write(conversion.header)
    with ExitStack() as stack:
        files = {p: stack.enter_context(_open(p)) for p in conversion.meta.paths}
        following = (span for tensor in conversion.tensors for span in tensor.sources)
        next(following)
        for tensor in conversion.tensors:
            for span in tensor.sources:
                if soon := next(following, None):
                    _foretell(files[soon.path], soon)
                file = files[span.path]
                if not tensor.is_widened:
                    n_moved = _moved(file, span, out, n_done, report)
                    n_done += n_moved
                    span = replace(
                        span, offset=span.offset + n_moved, n_bytes=span.n_bytes - n_moved
                    )
                for piece in _pieces(file, span, buffer):
                    values = widened(piece, tensor.from_type) if tensor.is_widened else piece
                    n_done += out.write(values)
                    report(n_done)
            n_bytes = tensor.row.n_bytes
            n_done += out.write(bytes(padded(n_bytes, conversion.alignment) - n_bytes))


def _open(path: Path) -> io.FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from None


def _foretell(file: io.FileIO, span: Span) -> None:
    """Have the disk read it while what comes before it is copied (docs/notes/convert.md)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), span.offset, span.n_bytes, os.POSIX_FADV_WILLNEED)


def _moved(
    file: io.FileIO, span: Span, out: BinaryIO, at: int, report: Callable[[int], None]
) -> int:
    """Have the kernel copy the span to `at`; gives how many bytes it did, 0 where it can't.

    What it stops at, whatever the reason, is for reading and writing to meet again and to tell.
    """
    n_moved = 0
    if hasattr(os, "copy_file_range"):
        out.flush()
        with contextlib.suppress(OSError):
            while left := span.n_bytes - n_moved:
                places = span.offset + n_moved, at + n_moved
                n = os.copy_file_range(
                    file.fileno(), out.fileno(), min(left, KERNEL_BYTES), *places
                )
                if not n:
                    break
                n_moved += n
                report(at + n_moved)
        out.seek(at + n_moved)
    return n_moved


def _pieces(file: io.FileIO, span: Span, buffer: memoryview) -> Iterator[memoryview]:
    """The span's bytes, a buffer at a time; each piece is overwritten by the next."""
    file.seek(span.offset)
    left = span.n_bytes
    while left:
        piece = buffer[: min(len(buffer), left)]
        _fill(piece, file, span.path)
        yield piece
        left -= len(piece)


def _fill(piece: memoryview, file: io.FileIO, path: Path) -> None:
    n_read = 0
    while n_read < len(piece):
        try:
            n = file.readinto(piece[n_read:])
        except OSError as error:
            raise _unreadable(path, error) from None
        if not n:
            raise refusal(path.name, "was cut short while it was read")
        n_read += n


def widened(raw: memoryview, from_type: str) -> memoryview:
    """Values of half precision (F16 or BF16) as F32, none of them changed."""
    if from_type == "F16":
        values = np.frombuffer(raw, "<f2").astype("<f4")
    else:
        values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return values.view(np.uint8).data
