"""What a model is, from the headers of its files: sizes, experts, tokenizer, exact bytes.

`read_meta(path)` reads a model on disk, with all its shards; `meta_of(headers)` takes headers
that came from elsewhere. Keys are those of src/llama-arch.cpp, and so are the limits: a header
that would abort llama.cpp while it loads is refused here, in a sentence.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MESSAGE_CHARS, NAME_CHARS, ModelFileError, model_file_error
from ..files import open_regular
from .file_kinds import MODEL_HINT, refuse_other_kinds, why_no_generation
from .hparams import (
    Mla,
    Recurrent,
    SlidingWindow,
    read_kv_heads,
    read_mla,
    read_recurrent,
    read_sliding_window,
)
from .metadata import Metadata
from .reader import Header, read_header
from .tensors import Role, TensorInfo, has_split_experts, list_tensors
from .vocab import VocabMeta, read_tokenizer

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS (src/llama-hparams.h)
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
EARLY = "of the early layout, which llama.cpp no longer loads"
SHARD_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # llama_split_path (include/llama.h)

# enum llama_ftype (include/llama.h): number -> label, and the types its larger tensors may have
FILE_TYPES: dict[int, tuple[str, str]] = {
    0: ("F32", "F32"), 1: ("F16", "F16"), 2: ("Q4_0", "Q4_0"), 3: ("Q4_1", "Q4_1"),
    7: ("Q8_0", "Q8_0"), 8: ("Q5_0", "Q5_0"), 9: ("Q5_1", "Q5_1"), 10: ("Q2_K", "Q2_K Q3_K"),
    11: ("Q3_K_S", "Q3_K"), 12: ("Q3_K_M", "Q3_K Q4_K"), 13: ("Q3_K_L", "Q3_K Q5_K"),
    14: ("Q4_K_S", "Q4_K"), 15: ("Q4_K_M", "Q4_K Q6_K"), 16: ("Q5_K_S", "Q5_K"),
    17: ("Q5_K_M", "Q5_K Q6_K"), 18: ("Q6_K", "Q6_K"), 19: ("IQ2_XXS", "IQ2_XXS"),
    20: ("IQ2_XS", "IQ2_XS"), 21: ("Q2_K_S", "Q2_K"), 22: ("IQ3_XS", "IQ3_S IQ3_XXS"),
    23: ("IQ3_XXS", "IQ3_XXS"), 24: ("IQ1_S", "IQ1_S"), 25: ("IQ4_NL", "IQ4_NL"),
    26: ("IQ3_S", "IQ3_S"), 27: ("IQ3_M", "IQ3_S Q4_K"), 28: ("IQ2_S", "IQ2_XS IQ2_S"),
    29: ("IQ2_M", "IQ2_S"), 30: ("IQ4_XS", "IQ4_XS"), 31: ("IQ1_M", "IQ1_M"),
    32: ("BF16", "BF16"), 36: ("TQ1_0", "TQ1_0"), 37: ("TQ2_0", "TQ2_0"),
    38: ("MXFP4", "MXFP4"), 39: ("NVFP4", "NVFP4"), 40: ("Q1_0", "Q1_0"), 41: ("Q2_0", "Q2_0"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TypeTotal:
    """How much of a model has one type."""

    n_tensors: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ModelMeta:
    """A model as its headers describe it. Sizes are numbers of values, `*_bytes` bytes.

    `n_layers` counts the layers that generate; `n_nextn_layers` more may follow them for drafting,
    which llama.cpp leaves unloaded. `n_heads` and `n_kv_heads` have an entry for each layer;
    `n_kv_heads` is 0 in layers without a KV cache. `n_ff` is the largest layer's. `no_generation`
    says what a model is that can't write text, "" for one that can.
    """

    paths: tuple[Path, ...]
    architecture: str
    name: str
    description: str
    license: str
    size_label: str
    file_bytes: int
    n_layers: int
    n_nextn_layers: int
    n_experts: int
    n_experts_used: int
    n_shared_experts: int
    context_length: int
    n_embd: int
    n_ff: int
    n_ff_expert: int
    n_heads: tuple[int, ...]
    n_kv_heads: tuple[int, ...]
    head_dim_k: int
    head_dim_v: int
    mla: Mla | None
    sliding_window: SlidingWindow | None
    recurrent: Recurrent | None
    tensors: tuple[TensorInfo, ...]
    file_type: int | None
    tokenizer: VocabMeta
    chat_template: str
    sampling: Mapping[str, float | int | str]
    legacy_split_experts: bool
    no_generation: str = ""

    @property
    def is_moe(self) -> bool:
        """Whether it is a Mixture of Experts."""
        return self.n_experts > 0

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.n_bytes for t in self.tensors)

    @property
    def bytes_by_role(self) -> dict[Role, int]:
        """Exact bytes of each role that occurs."""
        totals: dict[Role, int] = {}
        for t in self.tensors:
            totals[t.role] = totals.get(t.role, 0) + t.n_bytes
        return totals

    @property
    def layer_bytes(self) -> tuple[dict[Role, int], ...]:
        """For each layer (drafting layers behind the others) the exact bytes of each role."""
        layers: list[dict[Role, int]] = [{} for _ in range(self.n_layers + self.n_nextn_layers)]
        for t in self.tensors:
            if t.layer is not None and t.layer < len(layers):
                layers[t.layer][t.role] = layers[t.layer].get(t.role, 0) + t.n_bytes
        return tuple(layers)

    @property
    def n_params(self) -> int:
        """All values of all tensors; embeddings that double as output count once."""
        return sum(t.n_values for t in self.tensors)

    @property
    def n_active_params(self) -> int:
        """Values a token meets: everything but the experts it isn't routed to.

        Embedding and output matrices count whole, as model cards do it (12.9B for Mixtral 8x7B).
        """
        experts = sum(t.n_values for t in self.tensors if t.role == "experts")
        used = experts * self.n_experts_used // self.n_experts if self.n_experts else experts
        return self.n_params - experts + used

    @property
    def quant_mix(self) -> dict[str, TypeTotal]:
        """What each tensor type takes, largest first."""
        types = {t.type for t in self.tensors}
        mix = {name: [t.n_bytes for t in self.tensors if t.type == name] for name in types}
        totals = {name: TypeTotal(len(sizes), sum(sizes)) for name, sizes in mix.items()}
        return dict(sorted(totals.items(), key=lambda item: -item[1].n_bytes))

    @property
    def quant_label(self) -> str:
        """What people call the quant, as Q4_K_M; the largest type where the header disagrees."""
        largest = next(iter(self.quant_mix), "")
        label, types = FILE_TYPES.get(-1 if self.file_type is None else self.file_type, ("", ""))
        return label if largest in types.split() else largest

    @property
    def refusal(self) -> ModelFileError | None:
        """Why llama.cpp can't run this model although its header is sound, or None."""
        file = self.paths[0].name if self.paths else self.name
        if self.no_generation:
            return model_file_error(file, self.no_generation, MODEL_HINT)
        if not self.legacy_split_experts:
            return None
        path = shlex.quote(str(self.paths[0])) if self.paths else "FILE"
        hint = "Make it run: localmoe convert "
        room = MESSAGE_CHARS - min(len(file), NAME_CHARS) - len(f": {EARLY}. {hint}")
        return model_file_error(file, EARLY, hint + (path if len(path) <= room else "FILE"))


