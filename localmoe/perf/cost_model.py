"""Forecasts the tokens per second of a placement, from bytes, operations and rates. Pure.

Which device multiplies which tensor follows llama.cpp's rules (load_tensors, src/llama-model.cpp):
the last layers are on GPUs, the output matrix counts as one more, overrides keep experts in RAM,
embeddings are looked up there.

The time of a step (one micro-batch of a prompt, or one token of every sequence) is the sum of

* products: a matrix's first token costs its bytes over the rate at which a device multiplies one
  token with weights from its memory, each further token its operations over the rate for batches;
* copies: weights in RAM that a GPU multiplies with, because the batch is large (32 tokens or more);
* attention: values of K and V that the heads meet;
* operations that cost time whatever their size, and round trips between a GPU and RAM;
* what the engine itself takes.

Every rate is measured (engine/native/device_benchmark.py) or by formula where it isn't (rates.py).
What runs really got corrects the rest (speed_records.py).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, TypeAlias

from ..engine.protocol import FLOATS, Placement, Timings, Usage, first_gpu_layer
from ..engine.rates import CPU, Bandwidths, Tuning
from ..gguf.model_meta import ModelMeta, head_dims, is_windowed
from ..gguf.tensors import TensorInfo
from .cpu_tuning import repacked_ratio
from .rates import Rates, rates_of
from .speed_records import SpeedKind, SpeedRecord, correction

Use: TypeAlias = Literal["dense", "experts", "output"]


@dataclass(frozen=True, slots=True)
class ComputePart:
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


def parts_of(placement: Placement, meta: ModelMeta, gpus: Sequence[str]) -> tuple[ComputePart, ...]:
    """What is multiplied where, with the names of the GPUs in order."""
    totals: dict[tuple[str, Use, str], list[int]] = defaultdict(lambda: [0, 0])
    homes = layer_devices(placement, meta, gpus)
    for tensor in meta.tensors:
        use = use_of(tensor, meta)
        if use is not None:
            total = totals[device_of(tensor, placement, homes), use, tensor.type]
            total[0] += tensor.n_bytes
            total[1] += tensor.n_values
    return tuple(ComputePart(*key, *total) for key, total in totals.items())


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
    first = first_gpu_layer(n_all, placement.n_gpu_layers)
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
    """Returns the device that a tensor is computed on."""
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
    """Whether the output matrix is a tensor of its own."""
    return any(tensor.role == "output" for tensor in meta.tensors)


def values_per_cell(meta: ModelMeta, layer: int) -> int:
    """Every query head meets K and V of each token that it sees, whoever shares them with it."""
    if not meta.n_kv_heads[layer]:
        return 0
    return meta.n_heads[layer] * sum(head_dims(meta, layer))


def window_of(meta: ModelMeta, layer: int) -> int | None:
    """Returns a layer's sliding window; None where it sees everything."""
    window = meta.sliding_window
    return window.n_window if window and is_windowed(meta, layer) else None


