"""A loaded model with its context: decodes batches, keeps its KV cache, governs its threads.

Each step gets all the compute threads that were planned, and fewer while other programs want the
cores. llama.cpp's threads wait for each other after every operation: where another program has one
of their cores, all of them wait for that one, and a thread less is several times as fast
(docs/notes/busy-machine.md). The kernel counts how long each thread waited for a core (Linux,
Documentation/scheduler/sched-stats.rst).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..native import llama
from ..native.llama import host_memory
from ..native.pinning import PinnedPages, can_pin
from ..native.repack import repacked
from ..protocol import FileSpan, Placement, VocabFacts

WINDOW_S = 0.25
"""How long it is looked before anything is decided."""
MUCH = 0.15
"""Seconds that threads waited in a second, all together, from which on cores are wanted by others:
a busy program takes half of a core from a thread, an idle machine a hundredth."""
PATIENCE_S, MOST_PATIENCE_S = 2.0, 60.0
"""After how long all threads are tried again; each time in vain it is twice as long."""
TASKS = Path("/proc/self/task")


def waited_s(tasks: Path = TASKS) -> float:
    """Seconds that this process's threads have been ready to run without a core; 0 where the
    system does not tell. Threads come and go, so it may fall."""
    nanoseconds = 0
    with suppress(OSError):  # no such system
        for task in tasks.iterdir():
            with suppress(OSError, ValueError, IndexError):  # a thread that has just ended
                nanoseconds += int((task / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9


class ThreadGovernor:
    """The number of threads for the next step, by what was lost in those before."""

    def __init__(
        self,
        n_most: int,
        waited: Callable[[], float] = waited_s,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n = self._n_most = n_most
        self._n_least = max(1, n_most // 2)
        self._waited, self._clock = waited, clock
        self._patience_s, self._lowered_at = PATIENCE_S, -MOST_PATIENCE_S
        self._seconds, self._before = 0.0, waited()

    def stepped(self, seconds: float) -> None:
        """A step took so long, with `n` threads."""
        self._seconds += seconds
        if self._seconds >= WINDOW_S:
            waited = self._waited()
            self._decide((waited - self._before) / self._seconds)
            self._seconds, self._before = 0.0, waited

    def _decide(self, lost: float) -> None:
        """`lost` are seconds in a second; one busy program takes about half of them."""
        since = self._clock() - self._lowered_at
        if lost >= MUCH and self.n > self._n_least:
            if self.n == self._n_most:
                is_still_busy = since < 2 * self._patience_s
                longer = min(2 * self._patience_s, MOST_PATIENCE_S)
                self._patience_s = longer if is_still_busy else PATIENCE_S
            self.n = max(self._n_least, self.n - max(1, round(2 * lost)))
            self._lowered_at = self._clock()
        elif self.n < self._n_most and since >= self._patience_s:
            self.n = self._n_most


# llama.cpp has two kernels for products with K-quants on x86 and takes one from 8 rows of an expert
# on: set before the first product of a process, the second for all (ggml-cpu/tiled/tiled.cpp)
ONE_KERNEL = "GGML_CPU_TILED_MM_FORCE"


class ModelError(Exception):
    """The model can't be loaded or can't compute; the message is llama.cpp's own reason."""


