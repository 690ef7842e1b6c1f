"""What is read from llama.cpp's log of a context that is laid out but not allocated."""

from __future__ import annotations

import pytest

from localmoe.engine.native.llama import NativeError
from localmoe.engine.worker.memory_probe import sizes_in

LOG = [
    "llama_kv_cache: size =    8.00 MiB (  4096 cells,   2 layers,  1/1 seqs)",
    "sched_reserve:        CPU compute buffer size =    12.50 MiB",
    "llama_context:        CPU  output buffer size =     0.25 MiB",
]


def test_the_sizes_of_a_log_are_bytes() -> None:
    sizes = sizes_in(LOG)
    assert sizes.compute_bytes == {"CPU": 25 << 19}
    assert sizes.output_bytes == {"CPU": 1 << 18}
    assert sizes.cache_bytes == 8 << 20


@pytest.mark.parametrize(
    "log",
    [
        [],
        [LOG[0], LOG[2]],
        [line.replace("buffer size", "buffer takes") for line in LOG],
        ["sched_reserve: CPU compute buffer size = 0.00 MiB"],
    ],
)
def test_a_log_that_tells_no_sizes_is_no_measurement_of_nothing(log: list[str]) -> None:
    with pytest.raises(NativeError, match="does not tell"):
        sizes_in(log)