OFFLOAD_MIN_BATCH = 32
"""From so many tokens on a GPU multiplies with weights in RAM, copied over
(GGML_OP_OFFLOAD_MIN_BATCH, ggml/src/ggml-cuda/ggml-cuda.cu)."""
MAX_OFFLOAD_EDGE = 1024
MAX_VECTOR_ROWS = 8  # MMVQ_MAX_BATCH_SIZE (ggml/src/ggml-cuda/mmvq.cuh)
MIN_MATRIX_ROWS = 8  # ggml/src/ggml-cpu/tiled/tiled.cpp
MIN_ATTENTION_BATCH = 64  # GGML_FA_TILE_Q (ggml/src/ggml-cpu/ops.cpp)
TILE_ROWS = 128
"""A GPU multiplies an expert's tokens in tiles of so many, the last of them on average half empty
(mmq_x, ggml/src/ggml-cuda/mmq.cuh)."""
QUANTIZED_ATTENTION = 0.6
"""A CPU meets values of a quantized cache one token at a time, at so much of the speed for f16:
8 to 11 of 17 G values a second (q8_0, 2 cores; docs/notes/forecast.md)."""
DENSE_NODES, EXPERT_NODES = 21, 7
"""Operations of a layer that aren't views: norms, attention, router; the experts and their sum
(src/models/llama.cpp, build_moe_ffn in src/llama-graph.cpp)."""
USUAL_LAYERS, USUAL_TYPE = 32, "Q4_K"
"""What a model is taken for whose header wasn't read."""
ENGINE_STEP_S, SAMPLING_S = 0.45e-3, 55e-6
"""A step of the scheduler with its messages, and a sampler's chain on 32,000 tokens
(docs/notes/engine-speed.md)."""
DISK_BYTES_PER_S = 1.5e9
"""Pages of a mapped file that RAM doesn't hold, from an NVMe disk: formula, never measured."""
LEAST_HOST_SHARE = 0.1
"""Where the CPU does less of the work, a run teaches nothing about it."""
MIN_PROMPT_TOKENS, MIN_GENERATED_TOKENS = 64, 16
"""A shorter run's speed says more about its beginning than about the machine."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a speed is asked for, in tokens: those held already, those of the prompt still to be
    computed, those to be generated, and how many sequences generate at once."""

    n_cached: int = 0
    n_prompt: int = 512
    n_generated: int = 128
    n_at_once: int = 1


@dataclass(frozen=True, slots=True)
class Forecast:
    """Tokens per second that may be expected, of all sequences together.

    `basis` is "formula" until a run on this machine was recorded. Errors say how far forecasts
    like these were off so far (0.1: by 10 %, the median); None where there were none.
    """

    prompt_tps: float
    generation_tps: float
    basis: Literal["formula", "measured"] = "formula"
    prompt_error: float | None = None
    generation_error: float | None = None


@dataclass(frozen=True, slots=True)
class CostModel:
    """A placement on a machine, ready to be asked for the time of a step. `tuning` is what the CPU
    was timed with on the model itself."""

    placement: Placement
    meta: ModelMeta
    gpus: tuple[str, ...]
    parts: tuple[ComputePart, ...]
    layers: tuple[LayerWork, ...]
    rates: Mapping[str, Rates]
    missing_share: float = 0.0
    tuning: Tuning | None = None

    def is_offloaded(self, device: str, n_tokens: int) -> bool:
        """Whether a GPU does the work with weights that lie in RAM."""
        edge = self.placement.offload_min_batch or OFFLOAD_MIN_BATCH
        return device == CPU and bool(self.gpus) and n_tokens >= edge

    def worker(self, device: str, n_tokens: int) -> Rates:
        """Who does the work with weights of a device."""
        return self.rates[self.gpus[0] if self.is_offloaded(device, n_tokens) else device]


def cost_model_of(
    placement: Placement,
    meta: ModelMeta,
    bandwidths: Bandwidths,
    gpus: Sequence[str] | None = None,
    ram_bytes: int | None = None,
    tuning: Tuning | None = None,
) -> CostModel:
    """A placement on a machine. `gpus` are the names of those that the engine sees, by default
    those that were measured; `ram_bytes` what may hold pages of a mapped file, by default enough.
    """
    names = tuple(gpus) if gpus is not None else measured_gpus(bandwidths)
    if placement.n_gpu_layers and not names:
        names = ("GPU",)
    parts = parts_of(placement, meta, names)
    in_ram = sum(part.n_bytes for part in parts if part.device == CPU)
    missing = 0.0 if ram_bytes is None or not in_ram else max(0.0, 1 - ram_bytes / in_ram)
    return CostModel(
        placement=placement,
        meta=meta,
        gpus=names,
        parts=parts,
        layers=layers_of(placement, meta, names),
        rates={name: rates_of(bandwidths, name, placement.n_threads) for name in (CPU, *names)},
        missing_share=missing,
        tuning=tuning,
    )


