"""The messages between a client and its engine process, as plain data.

A message is a frozen dataclass, which client.py frames as JSON. Every message to the engine
carries an id chosen by the client, and every answer repeats it, so one connection can have many
requests under way. A state may be larger than a pipe should carry: the engine process reads and
writes its file by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..gguf.tensors import experts_of_layer
from .rates import Bandwidths, Tuning

FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class SaveState:
    """Write what is held of the longest beginning of `tokens` to the file at `path`.

    Only a model of the same `key` can have it again; what that stands for is the client's to say.
    One of more than `room_bytes` is not written.
    """

    id: int
    path: str
    key: str
    tokens: tuple[int, ...]
    room_bytes: int
    type: Literal["save_state"] = "save_state"


@dataclass(frozen=True, slots=True)
class RestoreState:
    """Hold again what the file at `path` has, for the next requests that begin like it."""

    id: int
    path: str
    key: str
    type: Literal["restore_state"] = "restore_state"


@dataclass(frozen=True, slots=True)
class StateSaved:
    """So many tokens' state is on disk, in a file of `n_bytes`.

    With 0 tokens nothing was written, for this reason; `n_bytes` is then what it would have taken,
    where that was why.
    """

    id: int
    n_tokens: int
    n_bytes: int
    reason: str = ""
    type: Literal["state_saved"] = "state_saved"


@dataclass(frozen=True, slots=True)
class StateRestored:
    """So many tokens are held again; 0 where the file doesn't suit, for this reason."""

    id: int
    n_tokens: int
    reason: str = ""
    type: Literal["state_restored"] = "state_restored"


StateWish = SaveState | RestoreState
StateAnswer = StateSaved | StateRestored


KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
RepackMode = Literal["off", "experts", "all"]
FinishReason = Literal["stop", "length", "cancelled"]


def first_gpu_layer(n_layers: int, n_gpu_layers: int) -> int:
    """Returns the first layer that is on a GPU; n_layers stands for the output matrix.

    llama.cpp offloads the last `n_gpu_layers` of them (src/llama-model.cpp, load_tensors), so it is
    n_layers + 1 where none is.
    """
    return max(0, n_layers + 1 - n_gpu_layers)


@dataclass(frozen=True, slots=True)
class Placement:
    """Every value that a model is loaded by; nothing is left for the engine to choose.

    `n_gpu_layers` counts as llama.cpp does: the last layers, and the output matrix as one more.
    Experts of `cpu_expert_layers` (whole layers) and `cpu_expert_tensors` (by name) stay in RAM.
    `repack` says of which matrices of the first `n_repacked_layers` layers there is a second copy,
    repacked, to generate with (engine/native/repack.py); `repack_in_idle`, where that takes long.
    `n_ctx` is for one sequence; the cache holds `n_ctx_total` cells. Where `kv_unified`, all share
    them, and `n_cells` may be less than every sequence would fill; 0 is as many.
    From `offload_min_batch` tokens on a GPU computes with experts in RAM, which are copied to it;
    0 leaves that to llama.cpp. It must be in the process's environment.
    """

    n_threads: int
    n_gpu_layers: int = 0
    cpu_expert_layers: tuple[int, ...] = ()
    cpu_expert_tensors: tuple[str, ...] = ()
    tensor_split: tuple[float, ...] = ()
    n_ctx: int = 4096
    n_seq: int = 1
    kv_type: KvType = "f16"
    n_batch: int = 512
    n_ubatch: int = 512
    load_mode: Literal["mmap", "pinned"] = "mmap"
    repack: RepackMode = "off"
    n_repacked_layers: int = 0
    repack_in_idle: bool = False
    flash_attention: Literal["auto", "on", "off"] = "auto"
    kv_unified: bool = False
    n_cells: int = 0
    batch_invariant: bool = False
    offload_min_batch: int = 0

    @property
    def n_ctx_total(self) -> int:
        """Cells of the whole KV cache."""
        n_full = self.n_ctx * self.n_seq
        return (self.n_cells or n_full) if self.kv_unified else n_full

    def cpu_patterns(self) -> list[str]:
        """Returns regular expressions for the tensors that are kept in RAM, as -ot takes them."""
        layers = [experts_of_layer(n) for n in self.cpu_expert_layers]
        return layers + [f"^{re.escape(name)}$" for name in self.cpu_expert_tensors]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. A temperature of 0 takes the likeliest one (greedy).

    `repeat_penalty` divides the logits of the last `repeat_last_n` tokens, the prompt's too. The
    other two penalties are OpenAI's: subtracted for what the answer has said so far, once and for
    each time. `logit_bias` adds to the logits of some tokens.
    `seed` None draws a fresh one for each request. `grammar` is GBNF with the root rule `root`;
    `json_schema` is a schema as JSON text; at most one of the two. `held_schema` is what the engine
    holds answers to for it (structured/llguidance_schema.py); whoever asks the engine adds it.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    grammar: str | None = None
    json_schema: str | None = None
    held_schema: str | None = None

    @property
    def reshapes_logits(self) -> bool:
        """Whether the likeliest token may be another one than the model says."""
        is_penalized = self.repeat_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        return bool(is_penalized or self.logit_bias)

    @property
    def is_repeatable(self) -> bool:
        """Whether the same request is to give the same answer."""
        return self.temperature <= 0 or self.seed is not None


