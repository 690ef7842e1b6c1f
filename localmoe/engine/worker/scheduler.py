"""Requests and the sequences that answer them: what goes into the next batch, what comes out.

`Scheduler.step()` is the whole loop: admit, build a batch, decode it, sample. Requests with a
common prefix compute it once: the first of them does, and the others wait for it and copy it. A
slot keeps what the cache holds of a finished request, so that later requests can reuse it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from ..native.llama import NativeError
from ..prefix import MIN_SHARED_TOKENS, common_prefix
from ..protocol import Delta, Failed, FinishReason, Request, Timings, Usage
from .batch_builder import BatchBuilder, DecodeBatch
from .constraint import GrammarDeadEnd
from .kv_slots import KvSlots
from .model import NativeModel
from .request_queue import QueuedRequest, RequestQueue
from .sampling import Sampler, TextStream
from .sequence import Sequence
from .state_files import StateFiles

MOST_WAIT_S = 0.5
"""How long a person's question waits for copies of the weights that are made only once."""


class RequestRefused(Exception):
    """A request that can't be answered as it is; `hint` says what would help."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Scheduler:
    """Answers requests on a loaded model, as many at once as it has slots."""

    def __init__(self, model: NativeModel, most_wait_s: float = MOST_WAIT_S) -> None:
        self._model = model
        self._most_wait_s = most_wait_s
        self._queue = RequestQueue()
        self._running: dict[int, Sequence] = {}
        self._slots = KvSlots(model)
        self.states = StateFiles(model, self._slots)
        self._lacks_room = False  # until a sequence ends
        self._builder = BatchBuilder(model, self._slots)
        self._eog = frozenset(model.facts().eog)
        self._computing_prompt_of: int | None = None

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._queue and not self._running

    def add(self, id: int, request: Request) -> None:
        """Queue a request. Raises RequestRefused where it could never be answered."""
        self._check(request)
        self._queue.add(QueuedRequest(id, request, time.perf_counter()))

    def cancel(self, id: int, *, only_waiting: bool = False) -> list[Delta]:
        """End a request; gives its last delta, or nothing where it has ended already.

        With `only_waiting`, one that is being computed goes on.
        """
        if waiting := self._queue.remove(id) or self._take_follower(id):
            usage, timings = Usage(len(waiting.request.tokens), 0, 0), Timings(0.0, 0.0, 0.0)
            return [Delta(id, finish_reason="cancelled", usage=usage, timings=timings)]
        sequence = None if only_waiting else self._running.get(id)
        return [self._finish(sequence, "cancelled")] if sequence else []

    def interrupt(self, id: int) -> None:
        """From another thread: give up the decode under way if it serves this request alone."""
        if self._computing_prompt_of == id:
            self._model.context.abort()

    def step(self) -> list[Delta | Failed]:
        """Takes every answer one step further; returns what is new of each."""
        news: list[Delta | Failed] = [*self._admit()]
        if self._model.lacks_copies and self._are_copies_due():
            self._make_copies()
            return news
        batch = self._builder.build(self._running.values())
        if batch.parts and self._decode(batch):
            news += self._sample(batch)
        return news

    def _are_copies_due(self) -> bool:
        """Whether an answer that is about to be generated waits for copies of the weights.

        One that is to be repeatable does, since it must not depend on when they are made. Others
        do where a plan says so, as it reckoned with them, or where they don't wait for long.
        """
        sequences = [sequence for sequence in self._running.values() if sequence.n_sampled]
        is_reckoned_with = not self._model.placement.repack_in_idle
        again = any(sequence.request.sampling.is_repeatable for sequence in sequences)
        soon = self._model.copies_left_s <= self._most_wait_s
        return bool(sequences) and (is_reckoned_with or again or soon)

    def _make_copies(self) -> None:
        """Some of those that answers are generated with. A step of its own, so that it can be
        broken off; an answer's speed is not that of this."""
        started = time.perf_counter()
        self._model.make_copies()
        for sequence in self._running.values():
            sequence.copying_s += (time.perf_counter() - started) * bool(sequence.n_sampled)

    def fail_all(self, reason: str) -> list[Failed]:
        """Drop every request under way, for one reason."""
        sequences = list(self._running.values())
        for sequence in sequences:
            self._release(sequence)
        return [Failed(sequence.id, reason) for sequence in sequences]

    # ---- admitting ----

    def _check(self, request: Request) -> None:
        n_prompt, n_ctx = len(request.tokens), self._model.n_ctx
        if n_prompt == 0:
            raise RequestRefused("The prompt has no tokens.")
        if n_prompt >= n_ctx:
            raise RequestRefused(
                f"The prompt has {n_prompt} tokens; the context holds {n_ctx}, answer included.",
                f"Try: -c {2 * n_prompt}, or a shorter prompt.",
            )
        n_vocab = self._model.vocab.n_tokens
        if min(request.tokens) < 0 or max(request.tokens) >= n_vocab:
            raise RequestRefused(f"The prompt has a token outside the vocabulary of {n_vocab}.")
        if request.max_tokens is not None and request.max_tokens < 1:
            raise RequestRefused(f"max_tokens is {request.max_tokens}; it must be 1 or more.")
        foreign = [id for id, _ in request.sampling.logit_bias if not 0 <= id < n_vocab]
        if foreign:
            raise RequestRefused(
                f"logit_bias names the token {foreign[0]}; the vocabulary has {n_vocab}."
            )
        if request.sampling.grammar is not None and request.sampling.json_schema is not None:
            raise RequestRefused("A grammar and a JSON schema can't both be asked for.")
        if request.sampling.json_schema is not None and request.sampling.held_schema is None:
            raise RequestRefused("The JSON schema came without what answers are held to for it.")
        if request.sampling.grammar is not None and not request.sampling.grammar.strip():
            raise RequestRefused("The grammar is empty.", "It needs a rule named root.")

    def _admit(self) -> list[Failed]:
        """Start waiting requests while there is room, but for those that wait for a beginning."""
        refused: list[Failed] = []
        n_following = self._let_followers_go()
        while self._queue and len(self._slots.free) > n_following and not self._lacks_room:
            waiting = self._queue.pop()
            if leader := self._leader_of(waiting):
                leader[1].followers.append((leader[0], waiting))
                n_following += 1
            elif failed := self._start(waiting):
                refused.append(failed)
        return refused

    def _let_followers_go(self) -> int:
        """Queue those again whose beginning is computed; gives how many still wait for theirs."""
        n_following = 0
        for sequence in self._running.values():
            for n_shared, waiting in sequence.followers:
                if n_shared <= sequence.n_done:
                    self._queue.add(waiting)
            sequence.followers = [f for f in sequence.followers if f[0] > sequence.n_done]
            n_following += len(sequence.followers)
        return n_following

    def _leader_of(self, waiting: QueuedRequest) -> tuple[int, Sequence] | None:
        """The sequence that is about to compute how this request begins, and how much of it."""
        if not (waiting.request.reuse_prefix and self._model.can_share):
            return None
        tokens = waiting.request.tokens
        n_most, leader, n_computed = 0, None, 0
        for sequence in self._running.values():
            n = min(common_prefix(sequence.tokens, tokens), len(tokens) - 1)
            n_computed = max(n_computed, min(n, sequence.n_done))
            if n > n_most:
                n_most, leader = n, sequence
        for held in self._slots.free.values():
            n_computed = max(n_computed, common_prefix(held, tokens))
        is_worth_it = n_most - n_computed >= MIN_SHARED_TOKENS
        return (n_most, leader) if leader and is_worth_it else None

    def _start(self, waiting: QueuedRequest) -> Failed | None:
        """Gives a request a slot, or puts it back where there is no room; says why it can't run."""
        request, n_prompt = waiting.request, len(waiting.request.tokens)
        n_most = min(self._model.n_ctx, n_prompt + (request.max_tokens or self._model.n_ctx))
        computed = {s.slot: s.tokens[: s.n_done] for s in self._running.values()}
        try:
            sampler = Sampler(self._model.vocab, request.sampling, request.tokens)
        except NativeError as error:
            return Failed(waiting.id, str(error))
        taken = self._slots.take(
            request.tokens, n_most, computed, reuse_prefix=request.reuse_prefix
        )
        if taken is None:
            sampler.free()
            self._queue.add(waiting)
            self._lacks_room = True
            return None
        slot, n_kept = taken
        skip_space = request.strip_leading_space and self._model.vocab.is_spm
        self._running[waiting.id] = Sequence(
            id=waiting.id,
            request=request,
            slot=slot,
            sampler=sampler,
            text=TextStream(request.stop, skip_space=skip_space),
            tokens=list(request.tokens),
            n_cached=n_kept,
            n_done=n_kept,
            arrived=waiting.arrived,
            started=time.perf_counter(),
        )
        return None

    def _take_follower(self, id: int) -> QueuedRequest | None:
        for sequence in self._running.values():
            for follower in sequence.followers:
                if follower[1].id == id:
                    sequence.followers.remove(follower)
                    return follower[1]
        return None

    # ---- decoding ----

    def _decode(self, batch: DecodeBatch) -> bool:
        """Computes the batch; False where `interrupt` ended it and nothing was computed."""
        self._model.context.allow()
        if len(batch.parts) == 1 and batch.parts[0].sequence.n_sampled == 0:
            self._computing_prompt_of = batch.parts[0].sequence.id
        whole = not self._model.lacks_copies  # else this answer does without
        generating = whole and all(part.sequence.n_sampled for part in batch.parts)
        again = any(part.sequence.request.sampling.is_repeatable for part in batch.parts)
        try:
            if not self._model.decode(batch.n_rows, generating=generating, again=again):
                return False
        finally:
            self._computing_prompt_of = None
        self._builder.forget_padding(batch)
        return True

    # ---- sampling ----

    def _sample(self, batch: DecodeBatch) -> Iterator[Delta | Failed]:
        """Draws a token for each sequence whose prompt is computed; tells how far others are."""
        for part in batch.parts:
            sequence = part.sequence
            sequence.n_done += part.n_tokens
            if sequence.n_waiting:
                new = self._progress(sequence)
            else:
                new = self._sample_next(sequence, part.last)
            if new is not None:
                yield new

    def _progress(self, sequence: Sequence) -> Delta | Failed | None:
        return (
            Delta(sequence.id, prompt_tokens=sequence.n_done) if sequence.request.stream else None
        )

    def _sample_next(self, sequence: Sequence, index: int) -> Delta | Failed | None:
        """Draws the next token; returns what is to be told of it now."""
        try:
            token = sequence.sampler.sample(self._model.context, index)
        except GrammarDeadEnd as error:
            self._release(sequence)
            return Failed(sequence.id, str(error))
        sequence.n_sampled_with_eog += 1
        sequence.last_token = time.perf_counter()
        sequence.first_token = sequence.first_token or sequence.last_token
        if token in self._eog:
            return self._finish(sequence, "stop")
        sequence.tokens.append(token)
        is_reasoning_token = token in sequence.request.reasoning_tokens
        if is_reasoning_token:
            text = sequence.text.finish()
        else:
            text = sequence.text.feed(self._model.vocab.piece(token))
        if sequence.text.stopped_by is not None or sequence.sampler.is_complete:
            return self._finish(sequence, "stop", text, (token,))
        full = len(sequence.tokens) >= self._model.n_ctx
        if full or sequence.n_sampled == sequence.request.max_tokens:
            return self._finish(sequence, "length", text, (token,))
        if not (sequence.request.stream or is_reasoning_token):
            sequence.unsent += text
            return None
        text, tokens = self._take_unsent(sequence, text, (token,))
        return Delta(
            sequence.id,
            text=text,
            tokens=tokens,
            prompt_tokens=sequence.n_prompt,
            completion_tokens=sequence.n_sampled,
            has_pending_text=sequence.text.has_pending_text,
        )

    def _take_unsent(
        self, sequence: Sequence, text: str, tokens: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]]:
        """What is new, with all that was gathered of a request that isn't streamed."""
        if sequence.request.stream:
            return text, tokens
        text = sequence.unsent + text
        tokens = tuple(sequence.tokens[sequence.n_prompt + sequence.n_sent :])
        sequence.unsent = ""
        sequence.n_sent = sequence.n_sampled
        return text, tokens

    def _finish(
        self, sequence: Sequence, reason: FinishReason, text: str = "", tokens: tuple[int, ...] = ()
    ) -> Delta:
        text, tokens = self._take_unsent(sequence, text + sequence.text.finish(), tokens)
        self._release(sequence)
        return Delta(
            sequence.id,
            text=text,
            tokens=tokens,
            prompt_tokens=min(sequence.n_done, sequence.n_prompt),
            completion_tokens=sequence.n_sampled,
            finish_reason=reason,
            stopped_by=sequence.text.stopped_by,
            usage=Usage(sequence.n_prompt, sequence.n_sampled, sequence.n_cached),
            timings=timings_of(sequence),
        )

    def _release(self, sequence: Sequence) -> None:
        sequence.sampler.free()
        del self._running[sequence.id]
        self._slots.give_back(sequence.slot, sequence.tokens[: sequence.n_done])
        self._lacks_room = False
        for _, waiting in sequence.followers:
            self._queue.add(waiting)


def timings_of(sequence: Sequence) -> Timings:
    """The speeds of a sequence: its prompt up to the first token, its answer from there on."""
    if not sequence.first_token:
        return Timings(0.0, 0.0, 0.0)
    prompt_s = sequence.first_token - sequence.started
    generation_s = sequence.last_token - sequence.first_token - sequence.copying_s
    n_computed = sequence.n_prompt - sequence.n_cached
    n_after_first = sequence.n_sampled_with_eog - 1
    return Timings(
        first_token_s=sequence.first_token - sequence.arrived,
        prompt_tps=n_computed / prompt_s if prompt_s > 0 else 0.0,
        generation_tps=n_after_first / generation_s if generation_s > 0 else 0.0,
    )
