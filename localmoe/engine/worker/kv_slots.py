"""Slots: the sequences of a KV cache, what each holds, and what can be copied.

A free slot keeps what it holds until the slot, or its cells, are needed for another request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..prefix import MIN_SHARED_TOKENS, common_prefix
from .model import NativeModel


class KvSlots:
    """The slots of a model's KV cache; `free` are those without a request, oldest first, with the
    tokens that the cache still holds of them."""

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
        reuse_prefix: bool = True,
    ) -> tuple[int, int] | None:
        """Takes a slot for a prompt that may grow to `n_most` tokens.

        Returns the slot and how many of the tokens it holds already, or None while the cache has
        no room. A longer prefix is copied from another slot, one of `running` among them. The
        last token is always left to compute, because its logits are wanted.
        """
        slot, source, n_shared = self._choose(tokens, running, reuse_prefix)
        del self.free[slot]
        n_shared = self._copy_prefix(slot, source, min(n_shared, len(tokens) - 1))
        if self._reserve_cells(slot, n_most):
            return slot, n_shared
        self.free[slot] = list(tokens[:n_shared])
        return None

    def give_back(self, slot: int, tokens: list[int]) -> None:
        """Frees a slot that holds these tokens now."""
        self._cells.cut(slot, len(tokens))
        self.free[slot] = tokens

    def shorten(self, slot: int, n_tokens: int) -> None:
        """Keeps only the first tokens of a free slot."""
        n_kept = self._model.keep(slot, n_tokens)
        self._cells.cut(slot, n_kept)
        self.free[slot] = self.free[slot][:n_kept]

    def fill(self, tokens: list[int], fill: Callable[[int], bool]) -> bool:
        """Lets the free slot that holds least take these tokens' state, which `fill` restores.

        Returns False where there is no room or `fill` fails; the slot then holds nothing.
        """
        if not self.free:
            return False
        slot = min(self.free, key=lambda n: len(self.free[n]))
        self.shorten(slot, 0)
        del self.free[slot]
        filled = self._reserve_cells(slot, len(tokens)) and fill(slot)
        self.free[slot] = tokens if filled else []
        if not filled:
            self.shorten(slot, 0)
        return filled

    def end_of(self, slot: int) -> int:
        """The position behind what a free slot holds; a slot that is full is emptied."""
        if len(self.free[slot]) >= self._model.n_ctx:
            self._model.keep(slot, 0)
            self._cells.cut(slot, 0)
            self.free[slot] = []
        return len(self.free[slot])

    def _choose(
        self, tokens: Sequence[int], running: Mapping[int, Sequence[int]], reuse_prefix: bool
    ) -> tuple[int, int, int]:
        """Chooses a slot, the slot to copy a prefix from, and how many tokens that prefix has.

        The slot is the free one that loses least: what it holds beyond the common prefix.
        """
        if not reuse_prefix:
            slot = min(self.free, key=lambda n: len(self.free[n]))
            return slot, slot, 0
        shared = {n: common_prefix(held, tokens) for n, held in self.free.items()}
        slot = min(shared, key=lambda n: (len(self.free[n]) - shared[n], -shared[n], n))
        if self._model.can_share:
            shared |= {n: common_prefix(held, tokens) for n, held in running.items()}
        source = max(shared, key=lambda n: (shared[n], n == slot))
        if source != slot and not self._is_worth_copying(shared[source] - shared[slot]):
            source = slot
        return slot, source, shared[source]

    def _is_worth_copying(self, n_more: int) -> bool:
        return self._model.can_share and n_more >= (
            1 if self._model.placement.kv_unified else MIN_SHARED_TOKENS
        )

    def _copy_prefix(self, slot: int, source: int, n_tokens: int) -> int:
        """Makes a slot hold the first tokens of another, or of itself; returns how many it does."""
        if source != slot:
            self._model.copy(source, slot)
        n_kept = self._model.keep(slot, n_tokens)
        if source != slot:
            self._cells.share(source, slot, n_kept)
        self._cells.cut(slot, n_kept)
        return n_kept

    def _reserve_cells(self, slot: int, n_most: int) -> bool:
        """Reserves cells for a slot; evicts what free slots hold, oldest first."""
        n_more = n_most - self._cells.count(slot)
        for other in self.free:
            if n_more <= self._cells.n_free:
                break
            self._model.keep(other, 0)
            self._cells.cut(other, 0)
            self.free[other] = []
        if n_more > self._cells.n_free:
            return False
        self._cells.extend(slot, n_more)
        return True


class CellAccounting:
    """Counts which cells of the cache belong to which slots; those of a shared prefix to several.

    llama.cpp chooses the cells and does not tell which; only their number is the same here. Where
    slots have streams of their own nothing is shared, and there is always room.
    """

    def __init__(self, n_cells: int) -> None:
        self._n_holders: npt.NDArray[np.int32] = np.zeros(n_cells, np.int32)
        self._of: dict[int, npt.NDArray[np.int64]] = {}
        self.n_free = n_cells

    def count(self, slot: int) -> int:
        """Cells that a slot has."""
        return len(self._of.get(slot, ()))

    def share(self, source: int, target: int, n_cells: int) -> None:
        """Gives a slot the first cells of another, and no others."""
        self.cut(target, 0)
        self._of[target] = self._of[source][:n_cells]
        self._n_holders[self._of[target]] += 1

    def extend(self, slot: int, n_cells: int) -> None:
        """Gives a slot more cells; so many must be free."""
        more = np.flatnonzero(self._n_holders == 0)[:n_cells]
        self._n_holders[more] = 1
        self._of[slot] = np.concatenate([self._of[slot], more])
        self.n_free -= len(more)

    def cut(self, slot: int, n_cells: int) -> None:
        """Keeps only the first cells of a slot."""
        cells = self._of.get(slot, np.zeros(0, np.int64))
        self._of[slot], rest = cells[:n_cells], cells[n_cells:]
        self._n_holders[rest] -= 1
        self.n_free += int(np.count_nonzero(self._n_holders[rest] == 0))
