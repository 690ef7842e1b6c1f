"""Ways to read bytes off urllib3 and off http.client, each in a process of its own, on loopback.

    python scripts/bench/http_loop.py --mb 1000 --rounds 5

Four threads read a share each into a buffer of one MiB, as a download does, and do nothing else:
what hub/http.py chose its way of reading by. Medians, and medians of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3
from download import NAME, REPO, start_in_process, write_model

CONNECTIONS = 4
PIECE_BYTES = 1 << 20
SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_RCVBUF, 768 << 10),
]
WAYS = (
    ("http.client", "read1"),
    ("http.client", "readinto"),
    ("urllib3", "read1"),
    ("urllib3", "read"),
    ("urllib3", "readinto"),
    ("urllib3", "stream"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kib", type=int, nargs="+", default=[64, 256, 1024], help="a read")
    parser.add_argument("--job", help="what a child process reads, as JSON")
    options = parser.parse_args()
    if options.job:
        sys.stdout.write(json.dumps(run(**json.loads(options.job))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "served" / REPO / NAME, options.mb)
        with start_in_process(Path(folder) / "served") as endpoint:
            for kib in options.kib:
                compare(endpoint, options.mb * 10**6, kib << 10, options.rounds)


def compare(endpoint: str, n_bytes: int, step: int, n_rounds: int) -> None:
    """One line for each way: wall time, the processor's time, and the ratio to the first."""
    rounds = [[in_process(way, endpoint, n_bytes, step) for way in WAYS] for _ in range(n_rounds)]
    for i, (library, method) in enumerate(WAYS):
        wall, cpu = (statistics.median(times[i][which] for times in rounds) for which in (0, 1))
        ratio = statistics.median(times[i][0] / times[0][0] for times in rounds)
        print(f"{step >> 10:5} KiB {library:11} {method:8} {wall:.3f} s, processor {cpu:.3f} s, "
              f"{ratio:.2f} of {' '.join(WAYS[0])}", flush=True)  # fmt: skip


def in_process(way: tuple[str, str], endpoint: str, n_bytes: int, step: int) -> list[float]:
    job = {"library": way[0], "method": way[1], "endpoint": endpoint, "n_bytes": n_bytes,
           "step": step}  # fmt: skip
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    times: list[float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return times


def run(library: str, method: str, endpoint: str, n_bytes: int, step: int) -> tuple[float, float]:
    """Seconds of wall and of processor for all of it."""
    host, port = urlsplit(endpoint).hostname or "", urlsplit(endpoint).port
    pool = urllib3.HTTPConnectionPool(host, port, maxsize=8, socket_options=SOCKET_OPTIONS)
    share = n_bytes // CONNECTIONS

    def receive(start: int) -> None:
        path, headers = f"/{REPO}/resolve/main/{NAME}", {"Accept-Encoding": "identity"}
        headers["Range"] = f"bytes={start}-{start + share - 1}"
        response: Any
        if library == "urllib3":
            response = pool.urlopen(
                "GET", path, headers=headers, preload_content=False, redirect=False, retries=False
            )
        else:
            connection = http.client.HTTPConnection(host, port)
            connection.connect()
            connection.sock.setsockopt(*SOCKET_OPTIONS[1])
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
        if sum(sizes(response, library, method, step)) != share:
            raise SystemExit("wrong number of bytes")

    began, cpu = time.perf_counter(), time.process_time()
    threads = [threading.Thread(target=receive, args=(i * share,)) for i in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, time.process_time() - cpu


def sizes(response: Any, library: str, method: str, step: int) -> Iterator[int]:
    """Reads into a piece until the end; gives how much came each time."""
    piece, filled = memoryview(bytearray(PIECE_BYTES)), 0
    plain = {"decode_content": False} if library == "urllib3" else {}
    stream = response.stream(step, **plain) if method == "stream" else None
    while True:
        at_most = min(step, PIECE_BYTES - filled)
        if method == "readinto":
            n = response.readinto(piece[filled : filled + at_most])
        else:
            chunk = next(stream, b"") if stream else getattr(response, method)(at_most, **plain)
            n = len(chunk)
            at_end = min(n, PIECE_BYTES - filled)
            piece[filled : filled + at_end] = chunk[:at_end]
            piece[: n - at_end] = chunk[at_end:]
        if not n:
            return
        yield n
        filled = (filled + n) % PIECE_BYTES


if __name__ == "__main__":
    main()
