"""llama.cpp's C API, thinly: the one module that imports llama_cpp.

It covers models, vocabularies, contexts, samplers, the devices of this build, and how their
backends lock host memory. Structs and constants are those of the pinned minor version of
llama-cpp-python (pyproject.toml); tests hold their fields. What owns native memory here has a
`free`; nothing frees itself. Errors come as NativeError with llama.cpp's own words from its log.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import llama_cpp.llama_cpp as C
import numpy as np
import numpy.typing as npt

from ..protocol import Device, KvType, Sampling, VocabFacts
from .ggml import declare
from .pinning import HostMemory

# enum ggml_log_level (ggml.h)
LOG_ERROR = 4
# enum llama_load_mode (llama.h): "pinned" is plain reading, which fills pinned memory beside a GPU
LOAD_MODES = {"pinned": 0, "mmap": 1}
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
# enum ggml_type (ggml.h)
GGML_TYPES: dict[KvType, int] = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30,
}  # fmt: skip

MAX_GROUPS = 4000  # llama.cpp's parser recurses on groups, and its stack ends at some 20,000
DECODE_OK, DECODE_NO_ROOM, DECODE_ABORTED = 0, 1, 2


class NativeError(Exception):
    """llama.cpp refused; the message is its own."""


# ---- log -----------------------------------------------------------------------------------------

_log_callback: Any = None  # kept alive: llama.cpp holds the pointer for good
_listeners: list[list[str]] = []


def log_to(sink: Callable[[int, str], None]) -> None:
    """Send llama.cpp's log to `sink(level, text)`; text may be less or more than a line."""
    global _log_callback

    def callback(level: int, raw: bytes | None, _: Any) -> None:
        text = (raw or b"").decode("utf-8", "replace")
        for lines in _listeners:
            lines.append(text)
        sink(level, text)

    _log_callback = C.llama_log_callback(callback)
    C.llama_log_set(_log_callback, ctypes.c_void_p(0))


@contextlib.contextmanager
def overheard(lines: list[str]) -> Iterator[None]:
    """Gather what the log says meanwhile, beside where it goes."""
    _listeners.append(lines)
    try:
        yield
    finally:
        _listeners.remove(lines)


# its handle also finds ggml's symbols; loading libggml by path would load it twice
ggml = declare(C._lib)


def system_info() -> str:
    """Returns llama.cpp's line on the features of its build."""
    return str(C.llama_print_system_info(), "utf-8", "replace")


# ---- model ---------------------------------------------------------------------------------------


