"""One request's sampler: a chain of llama.cpp's samplers, and a grammar beside it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..errors import UsageError
from . import bindings
from .protocol import Sampling
from .schema_grammar import schema_grammar

RANDOM_SEED = 0xFFFFFFFF
"""The one seed that means "draw one" to llama.cpp (LLAMA_DEFAULT_SEED, include/llama.h)."""


class GrammarDeadEnd(Exception):
    """No token of the vocabulary goes on as the grammar demands."""


@lru_cache(maxsize=64)
def grammar_of(json_schema: str) -> str:
    """The grammar of a schema. Raises NativeError on what no grammar can hold."""
    try:
        return schema_grammar(json_schema)
    except UsageError as error:
        raise bindings.NativeError(str(error)) from None


class Sampler:
    """Draws one token after the other; kept for the life of a request.

    The likeliest token is looked up here: a chain makes a list of all 32,000 candidates first, and
    64 sequences on a GPU wait for that as long as for a tenth of their step.

    The chain runs without the grammar first: mostly its choice is allowed, and checking one token
    is far cheaper than 32,000. Only a refused choice is drawn again among the allowed ones
    (as llama.cpp does, common/sampling.cpp).
    """

    def __init__(self, vocab: bindings.Vocab, sampling: Sampling, prompt: Sequence[int]) -> None:
        grammar = sampling.grammar
        if sampling.json_schema is not None:
            grammar = grammar_of(sampling.json_schema)
        self._grammar = bindings.grammar_sampler(vocab, grammar) if grammar else None
        penalized = sampling.repeat_penalty != 1.0
        self._is_greedy = sampling.temperature <= 0 and not penalized and grammar is None
        seed = (
            secrets.randbelow(RANDOM_SEED) if sampling.seed is None else sampling.seed % RANDOM_SEED
        )
        self._chain = bindings.sampler_chain(vocab, sampling, seed)
        if sampling.repeat_penalty != 1.0 and sampling.repeat_last_n > 0:
            for token in prompt[-sampling.repeat_last_n :]:
                bindings.accept(self._chain, token)

    def sample(self, context: bindings.Context, index: int) -> int:
        """The next token, from the logits of the batch's token at `index`."""
        if self._is_greedy:
            return int(context.logits(index).argmax())
        if self._grammar is None:
            return bindings.sample(self._chain, context, index)
        token = self._sample_allowed(context, index)
        bindings.accept(self._chain, token)
        bindings.accept(self._grammar, token)
        return token

    def _sample_allowed(self, context: bindings.Context, index: int) -> int:
        logits = context.logits(index)
        tokens = np.arange(len(logits), dtype=np.int32)
        candidates = bindings.Candidates(logits, tokens)
        bindings.apply(self._chain, candidates.native)
        choice = candidates.selected
        single = bindings.Candidates(logits[[choice]], tokens[[choice]])
        bindings.apply(self._grammar, single.native)
        if not single.all_refused:
            return choice
        candidates = bindings.Candidates(logits, tokens)
        bindings.apply(self._grammar, candidates.native)
        if candidates.all_refused:
            raise GrammarDeadEnd("no token goes on as the grammar demands")
        bindings.apply(self._chain, candidates.native)
        return candidates.selected

    def free(self) -> None:
        bindings.free_sampler(self._chain)
        if self._grammar is not None:
            bindings.free_sampler(self._grammar)
