"""A request being answered in one sequence of the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..protocol import Request
from .request_queue import QueuedRequest
from .sampling import Sampler, TextStream


@dataclass(slots=True)
class Sequence:
    """A request being answered in a sequence of the cache.

    `tokens` are the prompt's and then the sampled ones; the first `n_done` are in the cache.
    `n_drawn` counts what was sampled, the end-of-text token too. Times are seconds of one clock.
    """

    id: int
    request: Request
    sequence: int
    sampler: Sampler
    text: TextStream
    tokens: list[int]
    n_cached: int
    n_done: int
    arrived: float
    started: float
    # requests that begin alike, each with how many tokens: they wait until those are computed
    followers: list[tuple[int, QueuedRequest]] = field(default_factory=list)
    n_drawn: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    copying_s: float = 0.0  # since the first token
    # of a request that isn't streamed: the text, and sampled tokens, that no delta has told yet
    untold: str = ""
    n_told: int = 0

    @property
    def n_prompt(self) -> int:
        return len(self.request.tokens)

    @property
    def n_sampled(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def n_waiting(self) -> int:
        """Tokens that the cache doesn't hold yet: the rest of the prompt, or the last sampled."""
        return len(self.tokens) - self.n_done
