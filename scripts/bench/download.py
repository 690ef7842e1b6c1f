"""A download, verified, beside that of `hf download` of the same file, which verifies nothing.

    python scripts/bench/download.py --mb 500 --rounds 5

The stand-in for the Hub serves from a process of its own on this machine. Both run in turn, each in
a fresh process with an empty cache, from the start of the process to its end; the sha256 of what
they leave is checked outside the time. Medians, and the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from standin_hub import start_in_process  # noqa: E402

REPO, NAME = "org/bench-GGUF", "bench.gguf"
OURS = """
import sys
from pathlib import Path
from localmoe.hub.download import download
from localmoe.hub.client import Hub
from localmoe.hub.types import HubAccess

folder = Path(sys.argv[2])
hub = Hub(HubAccess(sys.argv[1], folder / "hub", folder / "headers", folder / "stamps"))
download(hub, hub.repository(sys.argv[3]).files)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        served = Path(folder) / "served" / REPO / NAME
        sha256 = write_model(served, options.mb)
        with start_in_process(Path(folder) / "served") as endpoint:
            rounds = [
                (timed(hf_command(), endpoint, Path(folder), sha256),
                 timed(our_command(endpoint, Path(folder)), endpoint, Path(folder), sha256))
                for _ in range(options.rounds)
            ]  # fmt: skip
    for name, times in zip(("hf download", "localmoe"), zip(*rounds, strict=True), strict=True):
        median = statistics.median(times)
        listed = " ".join(f"{t:.2f}" for t in times)
        print(f"{name:12} {median:.2f} s, {options.mb / median:.0f} MB/s ({listed})")
    ratio = statistics.median(hf / ours for hf, ours in rounds)
    print(f"speed, of hf download's: {ratio:.2f}")


def write_model(path: Path, n_mb: int) -> str:
    path.parent.mkdir(parents=True)
    block, whole = b"GGUF" + random.Random(0).randbytes(999_996), hashlib.sha256()
    with path.open("wb") as file:
        for i in range(n_mb):
            changed = i.to_bytes(4, "little") + block[4:] if i else block
            whole.update(changed)
            file.write(changed)
    return whole.hexdigest()


def hf_command() -> list[str]:
    return [str(Path(sys.executable).with_name("hf")), "download", REPO, NAME]


def our_command(endpoint: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", OURS, endpoint, str(folder / "cache"), REPO]


def timed(command: list[str], endpoint: str, folder: Path, sha256: str) -> float:
    """Seconds from start to end; the cache is emptied before, and what came is checked after."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.sync()
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
    began = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)
    took = time.perf_counter() - began
    (found,) = cache.glob("hub/models--*/snapshots/*/" + NAME)
    if hashlib.sha256(found.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"wrong bytes from {command[0]}")
    return took


if __name__ == "__main__":
    main()
