"""Which tokens go into the next batch, and where in it.

Where sequences share one cache, everything goes together. Where they have streams of their own,
llama.cpp computes only streams next to each other at once, and as many tokens of each: prompts and
generation take turns. With `Placement.batch_invariant`, rows that nobody asked for are put between
and behind, and taken out of the cache afterwards, so that no token is ever computed by another
kernel because of what is beside it (docs/notes/batching.md):

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
    """What a sequence has in a batch: `n_tokens` rows, of which the last is row `last`."""

    sequence: Sequence
    n_tokens: int
    last: int


@dataclass(slots=True)
class DecodeBatch:
    """A batch of `n_rows` tokens. `padding` has, by slot, the first position that isn't its own and
    is to be forgotten again."""

    parts: list[BatchSlice] = field(default_factory=list)
    n_rows: int = 0
    padding: dict[int, int] = field(default_factory=dict)


class BatchBuilder:
    """Builds the batches of a model with these slots of its KV cache."""

    def __init__(self, model: NativeModel, slots: KvSlots) -> None:
        self._model = model
        self._slots = slots
        self._is_prompts_turn = False
        # a recurrent state can't be had back from before a row that nobody asked for
        self._is_batch_invariant = model.placement.batch_invariant and model.can_share

    def build(self, running: Iterable[Sequence]) -> DecodeBatch:
        """A token of each generating sequence, and as much of prompts as goes with them."""
        sequences = list(running)
        generating = [sequence for sequence in sequences if sequence.n_sampled]
        prompts = [sequence for sequence in sequences if not sequence.n_sampled]
        if generating and prompts and not self._model.placement.kv_unified:
            # nobody waits for the next word of a batch: many generating together are done sooner
            prompts_first = not any(sequence.request.stream for sequence in generating)
            self._is_prompts_turn = prompts_first or not self._is_prompts_turn
            generating, prompts = ([], prompts) if self._is_prompts_turn else (generating, [])
        batch = DecodeBatch()
        if not self._is_batch_invariant:
            self._add_generating(generating, batch)
            self._add_prompts(prompts, batch)
        elif generating:
            self._add_generating_invariant(generating, sequences, batch)
        elif prompts:
            self._add_prompts_invariant(prompts, batch)
        return batch

    def forget_padding(self, batch: DecodeBatch) -> None:
        """Removes the padding of a computed batch from the cache."""
        for slot, start in batch.padding.items():
            self._model.context.remove(slot, start)

    # ---- in llama.cpp's own order ----

    def _add_generating(self, sequences: list[Sequence], batch: DecodeBatch) -> None:
        # in order, as only streams next to each other are computed together
        in_order = sorted(sequences, key=lambda sequence: sequence.slot)
        for sequence in in_order[: self._model.placement.n_ubatch]:
            self._add(batch, sequence, 1)

    def _add_prompts(self, sequences: list[Sequence], batch: DecodeBatch) -> None:
        """As much of prompts as the micro-batch still holds."""
        for sequence in sequences:
            n = min(sequence.n_waiting, self._model.placement.n_ubatch - batch.n_rows)
            if n == 0:
                break
            self._add(batch, sequence, n)

    # ---- batch-invariant ----

    def _add_generating_invariant(
        self, sequences: list[Sequence], all_sequences: list[Sequence], batch: DecodeBatch
    ) -> None:
        generating = {sequence.slot: sequence for sequence in sequences}
        ends = {sequence.slot: sequence.n_done for sequence in all_sequences}
        for span in spans(sorted(generating), self._model.placement.n_seq):
            for slot in span:
                if slot in generating:
                    self._add(batch, generating[slot], 1)
                    continue
                is_free = slot in self._slots.free
                end = self._slots.end_of(slot) if is_free else ends[slot]
                batch.padding[slot] = end
                self._add_padding(batch, slot, 1, wants_logits=True)

    def _add_prompts_invariant(self, sequences: list[Sequence], batch: DecodeBatch) -> None:
        """As much of the first prompt as there is room for, and those beside that go with it."""
        together, n_each = self._side_by_side(sequences)
        for sequence in together:
            n = min(sequence.n_waiting, n_each)
            self._add(batch, sequence, n)
            if n < n_each:
                batch.padding[sequence.slot] = sequence.n_done + n
                self._add_padding(batch, sequence.slot, n_each - n)
        ends = [part.last for part in batch.parts if part.n_tokens == part.sequence.n_waiting]
        if len(ends) == 1:
            beside = ends[0] + 1 if ends[0] + 1 < batch.n_rows else ends[0] - 1
            self._model.batch.wants_logits[beside] = 1

    def _side_by_side(self, sequences: list[Sequence]) -> tuple[list[Sequence], int]:
        """Prompts in streams next to each other, the first among them, and how many tokens each."""
        waiting = {sequence.slot: sequence for sequence in sequences}
        together = [sequences[0]]
        n_each = max(2, min(sequences[0].n_waiting, self._model.placement.n_ubatch))
        for step in (1, -1):
            other = waiting.get(sequences[0].slot + step)
            while other is not None and (longest := self._length_with(other, together, n_each)):
                together.append(other)
                n_each = longest
                other = waiting.get(other.slot + step)
        return sorted(together, key=lambda sequence: sequence.slot), n_each

    def _length_with(self, other: Sequence, together: list[Sequence], n_each: int) -> int:
        """How many tokens of each where one more goes along; 0 where that isn't worth it."""
        longest = max(n_each, other.n_waiting)
        n_padding = (longest - n_each) * len(together) + longest - other.n_waiting
        deepest = max(sequence.n_done for sequence in (other, *together))
        n_rows = (len(together) + 1) * longest
        has_room = n_rows <= self._model.placement.n_ubatch
        fits = has_room and deepest + longest <= self._model.n_ctx
        return longest if fits and n_padding <= WORTH_PADDING else 0

    # ---- the batch ----

    def _add(self, batch: DecodeBatch, sequence: Sequence, n_tokens: int) -> None:
        rows, at, end = self._model.batch, batch.n_rows, batch.n_rows + n_tokens
        n_done = sequence.n_done
        rows.tokens[at:end] = sequence.tokens[n_done : n_done + n_tokens]
        rows.positions[at:end] = range(n_done, n_done + n_tokens)
        rows.sequences[at:end] = sequence.slot
        rows.wants_logits[at:end] = 0
        rows.wants_logits[end - 1] = n_tokens == sequence.n_waiting
        batch.parts.append(BatchSlice(sequence, n_tokens, end - 1))
        batch.n_rows = end

    def _add_padding(
        self, batch: DecodeBatch, slot: int, n_rows: int, *, wants_logits: bool = False
    ) -> None:
        rows, at, end = self._model.batch, batch.n_rows, batch.n_rows + n_rows
        start = batch.padding[slot]
        rows.tokens[at:end] = PADDING_TOKEN
        rows.positions[at:end] = range(start, start + n_rows)
        rows.sequences[at:end] = slot
        rows.wants_logits[at:end] = wants_logits
        batch.n_rows = end


def spans(slots: list[int], n_streams: int) -> list[range]:
    """Neighbouring streams that are computed together: no gap between them is wide, and none is
    alone. `slots` are in order; there are `n_streams`, two at least."""
    found: list[range] = []
    for slot in slots:
        if found and slot - found[-1].stop <= WORTH_FILLING:
            found[-1] = range(found[-1].start, slot + 1)
        else:
            found.append(range(slot, slot + 1))
    return [
        span if len(span) > 1
        else range(span.start, span.stop + 1) if span.stop < n_streams
        else range(span.start - 1, span.stop)
        for span in found
    ]  # fmt: skip