class TensorOverride(ctypes.Structure):
    """struct llama_model_tensor_buft_override (llama.h)."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


class LlamaModel:
    """A loaded model, or with `vocab_only` its vocabulary.

    `cpu_patterns` are regular expressions (std::regex_search) of tensors that stay in RAM.
    `on_progress` is given 0 to 1. With `no_alloc` nothing is allocated, for measuring.
    """

    def __init__(
        self,
        path: str,
        *,
        vocab_only: bool = False,
        n_gpu_layers: int = 0,
        load_mode: str = "mmap",
        cpu_patterns: Sequence[str] = (),
        tensor_split: Sequence[float] = (),
        on_progress: Callable[[float], None] | None = None,
        no_alloc: bool = False,
    ) -> None:
        C.llama_backend_init()
        params = C.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = n_gpu_layers
        params.load_mode = LOAD_MODES["pinned" if no_alloc else load_mode]  # mmap would abort
        params.no_alloc = no_alloc
        params.use_extra_bufts = False  # repacked copies are engine/native/repack.py's
        # llama.cpp reads these while it loads: they must live until then
        overrides = _tensor_overrides(cpu_patterns)
        split = (ctypes.c_float * C.llama_max_devices())(*tensor_split)
        progress = C.llama_progress_callback(_progress(on_progress))
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        if tensor_split:
            params.tensor_split = ctypes.cast(split, ctypes.POINTER(ctypes.c_float))
        params.progress_callback = progress
        handle = C.llama_model_load_from_file(path.encode(), params)
        if not handle:
            raise NativeError("llama.cpp could not load the model")
        self.handle = handle
        self.is_recurrent = bool(
            C.llama_model_is_recurrent(handle) or C.llama_model_is_hybrid(handle)
        )
        self.vocab = Vocab(C.llama_model_get_vocab(handle))

    def free(self) -> None:
        """Frees the model."""
        C.llama_model_free(self.handle)


def _tensor_overrides(patterns: Iterable[str]) -> Any:
    cpu = ggml.ggml_backend_cpu_buffer_type()
    entries = [TensorOverride(pattern.encode(), cpu) for pattern in patterns]
    return (TensorOverride * (len(entries) + 1))(*entries, TensorOverride(None, None))


def _progress(report: Callable[[float], None] | None) -> Callable[[float, Any], bool]:
    return lambda fraction, _: bool((report and report(fraction)) or True)


BRACKETED = re.compile(rb"<.+>", re.DOTALL)


class Vocab:
    """A model's vocabulary. The bytes of each token are asked for once."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.n_tokens: int = C.llama_vocab_n_tokens(handle)
        self.is_spm: bool = C.llama_vocab_type(handle) == C.LLAMA_VOCAB_TYPE_SPM
        self._pieces: dict[int, bytes] = {}

    @cached_property
    def facts(self) -> VocabFacts:
        """The special tokens. Every token is asked once whether it ends a turn."""
        return VocabFacts(
            n_vocab=self.n_tokens,
            bos=C.llama_vocab_bos(self.handle),
            eos=C.llama_vocab_eos(self.handle),
            add_bos=C.llama_vocab_get_add_bos(self.handle),
            add_eos=C.llama_vocab_get_add_eos(self.handle),
            eog=tuple(t for t in range(self.n_tokens) if C.llama_vocab_is_eog(self.handle, t)),
        )

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids of a text; only with `special` does it spell control tokens."""
        raw = text.encode()
        room = len(raw) + 8  # mostly enough: a token is a byte at least, but for spaces put before
        while True:
            tokens = np.empty(room, np.int32)
            target = _pointer(tokens, C.llama_token)
            n = C.llama_tokenize(self.handle, raw, len(raw), target, room, False, special)
            if n >= 0:
                return cast("list[int]", tokens[:n].tolist())
            room = -n

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to a text; control tokens add none."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self.spell(token, special=False)
        return found

    def is_marker(self, token: int) -> bool:
        """Returns whether a token marks a part of an answer by its text, such as `<think>`."""
        attributes = C.llama_vocab_get_attr(self.handle, token)
        is_own = bool(attributes & C.LLAMA_TOKEN_ATTR_USER_DEFINED)
        return is_own and BRACKETED.fullmatch(self.piece(token)) is not None

    def spell(self, token: int, *, special: bool) -> bytes:
        """Returns the bytes of a token; control tokens only with `special`."""
        room = 128
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = C.llama_token_to_piece(self.handle, token, buffer, room, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            room = -n


def tokenize_address() -> int:
    """Returns where llama_tokenize is, for a library that calls it itself."""
    return ctypes.cast(C._lib.llama_tokenize, ctypes.c_void_p).value or 0


# ---- context -------------------------------------------------------------------------------------


class LlamaBatch:
    """Room for tokens of one decode, filled through numpy views of what llama.cpp reads.

    `tokens`, `positions`, `sequences` (int32) and `wants_logits` (int8) have `capacity` places.
    """

    def __init__(self, capacity: int) -> None:
        self.tokens = np.zeros(capacity, np.int32)
        self.positions = np.zeros(capacity, np.int32)
        self.sequences = np.zeros(capacity, np.int32)
        self.wants_logits = np.zeros(capacity, np.int8)
        self._counts = np.ones(capacity, np.int32)
        first = self.sequences.ctypes.data
        self._pointers = np.arange(first, first + 4 * capacity, 4, dtype=np.uintp)
        self.native = C.llama_batch(
            token=_pointer(self.tokens, C.llama_token),
            pos=_pointer(self.positions, C.llama_pos),
            n_seq_id=_pointer(self._counts, ctypes.c_int32),
            seq_id=_pointer(self._pointers, ctypes.POINTER(C.llama_seq_id)),
            logits=_pointer(self.wants_logits, ctypes.c_int8),
        )


def _pointer(array: npt.NDArray[Any], c_type: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(c_type))


class LlamaContext:
    """The KV cache and the buffers to compute with, for `n_seq` sequences of `n_ctx` tokens each.

    With `n_cells` the cache is unified: all sequences share so many cells.
    Only the last token of each sequence in a batch gives logits, which keeps their buffer small.
    `on_node` is shown each node of a graph before it is computed (its address, and True); where it
    says True, again with its result (and False), and what it says then is whether to go on.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int,
        n_seq: int,
        n_cells: int | None = None,
        n_batch: int,
        n_ubatch: int,
        n_threads: int,
        kv_type: KvType,
        flash_attention: str,
        on_node: Callable[[int, bool], bool] | None = None,
    ) -> None:
        params = C.llama_context_default_params()
        params.n_ctx = n_cells or n_ctx * n_seq
        params.kv_unified = n_cells is not None
        params.n_seq_max = n_seq
        params.n_batch = n_batch
        params.n_ubatch = n_ubatch
        params.n_outputs_max = n_seq
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = GGML_TYPES[kv_type]
        params.flash_attn_type = FLASH_ATTENTION[flash_attention]
        params.no_perf = True
        self._on_node = node_callback(on_node)
        params.cb_eval = self._on_node
        # Asked at every node of a graph by a compute thread, so it must not need Python: strlen of
        # one byte and its zero is 1 where the byte is set and 0 where it isn't.
        self._abort = ctypes.create_string_buffer(2)
        params.abort_callback = ctypes.cast(_c_library().strlen, C.ggml_abort_callback)
        params.abort_callback_data = ctypes.addressof(self._abort)
        handle = C.llama_init_from_model(model.handle, params)
        if not handle:
            raise NativeError("llama.cpp could not make a context")
        self.handle = handle
        self._n_vocab = model.vocab.n_tokens
        self.memory = C.llama_get_memory(handle)
        self.n_ctx: int = C.llama_n_ctx_seq(handle)
        self.n_cells: int = C.llama_n_ctx(handle)

    def decode(self, batch: LlamaBatch, n_tokens: int) -> int:
        """Compute the first `n_tokens` of a batch: DECODE_OK, _NO_ROOM, _ABORTED or an error."""
        batch.native.n_tokens = n_tokens
        return int(C.llama_decode(self.handle, batch.native))

    def set_threads(self, n_threads: int) -> None:
        """Compute with so many from the next decode on."""
        C.llama_set_n_threads(self.handle, n_threads, n_threads)

    def abort(self) -> None:
        """From another thread: end the decode under way (on the CPU; a GPU goes on)."""
        self._abort.value = b"\x01"

    def allow(self) -> None:
        """Take `abort` back."""
        self._abort.value = b""

    def logits(self, index: int) -> npt.NDArray[np.float32]:
        """The logits of the batch's token at `index`; valid until the next decode."""
        pointer = C.llama_get_logits_ith(self.handle, index)
        return np.ctypeslib.as_array(pointer, (self._n_vocab,))

    def remove(self, sequence: int, start: int) -> bool:
        """Forget a sequence from position `start` on; False where only all of it can be."""
        return bool(C.llama_memory_seq_rm(self.memory, sequence, start, -1))

    def copy(self, source: int, target: int) -> None:
        """Add all that is held of a sequence to another; bookkeeping only in a unified cache."""
        C.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def first_position(self, sequence: int) -> int:
        """The first position still held of a sequence (-1: nothing); sliding windows move it."""
        return int(C.llama_memory_seq_pos_min(self.memory, sequence))

    def last_position(self, sequence: int) -> int:
        """The last position that the cache holds of a sequence; -1 for none."""
        return int(C.llama_memory_seq_pos_max(self.memory, sequence))

    def free(self) -> None:
        """Frees the context and its cache."""
        C.llama_free(self.handle)


