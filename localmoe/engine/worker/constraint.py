"""Which tokens may come next in an answer that must have a form: a JSON schema, or a grammar.

llguidance holds schemas, llama.cpp grammars in GBNF. A constraint is of one answer and knows how
far that has got.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..native import llama
from ..protocol import Sampling
from ..schema_grammar import grammar_limits, library, on_deep_stack, schema_grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")
Logits = npt.NDArray[np.float32]
MAX_BUSY_S, MAX_BUSY_S_PER_TOKEN = 3.0, 0.005
"""What holding one answer may take in all. Everyday schemas take a fiftieth of it."""
MAX_DIGITS, MAX_EXPONENT_DIGITS = 20, 2
"""Digits in a row of a number: one that a schema doesn't bound would go on until the end."""
SPECIAL = b"\xff"
"""What llguidance wants before the bytes of a token that is no text (toktrie)."""


class GrammarDeadEnd(Exception):
    """No token of the vocabulary goes on as the form demands, or finding one takes too long."""


class Constraint(Protocol):
    """The form of one answer, at the place where the answer is."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing may follow."""
        ...

    def allows(self, token: int, logits: Logits) -> bool:
        """Returns whether a token may come next."""
        ...

    def masked(self, logits: Logits) -> Logits:
        """Returns the logits with minus infinity for every token that may not come next."""
        ...

    def accept(self, token: int) -> None:
        """Takes the token that comes next. Raises GrammarDeadEnd where that takes too long."""
        ...

    def free(self) -> None:
        """Frees native memory."""
        ...


def constraint_of(vocab: llama.Vocab, sampling: Sampling) -> Constraint | None:
    """Returns the form that an answer must have. Raises NativeError where nothing can hold it."""
    if sampling.held_schema is not None:
        return SchemaConstraint(vocab, sampling.held_schema)
    return GbnfConstraint(vocab, sampling.grammar) if sampling.grammar else None


class BusyClock:
    """Counts the seconds that one answer's form takes, and ends what takes too many."""

    def __init__(self, what: str) -> None:
        self.n_accepted = 0
        self._what = what
        self._busy_s = 0.0

    def timed(self, work: Callable[[], T]) -> T:
        """Returns what `work` returns. Raises GrammarDeadEnd once all took too long."""
        started = time.perf_counter()
        found = work()
        self._busy_s += time.perf_counter() - started
        if self._busy_s > MAX_BUSY_S + MAX_BUSY_S_PER_TOKEN * self.n_accepted:
            raise GrammarDeadEnd(f"{self._what} takes too long to hold. Make it simpler.")
        return found


class SchemaConstraint:
    """A JSON schema, held by llguidance."""

    def __init__(self, vocab: llama.Vocab, schema: str) -> None:
        self._vocab = vocab
        self._ends = _ends(vocab)
        self._matcher = _first_state(vocab, schema).deep_copy()
        self._clock = BusyClock("The JSON schema")
        self._digits = DigitRun()

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing may follow."""
        return self._matcher.is_stopped()

    def allows(self, token: int, logits: Logits) -> bool:
        """Returns whether a token may come next."""
        if self._ends[token]:
            return self._matcher.is_accepting()
        if _n_digits(self._vocab)[token] > self._digits.n_left:
            return False
        return self._timed(lambda: self._matcher.validate_tokens([token])) == 1

    def masked(self, logits: Logits) -> Logits:
        """Returns the logits with minus infinity for every token that may not come next."""
        bits = np.frombuffer(self._timed(self._matcher.compute_bitmask), np.uint8)
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").astype(bool)
        allowed[self._ends] = self._matcher.is_accepting()
        shorter = allowed & (_n_digits(self._vocab) <= self._digits.n_left)
        chosen = shorter if shorter.any() else allowed
        return np.where(chosen, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Takes the token that comes next. Raises GrammarDeadEnd where that takes too long."""
        if not self._ends[token]:
            self._clock.n_accepted += 1
            self._digits.feed(self._vocab.piece(token))
            self._timed(lambda: self._matcher.consume_token(token))

    def _timed(self, work: Callable[[], T]) -> T:
        found = self._clock.timed(work)
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:120]
            raise GrammarDeadEnd(f"The JSON schema can't be held any further: {reason}.")
        return found

    def free(self) -> None:
        """Does nothing: the matcher frees itself."""