@dataclass(frozen=True, slots=True)
class Request:
    """All that an answer depends on. `tokens` is the whole prompt; the engine keeps no history
    that it needs, and finds by itself the longest beginning that it still holds.

    `max_tokens` None means until the context is full. `strip_leading_space` says that the answer
    begins a text of its own, so that a SentencePiece vocabulary's space before its first word is
    left out. `reasoning_tokens` are tokens that part a text from another (thinking from answer):
    they have no text, and text that is held back ends at one. Without `stream` there is a delta at
    each of these and at the end only, with all that is new. Without `reuse_prefix` the prompt is
    computed whole, whatever is held of it.
    """

    tokens: tuple[int, ...]
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    strip_leading_space: bool = False
    stream: bool = True
    reuse_prefix: bool = True
    reasoning_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens; `cached_tokens` of the prompt's were held from an earlier request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the request's arrival to its first token; tokens per second.

    `prompt_tps` counts the prompt tokens that were computed, not those that were cached; both
    speeds are 0 where there was nothing to measure.
    """

    first_token_s: float
    prompt_tps: float
    generation_tps: float


@dataclass(frozen=True, slots=True)
class VocabFacts:
    """Facts of the loaded vocabulary; -1 stands for a token that there is not."""

    n_vocab: int
    bos: int
    eos: int
    add_bos: bool
    add_eos: bool
    eog: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Device:
    """A device as llama.cpp names it. `free_bytes` is read after this process's own context."""

    name: str
    description: str
    kind: Literal["cpu", "gpu", "igpu", "accel", "other"]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class BufferSizes:
    """What llama.cpp would reserve beside the weights, in bytes: by device, and all caches."""

    compute_bytes: dict[str, int]
    output_bytes: dict[str, int]
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text to encode by itself; only with `special` does it spell control tokens."""

    text: str
    special: bool = False


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Bytes of a file of the model that are copied to a GPU: whole tensors, from `start` on."""

    path: str
    start: int
    n_bytes: int


# ---- to the engine -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """Load a model by a placement; with `vocab_only`, its vocabulary alone.

    `pinned` are the weights in RAM that a GPU copies, for the load mode of that name.
    """

    id: int
    path: str
    placement: Placement
    vocab_only: bool = False
    pinned: tuple[FileSpan, ...] = ()
    type: Literal["load"] = "load"


@dataclass(frozen=True, slots=True)
class Probe:
    """Work out what a placement would take, allocating nothing."""

    id: int
    path: str
    placement: Placement
    type: Literal["probe"] = "probe"


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Encode each piece apart, with no token added before or after."""

    id: int
    pieces: tuple[TextPiece, ...]
    type: Literal["tokenize"] = "tokenize"


@dataclass(frozen=True, slots=True)
class Detokenize:
    """The text of some tokens, control tokens spelled out."""

    id: int
    tokens: tuple[int, ...]
    type: Literal["detokenize"] = "detokenize"


