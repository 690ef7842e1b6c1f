"""Downloads that are killed, dropped, stalled, refused and swapped, many times, at random moments.

    python scripts/soak/download.py --interruptions 100 --mb 300

A stand-in for the Hub serves one file to a child process that downloads it. After each kill and
each end the bytes that the server sent are held against those that the journal has: the rest is
what will be fetched again. The hash must be right at every end, and nothing may be left behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from standin_hub import Fault, RequestRecord, StandInHub  # noqa: E402

from localmoe.errors import DownloadError  # noqa: E402
from localmoe.hub.client import Hub  # noqa: E402
from localmoe.hub.download import download  # noqa: E402
from localmoe.hub.partial_file import leftovers  # noqa: E402
from localmoe.hub.transfer import RetryPolicy  # noqa: E402
from localmoe.hub.types import HubAccess, RemoteFile  # noqa: E402

REPO, NAME = "org/soak-GGUF", "soak.gguf"
BUDGET_BYTES = 8 << 20
KINDS = {"kill": 8, "drop": 3, "stall": 3, "busy": 3, "reset": 3, "swap": 2}  # how often each
QUICK = RetryPolicy(tries=6, first_wait_s=0.02, longest_wait_s=0.2)
STALL_S = 0.5


@dataclass(slots=True)
class Report:
    """What happened. `again_bytes` has, for each stretch between two looks at the journal, the
    bytes that were sent and are not here, over the interruptions in that stretch."""

    interruptions: dict[str, int] = field(default_factory=dict)
    n_finished: int = 0
    n_wrong: int = 0
    orphans: list[str] = field(default_factory=list)
    again_bytes: list[int] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


class Soak:
    """One run: the server, the child that downloads, and who interrupts it."""

    def __init__(self, folder: Path, n_bytes: int, seed: int, bytes_per_s: float | None) -> None:
        self.folder, self.n_bytes, self.bytes_per_s = folder, n_bytes, bytes_per_s
        self.chance = random.Random(seed)
        self.report = Report()
        self.content, self.other = (folder / name for name in ("right.gguf", "other.gguf"))
        for path in (self.content, self.other):
            with path.open("wb") as file:
                for at in range(0, n_bytes, 1 << 20):
                    file.write(self.chance.randbytes(min(1 << 20, n_bytes - at)))
        self.sha256 = sha256_of(self.content)
        self.cache = folder / "cache"
        self.blobs = self.cache / f"models--{REPO.replace('/', '--')}" / "blobs"
        self._faults: list[Fault] = []
        self._child: subprocess.Popen[str] | None = None
        self._n_interruptions = self._sent_before = self._here_before = 0
        self._is_void = False

    def run(self, n_interruptions: int) -> Report:
        with StandInHub() as self.hub:
            self.hub.fault = self._fault
            for server in self.hub._servers():  # what waits in there was not on the line yet
                server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
            self.commit = self.hub.add_repo(REPO, {NAME: self.content})
            for _ in range(n_interruptions):
                self._go_on(self.chance.randint(6 << 20, 16 << 20))
                (kind,) = self.chance.choices(list(KINDS), list(KINDS.values()))
                self.report.interruptions[kind] = self.report.interruptions.get(kind, 0) + 1
                self._n_interruptions += 1
                getattr(self, f"_{kind}")()
            until = self.report.n_finished + 1
            while self.report.n_finished < until:
                self._go_on(self.n_bytes)
        return self.report

    # --- the child

    def _go_on(self, n_bytes: int) -> None:
        """Until so many more bytes were sent, or the download ended."""
        if self._child is None:
            job = {"endpoint": self.hub.endpoint, "folder": str(self.folder), "commit": self.commit,
                   "n_bytes": self.n_bytes, "sha256": self.sha256}  # fmt: skip
            command = [sys.executable, __file__, "--child", json.dumps(job)]
            self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        goal = self.hub.bytes_sent() + n_bytes
        while self._child.poll() is None and self.hub.bytes_sent() < goal:
            time.sleep(0.002)
        if self._child.poll() is not None:
            self._ended(self._child)

    def _ended(self, child: subprocess.Popen[str]) -> None:
        said = child.communicate()[0].strip()
        self._child = None
        if child.returncode == 0:
            self._look(self.n_bytes)
            self._check_finished()
        elif child.returncode == DownloadError.exit_code:
            self.report.refusals.append(said)
            self._look(self._n_bytes_here())
        elif child.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the download ended with {child.returncode}: {said}")

    def _check_finished(self) -> None:
        """The file is right, nothing else is there; then the cache is emptied for another round."""
        self.report.n_finished += 1
        self.report.n_wrong += sha256_of(self.blobs / self.sha256) != self.sha256
        self.report.orphans += [p.name for p in self.blobs.iterdir() if p.name != self.sha256]
        shutil.rmtree(self.cache)
        shutil.rmtree(self.folder / "stamps")
        self._here_before = 0

    # --- what is fetched again

    def _n_bytes_here(self) -> int:
        return sum(left.n_bytes_here for left in leftovers(self.blobs))

    def _look(self, here: int) -> None:
        sent = self.hub.bytes_sent()
        again = (sent - self._sent_before) - (here - self._here_before)
        if not self._is_void:
            self.report.again_bytes.append(again // max(1, self._n_interruptions))
        self._sent_before, self._here_before = sent, here
        self._n_interruptions, self._is_void = 0, False

    # --- interruptions

    def _fault(self, request: RequestRecord) -> Fault | None:
        """The line's speed, and what is to happen to the next request for bytes."""
        if not request.is_bytes:
            return None
        share = self.bytes_per_s / 4 if self.bytes_per_s else None
        return replace(self._faults.pop() if self._faults else Fault(), bytes_per_s=share)

    def _kill(self) -> None:
        if self._child:
            self._child.kill()
            self._child.communicate()
            self._child = None
            self.hub.close_connections()
            time.sleep(0.02)  # for the server to notice
            self._look(self._n_bytes_here())

    def _drop(self) -> None:
        self.hub.close_connections()

    def _stall(self) -> None:
        after = self.chance.randint(0, 2 << 20)
        self._faults.append(Fault(stall_after=after, stall_s=4 * STALL_S))
        self.hub.close_connections()

    def _busy(self) -> None:
        status = self.chance.choice([429, 500, 502, 503])
        self._faults += [Fault(status=status)] * self.chance.randint(1, 3)
        self.hub.close_connections()

    def _reset(self) -> None:
        self._faults.append(Fault(drop_after=self.chance.randint(0, 2 << 20), reset=True))
        self.hub.close_connections()

    def _swap(self) -> None:
        """Other content for a while, then the right one again: what came meanwhile is of no use,
        and that is not counted as fetched twice."""
        self._is_void = True
        self.hub.replace(REPO, NAME, self.other)
        self.hub.close_connections()
        if self._child:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(self.chance.uniform(0.05, 0.5))
        self.hub.replace(REPO, NAME, self.content)
        self.hub.close_connections()


def sha256_of(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            whole.update(block)
    return whole.hexdigest()


def child(job: dict[str, Any]) -> int:
    """Download the file; gives the exit code that the command would."""
    folder = Path(job["folder"])
    access = HubAccess(job["endpoint"], folder / "cache", folder / "headers", folder / "stamps")
    file = RemoteFile(REPO, job["commit"], NAME, job["n_bytes"], job["sha256"])
    try:
        download(Hub(access, stall_s=STALL_S), [file], on_notice=print, patience=QUICK)
    except DownloadError as error:
        print(error)
        return error.exit_code
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interruptions", type=int, default=100)
    parser.add_argument("--mb", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--line-mb-s", type=float, default=100, help="0: as fast as it goes")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.exit(child(options.child))
    with tempfile.TemporaryDirectory() as folder:
        speed = options.line_mb_s * 1e6 or None
        soak = Soak(Path(folder), options.mb * 1_000_000, options.seed, speed)
        report = soak.run(options.interruptions)
    print(json.dumps({**asdict(report), "again_bytes": max(report.again_bytes)}, indent=1))


if __name__ == "__main__":
    main()
