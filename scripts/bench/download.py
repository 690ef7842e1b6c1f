"""A download, verified, beside that of `hf download` of the same file, which verifies nothing.

    python scripts/bench/download.py --mb 500 --rounds 5 [--tls] [--against OTHER_CHECKOUT]

The stand-in for the Hub serves from a process of its own on this machine. All run in turn, each in
a fresh process with an empty cache, from the start of the process to its end; the sha256 of what
they leave is checked outside the time. Medians, and the medians of the ratios of neighbours. Of
localmoe's time, "alone" is the download itself, without starting Python and asking for the listing.
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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from standin_hub import start_in_process  # noqa: E402

REPO, NAME = "org/bench-GGUF", "bench.gguf"
CERTIFICATE = "certificate.pem"
OURS = """
import sys, time
from localmoe.hub.download import download
from localmoe.hub.client import Hub
from localmoe.config.environment import hub_access

hub = Hub(hub_access())
files = hub.repository(sys.argv[1]).files
began = time.perf_counter()
download(hub, files)
print(time.perf_counter() - began)
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A program that downloads, and the folder that it is started in."""

    name: str
    command: list[str]
    folder: Path = ROOT


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a whole process, and of the download within it where that was told."""

    whole_s: float
    alone_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of localmoe, as it was")
    parser.add_argument("--tls", action="store_true", help="by https, as from the Hub")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        served = Path(folder) / "served" / REPO / NAME
        sha256 = write_model(served, options.mb)
        tls = make_certificate(Path(folder)) if options.tls else None
        with start_in_process(Path(folder) / "served", tls=tls) as endpoint:
            candidates = [
                Candidate("hf download", hf_command()),
                Candidate("localmoe", our_command()),
            ]
            if options.against:
                folder_there = options.against.resolve()
                candidates.append(Candidate("other checkout", our_command(), folder_there))
            rounds = [
                [timed(candidate, endpoint, Path(folder), sha256) for candidate in candidates]
                for _ in range(options.rounds)
            ]
    report([candidate.name for candidate in candidates], rounds, options.mb)


def report(names: list[str], rounds: list[list[Times]], n_mb: int) -> None:
    for name, times in zip(names, zip(*rounds, strict=True), strict=True):
        median = statistics.median(t.whole_s for t in times)
        listed = " ".join(f"{t.whole_s:.2f}" for t in times)
        alone = statistics.median(t.alone_s for t in times)
        told = f", alone {alone:.2f} s" if alone else ""
        print(f"{name:14} {median:.2f} s, {n_mb / median:.0f} MB/s ({listed}){told}")
    ratio = statistics.median(times[0].whole_s / times[1].whole_s for times in rounds)
    print(f"speed, of hf download's: {ratio:.2f}")
    if len(names) > 2:
        whole = statistics.median(times[2].whole_s / times[1].whole_s for times in rounds)
        alone = statistics.median(times[2].alone_s / times[1].alone_s for times in rounds)
        print(f"speed, of the other checkout's: {whole:.2f}, alone {alone:.2f}")


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


def our_command() -> list[str]:
    return [sys.executable, "-c", OURS, REPO]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for this machine, for SSL_CERT_FILE, and its key."""
    certificate, key = folder / CERTIFICATE, folder / "key.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return certificate, key


def timed(candidate: Candidate, endpoint: str, folder: Path, sha256: str) -> Times:
    """From start to end; the cache is emptied before, and what came is checked after."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.sync()
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache),
                   "LOCALMOE_STATE": str(cache / "state")}  # fmt: skip
    if (folder / CERTIFICATE).exists():
        environment["SSL_CERT_FILE"] = str(folder / CERTIFICATE)
    began = time.perf_counter()
    done = subprocess.run(
        candidate.command, env=environment, check=True, capture_output=True, text=True,
        cwd=candidate.folder,
    )  # fmt: skip
    took = time.perf_counter() - began
    (found,) = cache.glob("hub/models--*/snapshots/*/" + NAME)
    if hashlib.sha256(found.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"wrong bytes from {candidate.name}")
    alone = done.stdout.strip() if candidate.name != "hf download" else ""
    return Times(took, float(alone or 0))


if __name__ == "__main__":
    main()
