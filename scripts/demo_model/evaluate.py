"""The finished file through llama.cpp itself: replies, held-out loss, use of the experts."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np

from demo_model.tokenizer import BOS, EOS, user_text

N_CTX = 1024
MAX_REPLY_TOKENS = 60
SAMPLING_KEYS = ("temp", "top_k", "top_p", "min_p", "penalty_repeat", "penalty_last_n")
_silent = llama.llama_log_callback(lambda level, text, user_data: None)
_ggml = llama._lib
_ggml.ggml_get_name.restype = ctypes.c_char_p
_ggml.ggml_get_name.argtypes = (ctypes.c_void_p,)


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: its text, its length in tokens, and whether it ended by itself."""

    text: str
    n_tokens: int
    ended: bool

    @property
    def goes_round(self) -> bool:
        """Whether three words in a row, or a sentence, come twice."""
        words = re.findall(r"[a-z']+", self.text.lower())
        threes = list(zip(words, words[1:], words[2:], strict=False))
        sentences = [part.strip().lower() for part in re.split(r"[.!?]", self.text) if part.strip()]
        return len(set(threes)) < len(threes) or len(set(sentences)) < len(sentences)


class _Tensor(ctypes.Structure):
    """The head of `struct ggml_tensor` (ggml.h): enough to read a view of numbers."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


class Engine:
    """The model on the CPU, its weights not repacked: faster for prompts, and safe everywhere."""

    def __init__(self, path: Path) -> None:
        llama.llama_log_set(_silent, None)
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.use_extra_bufts = False
        params.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.n_vocab = llama.llama_vocab_n_tokens(self.vocab)
        self.expert_counts: dict[int, np.ndarray] = {}
        self._callback = llama.ggml_backend_sched_eval_callback(self._observe)
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = N_CTX, N_CTX, N_CTX
        settings.cb_eval = self._callback
        self.context = llama.llama_init_from_model(self.model, settings)

    def header(self, key: str) -> str:
        """One value of the file's header, as text; "" if it is absent."""
        buffer = ctypes.create_string_buffer(65536)
        found = llama.llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer))
        return buffer.value.decode() if found >= 0 else ""

    def encode(self, text: str) -> list[int]:
        """Ids of one piece of a prompt, nothing in it read as a control token."""
        data = text.encode()
        ids = (llama.llama_token * (len(data) + 8))()
        count = llama.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, False)
        return list(ids[:count])

    def decode(self, ids: list[int]) -> str:
        """Text of ids; a space in front is the vocabulary's, not the answer's."""
        buffer = ctypes.create_string_buffer(64)
        parts = []
        for token in ids:
            size = llama.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
            parts.append(buffer.raw[:size])
        return b"".join(parts).decode(errors="replace").removeprefix(" ")

    def logits(self, ids: list[int], *, everywhere: bool) -> np.ndarray:
        """Scores after every token of `ids`, or after the last: [tokens, n_vocab]."""
        batch = llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        start = llama.llama_memory_seq_pos_max(llama.llama_get_memory(self.context), 0) + 1
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = (
                token,
                start + i,
                1,
                0,
            )
            batch.logits[i] = everywhere or i == len(ids) - 1
        failed = llama.llama_decode(self.context, batch)
        llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        rows = len(ids) if everywhere else 1
        return np.ctypeslib.as_array(
            llama.llama_get_logits(self.context), (rows, self.n_vocab)
        ).copy()

    def forget(self) -> None:
        """Start a new conversation."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def reply(self, message: str, seed: int) -> Reply:
        """The answer to a first message, with the sampling defaults of the file's own header."""
        self.forget()
        self.logits([BOS, *self.encode(user_text(message))], everywhere=False)
        ids: list[int] = []
        with self._sampler(seed) as sampler:
            while len(ids) < MAX_REPLY_TOKENS:
                token = llama.llama_sampler_sample(sampler, self.context, -1)
                if token == EOS:
                    return Reply(self.decode(ids), len(ids), ended=True)
                ids.append(token)
                self.logits([token], everywhere=False)
        return Reply(self.decode(ids), len(ids), ended=False)

    @contextmanager
    def _sampler(self, seed: int) -> Iterator[object]:
        """llama.cpp's usual order: penalties, top-k, top-p, min-p, temperature, draw."""
        value = {key: float(self.header(f"general.sampling.{key}")) for key in SAMPLING_KEYS}
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for sampler in (
            llama.llama_sampler_init_penalties(
                self.n_vocab, int(value["penalty_last_n"]), value["penalty_repeat"], 0.0, 0.0
            ),
            llama.llama_sampler_init_top_k(int(value["top_k"])),
            llama.llama_sampler_init_top_p(value["top_p"], 1),
            llama.llama_sampler_init_min_p(value["min_p"], 1),
            llama.llama_sampler_init_temp(value["temp"]),
            llama.llama_sampler_init_dist(seed),
        ):
            llama.llama_sampler_chain_add(chain, sampler)
        try:
            yield chain
        finally:
            llama.llama_sampler_free(chain)

    def held_out_loss(self, documents: list[tuple[np.ndarray, np.ndarray]]) -> float:
        """Mean loss in nats of each reply token; counts the experts of every token on the way."""
        self.expert_counts.clear()
        total, count = 0.0, 0
        for ids, is_reply in documents:
            self.forget()
            scores = self.logits(ids.tolist(), everywhere=True)[:-1]
            scores -= scores.max(axis=1, keepdims=True)
            losses = (
                np.log(np.exp(scores).sum(axis=1))
                - scores[np.arange(len(ids) - 1), ids[1:].astype(int)]
            )
            total, count = total + losses[is_reply[1:]].sum(), count + int(is_reply[1:].sum())
        return float(total / count)

    def expert_shares(self) -> np.ndarray:
        """Share of `held_out_loss`'s tokens that each expert took: [layer, expert], 2 a row."""
        rows = [self.expert_counts[layer] for layer in sorted(self.expert_counts)]
        return np.array([counts / (counts.sum() / 2) for counts in rows])

    def _observe(self, tensor: int, ask: bool, _: object) -> bool:
        """llama.cpp asks for each result whether we want it, then hands it over."""
        name = _ggml.ggml_get_name(tensor).decode()
        if not name.startswith("ffn_moe_topk-"):
            return not ask
        if not ask:
            counts = self.expert_counts.setdefault(int(name.split("-")[1]), np.zeros(8, np.int64))
            counts += np.bincount(_chosen_experts(tensor).ravel(), minlength=8)
        return True


def _chosen_experts(tensor: int) -> np.ndarray:
    """The experts of every token; the tensor is a view with a row stride of its own."""
    head = _Tensor.from_address(tensor)
    n_used, n_tokens, stride = head.ne[0], head.ne[1], head.nb[1]
    raw = np.empty((n_tokens - 1) * stride + n_used * 4, np.uint8)
    _ggml.ggml_backend_tensor_get(
        ctypes.c_void_p(tensor),
        raw.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_size_t(0),
        ctypes.c_size_t(raw.nbytes),
    )
    return np.lib.stride_tricks.as_strided(raw.view(np.int32), (n_tokens, n_used), (stride, 4))
