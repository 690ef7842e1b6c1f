"""What the catalog has in place of an early Mixtral file, which llama.cpp no longer loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..gguf.model_meta import SHARD_NAME, ModelMeta
from .catalog import ModelSpec

SAME_SIZE = 0.02  # the catalog rounds the number of parameters


@dataclass(frozen=True, slots=True)
class Better:
    """The same model in the catalog. `label` is the early file's quant, "" where the catalog
    doesn't have that; `n_bytes` what it takes, where that is known."""

    key: str
    title: str
    label: str
    n_bytes: int | None

    @property
    def command(self) -> str:
        return f"localmoe pull {self.key}" + (f":{self.label}" if self.label else "")


def better(meta: ModelMeta, catalog: Mapping[str, ModelSpec]) -> Better | None:
    """The catalog's entry of the same model: what has its name and its size."""
    file = SHARD_NAME.sub("", meta.paths[0].name).removesuffix(".gguf") if meta.paths else ""
    # the header's name may have the maker's before it
    names = {plain_name(text) for text in (meta.name, meta.name.partition("_")[2], file)}
    for key, spec in catalog.items():
        ratio = meta.n_params / (spec.parameters or 1)
        if spec.repo and plain_name(spec.repo) in names and abs(ratio - 1) < SAME_SIZE:
            quant = spec.quants.get(meta.quant_label)
            label = meta.quant_label if quant else ""
            return Better(key, spec.title, label, quant.bytes if quant else None)
    return None


def plain_name(text: str) -> str:
    """A model's name without user, quant, case and marks, as files and repositories differ in."""
    name = re.sub(r"(?i)([-.]gguf|[-.](i?q\d\w*|b?f16|f32))$", "", text.rpartition("/")[2])
    return re.sub(r"[^a-z0-9]", "", name.lower())
