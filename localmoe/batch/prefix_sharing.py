"""How much requests share, to be known before a model is loaded: what a cache for them needs.

sharing = sharing_of(prompts, max_tokens=256, n_seq=32)
Placement(..., kv_unified=sharing.wants_unified, n_cells=sharing.n_cells)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from ..engine.prefix import common_prefix
from ..planner.request import BatchShape, numbers

if TYPE_CHECKING:
    from ..planner.request import BatchShape
    from .pending import PendingRequests


UNIFIED_SHARE = 0.5
"""Where so much of all prompts is shared, a unified cache beside a GPU: it is there once."""
PASS_CELLS = 90_000
"""A pass through the weights takes as long as that many cells of a unified cache that a step passes
by: 30 ms, and 4 ms for 12,288 cells (H100, Mixtral 8x7B; docs/notes/batching.md).

On a CPU nobody asks: there sequences always have streams of their own, which were the faster ones
in every measurement."""


@dataclass(frozen=True, slots=True)
class PrefixSharing:
    """Counts of tokens. `n_shared` of `n_prompt` need not be computed again; `n_cells` is the most
    that requests under way together hold, answers included.

    Streams of their own take `n_passes` through the weights more, as llama.cpp computes only
    prompts of one length together, and none beside a generating one. A unified cache has all
    `n_steps` of generation pass by the cells of all sequences.
    """

    n_prompt: int
    n_shared: int
    n_cells: int
    n_passes: int
    n_steps: int

    @property
    def fraction(self) -> float:
        """The part of all prompt tokens that is computed once for several."""
        return self.n_shared / self.n_prompt if self.n_prompt else 0.0

    @property
    def wants_unified(self) -> bool:
        """Whether sequences should have their cells in common, rather than streams of their own."""
        is_sooner = self.n_steps * self.n_cells <= self.n_passes * PASS_CELLS
        return is_sooner or self.fraction >= UNIFIED_SHARE


def prefix_sharing_of(
    prompts: Iterable[Sequence[int]], max_tokens: int, n_seq: int
) -> PrefixSharing:
    """What prompts have in common when `n_seq` are answered at once, in the engine's order.

    `max_tokens` is the length of the longest answer. Hundreds of prompts are enough to tell; all of
    them are held in memory.
    """
    ordered = sorted(tuple(prompt) for prompt in prompts)
    n_shared = n_cells = 0
    together: deque[tuple[int, int]] = deque(maxlen=n_seq)  # (own, common) tokens of neighbours
    for before, prompt in zip([(), *ordered], ordered, strict=False):
        n_common = common_prefix(before, prompt)
        n_shared += n_common
        together.append((len(prompt) - n_common + max_tokens, n_common))
        n_cells = max(n_cells, together[0][1] + sum(own for own, _ in together))
    n_rounds = -(-len(ordered) // n_seq)
    n_passes = len({len(prompt) for prompt in ordered[:n_seq]}) + max(0, len(ordered) - n_seq)
    return PrefixSharing(sum(map(len, ordered)), n_shared, n_cells, n_passes, n_rounds * max_tokens)


N_SAMPLED_LINES = 400
"""Requests that are enough to tell how much all of them have in common."""


def batch_shape_of(
    backlog: PendingRequests, n_ctx: int, n_wanted: int | None, reuse_prefix: bool
) -> BatchShape:
    """What the requests of a batch need of a cache. `n_ctx` is the most that one may take."""
    asks = list(islice(backlog.asks(), N_SAMPLED_LINES))
    answers = [ask.options.max_tokens or n_ctx for ask in asks]
    longest = max((len(a.tokens) + n for a, n in zip(asks, answers, strict=True)), default=n_ctx)
    if backlog.n_asks > N_SAMPLED_LINES:
        longest = n_ctx  # a longer one may follow
    choices = numbers(backlog.n_asks, n_wanted)
    n_cells = {}
    if reuse_prefix:
        prompts = [ask.tokens for ask in asks]
        for n in choices:
            sharing = prefix_sharing_of(prompts, max(answers, default=n_ctx), n)
            if n > 1 and sharing.wants_unified:
                n_cells[n] = sharing.n_cells
    return BatchShape(choices, min(longest, n_ctx), n_cells, is_open=n_wanted is None)
