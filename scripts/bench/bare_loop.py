"""The peer of engine.py and cpu.py: the shortest loop over llama.cpp's C API, as a process.

Reads a job as JSON from stdin: {model, tokens, n_tokens, n_ctx, n_ubatch, n_threads}; prints JSON:
{load_s, prompt_tps, generation_tps, times}, where times are seconds at which each was sampled.
With "defaults" in the job, weights are laid out as llama.cpp does by itself: repacked.
Nothing is checked, kept or sent but the text of each token, line by line, as a program would.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

import llama_cpp.llama_cpp as C
import numpy as np


def load(job: dict[str, Any]) -> tuple[Any, Any]:
    """A context and the vocabulary, with the parameters that localmoe's plan has."""
    C.llama_backend_init()
    model_params = C.llama_model_default_params()
    model_params.load_mode = 1
    model_params.use_extra_bufts = job.get("defaults", False)
    model_params.n_gpu_layers = 0
    model = C.llama_model_load_from_file(job["model"].encode(), model_params)
    params = C.llama_context_default_params()
    params.n_ctx = job["n_ctx"]
    params.n_batch = params.n_ubatch = job["n_ubatch"]
    params.n_outputs_max = 1
    params.n_threads = params.n_threads_batch = job["n_threads"]
    params.no_perf = True
    return C.llama_init_from_model(model, params), C.llama_model_get_vocab(model)


def decode(context: Any, batch: Any, tokens: list[int], position: int) -> None:
    n = len(tokens)
    np.ctypeslib.as_array(batch.token, (n,))[:] = tokens
    np.ctypeslib.as_array(batch.pos, (n,))[:] = range(position, position + n)
    logits = np.ctypeslib.as_array(batch.logits, (n,))
    logits[:] = 0
    logits[-1] = 1
    batch.n_tokens = n
    if C.llama_decode(context, batch) != 0:
        raise SystemExit("llama_decode failed")


def main() -> None:
    job = json.load(sys.stdin)
    started = time.perf_counter()
    context, vocab = load(job)
    load_s = time.perf_counter() - started
    batch = C.llama_batch_init(job["n_ubatch"], 0, 1)
    for i in range(job["n_ubatch"]):
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
    chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_greedy())
    piece = ctypes.create_string_buffer(256)

    tokens: list[int] = job["tokens"]
    started = time.perf_counter()
    for at in range(0, len(tokens), job["n_ubatch"]):
        decode(context, batch, tokens[at : at + job["n_ubatch"]], at)
    token = C.llama_sampler_sample(chain, context, -1)
    times = [time.perf_counter()]
    for position in range(len(tokens), len(tokens) + job["n_tokens"] - 1):
        n = C.llama_token_to_piece(vocab, token, piece, 256, 0, False)
        sys.stderr.buffer.write(piece.raw[:n] + b"\n")
        sys.stderr.flush()
        decode(context, batch, [token], position)
        token = C.llama_sampler_sample(chain, context, -1)
        times.append(time.perf_counter())
    result = {
        "load_s": load_s,
        "prompt_tps": len(tokens) / (times[0] - started),
        "generation_tps": (len(times) - 1) / (times[-1] - times[0]),
        "times": [at - times[0] for at in times],
    }
    os.close(2)  # the parent reads all text first; it would never come to a long result
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
