"""Random weights with even routing, at the speed of the disk.

Every quant gets a pool of random blocks once; a tensor is a run of the pool from a place of its
own. The pool's length is prime, so no two rows are equal until it has been gone round.

Routing is even when (measured through ffn_moe_logits): weights have zero mean, token embeddings
are about 20 times larger than what reads the residual stream, and what writes to it about 300
times smaller and different in every layer. Otherwise every token ends at the same few experts.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .gguf_writer import TYPES, Tensor

Bytes = npt.NDArray[np.uint8]

POOL_VALUES = 256  # values a pool's unit has: a multiple of every block
POOL_UNITS = (4_099, 65_537, 262_147)  # primes; the smallest that holds the tensor is taken
SMALLEST_SCALE = -23  # 7.5 and 15.5 times this power of two are still exact in float16
# how large a fill is, in units of 1 / sqrt(n_embd)
FILL_SCALES = {"reader": 1.0, "embedding": 20.0, "writer": 1 / 300}
CONSTANT_FILLS = {"ones": 1.0, "zeros": 0.0}


class RandomWeights:
    """Gives a tensor its bytes; the same seed gives the same file."""

    def __init__(self, n_embd: int, seed: int) -> None:
        self.n_embd = n_embd
        self.seed = seed
        self.pools: dict[tuple[str, str, int], Bytes] = {}

    def __call__(self, tensor: Tensor) -> Iterator[memoryview]:
        if tensor.fill in CONSTANT_FILLS:
            yield _constant(tensor)
            return
        stream = tensor.stream or tensor.name
        pool = self._pool(tensor)
        place = zlib.crc32(f"{self.seed} {stream}".encode()) % _units(tensor)
        start = place * _unit_bytes(tensor.type) + tensor.skip
        yield from _cyclic(pool.data, start % len(pool), tensor.n_bytes)

    def _pool(self, tensor: Tensor) -> Bytes:
        key = tensor.type, tensor.fill, _units(tensor)
        if key not in self.pools:
            rng = np.random.default_rng([self.seed, zlib.crc32(repr(key).encode())])
            n_blocks = key[2] * POOL_VALUES // TYPES[tensor.type][1]
            deviation = FILL_SCALES[tensor.fill] / math.sqrt(self.n_embd)
            self.pools[key] = random_blocks(tensor.type, n_blocks, deviation, rng)
        return self.pools[key]


def _cyclic(pool: memoryview, start: int, n_bytes: int) -> Iterator[memoryview]:
    while n_bytes > 0:
        chunk = pool[start : start + n_bytes]
        yield chunk
        n_bytes -= len(chunk)
        start = 0


def _units(tensor: Tensor) -> int:
    # the parts of a merged tensor must come out of the same pool as the whole, so shapes with and
    # without experts count alike: by rows
    wanted = max(tensor.shape[0], 1) * max(tensor.shape[1:2] or (1,)) // POOL_VALUES
    return next((units for units in POOL_UNITS if units >= wanted), POOL_UNITS[-1])


def _unit_bytes(type_name: str) -> int:
    _, block_values, block_bytes = TYPES[type_name]
    return POOL_VALUES // block_values * block_bytes


def _constant(tensor: Tensor) -> memoryview:
    if tensor.type != "F32":
        raise ValueError(f"{tensor.name}: {tensor.fill} are F32")
    value = CONSTANT_FILLS[tensor.fill]
    return np.full(tensor.n_bytes // 4, value, "<f4").view(np.uint8).data


def random_blocks(
    type_name: str, n_blocks: int, deviation: float, rng: np.random.Generator
) -> Bytes:
    """`n_blocks` blocks whose values have zero mean and about this standard deviation, flat.

    Layouts: ggml-common.h. All bits are random but the scales, which are a power of two times
    small random numbers: quants with a minimum (Q2_K, Q4_K, Q5_K) have it in the middle.
    """
    if type_name in ("F32", "F16", "BF16"):
        return _floats(type_name, n_blocks, deviation, rng)
    blocks = rng.integers(0, 256, (n_blocks, TYPES[type_name][2]), np.uint8)
    if type_name == "MXFP4":
        # value = 2^(e - 128) times one of 0 1 2 3 4 6 8 12 with a sign, 5.85 on average
        blocks[:, 0] = 128 + round(math.log2(deviation / 5.85))
    elif type_name in PLAIN_QUANTS:
        # lopsided by half a step: the sign of the scale evens it out
        sign = rng.choice(np.array([-1, 1], np.float16), n_blocks)
        _put(blocks, 0, _scale(deviation / PLAIN_QUANTS[type_name]) * sign)
    elif type_name == "Q3_K":
        _put(blocks, 108, _scale(deviation / 43.3))  # 6-bit scales less 32, values less 4
    elif type_name == "Q6_K":
        blocks[:, 192:208] = (blocks[:, 192:208].view(np.int8) >> 2).view(np.uint8)
        _put(blocks, 208, _scale(deviation / 342))
    else:
        _centre(type_name, blocks, deviation, rng)
    return blocks.reshape(-1)


# root mean square of a quant's random integers
PLAIN_QUANTS = {"Q4_0": 4.64, "Q5_0": 9.24, "Q8_0": 73.9}


def _centre(type_name: str, blocks: Bytes, deviation: float, rng: np.random.Generator) -> None:
    """Quants of the form d * scale * q - dmin * min: min = scale, dmin = d * middle of q."""
    if type_name == "Q2_K":
        blocks[:, :16] = rng.integers(8, 16, (len(blocks), 16), np.uint8) * 17  # both nibbles
        d, at, middle = _scale(deviation / 13.1), 80, 1.5
    else:
        scales = rng.integers(32, 64, (len(blocks), 8), np.uint8)
        low, high = scales[:, :4], scales[:, 4:]
        # get_scale_min_k4 (ggml-quants.c): 4 scales, 4 mins, then the low nibbles of 4 more
        blocks[:, 4:8] = blocks[:, 8:12] = low | (high >> 4 << 6)
        blocks[:, 12:16] = (high & 15) * 17
        four_bits = type_name == "Q4_K"
        d, at, middle = _scale(deviation / (223 if four_bits else 447)), 0, 7.5
        middle = 7.5 if four_bits else 15.5
    _put(blocks, at, d)
    _put(blocks, at + 2, np.float16(float(d) * middle))


def _scale(wanted: float) -> np.float16:
    return np.float16(2.0 ** max(SMALLEST_SCALE, round(math.log2(wanted))))


def _put(blocks: Bytes, at: int, value: np.float16 | npt.NDArray[np.float16]) -> None:
    column = np.broadcast_to(value, len(blocks)).astype("<f2")
    blocks[:, at : at + 2] = column.view(np.uint8).reshape(-1, 2)


def _floats(type_name: str, n: int, deviation: float, rng: np.random.Generator) -> Bytes:
    values = rng.standard_normal(n, np.float32) * np.float32(deviation)
    if type_name == "BF16":
        return (values.view("<u4") >> 16).astype("<u2").view(np.uint8)
    return values.astype("<f2" if type_name == "F16" else "<f4").view(np.uint8)
