"""Which bytes of a model's files a plan wants pinned. Pure."""

from __future__ import annotations

from ..engine.protocol import FileSpan, Placement
from ..engine.rates import CPU
from ..gguf.model_meta import ModelMeta
from .parts import device_of, layer_devices

SMALLEST_BYTES = 1 << 20
"""Smaller tensors (norms, biases) aren't worth a registration."""


def pinned_spans(meta: ModelMeta, placement: Placement) -> tuple[FileSpan, ...]:
    """The weights of layers in RAM that a GPU copies for large batches; the token embeddings are
    read row by row and stay as they are."""
    if placement.load_mode != "pinned" or not placement.n_gpu_layers:
        return ()
    homes = layer_devices(placement, meta, ("GPU",))
    return tuple(
        FileSpan(str(meta.paths[t.shard]), t.offset, t.n_bytes)
        for t in meta.tensors
        if t.layer is not None
        and t.layer < meta.n_layers
        and t.n_bytes >= SMALLEST_BYTES
        and device_of(t, placement, homes) == CPU
    )
