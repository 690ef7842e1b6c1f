"""Which experts a model's router picks, read out of llama.cpp while it computes."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def expert_logits(path: Path, n_tokens: int = 64, seed: int = 1) -> dict[int, npt.NDArray[Any]]:
    """Router logits by layer, shaped (tokens, experts), for random tokens.

    The last layer computes only the token whose output is wanted. Raises ValueError where logits
    of the model itself are not finite.
    """
    import llama_cpp.llama_cpp as C  # here alone: the writing half needs no llama.cpp

    found: dict[int, npt.NDArray[Any]] = {}
    callback = _collector(C, found)
    C.llama_backend_init()
    model_params = C.llama_model_default_params()
    model_params.use_extra_bufts = False
    model = C.llama_model_load_from_file(str(path).encode(), model_params)
    if not model:
        raise ValueError(f"llama.cpp could not load {path}")
    params = C.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 256, n_tokens, n_tokens
    params.cb_eval = ctypes.cast(callback, type(params.cb_eval))
    context = C.llama_init_from_model(model, params)
    n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
    ids = np.random.default_rng(seed).integers(3, n_vocab, n_tokens)
    tokens = (C.llama_token * n_tokens)(*map(int, ids))
    failed = C.llama_decode(context, C.llama_batch_get_one(tokens, n_tokens))
    logits = np.ctypeslib.as_array(C.llama_get_logits_ith(context, -1), (n_vocab,)).copy()
    C.llama_free(context)
    C.llama_model_free(model)
    if failed or not np.isfinite(logits).all():
        raise ValueError(f"{path} does not compute: llama_decode gave {failed}")
    return found


def _collector(C: Any, found: dict[int, npt.NDArray[Any]]) -> Any:
    """A ggml_backend_sched_eval_callback that keeps every `ffn_moe_logits-<layer>`."""
    lib = C._lib
    lib.ggml_get_name.restype, lib.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    lib.ggml_nbytes.restype, lib.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    lib.ggml_nrows.restype, lib.ggml_nrows.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    lib.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2

    def on_tensor(tensor: int, asking: bool, _: Any) -> bool:
        name = lib.ggml_get_name(tensor).decode()
        if not name.startswith("ffn_moe_logits-"):
            return not asking
        if not asking:
            values = np.empty(lib.ggml_nbytes(tensor) // 4, np.float32)
            lib.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            found[int(name.rsplit("-", 1)[1])] = values.reshape(lib.ggml_nrows(tensor), -1)
        return True

    kind = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    return kind(on_tensor)


def evenness(logits: dict[int, npt.NDArray[Any]], n_used: int = 2) -> tuple[int, float]:
    """The fewest experts that any layer uses, and the largest share of tokens one set takes.

    Layers that computed a single token (the last one) are left out.
    """
    fewest, largest = 10**9, 0.0
    for values in logits.values():
        if len(values) == 1:
            continue
        chosen = np.sort(np.argsort(values, 1)[:, -n_used:], 1)
        fewest = min(fewest, len(np.unique(chosen)))
        counts = np.unique(chosen, axis=0, return_counts=True)[1]
        largest = max(largest, counts.max() / len(values))
    return fewest, largest