def read_meta(path: Path | str) -> ModelMeta:
    """The model at `path` with all its shards; any shard may be named. Raises ModelFileError."""
    path = Path(path)
    first = _read_file(path)
    paths = _shard_paths(path, _split_count(first))
    headers = [first if shard == path else _read_file(shard) for shard in paths]
    return meta_of(headers, paths)


def meta_of(headers: Sequence[Header], paths: Sequence[Path] = ()) -> ModelMeta:
    """The model whose files have these headers, first shard first."""
    _check_shards(headers)
    first = headers[0]
    keys = Metadata(first)
    names = [tensor.name for header in headers for tensor in header.tensors]
    if error := refuse_other_kinds(keys, names):
        raise error
    architecture = _architecture(first, keys)
    tensors = list_tensors(headers)
    n_all, n_nextn = _layer_counts(keys)
    n_experts, n_used = _expert_counts(keys)
    n_heads = keys.each_layer("attention.head_count", n_all) or (0,) * n_all
    head_dim = keys.size("embedding_length") // max(n_heads) if any(n_heads) else 0
    head_dim_k = keys.size("attention.key_length", head_dim)
    head_dim_v = keys.size("attention.value_length", head_dim)
    n_ff = max(keys.each_layer("feed_forward_length", n_all) or (0,))
    keys.refuse_odd_floats()
    return ModelMeta(
        paths=tuple(paths), architecture=architecture, name=keys.text("general.name"),
        description=keys.text("general.description"), license=keys.text("general.license"),
        size_label=keys.text("general.size_label"), file_bytes=sum(h.file_bytes for h in headers),
        n_layers=n_all - n_nextn, n_nextn_layers=n_nextn,
        n_experts=n_experts, n_experts_used=n_used,
        n_shared_experts=_shared_experts(keys, tensors),
        context_length=keys.size("context_length"), n_embd=keys.size("embedding_length"),
        n_ff=n_ff, n_ff_expert=max(keys.each_layer("expert_feed_forward_length", n_all) or (n_ff,)),
        n_heads=n_heads[: n_all - n_nextn],
        n_kv_heads=read_kv_heads(keys, tensors, n_heads)[: n_all - n_nextn],
        head_dim_k=head_dim_k, head_dim_v=head_dim_v, mla=read_mla(keys),
        sliding_window=read_sliding_window(keys, n_all, head_dim_k, head_dim_v),
        recurrent=read_recurrent(keys, tensors), tensors=tensors,
        file_type=keys.optional_size("general.file_type"), tokenizer=read_tokenizer(keys),
        chat_template=keys.text("tokenizer.chat_template"),
        sampling=keys.below("general.sampling."),
        legacy_split_experts=has_split_experts(tensors),
        no_generation=why_no_generation(keys, names),
    )  # fmt: skip