@dataclass(frozen=True, slots=True)
class Generate:
    """Answer a request in deltas."""

    id: int
    request: Request
    type: Literal["generate"] = "generate"


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the request of this id; its last delta says "cancelled".

    With `only_waiting`, one that is being computed already goes on to its end.
    """

    id: int
    only_waiting: bool = False
    type: Literal["cancel"] = "cancel"


@dataclass(frozen=True, slots=True)
class ListDevices:
    """Name the devices that this build of llama.cpp sees."""

    id: int
    type: Literal["list_devices"] = "list_devices"


@dataclass(frozen=True, slots=True)
class MeasureBandwidth:
    """Time this machine's devices: with so many threads, on weights of these types."""

    id: int
    n_threads: tuple[int, ...]
    types: tuple[str, ...]
    type: Literal["measure_bandwidth"] = "measure_bandwidth"


@dataclass(frozen=True, slots=True)
class Tune:
    """Time a model on the CPU, for about `limit_s` seconds: with these numbers of threads, the
    likeliest first."""

    id: int
    path: str
    n_threads: tuple[int, ...]
    limit_s: float
    type: Literal["tune"] = "tune"


# ---- from the engine -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How much of a model is loaded, 0 to 1."""

    id: int
    fraction: float
    type: Literal["progress"] = "progress"


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model is ready. `n_ctx` is what one request may use, prompt and answer together;
    `n_pinned_bytes` lie where a GPU copies them at full speed."""

    id: int
    vocabulary: VocabFacts
    n_ctx: int
    load_s: float
    n_pinned_bytes: int = 0
    type: Literal["loaded"] = "loaded"


@dataclass(frozen=True, slots=True)
class Probed:
    """What llama.cpp would reserve for a placement."""

    id: int
    sizes: BufferSizes
    type: Literal["probed"] = "probed"


@dataclass(frozen=True, slots=True)
class Tokenized:
    """One list of ids for each piece."""

    id: int
    tokens: tuple[tuple[int, ...], ...]
    type: Literal["tokenized"] = "tokenized"


@dataclass(frozen=True, slots=True)
class Detokenized:
    """The text of the tokens."""

    id: int
    text: str
    type: Literal["detokenized"] = "detokenized"


@dataclass(frozen=True, slots=True)
class DeviceList:
    """The devices, and llama.cpp's own line on the features that it was built with."""

    id: int
    devices: tuple[Device, ...]
    system_info: str
    type: Literal["device_list"] = "device_list"


@dataclass(frozen=True, slots=True)
class BandwidthsMeasured:
    """The rates of this machine's devices."""

    id: int
    bandwidths: Bandwidths
    type: Literal["bandwidths_measured"] = "bandwidths_measured"


@dataclass(frozen=True, slots=True)
class Tuned:
    """How the CPU was timed on a model."""

    id: int
    tuning: Tuning
    type: Literal["tuned"] = "tuned"


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of an answer: its text and the tokens sampled, and the counts so far.

    While a prompt is computed, deltas without text tell how far it is. Text lags behind tokens
    where a character or a stop string may be going on: then `has_pending_text`. The last one has a
    finish reason, usage and timings; `stopped_by` is the stop string that ended the answer (and is
    not in its text). `kind` and `anew` are not the engine's: its callers set them
    (prompt/reasoning.py, retry.py). After one with `anew`, what came before of the answer is void:
    its engine died, and it begins once more.
    """

    id: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    stopped_by: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    has_pending_text: bool = False
    kind: Literal["text", "thinking"] = "text"
    anew: bool = False
    type: Literal["delta"] = "delta"


@dataclass(frozen=True, slots=True)
class Failed:
    """What was asked under this id can't be done; the engine lives on."""

    id: int
    message: str
    hint: str = ""
    type: Literal["failed"] = "failed"


Measuring = Probe | ListDevices | MeasureBandwidth | Tune
ToEngine = Load | Tokenize | Detokenize | Generate | Cancel | Measuring | StateWish
FromEngine = (
    LoadProgress
    | Loaded
    | Probed
    | Tokenized
    | Detokenized
    | DeviceList
    | BandwidthsMeasured
    | Tuned
    | Delta
    | Failed
    | StateAnswer
)
Message = ToEngine | FromEngine