def node_callback(on_node: Callable[[int, bool], bool] | None) -> Any:
    """What llama.cpp calls for each node; the caller keeps it alive."""
    if on_node is None:
        return C.ggml_backend_sched_eval_callback()
    return C.ggml_backend_sched_eval_callback(lambda node, ask, _: on_node(node, ask))


def _c_library() -> ctypes.CDLL:
    return ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)


# ---- sampling ------------------------------------------------------------------------------------


MAX_COUNTED_TOKENS = 1 << 16
"""How far back an answer's tokens count for presence and frequency; a ring of this size is kept."""


def sampler_chain(vocab: Vocab, sampling: Sampling, seed: int, prompt: Sequence[int] = ()) -> Any:
    """A chain in the order of llama.cpp's own programs (common/sampling.cpp).

    The end of the `prompt` counts for the repeat penalty alone: presence and frequency are those of
    the answer, as in OpenAI's API, or the words of a chat template would be penalized.
    """
    chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
    if sampling.logit_bias:
        C.llama_sampler_chain_add(chain, _bias_sampler(vocab, sampling.logit_bias))
    n_last = sampling.repeat_last_n
    if sampling.repeat_penalty != 1.0 and n_last > 0:
        repeats = C.llama_sampler_init_penalties(
            vocab.n_tokens, n_last, sampling.repeat_penalty, 0.0, 0.0
        )
        for token in prompt[-n_last:]:
            accept(repeats, token)
        C.llama_sampler_chain_add(chain, repeats)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = C.llama_sampler_init_penalties(
            vocab.n_tokens,
            MAX_COUNTED_TOKENS,
            1.0,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        C.llama_sampler_chain_add(chain, counts)
    if sampling.temperature <= 0:
        C.llama_sampler_chain_add(chain, C.llama_sampler_init_greedy())
        return chain
    if sampling.top_k > 0:
        C.llama_sampler_chain_add(chain, C.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        C.llama_sampler_chain_add(chain, C.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        C.llama_sampler_chain_add(chain, C.llama_sampler_init_min_p(sampling.min_p, 1))
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_temp(sampling.temperature))
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_dist(seed))
    return chain


def _bias_sampler(vocab: Vocab, biases: Sequence[tuple[int, float]]) -> Any:
    """A sampler that adds to the logits of some tokens; llama.cpp copies the list."""
    listed = (C.llama_logit_bias * len(biases))(*(C.llama_logit_bias(*bias) for bias in biases))
    return C.llama_sampler_init_logit_bias(vocab.n_tokens, len(biases), listed)


def grammar_sampler(vocab: Vocab, grammar: str) -> Any:
    """A sampler that allows only what a GBNF grammar does. Raises NativeError on a bad one."""
    if grammar.count("(") > MAX_GROUPS or "\0" in grammar:
        raise NativeError(f"the grammar has more than {MAX_GROUPS} groups, or a NUL character")
    sampler = C.llama_sampler_init_grammar(vocab.handle, grammar.encode(), b"root")
    if not sampler:
        raise NativeError("the grammar is not valid GBNF, or has no rule named root")
    return sampler


def sample(chain: Any, context: LlamaContext, index: int) -> int:
    """Draw the next token from the logits at `index`, and tell the chain of it."""
    return int(C.llama_sampler_sample(chain, context.handle, index))


accept = C.llama_sampler_accept
free_sampler = C.llama_sampler_free


def apply(sampler: Any, candidates: Any) -> None:
    """Applies a sampler to candidates."""
    C.llama_sampler_apply(sampler, ctypes.byref(candidates))


class Candidates:
    """Tokens and their logits as samplers take them; `native` is a llama_token_data_array."""

    def __init__(self, logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32]) -> None:
        self._rows = np.zeros(len(tokens), [("id", "i4"), ("logit", "f4"), ("p", "f4")])
        self._rows["id"], self._rows["logit"] = tokens, logits
        rows = _pointer(self._rows, C.llama_token_data)
        self.native = C.llama_token_data_array(rows, len(tokens), -1, False)

    @property
    def selected(self) -> int:
        """The token that the last sampler chose."""
        return int(self.native.data[self.native.selected].id)

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """The logits in the order of the tokens, until a sampler sorts them."""
        return self._rows["logit"]


