"""Samples a request's next token, and turns the bytes of tokens into text.

`Sampler` is a chain of llama.cpp's samplers with a grammar beside it. `TextStream` gives text once
it can be shown: whole characters, and nothing of a stop string.
"""

from __future__ import annotations

import codecs
import secrets
from collections.abc import Sequence

import numpy as np

from ..native import llama
from ..protocol import Sampling
from .constraint import Constraint, GrammarDeadEnd, Logits, constraint_of


class TextStream:
    """Takes bytes as they are sampled, gives text as soon as it is certain.

    A character split over tokens waits for its last byte; what may be the beginning of a stop
    string waits until it is one or isn't. With `skip_space`, one space at the very beginning is
    left out: a SentencePiece vocabulary spells the first word of a text with it.
    """

    def __init__(self, stop: Sequence[str] = (), *, skip_space: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = [text for text in stop if text]
        self._skip_space = skip_space
        self._held = ""
        self.stopped_by: str | None = None

    def feed(self, raw: bytes) -> str:
        """More bytes; gives the text that they make certain. Sets `stopped_by` at a stop string."""
        return self._take(self._decoder.decode(raw))

    @property
    def has_pending_text(self) -> bool:
        """Whether text that was fed hasn't come out yet."""
        return bool(self._held or self._decoder.getstate()[0])

    def finish(self) -> str:
        """No more bytes of this text come: what was still held back of it."""
        text = self._take(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _take(self, text: str) -> str:
        if self._skip_space and text:
            self._skip_space = False
            text = text.removeprefix(" ")
        if not self._stop or self.stopped_by is not None:
            return text if self.stopped_by is None else ""
        self._held += text
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found)
        else:
            at = len(self._held) - self._undecided()
        certain, self._held = self._held[:at], self._held[at:]
        return certain

    def _undecided(self) -> int:
        """How many characters at the end may begin a stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        for n in range(longest, 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stop):
                return n
        return 0


RANDOM_SEED = 0xFFFFFFFF
"""The one seed that means "draw one" to llama.cpp (LLAMA_DEFAULT_SEED, include/llama.h)."""


class Sampler:
    """Draws one token after the other; kept for the life of a request.

    The likeliest token is looked up here: a chain makes a list of all 32,000 candidates first, and
    64 sequences on a GPU wait for that as long as for a tenth of their step.

    The chain runs without the grammar first: mostly its choice is allowed, and checking one token
    is far cheaper than 32,000. Only a refused choice is drawn again among the allowed ones
    (as llama.cpp does, common/sampling.cpp).
    """

    def __init__(self, vocab: llama.Vocab, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._constraint = constraint_of(vocab, sampling)
        self._is_greedy = sampling.temperature <= 0 and not sampling.reshapes_logits
        seed = (
            secrets.randbelow(RANDOM_SEED) if sampling.seed is None else sampling.seed % RANDOM_SEED
        )
        self._chain = llama.sampler_chain(vocab, sampling, seed, prompt)

    @property
    def is_complete(self) -> bool:
        """Whether the answer has all that its form lets it have."""
        return self._constraint is not None and self._constraint.is_complete

    def sample(self, context: llama.LlamaContext, index: int) -> int:
        """The next token, from the logits of the batch's token at `index`."""
        if self._constraint is None:
            if self._is_greedy:
                return int(context.logits(index).argmax())
            return llama.sample(self._chain, context, index)
        token = self._sample_allowed(self._constraint, context.logits(index))
        llama.accept(self._chain, token)
        self._constraint.accept(token)
        return token

    def _sample_allowed(self, constraint: Constraint, logits: Logits) -> int:
        choice = self._choose(logits)
        if constraint.allows(choice, logits):
            return choice
        allowed = constraint.masked(logits)
        if not np.isfinite(allowed).any():
            raise GrammarDeadEnd("no token goes on as the grammar demands")
        return self._choose(allowed)

    def _choose(self, logits: Logits) -> int:
        if self._is_greedy:
            return int(logits.argmax())
        candidates = llama.Candidates(logits, np.arange(len(logits), dtype=np.int32))
        llama.apply(self._chain, candidates.native)
        return candidates.selected

    def free(self) -> None:
        """Frees the samplers."""
        llama.free_sampler(self._chain)
        if self._constraint is not None:
            self._constraint.free()
