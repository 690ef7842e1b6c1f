"""Merges early Mixtral files, a tensor for each expert, into what llama.cpp loads today.

Files of December 2023 to April 2024 have it (llama.cpp's pull requests 4406 and 6387). Laid end to
end in the order of their numbers, the experts' bytes are the merged tensor of today's files: rows
of a quant end with an expert. Routers in half precision become F32, as converters write them today;
llama.cpp would round what goes into them. All else stays as it is.

`plan_conversion(path)` reads headers and refuses what would not run; `convert` copies.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import __version__
from ..errors import LocalMoeError, ModelFileError, UsageError, gib, model_file_error
from ..files import (
    atomic_file,
    open_regular,
    open_regular_unbuffered,
    remove_temporaries,
    sync,
)
from .model_meta import ModelMeta, meta_of, read_meta
from .reader import Header, RawTensor, read_header
from .tensors import SPLIT_EXPERT, TensorInfo
from .writer import encode_header, padded, raw_entries, tensor_offsets, text_entry

# wider than the names that llama.cpp knows: nothing that looks like experts may be left over
UNMERGEABLE = re.compile(r"^blk\.\d+\.ffn_(?:(?:gate|up|down)\.|\w+_exps\.)")
KINDS = ("gate", "up", "down")
ROUTER_TYPES = ("F32", "F16", "BF16")
ROPE_BASE = "llama.rope.freq_base"
MIXTRAL_ROPE_BASE = 1e6
NEWER = "Take a version made after April 2024: localmoe list"


@dataclass(frozen=True, slots=True)
class Group:
    """The experts of one layer and kind, in the order of their numbers, and their merged name."""

    name: str
    experts: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class EarlyLayout:
    """Which group each expert's tensor belongs to, by its name, and the routers' names."""

    groups: Mapping[str, Group]
    routers: frozenset[str]


def early_layout(meta: ModelMeta) -> EarlyLayout:
    """The experts and routers of an early file.

    Raises ModelFileError where it is of another layout, and where merging would give a file that
    doesn't run or talks nonsense.
    """
    _check_kind_of_file(meta)
    groups = {t.name: group for group in _groups(meta) for t in group.experts}
    tensors = {t.name: t for t in meta.tensors}
    routers = [f"blk.{layer}.ffn_gate_inp.weight" for layer in range(meta.n_layers)]
    for name in routers:
        _check_router(meta, name, tensors.get(name))
    return EarlyLayout(groups, frozenset(routers))


def check_rope_base(header: Header) -> tuple[str, ...]:
    """Warnings about the base of positions. Raises ModelFileError where there is none.

    Then llama.cpp would take 10,000, and a Mixtral loses the thread. Another base than Mixtral's
    is kept: experts made of Mistral 7B have 10,000 by right.
    """
    base = header.kv.get(ROPE_BASE)
    if not isinstance(base, float) or base <= 0:
        reason = f"no {ROPE_BASE} in its header; a Mixtral's is {MIXTRAL_ROPE_BASE:,.0f}"
        raise model_file_error(header.name, reason, NEWER)
    if base == MIXTRAL_ROPE_BASE:
        return ()
    return (f"{ROPE_BASE} is {base:,.0f} and kept; a Mixtral's is {MIXTRAL_ROPE_BASE:,.0f}.",)


def _refuse(meta: ModelMeta, reason: str, hint: str = NEWER) -> ModelFileError:
    return model_file_error(meta.paths[0].name, reason, hint)


def _check_kind_of_file(meta: ModelMeta) -> None:
    names = [t.name for t in meta.tensors]
    if not any(map(SPLIT_EXPERT.match, names)):
        what = "its experts are merged already" if meta.is_moe else "it has no experts"
        raise _refuse(meta, f"needs no conversion: {what}", "Try: localmoe run FILE")
    if meta.architecture != "llama":
        reason = f"of an early layout of {meta.architecture[:20]}; only Mixtral's can be converted"
        raise _refuse(meta, reason)
    if not meta.n_experts:
        raise _refuse(meta, "damaged: no llama.expert_count in its header")
    for name in names:
        if UNMERGEABLE.match(name) and not SPLIT_EXPERT.match(name):
            raise _refuse(meta, f"damaged: {name} stands beside separate experts")


def _groups(meta: ModelMeta) -> list[Group]:
    found: defaultdict[tuple[int, str], list[tuple[int, TensorInfo]]] = defaultdict(list)
    for tensor in meta.tensors:
        if match := SPLIT_EXPERT.match(tensor.name):
            found[int(match[1]), match[2]].append((int(match[3]), tensor))
    wanted = {(layer, kind) for layer in range(meta.n_layers) for kind in KINDS}
    for layer, kind in sorted(wanted ^ found.keys()):
        what = "no" if (layer, kind) in wanted else "unexpected"
        raise _refuse(meta, f"damaged: {what} ffn_{kind} experts in layer {layer}")
    return [_group(meta, layer, kind, found[layer, kind]) for layer, kind in sorted(wanted)]


def _group(meta: ModelMeta, layer: int, kind: str, found: list[tuple[int, TensorInfo]]) -> Group:
    # by number: files have them in any order
    found.sort(key=lambda item: item[0])
    if [number for number, _ in found] != list(range(meta.n_experts)):
        numbers = f"not one each from 0 to {meta.n_experts - 1}"
        raise _refuse(meta, f"damaged: the ffn_{kind} experts of layer {layer} are {numbers}")
    experts = tuple(tensor for _, tensor in found)
    types = sorted({expert.type for expert in experts})
    if len(types) > 1:
        # some builds of llama.cpp from 11 to 14 January 2024 (its pull request 4927)
        where = f"the ffn_{kind} experts of layer {layer}"
        raise _refuse(meta, f"{where} differ in type ({', '.join(types)}), so it never worked")
    sides = (meta.n_ff, meta.n_embd) if kind == "down" else (meta.n_embd, meta.n_ff)
    for expert in experts:
        _check_shape(meta, expert, sides)
    return Group(f"blk.{layer}.ffn_{kind}_exps.weight", experts)


def _check_router(meta: ModelMeta, name: str, router: TensorInfo | None) -> None:
    if router is None:
        raise _refuse(meta, f"damaged: no {name}")
    if router.type not in ROUTER_TYPES:
        raise _refuse(meta, f"{name} is of type {router.type}, expected F16 or F32")
    _check_shape(meta, router, (meta.n_embd, meta.n_experts))


def _check_shape(meta: ModelMeta, tensor: TensorInfo, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        shapes = f"{list(tensor.shape)}, expected {list(expected)}"
        raise _refuse(meta, f"damaged: {tensor.name} has the shape {shapes}")


BY, FROM = "general.converted.by", "general.converted.from"
CHUNK_BYTES = 2**20  # docs/notes/convert.md
KERNEL_BYTES = 2**24  # a Ctrl-C is answered between two of these


@dataclass(frozen=True, slots=True)
class ByteRange:
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
    sources: tuple[ByteRange, ...]
    from_type: str

    @property
    def is_merged(self) -> bool:
        """Whether it is made of the tensors of several experts."""
        return len(self.sources) > 1

    @property
    def is_widened(self) -> bool:
        """Whether it gets a type of more bits."""
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
    rows = tensor_offsets((t.row for t in planned), header.alignment)
    tensors = tuple(replace(t, row=row) for row, t in zip(rows, planned, strict=True))
    head = encode_header(header.version, _kept(entries, meta), rows, header.alignment)
    n_bytes = len(head) + padded(rows[-1].offset + rows[-1].n_bytes, header.alignment)
    meta_of([read_header(io.BytesIO(head), n_bytes, header.name)])  # what it refuses can't run
    return Conversion(meta, tensors, head, header.alignment, n_bytes, warnings)


def merge_experts(
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
        remove_temporaries(target)
        with atomic_file(target, durable=True, replace=False) as file:
            _check_room(conversion, target)
            _write(conversion, file, on_progress or (lambda n_bytes: None))
            file.flush()
            sync(file.fileno())
            if check:
                check(Path(file.name))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        hint = "Try: -o FILE in another folder or on another disk"
        raise LocalMoeError(f"{target} can't be written: {reason}.", hint) from None


def _read_entries(path: Path) -> tuple[Header, dict[str, bytes]]:
    try:
        with open_regular(path) as stream:
            header = read_header(stream, name=path.name)
            return header, raw_entries(stream, header)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ModelFileError:
    return model_file_error(path.name, f"can't be read: {error.strerror or type(error).__name__}")


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


def _span(meta: ModelMeta, tensor: TensorInfo) -> ByteRange:
    return ByteRange(meta.paths[tensor.shard], tensor.offset, tensor.n_bytes)


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
        return open_regular_unbuffered(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _foretell(file: io.FileIO, span: ByteRange) -> None:
    """Have the disk read it while what comes before it is copied (docs/notes/convert.md)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), span.offset, span.n_bytes, os.POSIX_FADV_WILLNEED)


def _moved(
    file: io.FileIO, span: ByteRange, out: BinaryIO, at: int, report: Callable[[int], None]
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


def _pieces(file: io.FileIO, span: ByteRange, buffer: memoryview) -> Iterator[memoryview]:
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
            raise model_file_error(path.name, "was cut short while it was read")
        n_read += n


def widened(raw: memoryview, from_type: str) -> memoryview:
    """Values of half precision (F16 or BF16) as F32, none of them changed."""
    if from_type == "F16":
        values = np.frombuffer(raw, "<f2").astype("<f4")
    else:
        values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return values.view(np.uint8).data
