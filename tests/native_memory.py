"""llama.cpp's own account of a placement, to the byte, for tests.

`llama_get_memory_breakdown` (src/llama-ext.h) is C++ and gives a std::map; on Linux its tree can be
walked as libstdc++ lays it out. Where the symbol or that library is absent, tests skip.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from llama_cpp import llama_cpp as native

from localmoe.engine.native import llama
from localmoe.engine.protocol import KvType, Placement
from localmoe.engine.worker.model import load_model, open_context

SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context"
# std::_Rb_tree_node<pair<buft, data>>: colour, parent, left, right, then the pair
LEFT, RIGHT, KEY, MODEL, CONTEXT, COMPUTE = 2, 3, 4, 5, 6, 7
ROOT = 2  # in the map itself: comparator, the header's colour, its parent, which is the root
_Words = ctypes.c_uint64


@dataclass(frozen=True)
class NativeMemory:
    """Bytes of one buffer type: weights, caches and states, compute buffer."""

    weights: int
    cache: int
    compute: int


def native_memory(path: str, placement: Placement) -> dict[str, NativeMemory]:
    """What llama.cpp would take of each buffer type, with nothing allocated."""
    breakdown = _breakdown()
    llama.log_to(lambda level, text: None)
    model = load_model(path, placement, no_alloc=True)
    try:
        context = open_context(model, placement)
        try:
            tree = (_Words * 6)()
            breakdown(ctypes.addressof(tree), context.handle)
            return dict(_nodes(tree[ROOT]))
        finally:
            context.free()
    finally:
        model.free()


def _breakdown() -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    function = getattr(native._lib, SYMBOL, None) if sys.platform == "linux" else None
    if function is None:
        pytest.skip("this build does not tell its memory")
    # a class is returned through a hidden first argument (Itanium C++ ABI)
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p]
    native._lib.ggml_backend_buft_name.restype = ctypes.c_char_p
    native._lib.ggml_backend_buft_name.argtypes = [ctypes.c_void_p]
    return function


def _nodes(address: int) -> Iterator[tuple[str, NativeMemory]]:
    if not address:
        return
    node = (_Words * 8).from_address(address)
    yield from _nodes(node[LEFT])
    name = native._lib.ggml_backend_buft_name(node[KEY]).decode()
    yield name, NativeMemory(node[MODEL], node[CONTEXT], node[COMPUTE])
    yield from _nodes(node[RIGHT])


# ---- what was recorded ----

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Recorded:
    """Bytes that llama.cpp told for one model on a CPU; `n_ctx` is one sequence's."""

    n_ctx: int
    kv_type: KvType
    n_ubatch: int
    n_seq: int
    weights: int
    cache: int
    compute: int


def recorded(name: str) -> list[Recorded]:
    """Every figure of a published shape in data/native_memory.txt."""
    fields = [line.split() for line in rows_of("native_memory.txt") if line.startswith(name + " ")]
    return [Recorded(int(f[1]), cast(KvType, f[2]), *map(int, f[3:])) for f in fields]


@dataclass(frozen=True)
class RecordedGpus:
    """What CUDA told: RAM's memory and each GPU's, `n_first` layers being on the first one."""

    name: str
    n_gpus: int
    tag: str
    n_gpu_layers: int
    n_first: int
    n_ctx: int
    n_ubatch: int
    ram: NativeMemory
    gpus: tuple[NativeMemory, ...]


def recorded_gpus() -> list[RecordedGpus]:
    """Every figure in data/cuda_memory.txt."""
    return [_gpus_of(line.split()) for line in rows_of("cuda_memory.txt")]


def _gpus_of(f: list[str]) -> RecordedGpus:
    ram, *gpus = (NativeMemory(*map(int, part.split("/"))) for part in f[7:])
    numbers = list(map(int, f[3:7]))
    return RecordedGpus(f[0], int(f[1]), f[2], *numbers, ram, tuple(gpus))


def rows_of(file: str) -> list[str]:
    lines = (DATA / file).read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]