def with_edge(setting: CostModel, n_tokens: int) -> CostModel:
    """The same with weights in RAM copied to a GPU from so many tokens on."""
    return replace(setting, placement=replace(setting.placement, offload_min_batch=n_tokens))


def measured_gpus(bandwidths: Bandwidths) -> tuple[str, ...]:
    """Returns the GPUs whose rates are known."""
    return tuple(d.device for d in bandwidths.devices if d.device != CPU)


# ---- forecasts ----


def forecast(
    setting: CostModel, records: Sequence[SpeedRecord] = (), task: Task | None = None
) -> Forecast:
    """The speeds of a task, corrected by what runs on this machine got."""
    task = task or Task()
    model = model_label(setting.meta)
    tps_in, tps_out = prompt_tps(setting, task), generation_tps(setting, task)
    regimes = regime_of(setting, task, "prompt"), regime_of(setting, task, "generation")
    prompt = correction(records, "prompt", regimes[0], model, tps_in)
    share = host_share(setting, task)
    generation = correction(records, "generation", regimes[1], model, tps_out, share)
    return Forecast(
        prompt_tps=tps_in * prompt.factor,
        generation_tps=tps_out * generation.factor,
        basis="measured" if prompt.n_runs or generation.n_runs else "formula",
        prompt_error=prompt.error,
        generation_error=generation.error,
    )


def prompt_tps(setting: CostModel, task: Task) -> float:
    """By formula alone: the prompt's micro-batches, the last one with a token's logits."""
    if task.n_prompt <= 0:
        return 0.0
    n_all = task.n_prompt * task.n_at_once  # those of several sequences share micro-batches
    seconds, done = 0.0, 0
    while done < n_all:
        n = min(setting.placement.n_ubatch, n_all - done)
        done += n
        seen = task.n_cached + (done - (n - 1) / 2) / task.n_at_once
        seconds += step_seconds(setting, n, seen, n_outputs=int(done == n_all))
    return n_all / seconds


def generation_tps(setting: CostModel, task: Task) -> float:
    """By formula alone, at the depth in the middle of what is generated."""
    seen = task.n_cached + task.n_prompt + task.n_generated / 2
    n, place = task.n_at_once, setting.placement
    seconds = step_seconds(setting, n, seen, n_outputs=n, one_each=True)
    if setting.tuning:
        touched = touched_share(setting.meta, n)
        copies = place.repack, place.n_repacked_layers
        seconds *= repacked_ratio(setting.tuning, *copies, n, touched)
    return n / seconds


def likely_tps(
    file_bytes: int, active_share: float, bandwidths: Bandwidths, n_threads: int, gpu_bytes: int = 0
) -> float:
    """A first idea of generation from a catalog's figures, before any header was read.

    `active_share` are active over all parameters, `gpu_bytes` what a GPU has for the model; what is
    left of it is read by the CPU. Fixed costs are those of a model of 32 layers.
    """
    gpus = measured_gpus(bandwidths)
    on_gpu = min(1.0, gpu_bytes / file_bytes)
    host = rates_of(bandwidths, CPU, n_threads)
    gpu = rates_of(bandwidths, gpus[0] if gpus else "GPU", 0)
    n_nodes = USUAL_LAYERS * (DENSE_NODES + EXPERT_NODES)
    seconds = sum(
        share * file_bytes * active_share / rates.product(USUAL_TYPE).vector_bytes_per_s
        + share * n_nodes * rates.device.node_s
        for share, rates in ((1 - on_gpu, host), (on_gpu, gpu))
    )
    return 1 / (seconds + ENGINE_STEP_S + SAMPLING_S)


