"""Fetches the missing bytes of one file over a few connections, with retries and its sha256.

Each connection fills one piece at a time in memory and hands it to the partial file whole. One more
thread makes the sha256 of what lies without a gap from the beginning, as it grows, and one has the
disk keep what came. Nothing here decides what a wrong hash means: download.py does.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DownloadError, gib
from .client import Hub
from .partial_file import Partial
from .types import TransferFault
from .verify import PIECE_BYTES, n_pieces

if TYPE_CHECKING:
    from .http import RemoteBytes

LONGEST_BYTES = 64 << 20
SHORTEST_BYTES = 2 << 20
WORTH_SHARING_BYTES = 4 << 20
"""A connection with less left is not helped: the request would cost more than it brings."""


@dataclass(slots=True, eq=False)
class Segment:
    """Bytes that one connection fetches, from `at` on; both ends are those of pieces.

    `at` is moved by its connection alone, `end` comes down when others take over its tail.
    """

    at: int
    end: int


class Segments:
    """What no connection has yet, and what each is at.

    The share of a connection gets smaller towards the end, so that all end at about the same time;
    one that is free takes over half of what the slowest has left.
    """

    def __init__(self, missing: Iterable[tuple[int, int]], connections: int) -> None:
        self._waiting = [Segment(*ends) for ends in missing]
        self._active: list[Segment] = []
        self._connections = connections
        self._lock = threading.Lock()
        self._streaming: Segment | None = None

    def take(self) -> Segment | None:
        """The next one, to be handed back with `done`; None where nothing is left to do."""
        with self._lock:
            if self._streaming:
                return None
            taken = self._next() if self._waiting else self._share_of_slowest()
            if taken:
                self._active.append(taken)
            return taken

    def _next(self) -> Segment:
        left = sum(segment.end - segment.at for segment in self._waiting)
        share = left // (2 * self._connections)
        first = self._waiting[0]
        n_bytes = _whole_pieces(min(max(share, SHORTEST_BYTES), LONGEST_BYTES))
        if first.end - first.at <= n_bytes:
            return self._waiting.pop(0)
        first.at += n_bytes
        return Segment(first.at - n_bytes, first.at)

    def _share_of_slowest(self) -> Segment | None:
        slowest = max(self._active, key=lambda s: s.end - s.at, default=None)
        if slowest is None or slowest.end - slowest.at < WORTH_SHARING_BYTES:
            return None
        middle = slowest.at + _whole_pieces((slowest.end - slowest.at) // 2)
        tail = Segment(middle, slowest.end)
        slowest.end = middle
        return tail

    def done(self, segment: Segment) -> None:
        """Its connection is through with it, or gives up; others take what is left of it."""
        with self._lock:
            self._active.remove(segment)
            if segment.at < segment.end:
                self._waiting.insert(0, segment)

    def in_one_stream(self, segment: Segment, n_bytes: int) -> bool:
        """The server sends the file from its beginning, whatever is asked: one connection takes it.

        That is the first one to ask; for the others this is False and their segment is empty now.
        """
        with self._lock:
            if not self._streaming:
                self._streaming = segment
                self._waiting.clear()
                for other in self._active:
                    other.end = other.at
            if self._streaming is segment:
                segment.at, segment.end = 0, n_bytes
            return self._streaming is segment


def _whole_pieces(n_bytes: int) -> int:
    return max(PIECE_BYTES, n_bytes - n_bytes % PIECE_BYTES)


SYNC_EVERY_S = 0.25
"""What came since then is fetched again after a power cut: 8 MiB at 32 MiB/s."""

THREAD_NAME = "localmoe-transfer"
TICK_S = 0.2
GOODBYE_S = 0.8
"""How long an interrupt waits for the threads; the prompt is to be back within a second."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """With a line that fails: waits double from the first to the longest; any byte starts anew.

    `tries` in a row without one end the transfer: with these figures after about two minutes.
    """

    tries: int = 8
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    longest_obeyed_s: float = 600.0  # of what a server asks for with Retry-After

    def wait_s(self, n_failures: int, asked_s: float | None) -> float:
        backoff: float = min(self.first_wait_s * 2.0 ** (n_failures - 1), self.longest_wait_s)
        jittered: float = backoff * random.uniform(0.5, 1.0)
        return max(jittered, min(asked_s or 0.0, self.longest_obeyed_s))


class ContentChanged(Exception):
    """The server has other content under this name than that of the pieces so far."""


class Transfer:
    """Fetches what a partial lacks: `run`, once."""

    def __init__(self, hub: Hub, partial: Partial, connections: int, patience: RetryPolicy) -> None:
        self.hub, self.partial, self.file = hub, partial, partial.file
        self.patience = patience
        self.n_received = 0  # bytes off the line, for the speed
        self.n_bytes_here = partial.n_bytes_here
        self.trouble = ""  # what went wrong last, until bytes come again
        self.segments = Segments(partial.ranges(present=False), connections)
        self._connections = connections
        self._bodies: set[RemoteBytes] = set()
        self._lock = threading.Condition()
        self._stopped = threading.Event()
        self._failure: Exception | None = None
        self._n_working = connections
        self._n_hashed = 0
        self._sha256 = hashlib.sha256()

    def run(self, on_tick: Callable[[Transfer], None]) -> str:
        """The sha256 of the whole file; `on_tick` is called a few times a second, in this thread.

        Raises DownloadError where the line gave out, ContentChanged, OSError from the disk. However
        it ends, the threads end with it, and the partial keeps what came.
        """
        works = [*[self._receive_all] * self._connections, self._hash_all, self._sync_all]
        threads = [
            threading.Thread(target=self._guard, args=(work,), name=THREAD_NAME, daemon=True)
            for work in works
        ]
        try:
            for thread in threads:
                thread.start()
            while not self._is_over():
                on_tick(self)
            on_tick(self)
        finally:
            self._stop()
            until = time.monotonic() + GOODBYE_S
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, until - time.monotonic()))
        if self._failure:
            raise self._failure
        return self._sha256.hexdigest()

    @property
    def n_bytes_hashed(self) -> int:
        return min(self._n_hashed * PIECE_BYTES, self.file.n_bytes)

    def _is_over(self) -> bool:
        with self._lock:
            if not self._failure and self._n_hashed < n_pieces(self.file.n_bytes):
                self._lock.wait(TICK_S)
            return self._failure is not None or self._n_hashed == n_pieces(self.file.n_bytes)

    def _guard(self, work: Callable[[], None]) -> None:
        """The first thing that goes wrong in a thread ends the transfer, in the caller's thread."""
        try:
            work()
        except Exception as error:
            with self._lock:
                if not self._stopped.is_set():
                    self._failure = self._failure or error
                    self._stopped.set()
                self._lock.notify_all()

    def _stop(self) -> None:
        with self._lock:
            self._stopped.set()
            self._lock.notify_all()
            bodies = list(self._bodies)
        for body in bodies:
            body.close()

    # --- a connection

    def _receive_all(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        given_up = False
        while not given_up and not self._stopped.is_set() and (segment := self.segments.take()):
            try:
                _Connection(self, segment, buffer).run()
            except TransferFault:
                given_up = True
            self.segments.done(segment)
        self._one_less()

    def _one_less(self) -> None:
        """A connection that gave up leaves its share to the others: some servers take only a few.

        Raises DownloadError where it was the last, and something is still missing.
        """
        with self._lock:
            self._n_working -= 1
            over = self._stopped.is_set() or self.n_bytes_here == self.file.n_bytes
            if self._n_working or over:
                return
        here, whole = gib(self.n_bytes_here), gib(self.file.n_bytes)
        what = self.trouble or "The connection broke off."
        raise DownloadError(
            f"{what} Gave up after {self.patience.tries} tries; {here} of {whole} of "
            f"{self.file.base_name} are here and kept.",
            "The same command goes on from there.",
        )

    def failed(self, fault: TransferFault) -> None:
        with self._lock:
            self.trouble = fault.message

    def opened(self, body: RemoteBytes) -> None:
        with self._lock:
            self._bodies.add(body)

    def closed(self, body: RemoteBytes) -> None:
        with self._lock:
            self._bodies.discard(body)

    def received(self, n: int) -> None:
        with self._lock:
            self.n_received += n
            self.trouble = ""

    def keep(self, i: int, piece: memoryview) -> None:
        if self.partial.has(i) or not self.partial.write(i, piece):
            return
        with self._lock:
            self.n_bytes_here += len(piece)
            self._lock.notify_all()

    def is_stopped(self, wait_s: float = 0.0) -> bool:
        return self._stopped.wait(wait_s) if wait_s else self._stopped.is_set()

    # --- the hash and the disk

    def _hash_all(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        for i in range(n_pieces(self.file.n_bytes)):
            with self._lock:
                while not self.partial.has(i) and not self._stopped.is_set():
                    self._lock.wait()
            if self._stopped.is_set():
                return
            self._sha256.update(buffer[: self.partial.read(i, buffer)])
            self._n_hashed = i + 1
        with self._lock:
            self._lock.notify_all()

    def _sync_all(self) -> None:
        while not self._stopped.wait(SYNC_EVERY_S):
            self.partial.sync()


class _Connection:
    """One segment, over as many requests as it takes."""

    def __init__(self, transfer: Transfer, segment: Segment, buffer: memoryview) -> None:
        self._transfer, self._segment, self._buffer = transfer, segment, buffer
        self._n_filled = 0  # of the piece at segment.at: a retry goes on behind it
        self._n_failures = 0
        self._furthest = 0

    def run(self) -> None:
        """Raises TransferFault when patience is at its end."""
        patience, segment = self._transfer.patience, self._segment
        while segment.at < segment.end and not self._transfer.is_stopped():
            try:
                self._request()
            except TransferFault as fault:
                if self._transfer.is_stopped():
                    return
                self._transfer.failed(fault)
                self._n_failures += 1
                if fault.kind == "proxy" and not self._transfer.n_received:
                    raise DownloadError(fault.message, fault.hint) from None
                if self._n_failures >= patience.tries:
                    raise
                self._transfer.is_stopped(patience.wait_s(self._n_failures, fault.retry_after_s))

    def _request(self) -> None:
        transfer, start = self._transfer, self._segment.at + self._n_filled
        etag = transfer.partial.etag
        with transfer.hub.open(transfer.file, start, self._segment.end, etag=etag) as body:
            transfer.opened(body)
            try:
                if not transfer.is_stopped() and self._is_ours(body, start):
                    self._read(body)
            finally:
                transfer.closed(body)

    def _is_ours(self, body: RemoteBytes, start: int) -> bool:
        """Whether this answer's bytes are for this connection to take. Raises ContentChanged."""
        file, segment = self._transfer.file, self._segment
        other_size = body.total_bytes not in (None, file.n_bytes)
        if other_size or not self._transfer.partial.agree(body.etag):
            raise ContentChanged
        if body.start == start:
            return True
        if body.start:
            raise TransferFault("dropped", "The server sends other bytes than it was asked for.")
        self._n_filled = 0
        return self._transfer.segments.in_one_stream(segment, file.n_bytes)

    def _read(self, body: RemoteBytes) -> None:
        transfer, segment = self._transfer, self._segment
        while segment.at < segment.end and not transfer.is_stopped():
            n_bytes = min(PIECE_BYTES, transfer.file.n_bytes - segment.at)
            got = body.read_into(self._buffer[self._n_filled : n_bytes])
            if not got:
                raise TransferFault("dropped", "The connection ended early.")
            self._n_filled += got
            self._note_progress(segment.at + self._n_filled)
            transfer.received(got)
            if self._n_filled == n_bytes:
                transfer.keep(segment.at // PIECE_BYTES, self._buffer[:n_bytes])
                self._n_filled = 0
                segment.at += n_bytes

    def _note_progress(self, at: int) -> None:
        """Bytes that came before count for nothing: a server without ranges may repeat itself."""
        if at > self._furthest:
            self._furthest, self._n_failures = at, 0
