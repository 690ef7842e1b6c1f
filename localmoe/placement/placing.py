"""A layout as the explicit values that an engine loads by, in llama.cpp's own counting. Pure."""

from __future__ import annotations

from typing import Literal

from ..engine.protocol import Placement
from .fill import Layout
from .hardware import Machine
from .sizes import FLOATS, Sizes


def placement_of(machine: Machine, sizes: Sizes, layout: Layout) -> Placement:
    """The explicit values that an engine loads by."""
    request = sizes.request
    cpu_layers, cpu_tensors = cpu_experts_of(sizes, layout)
    return Placement(
        n_threads=request.n_threads or machine.n_cores,
        n_gpu_layers=native_layers(sizes, layout),
        cpu_expert_layers=cpu_layers,
        cpu_expert_tensors=cpu_tensors,
        tensor_split=tensor_split(sizes, layout) if len(machine.gpus) > 1 else (),
        n_ctx=sizes.n_ctx,
        n_seq=request.n_seq,
        kv_unified=request.n_cells > 0,
        n_cells=request.n_cells,
        kv_type=request.kv_type,
        n_batch=request.n_ubatch,
        n_ubatch=request.n_ubatch,
        load_mode="pinned" if request.load_mode == "pinned" else "mmap",
        flash_attention=flash_attention(sizes),
        alike=sizes.is_alike,
    )


def flash_attention(sizes: Sizes) -> Literal["auto", "on", "off"]:
    """A quantized cache needs it. Where answers are to be alike it may not choose its kernel by the
    number of tokens, which llama.cpp's does on the CPU for other caches."""
    if sizes.request.kv_type not in FLOATS:
        return "on"
    return "off" if sizes.is_alike else "auto"


def cpu_experts_of(sizes: Sizes, layout: Layout) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Layers whose experts all stay in RAM though the layer doesn't, and single such tensors."""
    if not layout.n_gpu_layers:
        return (), ()
    if sizes.request.n_cpu_moe is not None:
        return tuple(range(min(sizes.request.n_cpu_moe, len(sizes.layers)))), ()
    on_gpu = sizes.layers[len(sizes.layers) + 1 - layout.n_gpu_layers :]
    in_ram = {
        n.index: [name for name, _ in n.experts if name in layout.cpu_experts] for n in on_gpu
    }
    n_experts = sizes.n_experts()
    whole = tuple(n for n, names in in_ram.items() if names and len(names) == n_experts[n])
    single = [name for n, names in in_ram.items() if n not in whole for name in names]
    return whole, sizes.tensors_of(single)


def native_layers(sizes: Sizes, layout: Layout) -> int:
    """n_gpu_layers as llama.cpp counts: layers for drafting stand before the output."""
    asked, n = sizes.request.n_gpu_layers, layout.n_gpu_layers
    if n == 0:
        return 0
    n_all = n + sizes.meta.n_nextn_layers
    return min(asked, n_all) if isinstance(asked, int) else n_all


def tensor_split(sizes: Sizes, layout: Layout) -> tuple[float, ...]:
    """Shares of the layers for llama.cpp: of those on GPUs, number i of n goes to the first GPU
    whose cumulated share is above i/n (upper_bound in load_tensors, src/llama-model.cpp)."""
    split = list(map(float, layout.split))
    if split:
        last = max(i for i, n in enumerate(split) if n)
        split[last] += native_layers(sizes, layout) - layout.n_gpu_layers
    return tuple(split)
