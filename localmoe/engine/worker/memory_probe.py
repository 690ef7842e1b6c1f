"""What a placement would take, by llama.cpp's own reckoning: all laid out, nothing allocated.

Under no_alloc a load and a context take tens of milliseconds. The sizes come from llama.cpp's log,
rounded to 0.01 MiB: its own structure for them is C++ and has no stable layout
(src/llama-context.cpp, src/llama-kv-cache.cpp).
"""

from __future__ import annotations

import re
from collections import defaultdict

from ..native import llama
from ..protocol import BufferSizes, Placement
from .model import load_model, open_context

COMPUTE = re.compile(r"(\S+)\s+compute buffer size\s+=\s+([\d.]+) MiB")
OUTPUT = re.compile(r"(\S+)\s+output buffer size\s+=\s+([\d.]+) MiB")
CACHE = re.compile(r"^(llama_kv_cache|llama_memory_recurrent)\w*: size =\s+([\d.]+) MiB")
MIB = 1 << 20


def probe(path: str, placement: Placement) -> BufferSizes:
    """Sizes of the buffers of a placement, in bytes. Raises NativeError where llama.cpp refuses."""
    model = load_model(path, placement, no_alloc=True)
    lines: list[str] = []
    try:
        with llama.overheard(lines):
            context = open_context(model, placement)
        context.free()
    finally:
        model.free()
    return sizes_in("".join(lines).splitlines())


def sizes_in(lines: list[str]) -> BufferSizes:
    """The sizes that a log of making a context tells; caches of several kinds are summed.

    Raises NativeError where the log tells of no compute buffer: every context has one, so this
    llama.cpp words it otherwise, and 0 would count as measured.
    """
    by_device: dict[str, dict[str, int]] = {"compute": defaultdict(int), "output": defaultdict(int)}
    cache_bytes = 0
    for line in lines:
        for kind, pattern in (("compute", COMPUTE), ("output", OUTPUT)):
            if match := pattern.search(line):
                by_device[kind][match[1]] += round(float(match[2]) * MIB)
        if match := CACHE.search(line):
            cache_bytes += round(float(match[2]) * MIB)
    if not any(by_device["compute"].values()):
        raise llama.NativeError("llama.cpp's log does not tell how large its buffers are")
    return BufferSizes(dict(by_device["compute"]), dict(by_device["output"]), cache_bytes)
