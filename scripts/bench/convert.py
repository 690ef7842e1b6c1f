"""Converting an early file against copying it: speed on the disk, and memory.

    python scripts/bench/convert.py /tmp/convert --layers 3

Makes an early file in the folder (0.84 GB a layer of Mixtral 8x7B at Q4_K) and needs as much room
again. `cp` with `sync` of its copy and the conversion with its fsync take turns; with `--cold` the
source is dropped from the page cache before each. Figures are of the source's bytes. Linux only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from make_model import SHAPES, make_model  # noqa: E402

# VmHWM: what getrusage tells would begin with the memory of the process that started this one
CONVERT = """
import sys, time
from pathlib import Path
from localmoe.gguf.merge_experts import merge_experts, plan_conversion
started = time.perf_counter()
merge_experts(plan_conversion(sys.argv[1]), Path(sys.argv[2]))
seconds = time.perf_counter() - started
status = Path("/proc/self/status").read_text()
print(seconds, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--quant", default="Q4_K")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    early, new = options.folder / "early.gguf", options.folder / "new.gguf"
    shape = replace(SHAPES["mixtral-8x7b"], n_layers=options.layers)
    make_model(early, shape, options.quant, split_experts=True)
    n_bytes = early.stat().st_size
    speeds: dict[str, list[float]] = {"cp": [], "convert": []}
    for number in range(options.rounds):
        for name in ("cp", "convert") if number % 2 else ("convert", "cp"):
            prepare(early, new, options.cold)
            seconds, note = copy(early, new) if name == "cp" else convert(early, new)
            speeds[name].append(n_bytes / seconds)
            print(f"{name:8} {n_bytes / seconds / 1e6:7.0f} MB/s  {note}", flush=True)
    new.unlink()
    early.unlink()
    cp, ours = (statistics.median(speeds[name]) for name in ("cp", "convert"))
    print(f"{n_bytes:,} bytes; medians: cp {cp / 1e6:.0f} MB/s, convert {ours / 1e6:.0f} MB/s, "
          f"{ours / cp:.2f} of cp")  # fmt: skip


def prepare(early: Path, new: Path, cold: bool) -> None:
    """Nothing waits to be written, the target is gone, and the source is cached or is not."""
    new.unlink(missing_ok=True)
    os.sync()
    with early.open("rb") as source:
        if cold:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while source.read(2**24):
                pass


def copy(early: Path, new: Path) -> tuple[float, str]:
    started = time.perf_counter()
    subprocess.run(["cp", early, new], check=True)
    subprocess.run(["sync", new], check=True)
    return time.perf_counter() - started, ""


def convert(early: Path, new: Path) -> tuple[float, str]:
    """Seconds as the child counts them, without the start of Python; and its largest memory."""
    answer = subprocess.check_output([sys.executable, "-c", CONVERT, early, new], text=True)
    seconds, peak = map(float, answer.split())
    return seconds, f"peak {peak / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
