"""A machine's rates: kept between runs, looked up for a device, and by formula where unmeasured.

They are measured by engine/native/device_benchmark.py once for each machine and build, and kept
in a file beside
the other measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from ..engine.rates import CPU, Bandwidths, DeviceRates, ProductRate
from ..gguf.model_meta import ModelMeta

NO_BANDWIDTHS = Bandwidths()

# ---- by formula, where nobody measured ----

RAM_BYTES_PER_S = 40e9
"""Two channels of DDR4-3200 deliver 51, of DDR5-5600 90 GB/s, and programs get most of it."""
VRAM_BYTES_PER_S = 400e9
"""A consumer card of the middle: an RTX 4060 Ti has 288, a 3060 360, a 4070 504 GB/s."""
PINNED_BYTES_PER_S, PAGEABLE_BYTES_PER_S = 22e9, 6e9
"""PCIe 4 x16 from pinned memory; one core's copying from pages of a file (7.3 GB/s at PCIe 5)."""
CPU_OF_READ, CPU_VECTOR_BYTES_PER_S, CPU_FLOPS = 0.7, 5e9, 30e9
"""One token's products on a CPU: a part of what RAM delivers (16 vCPUs: 67 of 97 GB/s), and no
more than a core unpacks of Q4_K; a large batch: operations a second and core (16 vCPUs: 480e9)."""
GPU_OF_READ, GPU_FLOPS_PER_BYTE = 0.8, 55.0
"""The same on a GPU: quantized products reach about 55 operations for each byte of its memory's
bandwidth (H100: 180e12 of 3.35e12, measured; RTX 3090: 64e12 of 0.94e12, public benchmarks)."""
CPU_NODE_S, GPU_NODE_S = 1.5e-6, 3e-6
"""A barrier costs something for each thread (16 vCPUs: 1 ms a layer of 28 operations); a kernel is
launched in about 3 us, and an H100 with everything on it takes that much more than its bytes."""
CPU_ATTENTION, CPU_BATCH_ATTENTION = 10e9, 20e9
"""Values of K and V a second and core, 16-bit floats (AVX-512, 2.6 GHz)."""
ROUND_TRIP_S = 60e-6
SMALL_SHARE = 0.01
"""Tensors of types that are no more of a model than this aren't worth a measurement."""

Rate = TypeVar("Rate", DeviceRates, ProductRate)


@dataclass(frozen=True, slots=True)
class Rates:
    """One device's rates, whole: what wasn't measured is by formula. `products` by tensor type."""

    device: DeviceRates
    products: Mapping[str, ProductRate]
    is_gpu: bool

    def product(self, type: str) -> ProductRate:
        """Of an unmeasured type, the slowest of the measured ones.

        No processor multiplies faster than its RAM gives the weights, although a large cache, which
        held what was timed, may have made it look so (seen: 122 GB/s where RAM reads at 79).
        """
        if type in self.products:
            known = self.products[type]
            read = known.vector_bytes_per_s if self.is_gpu else self.device.read_bytes_per_s
            return replace(known, vector_bytes_per_s=min(known.vector_bytes_per_s, read))
        others = self.products.values()
        return ProductRate(
            self.device.device,
            self.device.n_threads,
            type,
            min((p.vector_bytes_per_s for p in others), default=self._vector_bytes_per_s()),
            min((p.matrix_flops for p in others), default=self._matrix_flops()),
            min((p.few_flops for p in others), default=0.0),
        )

    def _vector_bytes_per_s(self) -> float:
        read = self.device.read_bytes_per_s
        if self.is_gpu:
            return GPU_OF_READ * read
        return min(CPU_OF_READ * read, CPU_VECTOR_BYTES_PER_S * self.device.n_threads)

    def _matrix_flops(self) -> float:
        if self.is_gpu:
            return GPU_FLOPS_PER_BYTE * self.device.read_bytes_per_s
        return CPU_FLOPS * self.device.n_threads