def host_share(setting: CostModel, task: Task) -> float:
    """The CPU's share of the time of a generating step beside a GPU; 1 where there is but one."""
    devices = {part.device for part in setting.parts}
    if CPU not in devices or devices == {CPU}:
        return 1.0
    n, seen = task.n_at_once, task.n_cached + task.n_prompt + task.n_generated / 2
    if setting.is_offloaded(CPU, n):
        return 1.0
    products = sum(
        product_seconds(setting, part, n) for part in setting.parts if part.device == CPU
    )
    layers = sum(
        attention_seconds(setting, layer, n, seen, True) for layer in setting.layers
        if layer.device == CPU
    )  # fmt: skip
    return (products + layers) / step_seconds(setting, n, seen, n_outputs=n, one_each=True)


def offload_edge(setting: CostModel) -> int:
    """From how many tokens on weights in RAM are better copied to a GPU than left to the CPU.

    2 at least, as a copy for one token is never worth it, and MAX_OFFLOAD_EDGE where none is.
    """

    def is_copied_sooner(n_tokens: int) -> bool:
        copied, left = (
            step_seconds(with_edge(setting, edge), n_tokens, n_tokens, n_outputs=1)
            for edge in (n_tokens, n_tokens + 1)
        )
        return copied < left

    numbers = range(2, MAX_OFFLOAD_EDGE)
    return numbers.start + bisect_left(numbers, True, key=is_copied_sooner)


# ---- the time of a step ----


def step_seconds(
    setting: CostModel, n_tokens: int, seen: float, n_outputs: int, one_each: bool = False
) -> float:
    """Seconds of one decode. Each token sees `seen` tokens on average; `one_each` says that every
    token is of another sequence."""
    products = sum(
        product_seconds(setting, part, n_outputs if part.use == "output" else n_tokens)
        for part in setting.parts
    )
    layers = sum(
        attention_seconds(setting, layer, n_tokens, seen, one_each)
        + fixed_seconds(setting, layer, n_tokens)
        for layer in setting.layers
    )
    return products + layers + ENGINE_STEP_S + SAMPLING_S * n_outputs


def product_seconds(setting: CostModel, part: ComputePart, n_tokens: int) -> float:
    """All products of some tensors with a batch, and what has to be fetched for them."""
    if not n_tokens:
        return 0.0
    touched = touched_share(setting.meta, n_tokens) if part.use == "experts" else 1.0
    read = part.n_bytes * touched
    worker = setting.worker(part.device, n_tokens)
    rate = worker.product(part.type)
    n_rows = rows(setting.meta, part, n_tokens, worker.is_gpu)
    operations = 2 * part.n_values * touched * max(0.0, n_rows - 1)
    flops = (n_rows < MIN_MATRIX_ROWS and rate.few_flops) or rate.matrix_flops
    seconds = read / rate.vector_bytes_per_s + operations / flops
    if setting.is_offloaded(part.device, n_tokens):
        link = worker.device
        pinned = setting.placement.load_mode == "pinned"
        seconds += read / (link.pinned_bytes_per_s if pinned else link.pageable_bytes_per_s)
    if part.device == CPU:
        seconds += read * setting.missing_share / DISK_BYTES_PER_S
    return seconds


def touched_share(meta: ModelMeta, n_tokens: int) -> float:
    """The share of a layer's experts that so many tokens are routed to, where routing is even."""
    if not meta.n_experts:
        return 1.0
    return 1.0 - (1.0 - meta.n_experts_used / meta.n_experts) ** n_tokens


def rows(meta: ModelMeta, part: ComputePart, n_tokens: int, is_gpu: bool) -> float:
    """Tokens that each touched matrix is multiplied with, counting what a GPU's tiles waste."""
    if part.use != "experts" or not meta.n_experts:
        return n_tokens
    routed = n_tokens * meta.n_experts_used / meta.n_experts / touched_share(meta, n_tokens)
    return routed + TILE_ROWS / 2 if is_gpu and n_tokens > MAX_VECTOR_ROWS else routed


