"""The sequences of a cache as places for requests: what each holds, and what can be copied.

A sequence that nothing runs in keeps what it holds until its place, or its cells, are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..prefix import MIN_SHARED_TOKENS, common_prefix
from .model import NativeModel


class KvSlots:
    """The sequences of a model's cache; `free` are those that nothing runs in, oldest first, with
    the tokens that the cache still holds of them."""

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self._cells = CellAccounting(model.n_cells)
        self.free: dict[int, list[int]] = {n: [] for n in range(model.placement.n_seq)}

    def take(
        self,
        tokens: Sequence[int],
        n_most: int,
        running: Mapping[int, Sequence[int]],
        *,
        share: bool = True,
    ) -> tuple[int, int] | None:
        """A place for a prompt that may grow to `n_most` tokens: its sequence, and how many of the
        tokens that holds already. None while the cache has no room for it.

        What is missing is copied from another sequence, one of `running` among them, where that
        holds more. The last token is always left to compute: its logits are what is wanted.
        """
        sequence, source, n_shared = self._choose(tokens, running, share)
        del self.free[sequence]
        n_shared = self._bring(sequence, source, min(n_shared, len(tokens) - 1))
        if self._make_room(sequence, n_most):
            return sequence, n_shared
        self.free[sequence] = list(tokens[:n_shared])
        return None

    def give_back(self, sequence: int, tokens: list[int]) -> None:
        """End the use of a sequence that holds these tokens now."""
        self._cells.cut(sequence, len(tokens))
        self.free[sequence] = tokens

    def shorten(self, sequence: int, n_tokens: int) -> None:
        """Leave a free sequence its first tokens only."""
        n_kept = self._model.keep(sequence, n_tokens)
        self._cells.cut(sequence, n_kept)
        self.free[sequence] = self.free[sequence][:n_kept]

    def fill(self, tokens: list[int], fill: Callable[[int], bool]) -> bool:
        """Let the sequence that holds least have these tokens' state, which `fill` gives to it.

        False where there is no room, or it could not; then it holds nothing.
        """
        if not self.free:
            return False
        sequence = min(self.free, key=lambda n: len(self.free[n]))
        self.shorten(sequence, 0)
        del self.free[sequence]
        filled = self._make_room(sequence, len(tokens)) and fill(sequence)
        self.free[sequence] = tokens if filled else []
        if not filled:
            self.shorten(sequence, 0)
        return filled

    def end_of(self, sequence: int) -> int:
        """The position behind what a free sequence holds; what fills its stream is given up."""
        if len(self.free[sequence]) >= self._model.n_ctx:
            self._model.keep(sequence, 0)
            self._cells.cut(sequence, 0)
            self.free[sequence] = []
        return len(self.free[sequence])

    def _choose(
        self, tokens: Sequence[int], running: Mapping[int, Sequence[int]], share: bool
    ) -> tuple[int, int, int]:
        """Where to put it, where to take its beginning from, and how many tokens of that.

        The place is the one where least is lost: what a free sequence holds beyond what it has in
        common with the prompt.
        """
        if not share:
            sequence = min(self.free, key=lambda n: len(self.free[n]))
            return sequence, sequence, 0
        shared = {n: common_prefix(held, tokens) for n, held in self.free.items()}
        sequence = min(shared, key=lambda n: (len(self.free[n]) - shared[n], -shared[n], n))
        if self._model.can_share:
            shared |= {n: common_prefix(held, tokens) for n, held in running.items()}
        source = max(shared, key=lambda n: (shared[n], n == sequence))
        if source != sequence and not self._is_worth_copying(shared[source] - shared[sequence]):
            source = sequence
        return sequence, source, shared[source]

    def _is_worth_copying(self, n_more: int) -> bool:
        return self._model.can_share and n_more >= (
            1 if self._model.placement.kv_unified else MIN_SHARED_TOKENS
        )

    def _bring(self, sequence: int, source: int, n_tokens: int) -> int:
        """Make a sequence hold the first tokens of another, or its own; gives how many it does."""
        if source != sequence:
            self._model.copy(source, sequence)
        n_kept = self._model.keep(sequence, n_tokens)
        if source != sequence:
            self._cells.share(source, sequence, n_kept)
        self._cells.cut(sequence, n_kept)
        return n_kept

    def _make_room(self, sequence: int, n_most: int) -> bool:
        """Set cells apart for a sequence, at the cost of what nothing runs in, oldest first."""
        n_more = n_most - self._cells.count(sequence)
        for other in self.free:
            if n_more <= self._cells.n_free:
                break
            self._model.keep(other, 0)
            self._cells.cut(other, 0)
            self.free[other] = []
        if n_more > self._cells.n_free:
            return False
        self._cells.extend(sequence, n_more)
        return True


class CellAccounting:
    """Which cells of the cache are whose; those of a copied beginning are several sequences'.

    llama.cpp chooses the cells and does not tell which; only their number is the same here. Where
    sequences have streams of their own nothing is common, and there is always room.
    """

    def __init__(self, n_cells: int) -> None:
        self._n_holders: npt.NDArray[np.int32] = np.zeros(n_cells, np.int32)
        self._of: dict[int, npt.NDArray[np.int64]] = {}
        self.n_free = n_cells

    def count(self, sequence: int) -> int:
        return len(self._of.get(sequence, ()))

    def share(self, source: int, target: int, n_cells: int) -> None:
        """Give a sequence the first cells of another, and none beside."""
        self.cut(target, 0)
        self._of[target] = self._of[source][:n_cells]
        self._n_holders[self._of[target]] += 1

    def extend(self, sequence: int, n_cells: int) -> None:
        """Give a sequence more cells; there must be so many free."""
        more = np.flatnonzero(self._n_holders == 0)[:n_cells]
        self._n_holders[more] = 1
        self._of[sequence] = np.concatenate([self._of[sequence], more])
        self.n_free -= len(more)

    def cut(self, sequence: int, n_cells: int) -> None:
        """Leave a sequence its first cells only."""
        cells = self._of.get(sequence, np.zeros(0, np.int64))
        self._of[sequence], rest = cells[:n_cells], cells[n_cells:]
        self._n_holders[rest] -= 1
        self.n_free += int(np.count_nonzero(self._n_holders[rest] == 0))