# ---- files -----------------------------------------------------------------------------------


def _read_file(path: Path) -> Header:
    try:
        with open_regular(path) as stream:
            return read_header(stream, name=path.name)
    except FileNotFoundError:
        raise model_file_error(path.name, "no such file") from None
    except OSError as error:
        raise model_file_error(path.name, error.strerror or "can't be read") from None


def _split_count(header: Header) -> int:
    count = header.kv.get("split.count", 1)
    return count if isinstance(count, int) and count > 1 else 1


def _shard_paths(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    name = SHARD_NAME.search(path.name)
    if not name or int(name[2]) != count:
        reason = f"one of {count} shards, whose name should end in -00001-of-{count:05d}.gguf"
        raise model_file_error(path.name, reason)
    stem = path.name[: name.start()]
    paths = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for i, shard in enumerate(paths, 1):
        if not shard.is_file():
            # the parts of long names that differ stand at their end
            reason = f"shard {i} of {count} is missing; wanted beside it: …{shard.name[-48:]}"
            raise model_file_error(path.name, reason)
    return paths


def _check_shards(headers: Sequence[Header]) -> None:
    count = _split_count(headers[0])
    if len(headers) != count:
        raise model_file_error(headers[0].name, f"one of {count} shards; {len(headers)} were given")
    if count == 1:
        return
    seen: set[str] = set()
    for i, header in enumerate(headers):
        if header.kv.get("split.no") != i or header.kv.get("split.count") != count:
            raise model_file_error(header.name, f"not shard {i + 1} of {count} by its header")
        names = {t.name for t in header.tensors}
        if names & seen:
            raise model_file_error(
                header.name, f"damaged: {min(names & seen)} is in an earlier shard too"
            )
        seen |= names
    total = headers[0].kv.get("split.tensors.count", len(seen))
    if total != len(seen):
        raise model_file_error(
            headers[0].name, f"damaged: {len(seen)} tensors in all shards, not {total}"
        )


# ---- facts -----------------------------------------------------------------------------------


def _architecture(header: Header, keys: Metadata) -> str:
    if not keys.architecture:
        raise model_file_error(header.name, "damaged: no general.architecture in its header")
    return keys.architecture


def _layer_counts(keys: Metadata) -> tuple[int, int]:
    """All layers, and how many of them are for drafting."""
    n_all, n_nextn = keys.size("block_count"), keys.size("nextn_predict_layers", 0)
    if not 1 <= n_all <= MAX_LAYERS:
        raise keys.refuse(f"{n_all:,} layers (block_count); llama.cpp takes 1 to {MAX_LAYERS}")
    if n_nextn >= n_all:
        raise keys.refuse(f"damaged: {n_nextn:,} of {n_all} layers are for drafting")
    return n_all, n_nextn


def _expert_counts(keys: Metadata) -> tuple[int, int]:
    n_experts = keys.size("expert_count", 0)
    n_used = max(keys.each_layer("expert_used_count", MAX_LAYERS) or (0,))
    if n_experts > MAX_EXPERTS:
        raise keys.refuse(f"{n_experts:,} experts; llama.cpp takes {MAX_EXPERTS:,} at most")
    if n_used > n_experts or bool(n_used) != bool(n_experts):
        raise keys.refuse(f"damaged: {n_used:,} of {n_experts:,} experts are used")
    n_groups = keys.size("expert_group_count", 0)
    if n_groups and not (n_groups < n_experts and n_experts % n_groups == 0):
        raise keys.refuse(f"damaged: {n_experts:,} experts in {n_groups:,} groups")
    if n_groups > 1 and not 0 < keys.size("expert_group_used_count", 0) < n_groups:
        raise keys.refuse(f"damaged: expert_group_used_count for {n_groups:,} groups")
    return n_experts, n_used


def _shared_experts(keys: Metadata, tensors: Sequence[TensorInfo]) -> int:
    """Some converters write the tensors and not the count (granite, qwen35moe)."""
    fallback = int(any(t.role == "shared_experts" for t in tensors))
    return keys.size("expert_shared_count", 0) or fallback


def head_dims(meta: ModelMeta, layer: int) -> tuple[int, int]:
    """Returns the lengths of a layer's key and value heads."""
    window = meta.sliding_window
    if window is not None and is_windowed(meta, layer):
        return window.head_dim_k, window.head_dim_v
    return meta.head_dim_k, meta.head_dim_v


def is_windowed(meta: ModelMeta, layer: int) -> bool:
    """Whether a layer sees a sliding window only; where its header says so."""
    pattern = meta.sliding_window.pattern if meta.sliding_window else None
    if isinstance(pattern, tuple):
        return pattern[layer]
    return pattern is not None and layer % pattern < pattern - 1