@lru_cache(maxsize=16)
def _first_state(vocab: llama.Vocab, schema: str) -> LLMatcher:
    """The state before the first token. Each answer to the schema goes on with a copy."""
    tokenizer, grammar, limits = _tokenizer(vocab), schema_grammar(schema), grammar_limits()
    matcher: LLMatcher = on_deep_stack(
        schema, lambda: library().LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    )
    if matcher.is_error():
        reason = " ".join(matcher.get_error().split())[:120]
        raise llama.NativeError(f"the JSON schema can't be held: {reason}")
    return matcher


@lru_cache(maxsize=1)
def _tokenizer(vocab: llama.Vocab) -> LLTokenizer:
    """The vocabulary as llguidance takes it, which is read once: 20 ms for 4,000 tokens.

    A token that adds no text is special there, and so is one that marks a part of an answer: no
    schema takes either. Where no token ends an answer, the last one must be named as if it did.
    """
    tokens = [
        SPECIAL + vocab.spell(token, special=True)
        if not vocab.piece(token) or vocab.is_marker(token)
        else vocab.piece(token)
        for token in range(vocab.n_tokens)
    ]
    return library().LLTokenizer.from_llamacpp(  # type: ignore[no-any-return]
        tokens=tokens,
        vocab_ptr=vocab.handle,
        tokenize_fptr=llama.tokenize_address(),
        eos_token=np.flatnonzero(_ends(vocab)).tolist() or [vocab.n_tokens - 1],
        slices=None,
    )


@lru_cache(maxsize=1)
def _ends(vocab: llama.Vocab) -> npt.NDArray[np.bool_]:
    """Which tokens end an answer."""
    found = np.zeros(vocab.n_tokens, bool)
    found[list(vocab.facts.eog)] = True
    return found


@lru_cache(maxsize=1)
def _n_digits(vocab: llama.Vocab) -> npt.NDArray[np.int32]:
    """How many digits each token begins with."""
    pieces = map(vocab.piece, range(vocab.n_tokens))
    return np.array([len(text) - len(text.lstrip(b"0123456789")) for text in pieces], np.int32)


class DigitRun:
    """Counts the digits that may still follow in the number that a text of JSON ends with."""

    def __init__(self) -> None:
        self.n_left = MAX_DIGITS
        self._is_in_string = False
        self._is_escaped = False

    def feed(self, text: bytes) -> None:
        """Takes the bytes that come next."""
        for byte in text:
            is_quote = byte == ord('"') and not self._is_escaped
            self._is_escaped = self._is_in_string and byte == ord("\\") and not self._is_escaped
            self._is_in_string ^= is_quote
            if self._is_in_string or byte not in b"0123456789eE+-":
                self.n_left = MAX_DIGITS
            elif byte in b"eE":
                self.n_left = MAX_EXPONENT_DIGITS
            elif byte not in b"+-":
                self.n_left -= 1


class GbnfConstraint:
    """A grammar in GBNF, held by llama.cpp."""

    is_complete = False  # it can't be asked; then the end is all that it allows

    def __init__(self, vocab: llama.Vocab, grammar: str) -> None:
        self._clock = BusyClock("The grammar")
        self._sampler = llama.grammar_sampler(vocab, grammar)

    def allows(self, token: int, logits: Logits) -> bool:
        """Returns whether a token may come next."""
        single = llama.Candidates(logits[[token]], np.array([token], np.int32))
        self._clock.timed(lambda: llama.apply(self._sampler, single.native))
        return bool(np.isfinite(single.logits).all())

    def masked(self, logits: Logits) -> Logits:
        """Returns the logits with minus infinity for every token that may not come next."""
        candidates = llama.Candidates(logits, np.arange(len(logits), dtype=np.int32))
        self._clock.timed(lambda: llama.apply(self._sampler, candidates.native))
        return candidates.logits

    def accept(self, token: int) -> None:
        """Takes the token that comes next. Raises GrammarDeadEnd where that takes too long."""
        self._clock.n_accepted += 1
        self._clock.timed(lambda: llama.accept(self._sampler, token))

    def free(self) -> None:
        """Frees the sampler."""
        llama.free_sampler(self._sampler)
