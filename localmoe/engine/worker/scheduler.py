"""Requests and the sequences that answer them: what goes into the next batch, what comes out.

`Scheduler.step()` is the whole loop. Requests that begin alike compute their common part once:
the first of them does, the others wait for it and copy it. A sequence keeps what the cache holds of
it when its request is done, so that later requests can go on from there.
"""

from __future__ import annotations

import time

from ..native.llama import NativeError
from ..prefix import MIN_SHARED_TOKENS, common_prefix
from ..protocol import Delta, Failed, FinishReason, Request, Timings, Usage
from .batch_builder import BatchBuilder, DecodeBatch
from .kv_slots import KvSlots
from .model import NativeModel
from .request_queue import QueuedRequest, RequestQueue
from .sampling import GrammarDeadEnd, Sampler, TextStream
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
    """Answers requests on a loaded model, as many at once as it has sequences."""

    def __init__(self, model: NativeModel, most_wait_s: float = MOST_WAIT_S) -> None:
        self._model = model
        self._most_wait_s = most_wait_s
        self._queue = RequestQueue()
        self._running: dict[int, Sequence] = {}
        self._places = KvSlots(model)
        self.states = StateFiles(model, self._places)
        self._lacks_room = False  # until a run ends
        self._layout = BatchBuilder(model, self._places)
        self._eog = frozenset(model.facts().eog)
        self._computing_prompt_of: int | None = None

    @property
    def idle(self) -> bool:
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
        run = None if only_waiting else self._running.get(id)
        return [self._finish(run, "cancelled")] if run else []

    def interrupt(self, id: int) -> None:
        """From another thread: give up the decode under way if it serves this request alone."""
        if self._computing_prompt_of == id:
            self._model.context.abort()

    def step(self) -> list[Delta | Failed]:
        """Admit, build one batch, compute it, sample: what is new of each answer."""
        news: list[Delta | Failed] = [*self._admit()]
        if self._model.lacks_copies and self._are_copies_due():
            self._make_copies()
            return news
        laid = self._layout.lay(self._running.values())
        if not laid.parts or not self._compute(laid):
            return news
        for part in laid.parts:
            run = part.run
            run.n_done += part.n_tokens
            new = self._progress(run) if run.n_waiting else self._sample(run, part.last)
            if new is not None:
                news.append(new)
        return news

    def _are_copies_due(self) -> bool:
        """Whether an answer that is about to be generated waits for copies of the weights.

        One that is to be repeatable does, since it must not depend on when they are made. Others
        do where a plan says so, as it reckoned with them, or where they don't wait for long.
        """
        runs = [run for run in self._running.values() if run.n_sampled]
        is_reckoned_with = not self._model.placement.repack_in_idle
        again = any(run.request.sampling.is_repeatable for run in runs)
        soon = self._model.copies_left_s <= self._most_wait_s
        return bool(runs) and (is_reckoned_with or again or soon)

    def _make_copies(self) -> None:
        """Some of those that answers are generated with. A step of its own, so that it can be
        broken off; an answer's speed is not that of this."""
        started = time.perf_counter()
        self._model.make_copies()
        for run in self._running.values():
            run.copying_s += (time.perf_counter() - started) * bool(run.n_sampled)

    def fail_all(self, reason: str) -> list[Failed]:
        """Drop every request under way, for one reason."""
        runs = list(self._running.values())
        for run in runs:
            self._release(run)
        return [Failed(run.id, reason) for run in runs]

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
        if request.sampling.grammar is not None and request.sampling.json_schema is not None:
            raise RequestRefused("A grammar and a JSON schema can't both be asked for.")
        if request.sampling.grammar is not None and not request.sampling.grammar.strip():
            raise RequestRefused("The grammar is empty.", "It needs a rule named root.")

    def _admit(self) -> list[Failed]:
        """Start waiting requests while there is room, but for those that wait for a beginning."""
        refused: list[Failed] = []
        n_following = self._let_followers_go()
        while self._queue and len(self._places.free) > n_following and not self._lacks_room:
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
        for run in self._running.values():
            for n_shared, waiting in run.followers:
                if n_shared <= run.n_done:
                    self._queue.add(waiting)
            run.followers = [f for f in run.followers if f[0] > run.n_done]
            n_following += len(run.followers)
        return n_following

    def _leader_of(self, waiting: QueuedRequest) -> tuple[int, Sequence] | None:
        """The run that is about to compute how this request begins, and how much of it."""
        if not (waiting.request.share and self._model.can_share):
            return None
        tokens = waiting.request.tokens
        n_most, leader, n_computed = 0, None, 0
        for run in self._running.values():
            n = min(common_prefix(run.tokens, tokens), len(tokens) - 1)
            n_computed = max(n_computed, min(n, run.n_done))
            if n > n_most:
                n_most, leader = n, run
        for held in self._places.free.values():
            n_computed = max(n_computed, common_prefix(held, tokens))
        is_worth_it = n_most - n_computed >= MIN_SHARED_TOKENS
        return (n_most, leader) if leader and is_worth_it else None

    def _start(self, waiting: QueuedRequest) -> Failed | None:
        """Give a request a place, or put it back where there is no room; says why it can't run."""
        request, n_prompt = waiting.request, len(waiting.request.tokens)
        n_most = min(self._model.n_ctx, n_prompt + (request.max_tokens or self._model.n_ctx))
        computed = {run.sequence: run.tokens[: run.n_done] for run in self._running.values()}
        try:
            sampler = Sampler(self._model.vocab, request.sampling, request.tokens)
        except NativeError as error:
            return Failed(waiting.id, str(error))
        place = self._places.take(request.tokens, n_most, computed, share=request.share)
        if place is None:
            sampler.free()
            self._queue.add(waiting)
            self._lacks_room = True
            return None
        sequence, n_kept = place
        skip_space = request.starts_text and self._model.vocab.is_spm
        self._running[waiting.id] = Sequence(
            id=waiting.id,
            request=request,
            sequence=sequence,
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
        for run in self._running.values():
            for follower in run.followers:
                if follower[1].id == id:
                    run.followers.remove(follower)
                    return follower[1]
        return None

    # ---- computing ----

    def _compute(self, laid: DecodeBatch) -> bool:
        """Decode the batch; False where `interrupt` ended it and nothing was computed."""
        self._model.context.allow()
        if len(laid.parts) == 1 and laid.parts[0].run.n_sampled == 0:
            self._computing_prompt_of = laid.parts[0].run.id
        whole = not self._model.lacks_copies  # else this answer does without
        generating = whole and all(part.run.n_sampled for part in laid.parts)
        again = any(part.run.request.sampling.is_repeatable for part in laid.parts)
        try:
            if not self._model.decode(laid.n_rows, generating=generating, again=again):
                return False
        finally:
            self._computing_prompt_of = None
        self._layout.forget_padding(laid)
        return True

    # ---- answering ----

    def _progress(self, run: Sequence) -> Delta | None:
        return Delta(run.id, prompt_tokens=run.n_done) if run.request.stream else None

    def _sample(self, run: Sequence, index: int) -> Delta | Failed | None:
        """Draw the next token; gives what is to be told of it now."""
        try:
            token = run.sampler.sample(self._model.context, index)
        except GrammarDeadEnd as error:
            self._release(run)
            return Failed(run.id, str(error))
        run.n_drawn += 1
        run.last_token = time.perf_counter()
        run.first_token = run.first_token or run.last_token
        if token in self._eog:
            return self._finish(run, "stop")
        run.tokens.append(token)
        is_marker = token in run.request.markers
        text = run.text.finish() if is_marker else run.text.feed(self._model.vocab.piece(token))
        if run.text.stopped_by is not None:
            return self._finish(run, "stop", text, (token,))
        full = len(run.tokens) >= self._model.n_ctx
        if full or run.n_sampled == run.request.max_tokens:
            return self._finish(run, "length", text, (token,))
        if not (run.request.stream or is_marker):
            run.untold += text
            return None
        text, tokens = self._untold(run, text, (token,))
        return Delta(
            run.id,
            text=text,
            tokens=tokens,
            prompt_tokens=run.n_prompt,
            completion_tokens=run.n_sampled,
            is_held=run.text.is_holding,
        )

    def _untold(
        self, run: Sequence, text: str, tokens: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]]:
        """What is new, with all that was gathered of a request that isn't streamed."""
        if run.request.stream:
            return text, tokens
        text, run.untold = run.untold + text, ""
        tokens, run.n_told = tuple(run.tokens[run.n_prompt + run.n_told :]), run.n_sampled
        return text, tokens

    def _finish(
        self, run: Sequence, reason: FinishReason, text: str = "", tokens: tuple[int, ...] = ()
    ) -> Delta:
        text, tokens = self._untold(run, text + run.text.finish(), tokens)
        self._release(run)
        return Delta(
            run.id,
            text=text,
            tokens=tokens,
            prompt_tokens=min(run.n_done, run.n_prompt),
            completion_tokens=run.n_sampled,
            finish_reason=reason,
            stopped_by=run.text.stopped_by,
            usage=Usage(run.n_prompt, run.n_sampled, run.n_cached),
            timings=timings_of(run),
        )

    def _release(self, run: Sequence) -> None:
        run.sampler.free()
        del self._running[run.id]
        self._places.give_back(run.sequence, run.tokens[: run.n_done])
        self._lacks_room = False
        for _, waiting in run.followers:
            self._queue.add(waiting)


def timings_of(run: Sequence) -> Timings:
    """The speeds of a run: its prompt up to the first token, its answer from there on."""
    if not run.first_token:
        return Timings(0.0, 0.0, 0.0)
    prompt_s = run.first_token - run.started
    generation_s = run.last_token - run.first_token - run.copying_s
    n_computed, n_after_first = run.n_prompt - run.n_cached, run.n_drawn - 1
    return Timings(
        first_token_s=run.first_token - run.arrived,
        prompt_tps=n_computed / prompt_s if prompt_s > 0 else 0.0,
        generation_tps=n_after_first / generation_s if generation_s > 0 else 0.0,
    )
