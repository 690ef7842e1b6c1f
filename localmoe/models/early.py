"""The early layout of Mixtral files: a tensor for each expert, and routers in half precision.

Files of December 2023 to April 2024 have it (llama.cpp's pull requests 4406 and 6387).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ModelFileError
from .cursor import refusal
from .gguf import Header
from .meta import ModelMeta
from .tensors import TensorInfo

EXPERT = re.compile(r"^blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight$")
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
        raise refusal(header.name, reason, NEWER)
    if base == MIXTRAL_ROPE_BASE:
        return ()
    return (f"{ROPE_BASE} is {base:,.0f} and kept; a Mixtral's is {MIXTRAL_ROPE_BASE:,.0f}.",)


def _refuse(meta: ModelMeta, reason: str, hint: str = NEWER) -> ModelFileError:
    return refusal(meta.paths[0].name, reason, hint)


def _check_kind_of_file(meta: ModelMeta) -> None:
    names = [t.name for t in meta.tensors]
    if not any(map(EXPERT.match, names)):
        what = "its experts are merged already" if meta.is_moe else "it has no experts"
        raise _refuse(meta, f"needs no conversion: {what}", "Try: localmoe run FILE")
    if meta.architecture != "llama":
        reason = f"of an early layout of {meta.architecture[:20]}; only Mixtral's can be converted"
        raise _refuse(meta, reason)
    if not meta.n_experts:
        raise _refuse(meta, "damaged: no llama.expert_count in its header")
    for name in names:
        if UNMERGEABLE.match(name) and not EXPERT.match(name):
            raise _refuse(meta, f"damaged: {name} stands beside separate experts")


def _groups(meta: ModelMeta) -> list[Group]:
    found: defaultdict[tuple[int, str], list[tuple[int, TensorInfo]]] = defaultdict(list)
    for tensor in meta.tensors:
        if match := EXPERT.match(tensor.name):
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