def rates_of(bandwidths: Bandwidths, device: str, n_threads: int) -> Rates:
    """The rates of a device, `CPU` with so many threads or a GPU by its name. Never empty."""
    is_gpu = device != CPU
    n = 0 if is_gpu else n_threads
    mine = [d for d in bandwidths.devices if d.device == device]
    products: dict[str, list[ProductRate]] = {}
    for product in bandwidths.products:
        if product.device == device:
            products.setdefault(product.type, []).append(product)
    return Rates(
        device=fill_missing(interpolate(mine, n) if mine else None, device, n, is_gpu),
        products={type: interpolate(known, n) for type, known in products.items()},
        is_gpu=is_gpu,
    )


def fill_missing(
    known: DeviceRates | None, device: str, n_threads: int, is_gpu: bool
) -> DeviceRates:
    """Rates with every 0 by formula."""
    defaults = gpu_formula(device, known) if is_gpu else cpu_formula(n_threads)
    if known is None:
        return defaults
    values = {f.name: getattr(known, f.name) or getattr(defaults, f.name) for f in fields(known)}
    return DeviceRates(**values)


def cpu_formula(n_threads: int) -> DeviceRates:
    """Returns the rates of a CPU that was not measured."""
    return DeviceRates(
        CPU,
        n_threads,
        read_bytes_per_s=RAM_BYTES_PER_S,
        node_s=CPU_NODE_S * n_threads,
        attention_values_per_s=CPU_ATTENTION * n_threads,
        attention_batch_values_per_s=CPU_BATCH_ATTENTION * n_threads,
    )


def gpu_formula(device: str, known: DeviceRates | None) -> DeviceRates:
    """A head's K and V are 2 bytes a value, and a batch's heads do 2 operations with each."""
    read = known.read_bytes_per_s if known and known.read_bytes_per_s else VRAM_BYTES_PER_S
    return DeviceRates(
        device,
        0,
        read_bytes_per_s=read,
        node_s=GPU_NODE_S,
        attention_values_per_s=GPU_OF_READ * read / 2,
        attention_batch_values_per_s=GPU_FLOPS_PER_BYTE * read / 2,
        pinned_bytes_per_s=PINNED_BYTES_PER_S,
        pageable_bytes_per_s=PAGEABLE_BYTES_PER_S,
        round_trip_s=ROUND_TRIP_S,
    )


def interpolate(known: Sequence[Rate], n_threads: int) -> Rate:
    """The rates at a number of threads, between the nearest numbers that were measured.

    Below the smallest a rate falls in proportion; above the largest nothing is promised.
    """
    ordered = sorted(known, key=lambda rate: rate.n_threads)
    above = next((rate for rate in ordered if rate.n_threads >= n_threads), ordered[-1])
    below = next((rate for rate in reversed(ordered) if rate.n_threads <= n_threads), None)
    if below is above or above.n_threads <= n_threads:
        return above
    if below is None:
        return interpolate_threads(
            above, above, n_threads, lambda a, _: a * n_threads / above.n_threads
        )
    share = (n_threads - below.n_threads) / (above.n_threads - below.n_threads)
    return interpolate_threads(below, above, n_threads, lambda a, b: a + (b - a) * share)


def interpolate_threads(
    a: Rate, b: Rate, n_threads: int, mix: Callable[[float, float], float]
) -> Rate:
    """Every rate of two, mixed; times (`*_s`, not a second's worth of something) are b's."""
    values: dict[str, Any] = {f.name: getattr(b, f.name) for f in fields(b)}
    for name, value in values.items():
        if isinstance(value, float) and name.endswith(("_per_s", "_flops")):
            values[name] = mix(getattr(a, name), value)
    return type(b)(**{**values, "n_threads": n_threads})


def threads_to_measure(n_threads: int) -> tuple[int, ...]:
    """The number in use, and half of it: fewer threads are not slower in proportion."""
    return tuple(sorted({max(1, n_threads // 2), n_threads}))


def types_to_measure(meta: ModelMeta) -> tuple[str, ...]:
    """The types that make a difference to a model's speed."""
    mix = meta.quant_mix.items()
    return tuple(type for type, total in mix if total.n_bytes > SMALL_SHARE * meta.weights_bytes)
