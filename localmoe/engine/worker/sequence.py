"""A sequence: a request that is being answered in one slot of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..protocol import Request
from .request_queue import QueuedRequest
from .sampling import Sampler, TextStream


@dataclass(slots=True)
class Sequence:
    """A request being answered in a slot of the cache.

    `tokens` are the prompt's and then the sampled ones; the first `n_done` are in the cache.
    `n_sampled_with_eog` counts the end-of-generation token, too. Times are seconds of one clock.
    """

    id: int
    request: Request
    slot: int
    sampler: Sampler
    text: TextStream
    tokens: list[int]
    n_cached: int
    n_done: int
    arrived: float
    started: float
    # requests that begin alike, each with how many tokens: they wait until those are computed
    followers: list[tuple[int, QueuedRequest]] = field(default_factory=list)
    n_sampled_with_eog: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    copying_s: float = 0.0  # since the first token
    # of a request that isn't streamed: the text, and sampled tokens, that no delta has brought yet
    unsent: str = ""
    n_sent: int = 0

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.tokens)

    @property
    def n_sampled(self) -> int:
        """Tokens sampled so far, without the end-of-generation token."""
        return len(self.tokens) - self.n_prompt

    @property
    def n_waiting(self) -> int:
        """Tokens that the cache doesn't hold yet: the rest of the prompt, or the last sampled."""
        return len(self.tokens) - self.n_done
