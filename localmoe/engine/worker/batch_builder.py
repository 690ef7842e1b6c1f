"""Which tokens go into the next batch, and where in it.

Where sequences share one cache, everything goes together. Where they have streams of their own,
llama.cpp computes only streams next to each other at once, and as many tokens of each: prompts and
generation take turns. With `Placement.alike`, rows that nobody asked for are put between and
behind, and taken out of the cache afterwards, so that no token is ever computed by another kernel
because of what is beside it (docs/notes/batching.md):

* two rows at least, as matrices of f32, f16 and 8 bits have a kernel of their own for one;
* two rows that give logits, as the last layer computes those alone;
* two tokens of a prompt at least in its own stream, as attention has such kernels, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .kv_slots import KvSlots
from .model import NativeModel

if TYPE_CHECKING:
    from .sequence import Sequence


WORTH_FILLING = 4
"""Streams in a row without a token, up to which rows are put there so that those on both sides go
together: a row beside 16 others takes a sixth of what two by themselves take."""

WORTH_PADDING = 48
"""Rows behind a shorter prompt, up to which it goes together with a longer one: so many cost what
a second pass through the weights would."""

PADDING_TOKEN = 0
"""The token of rows that nobody asked for; any will do."""


@dataclass(frozen=True, slots=True)
class BatchSlice:
    """What a run has of a batch: so many tokens, the last of which is its number `last`."""

    run: Sequence
    n_tokens: int
    last: int


@dataclass(slots=True)
class DecodeBatch:
    """A batch of `n_rows` tokens. `padding` has, by sequence, the first position that isn't its own
    and is to be forgotten again."""

    parts: list[BatchSlice] = field(default_factory=list)
    n_rows: int = 0
    padding: dict[int, int] = field(default_factory=dict)


class BatchBuilder:
    """Lays the batches of a model whose sequences are `places`."""

    def __init__(self, model: NativeModel, places: KvSlots) -> None:
        self._model = model
        self._places = places
        self._is_prompts_turn = False
        # a recurrent state can't be had back from before a row that nobody asked for
        self._is_alike = model.placement.alike and model.can_share

    def lay(self, running: Iterable[Sequence]) -> DecodeBatch:
        """A token of each generating sequence, and as much of prompts as goes with them."""
        runs = list(running)
        generating = [run for run in runs if run.n_sampled]
        prompts = [run for run in runs if not run.n_sampled]
        if generating and prompts and not self._model.placement.kv_unified:
            # nobody waits for the next word of a batch: many generating together are done sooner
            prompts_first = not any(run.request.stream for run in generating)
            self._is_prompts_turn = prompts_first or not self._is_prompts_turn
            generating, prompts = ([], prompts) if self._is_prompts_turn else (generating, [])
        laid = DecodeBatch()
        if not self._is_alike:
            self._lay_generating(generating, laid)
            self._lay_prompts(prompts, laid)
        elif generating:
            self._lay_generating_alike(generating, runs, laid)
        elif prompts:
            self._lay_prompts_alike(prompts, laid)
        return laid

    def forget_padding(self, laid: DecodeBatch) -> None:
        for sequence, start in laid.padding.items():
            self._model.context.remove(sequence, start)

    # ---- as llama.cpp takes it ----

    def _lay_generating(self, runs: list[Sequence], laid: DecodeBatch) -> None:
        # in order, as only streams next to each other are computed together
        runs = sorted(runs, key=lambda run: run.sequence)[: self._model.placement.n_ubatch]
        for run in runs:
            self._put(laid, run, 1)

    def _lay_prompts(self, runs: list[Sequence], laid: DecodeBatch) -> None:
        """As much of prompts as the micro-batch still holds."""
        for run in runs:
            n = min(run.n_waiting, self._model.placement.n_ubatch - laid.n_rows)
            if n == 0:
                break
            self._put(laid, run, n)

    # ---- whatever is beside ----

    def _lay_generating_alike(
        self, runs: list[Sequence], all_runs: list[Sequence], laid: DecodeBatch
    ) -> None:
        generating = {run.sequence: run for run in runs}
        ends = {run.sequence: run.n_done for run in all_runs}
        for span in spans(sorted(generating), self._model.placement.n_seq):
            for sequence in span:
                if sequence in generating:
                    self._put(laid, generating[sequence], 1)
                    continue
                is_free = sequence in self._places.free
                end = self._places.end_of(sequence) if is_free else ends[sequence]
                laid.padding[sequence] = end
                self._put_filler(laid, sequence, 1, wants_logits=True)

    def _lay_prompts_alike(self, runs: list[Sequence], laid: DecodeBatch) -> None:
        """As much of the first prompt as there is room for, and those beside that go with it."""
        together, n_each = self._together(runs)
        for run in together:
            n = min(run.n_waiting, n_each)
            self._put(laid, run, n)
            if n < n_each:
                laid.padding[run.sequence] = run.n_done + n
                self._put_filler(laid, run.sequence, n_each - n)
        ends = [part.last for part in laid.parts if part.n_tokens == part.run.n_waiting]
        if len(ends) == 1:
            beside = ends[0] + 1 if ends[0] + 1 < laid.n_rows else ends[0] - 1
            self._model.batch.wants_logits[beside] = 1

    def _together(self, runs: list[Sequence]) -> tuple[list[Sequence], int]:
        """Prompts in streams next to each other, the first among them, and how many tokens each."""
        waiting = {run.sequence: run for run in runs}
        together = [runs[0]]
        n_each = max(2, min(runs[0].n_waiting, self._model.placement.n_ubatch))
        for step in (1, -1):
            run = waiting.get(runs[0].sequence + step)
            while run is not None and (longest := self._length_with(run, together, n_each)):
                together.append(run)
                n_each = longest
                run = waiting.get(run.sequence + step)
        return sorted(together, key=lambda run: run.sequence), n_each

    def _length_with(self, other: Sequence, together: list[Sequence], n_each: int) -> int:
        """How many tokens of each where one more goes along; 0 where that isn't worth it."""
        longest = max(n_each, other.n_waiting)
        n_padding = (longest - n_each) * len(together) + longest - other.n_waiting
        deepest = max(run.n_done for run in (other, *together))
        n_rows = (len(together) + 1) * longest
        has_room = n_rows <= self._model.placement.n_ubatch
        fits = has_room and deepest + longest <= self._model.n_ctx
        return longest if fits and n_padding <= WORTH_PADDING else 0

    # ---- the batch ----

    def _put(self, laid: DecodeBatch, run: Sequence, n_tokens: int) -> None:
        batch, at, end = self._model.batch, laid.n_rows, laid.n_rows + n_tokens
        n_done = run.n_done
        batch.tokens[at:end] = run.tokens[n_done : n_done + n_tokens]
        batch.positions[at:end] = range(n_done, n_done + n_tokens)
        batch.sequences[at:end] = run.sequence
        batch.wants_logits[at:end] = 0
        batch.wants_logits[end - 1] = n_tokens == run.n_waiting
        laid.parts.append(BatchSlice(run, n_tokens, end - 1))
        laid.n_rows = end

    def _put_filler(
        self, laid: DecodeBatch, sequence: int, n_rows: int, *, wants_logits: bool = False
    ) -> None:
        batch, at, end = self._model.batch, laid.n_rows, laid.n_rows + n_rows
        start = laid.padding[sequence]
        batch.tokens[at:end] = PADDING_TOKEN
        batch.positions[at:end] = range(start, start + n_rows)
        batch.sequences[at:end] = sequence
        batch.wants_logits[at:end] = wants_logits
        laid.n_rows = end


def spans(sequences: list[int], n_streams: int) -> list[range]:
    """Neighbouring streams that are computed together: no gap between them is wide, and none is
    alone. `sequences` are in order; there are `n_streams`, two at least."""
    found: list[range] = []
    for sequence in sequences:
        if found and sequence - found[-1].stop <= WORTH_FILLING:
            found[-1] = range(found[-1].start, sequence + 1)
        else:
            found.append(range(sequence, sequence + 1))
    return [
        span if len(span) > 1
        else range(span.start, span.stop + 1) if span.stop < n_streams
        else range(span.start - 1, span.stop)
        for span in found
    ]  # fmt: skip
