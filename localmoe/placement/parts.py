"""Which tensors of a placement are multiplied where: what a forecast adds up. Pure.

The rules are llama.cpp's (load_tensors, src/llama-model.cpp): the last layers are on GPUs, the
output matrix counts as one more, overrides keep experts in RAM, embeddings are looked up there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

from ..engine.protocol import Placement
from ..engine.rates import CPU
from ..gguf.model_meta import ModelMeta, head_dims, is_windowed
from ..gguf.tensors import TensorInfo

Use: TypeAlias = Literal["dense", "experts", "output"]


@dataclass(frozen=True, slots=True)
class Part:
    """All tensors of one device, use and type together. The output matrix is used once for each
    token that is wanted, experts by the tokens that are routed to them, the rest by every token."""

    device: str
    use: Use
    type: str
    n_bytes: int
    n_values: int


@dataclass(frozen=True, slots=True)
class LayerWork:
    """A layer beside its products: where its dense part and its experts are computed (None where
    it has none), values of K and V that its heads meet for each token seen, and its window."""

    device: str
    expert_devices: tuple[str, ...]
    values_per_cell: int
    window: int | None


def parts_of(placement: Placement, meta: ModelMeta, gpus: Sequence[str]) -> tuple[Part, ...]:
    """What is multiplied where, with the names of the GPUs in order."""
    totals: dict[tuple[str, Use, str], list[int]] = defaultdict(lambda: [0, 0])
    homes = layer_devices(placement, meta, gpus)
    for tensor in meta.tensors:
        use = use_of(tensor, meta)
        if use is not None:
            total = totals[device_of(tensor, placement, homes), use, tensor.type]
            total[0] += tensor.n_bytes
            total[1] += tensor.n_values
    return tuple(Part(*key, *total) for key, total in totals.items())


def layers_of(placement: Placement, meta: ModelMeta, gpus: Sequence[str]) -> tuple[LayerWork, ...]:
    """The layers in order."""
    homes = layer_devices(placement, meta, gpus)
    experts: Mapping[int, set[str]] = defaultdict(set)
    for tensor in meta.tensors:
        if tensor.role == "experts" and tensor.layer is not None:
            experts[tensor.layer].add(device_of(tensor, placement, homes))
    return tuple(
        LayerWork(homes[n], tuple(sorted(experts[n])), values_per_cell(meta, n), window_of(meta, n))
        for n in range(meta.n_layers)
    )


def layer_devices(placement: Placement, meta: ModelMeta, gpus: Sequence[str]) -> tuple[str, ...]:
    """The device of each layer, and of the output at the end; layers for drafting are left out."""
    n_all = meta.n_layers + meta.n_nextn_layers
    first = n_all + 1 - min(placement.n_gpu_layers, n_all + 1)
    n_on_gpus = n_all + 1 - first
    edges = list(accumulate(placement.tensor_split)) if len(gpus) > 1 else []

    def device(n: int) -> str:
        if n < first or not gpus:
            return CPU
        if not edges or not edges[-1]:
            return gpus[0]
        place = bisect_right(edges, (n - first) / n_on_gpus * edges[-1])
        return gpus[min(place, len(gpus) - 1)]

    return tuple(device(n) for n in (*range(meta.n_layers), n_all))


def device_of(tensor: TensorInfo, placement: Placement, homes: Sequence[str]) -> str:
    if tensor.layer is None:
        return homes[-1]
    in_ram = tensor.role == "experts" and (
        tensor.layer in placement.cpu_expert_layers or tensor.name in placement.cpu_expert_tensors
    )
    return CPU if in_ram else homes[tensor.layer]


def use_of(tensor: TensorInfo, meta: ModelMeta) -> Use | None:
    """What a tensor is used for; None where a token meets next to nothing of it."""
    if tensor.layer is not None:
        if tensor.layer >= meta.n_layers:
            return None
        return "experts" if tensor.role == "experts" else "dense"
    if tensor.role == "output":
        return "output"
    tied = tensor.name == "token_embd.weight" and not has_output(meta)
    return "output" if tied else None


def has_output(meta: ModelMeta) -> bool:
    return any(tensor.role == "output" for tensor in meta.tensors)


def values_per_cell(meta: ModelMeta, layer: int) -> int:
    """Every query head meets K and V of each token that it sees, whoever shares them with it."""
    if not meta.n_kv_heads[layer]:
        return 0
    return meta.n_heads[layer] * sum(head_dims(meta, layer))


def window_of(meta: ModelMeta, layer: int) -> int | None:
    window = meta.sliding_window
    return window.n_window if window and is_windowed(meta, layer) else None
