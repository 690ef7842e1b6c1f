"""How fast a machine is: what an engine measures and a forecast divides by. Data alone.

Everything is measured through ggml's own operations where there is one for it, so that a rate
already has in it what a kernel makes of the memory it reads.
"""

from __future__ import annotations

from dataclasses import dataclass

CPU = "CPU"
MARGIN = 1.1
"""A gain below it is noise: the same step of a model, timed again, differs by up to 8 %."""


@dataclass(frozen=True, slots=True)
class ProductRate:
    """How fast a device multiplies with weights of one type, in the form that experts have.

    `vector_bytes_per_s` are bytes of weights for one token; `matrix_flops` floating-point
    operations a second (two for each weight and token) for a large batch, `few_flops` for the
    tokens beyond the first where they are few; 0 where that makes no difference.
    """

    device: str
    n_threads: int
    type: str
    vector_bytes_per_s: float
    matrix_flops: float
    few_flops: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What holds for a device whatever it computes; `n_threads` is 0 but for the CPU.

    `read_bytes_per_s`: its own memory. `node_s`: seconds that an operation takes with nothing to
    do, so launching a kernel or meeting at a barrier. `attention_values_per_s`: values of K and V
    that heads meet, for one token, and `attention_batch_values_per_s` for each of a batch.
    From RAM to the device: `pinned_bytes_per_s`, `pageable_bytes_per_s`, and `round_trip_s` for a
    few KiB there and back; 0 for the CPU.
    """

    device: str
    n_threads: int
    read_bytes_per_s: float
    node_s: float
    attention_values_per_s: float
    attention_batch_values_per_s: float
    pinned_bytes_per_s: float = 0.0
    pageable_bytes_per_s: float = 0.0
    round_trip_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """A machine's rates: its devices (the CPU once for each number of threads), and products."""

    devices: tuple[DeviceRates, ...] = ()
    products: tuple[ProductRate, ...] = ()

    def with_newer(self, newer: Bandwidths) -> Bandwidths:
        """These rates and newer ones, which count where both say something."""
        devices = {(d.device, d.n_threads): d for d in (*self.devices, *newer.devices)}
        pairs = (*self.products, *newer.products)
        products = {(p.device, p.n_threads, p.type): p for p in pairs}
        return Bandwidths(tuple(devices.values()), tuple(products.values()))


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds that a model's first layers took for a batch of `n_tokens` with so many threads."""

    n_threads: int
    n_tokens: int
    repacked: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class RepackableLayer:
    """Bytes of a layer that can be repacked on this CPU."""

    expert_bytes: int = 0
    dense_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a CPU made of a model's first `n_layers` layers, and what of it can be repacked.

    `repackable` has every layer, and what is outside of layers at its end. `others_share` of the
    processor's time went to other programs meanwhile: much of it, and the times say little.
    All but the first times are of `n_threads`, the fastest number.
    """

    n_layers: int
    n_threads: int
    times: tuple[StepTime, ...]
    repackable: tuple[RepackableLayer, ...]
    repack_bytes_per_s: float
    others_share: float = 0.0