class NativeModel:
    """A model in memory, ready to compute for `placement.n_seq` sequences.

    Load mode "pinned" maps the file and locks those pages of it that a GPU copies (`pinned`).
    Where that can't be, llama.cpp reads the file into pinned memory of its own, which takes longer.

    `n_ctx` is the room of one sequence in tokens; a batch holds at most `n_ubatch` tokens, so that
    a request can be ended between two micro-batches.
    """

    def __init__(
        self,
        path: str,
        placement: Placement,
        pinned: Sequence[FileSpan] = (),
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        memory = host_memory() if placement.load_mode == "pinned" and pinned else None
        if memory and can_pin(memory, pinned[0].path):
            placement = replace(placement, load_mode="mmap")
            self._pages = PinnedPages(memory)
        else:
            self._pages = PinnedPages()
        self.placement = placement
        if placement.batch_invariant:
            os.putenv(ONE_KERNEL, "1")
        self._model = load_model(path, placement, on_progress)
        self._pages.pin(pinned)
        self._repacked = repacked(self._model, placement.repack, placement.n_repacked_layers)
        self.vocab = self._model.vocab
        self.context = open_context(self._model, placement)
        # llama.cpp rounds its cells up; what was asked for is what a request may use
        self.n_ctx = min(self.context.n_ctx, placement.n_ctx)
        self.n_cells = self.context.n_cells
        # a recurrent state is that of a whole sequence: no beginning can be had of it
        self.can_share = not self._model.is_recurrent
        self.batch = llama.LlamaBatch(placement.n_ubatch)
        self._threads = ThreadGovernor(placement.n_threads)
        # on a CPU flash attention divides a sequence among threads, so their number moves its sums
        # (use_split_kv_path, ggml/src/ggml-cpu/ops.cpp); nothing else depends on it
        self._wants_all_threads = not placement.n_gpu_layers and placement.flash_attention != "off"

    @property
    def n_pinned_bytes(self) -> int:
        """Bytes of the mapped file that are pinned."""
        return self._pages.n_bytes

    def facts(self) -> VocabFacts:
        """Returns the special tokens of the vocabulary."""
        return self.vocab.facts

    @property
    def lacks_copies(self) -> bool:
        """Whether there are matrices still to be repacked, with which answers will be generated."""
        return not self._repacked.is_whole

    @property
    def copies_left_s(self) -> float:
        """How long those that are lacking will take, about; 0 where none was made yet."""
        return self._repacked.left_s

    def make_copies(self) -> None:
        """Repack the next few: some tenths of a second at most."""
        self._repacked.make_some(self.placement.n_threads)

    def decode(self, n_tokens: int, *, generating: bool = False, again: bool = False) -> bool:
        """Compute the first tokens of `batch`; False where it was aborted, the cache as before.

        Repacked weights are for `generating`, all of them: those that lack are made first. What
        must come out the same `again` does not depend on what else the machine does.
        """
        if generating:
            self._repacked.make_all(self.placement.n_threads)
        self._repacked.use(generating)
        n_all, n_free = self.placement.n_threads, self._threads.n
        self.context.set_threads(n_all if again and self._wants_all_threads else n_free)
        started = time.perf_counter()
        status = self.context.decode(self.batch, n_tokens)
        self._threads.stepped(time.perf_counter() - started)
        if status == llama.DECODE_OK:
            return True
        self._forget(n_tokens)
        if status == llama.DECODE_ABORTED:
            return False
        if status == llama.DECODE_NO_ROOM:
            raise ModelError("the KV cache has no room for the batch")
        raise ModelError(f"llama_decode failed with status {status}")

    def _forget(self, n_tokens: int) -> None:
        """Take a failed batch back out of the cache, wherever in it the failure was."""
        sequences, positions = self.batch.sequences[:n_tokens], self.batch.positions[:n_tokens]
        for sequence in set(sequences.tolist()):
            self.context.remove(sequence, int(positions[sequences == sequence].min()))

    def keep(self, sequence: int, n_tokens: int) -> int:
        """Keep at most the first `n_tokens` of a sequence; gives how many could be kept.

        A recurrent state can't be cut, and a sliding window may have moved past what is asked for
        (llama_memory_seq_rm says true all the same): then nothing is kept, unless it is all of it.
        """
        if n_tokens > 0 and self.context.last_position(sequence) == n_tokens - 1:
            return n_tokens
        kept = n_tokens > 0 and self.context.remove(sequence, n_tokens)
        if kept and self.context.first_position(sequence) == 0:
            return n_tokens
        self.context.remove(sequence, 0)
        return 0

    def copy(self, source: int, target: int) -> None:
        """Let a sequence hold what another does, and nothing else; `keep` tells what it got.

        With a unified cache both have the same cells then; else llama.cpp copies a whole stream.
        """
        self.context.remove(target, 0)
        self.context.copy(source, target)

    def free(self) -> None:
        """Frees the context, the copies, the pinned pages and the model."""
        with suppress(AttributeError):
            self.context.free()
        self._repacked.free()
        self._pages.release()  # before the mapping goes
        self._model.free()


def load_model(
    path: str,
    placement: Placement,
    on_progress: Callable[[float], None] | None = None,
    *,
    no_alloc: bool = False,
) -> llama.LlamaModel:
    """The weights, placed; with `no_alloc`, as if they were."""
    return llama.LlamaModel(
        path,
        n_gpu_layers=placement.n_gpu_layers,
        load_mode=placement.load_mode,
        cpu_patterns=placement.cpu_patterns(),
        tensor_split=placement.tensor_split,
        on_progress=on_progress,
        no_alloc=no_alloc,
    )


def open_context(model: llama.LlamaModel, placement: Placement) -> llama.LlamaContext:
    """The KV cache and the compute buffers of a placement."""
    return llama.LlamaContext(
        model,
        n_ctx=placement.n_ctx,
        n_seq=placement.n_seq,
        n_cells=placement.n_ctx_total if placement.kv_unified else None,
        n_batch=max(placement.n_batch, placement.n_ubatch),
        n_ubatch=placement.n_ubatch,
        n_threads=placement.n_threads,
        kv_type=placement.kv_type,
        flash_attention=placement.flash_attention,
    )