def attention_seconds(
    setting: CostModel, layer: LayerWork, n_tokens: int, seen: float, one_each: bool
) -> float:
    """The cache is where the layer's dense part is."""
    device = setting.rates[layer.device].device
    cells = seen if layer.window is None else min(seen, layer.window)
    is_batch = n_tokens >= MIN_ATTENTION_BATCH and not one_each
    rate = device.attention_batch_values_per_s if is_batch else device.attention_values_per_s
    if layer.device == CPU and setting.placement.kv_type not in FLOATS:
        rate = QUANTIZED_ATTENTION * device.attention_values_per_s
    return layer.values_per_cell * cells * n_tokens / rate


def fixed_seconds(setting: CostModel, layer: LayerWork, n_tokens: int) -> float:
    """What a layer's operations take with nothing to do, and its trips to RAM and back."""
    dense = setting.worker(layer.device, n_tokens)
    seconds = DENSE_NODES * dense.device.node_s
    for device in layer.expert_devices:
        experts = setting.worker(device, n_tokens)
        seconds += EXPERT_NODES * experts.device.node_s / len(layer.expert_devices)
        if dense.is_gpu and not experts.is_gpu:
            seconds += dense.device.round_trip_s
    return seconds


# ---- what was learned ----


def regime_of(setting: CostModel, task: Task, kind: SpeedKind) -> str:
    """What a speed depends on, so that runs of one regime teach about each other."""
    devices = {part.device for part in setting.parts}
    if devices == {CPU}:
        where = "offloaded" if setting.gpus and kind == "prompt" else "cpu"
        if kind == "generation" and setting.placement.repack != "off":
            where = "cpu/repacked"
    elif CPU not in devices:
        where = "gpu"
    else:
        whole = any(layer.device == CPU for layer in setting.layers)
        where = f"{'layers' if whole else 'experts'}/{setting.placement.load_mode}"
    if kind == "prompt" or task.n_at_once == 1:
        return where
    copied = CPU in devices and setting.is_offloaded(CPU, task.n_at_once)
    return f"{where}/{'copied' if copied else 'batch'}"


def model_label(meta: ModelMeta) -> str:
    """What makes models alike in speed: architecture, quant, and size of their experts."""
    return f"{meta.architecture} {meta.quant_label} {meta.n_embd}x{meta.n_ff_expert}"


def records_of(
    setting: CostModel, usage: Usage, timings: Timings, when: float
) -> tuple[SpeedRecord, ...]:
    """What a run of one sequence by itself teaches; nothing where it was too short."""
    task = Task(
        n_cached=usage.cached_tokens,
        n_prompt=usage.prompt_tokens - usage.cached_tokens,
        n_generated=usage.completion_tokens,
    )
    found = []
    if task.n_prompt >= MIN_PROMPT_TOKENS and timings.prompt_tps > 0:
        found.append(("prompt", prompt_tps(setting, task), timings.prompt_tps, task.n_prompt))
    teaches = host_share(setting, task) >= LEAST_HOST_SHARE
    if task.n_generated >= MIN_GENERATED_TOKENS and timings.generation_tps > 0 and teaches:
        tps = generation_tps(setting, task)
        found.append(("generation", tps, timings.generation_tps, task.n_generated))
    model = model_label(setting.meta)
    kinds: Mapping[str, SpeedKind] = {"prompt": "prompt", "generation": "generation"}
    return tuple(
        SpeedRecord(
            kinds[kind],
            regime_of(setting, task, kinds[kind]),
            model,
            tps,
            real,
            n_tokens,
            when,
            host_share(setting, task) if kind == "generation" else 1.0,
        )  # fmt: skip
        for kind, tps, real, n_tokens in found
    )


@dataclass(frozen=True, slots=True)
class Speeds:
    """What forecasts are made from: this machine's rates, what earlier runs really got, and how
    the CPU was timed on the model itself."""

    bandwidths: Bandwidths = Bandwidths()
    records: Sequence[SpeedRecord] = ()
    tuning: Tuning | None = None