# enum ggml_backend_dev_type (ggml-backend.h)
DEVICE_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}
REGISTER = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_size_t)
UNREGISTER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def devices() -> tuple[Device, ...]:
    """Every device of this build, the CPU among them."""
    return tuple(_device(handle) for handle in _handles())


def host_memory() -> HostMemory | None:
    """How pages in RAM are locked for the GPUs; None where no backend of this build can.

    CUDA and HIP can; their function does nothing without GGML_CUDA_REGISTER_HOST (ggml-cuda.cu).
    """
    for handle in _handles():
        backend = ggml.ggml_backend_dev_backend_reg(handle)
        register, unregister = (
            ggml.ggml_backend_reg_get_proc_address(backend, name)
            for name in (
                b"ggml_backend_register_host_buffer",
                b"ggml_backend_unregister_host_buffer",
            )
        )
        if register and unregister:
            return HostMemory(REGISTER(register), UNREGISTER(unregister))
    return None


def _handles() -> list[int]:
    return [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]


def _device(handle: int) -> Device:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    return Device(
        name=ggml.ggml_backend_dev_name(handle).decode("utf-8", "replace"),
        description=ggml.ggml_backend_dev_description(handle).decode("utf-8", "replace"),
        kind=cast(Any, DEVICE_KINDS.get(ggml.ggml_backend_dev_type(handle), "other")),
        total_bytes=total.value,
        free_bytes=free.value,
    )
