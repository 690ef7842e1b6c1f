"""Requests and the sequences that answer them: what goes into the next batch, what comes out.

`Scheduler.step()` is the whole loop. A sequence keeps what the cache holds of it when its request
is done, so that the next request that begins alike goes on from there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from .bindings import NativeError
from .model import LoadedModel
from .protocol import Delta, Failed, FinishReason, Request, Timings, Usage
from .sampling import GrammarDeadEnd, Sampler
from .text import TextStream


class RequestRefused(Exception):
    """A request that can't be answered as it is; `hint` says what would help."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(slots=True)
class Run:
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
    n_drawn: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    unsent: str = ""  # the text so far of a request that isn't streamed

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


class Scheduler:
    """Answers requests on a loaded model, as many at once as it has sequences."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._waiting: deque[tuple[int, Request, float]] = deque()
        self._running: dict[int, Run] = {}
        # sequences that nothing runs in, with the tokens that the cache still holds of them
        self._free: dict[int, list[int]] = {n: [] for n in range(model.placement.n_seq)}
        self._eog = frozenset(model.facts().eog)
        self._computing_prompt_of: int | None = None

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, id: int, request: Request) -> None:
        """Queue a request. Raises RequestRefused where it could never be answered."""
        self._check(request)
        self._waiting.append((id, request, time.perf_counter()))

    def cancel(self, id: int, *, only_waiting: bool = False) -> list[Delta]:
        """End a request; gives its last delta, or nothing where it has ended already.

        With `only_waiting`, one that is being computed goes on.
        """
        for entry in self._waiting:
            if entry[0] == id:
                self._waiting.remove(entry)
                usage, timings = Usage(len(entry[1].tokens), 0, 0), Timings(0.0, 0.0, 0.0)
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
        parts = self._fill_batch()
        if not parts or not self._compute(parts):
            return news
        index = -1
        for run, n_tokens in parts:
            index += n_tokens
            run.n_done += n_tokens
            new = self._progress(run) if run.n_waiting else self._sample(run, index)
            if run.request.stream or isinstance(new, Failed) or new.finish_reason:
                news.append(new)
            else:
                run.unsent += new.text
        return news

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
        refused = []
        while self._waiting and self._free:
            id, request, arrived = self._waiting.popleft()
            try:
                sampler = Sampler(self._model.vocab, request.sampling, request.tokens)
            except NativeError as error:
                refused.append(Failed(id, str(error)))
                continue
            self._running[id] = self._start(id, request, arrived, sampler)
        return refused

    def _start(self, id: int, request: Request, arrived: float, sampler: Sampler) -> Run:
        sequence, n_shared = self._closest(request.tokens) if request.share else (self._any(), 0)
        del self._free[sequence]
        # the last token of a prompt is always computed: its logits are what is wanted
        n_kept = self._model.keep(sequence, min(n_shared, len(request.tokens) - 1))
        skip_space = request.starts_text and self._model.vocab.is_spm
        return Run(
            id=id,
            request=request,
            sequence=sequence,
            sampler=sampler,
            text=TextStream(request.stop, skip_space=skip_space),
            tokens=list(request.tokens),
            n_cached=n_kept,
            n_done=n_kept,
            arrived=arrived,
            started=time.perf_counter(),
        )

    def _closest(self, tokens: Seq[int]) -> tuple[int, int]:
        """The free sequence that holds most of how these tokens begin, and how many it holds."""
        shared = {n: common_prefix(held, tokens) for n, held in self._free.items()}
        best = max(shared, key=lambda n: (shared[n], -len(self._free[n])))
        return best, shared[best]

    def _any(self) -> int:
        return next(iter(self._free))

    # ---- computing ----

    def _fill_batch(self) -> list[tuple[Run, int]]:
        """Lay the batch: a token of each generating sequence, then prompts; who got how many."""
        batch, room = self._model.batch, self._model.placement.n_ubatch
        parts: list[tuple[Run, int]] = []
        at = 0
        for run in sorted(self._running.values(), key=lambda run: run.n_sampled == 0):
            n = min(run.n_waiting, room - at)
            if n == 0:
                break
            end = at + n
            batch.tokens[at:end] = run.tokens[run.n_done : run.n_done + n]
            batch.positions[at:end] = range(run.n_done, run.n_done + n)
            batch.sequences[at:end] = run.sequence
            batch.wants_logits[at:end] = 0
            batch.wants_logits[end - 1] = n == run.n_waiting
            parts.append((run, n))
            at = end
        return parts

    def _compute(self, parts: list[tuple[Run, int]]) -> bool:
        """Decode the batch; False where `interrupt` ended it and nothing was computed."""
        self._model.context.allow()
        if len(parts) == 1 and parts[0][0].n_sampled == 0:
            self._computing_prompt_of = parts[0][0].id
        try:
            return self._model.decode(sum(n for _, n in parts))
        finally:
            self._computing_prompt_of = None

    # ---- answering ----

    def _progress(self, run: Run) -> Delta:
        return Delta(run.id, prompt_tokens=run.n_done)

    def _sample(self, run: Run, index: int) -> Delta | Failed:
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
        text = run.text.feed(self._model.vocab.piece(token))
        if run.text.stopped_by is not None:
            return self._finish(run, "stop", text, (token,))
        full = len(run.tokens) >= self._model.n_ctx
        if full or run.n_sampled == run.request.max_tokens:
            return self._finish(run, "length", text, (token,))
        return Delta(
            run.id,
            text=text,
            tokens=(token,),
            prompt_tokens=run.n_prompt,
            completion_tokens=run.n_sampled,
        )

    def _finish(
        self, run: Run, reason: FinishReason, text: str = "", tokens: tuple[int, ...] = ()
    ) -> Delta:
        text += run.text.finish()
        if not run.request.stream:
            text, tokens = run.unsent + text, tuple(run.tokens[run.n_prompt :])
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

    def _release(self, run: Run) -> None:
        run.sampler.free()
        del self._running[run.id]
        self._free[run.sequence] = run.tokens[: run.n_done]


def timings_of(run: Run) -> Timings:
    """The speeds of a run: its prompt up to the first token, its answer from there on."""
    if not run.first_token:
        return Timings(0.0, 0.0, 0.0)
    prompt_s, generation_s = run.first_token - run.started, run.last_token - run.first_token
    n_computed, n_after_first = run.n_prompt - run.n_cached, run.n_drawn - 1
    return Timings(
        first_token_s=run.first_token - run.arrived,
        prompt_tps=n_computed / prompt_s if prompt_s > 0 else 0.0,
        generation_tps=n_after_first / generation_s if generation_s > 0 else 0.0,
    )


def common_prefix(a: Seq[int], b: Seq[int]) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(a), len(b))
    if tuple(a[:n]) == tuple(b[:n]):
        return n
    return next(i for i in range(n) if a[i] != b[i])
