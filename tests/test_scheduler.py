"""Many requests at once: who goes with whom, what is computed once, and that answers don't care."""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_model import FAMILIES, make_model
from synthetic.families import with_layers

from localmoe.batch.prefix_sharing import prefix_sharing_of
from localmoe.config.environment import engine_environment
from localmoe.engine.client import EngineProcess, Inbox
from localmoe.engine.prefix import MIN_SHARED_TOKENS, common_prefix
from localmoe.engine.protocol import Delta, Failed, KvType, Placement, Request, Sampling
from localmoe.engine.worker.batch_builder import WORTH_FILLING, spans
from localmoe.engine.worker.kv_slots import CellAccounting
from localmoe.engine.worker.model import NativeModel
from localmoe.engine.worker.request_queue import MAX_PASSED, QueuedRequest, RequestQueue
from localmoe.engine.worker.scheduler import Scheduler
from localmoe.gguf.demo import PACKAGE

GREEDY = Sampling(temperature=0)
DEMO = PACKAGE / "models" / "demo" / "demo.gguf"
N_CTX = 256
N_SEQ = 4
PLACEMENT = Placement(n_threads=1, n_ctx=N_CTX, n_seq=N_SEQ, n_ubatch=128)
ALIKE = replace(PLACEMENT, flash_attention="off", batch_invariant=True)
STREAMS = {
    "unified": replace(PLACEMENT, kv_unified=True),
    "streams": PLACEMENT,
    "batch_invariant": ALIKE,
}


def prompt(seed: int, n_tokens: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(300, 4000), k=n_tokens))


def ask(tokens: tuple[int, ...], **options: object) -> Request:
    options = {"max_tokens": 6, "stream": False, **options}
    return Request(tokens, GREEDY, **options)  # type: ignore[arg-type]


def answers(scheduler: Scheduler, requests: Sequence[Request], first_id: int = 1) -> list[Delta]:
    """Ask all, let them be answered, and give the last delta of each in the order asked."""
    for id, request in enumerate(requests, first_id):
        scheduler.add(id, request)
    ended = run_all(scheduler)
    return [ended[id] for id, _ in enumerate(requests, first_id)]


def run_out(scheduler: Scheduler) -> Iterator[tuple[int, Delta]]:
    while not scheduler.idle:
        for news in scheduler.step():
            assert isinstance(news, Delta), news
            if news.finish_reason:
                yield news.id, news


def run_all(scheduler: Scheduler) -> dict[int, Delta]:
    return dict(run_out(scheduler))


def cached(deltas: Sequence[Delta]) -> int:
    return sum(delta.usage.cached_tokens for delta in deltas if delta.usage)


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, NativeModel]]:
    models = {name: NativeModel(str(DEMO), place) for name, place in STREAMS.items()}
    yield models
    for model in models.values():
        model.free()


@pytest.fixture(params=STREAMS)
def scheduler(request: pytest.FixtureRequest, models: dict[str, NativeModel]) -> Scheduler:
    return fresh(models[request.param])


def fresh(model: NativeModel) -> Scheduler:
    for sequence in range(model.placement.n_seq):
        model.keep(sequence, 0)
    return Scheduler(model)


# ---- what is computed once ----


def test_a_common_beginning_is_computed_once(scheduler: Scheduler) -> None:
    """Twelve requests, four places: all but the first find it, whichever place they get."""
    requests = [ask(prompt(0, 150) + prompt(n, 20)) for n in range(1, 13)]
    assert cached(answers(scheduler, requests)) == 11 * 150


def test_documents_asked_in_turn_are_computed_once_each(scheduler: Scheduler) -> None:
    """Requests of five documents come mixed; those of one document are put together."""
    requests = [ask(prompt(0, 40) + prompt(100 + n % 5, 100) + prompt(n, 10)) for n in range(1, 26)]
    # the common start of all is found by four documents, each document by four of its five
    assert cached(answers(scheduler, requests)) == 4 * 40 + 5 * 4 * 140


def test_what_is_kept_serves_requests_that_come_later(scheduler: Scheduler) -> None:
    answers(scheduler, [ask(prompt(0, 100) + prompt(n, 20)) for n in range(1, 5)])
    later = answers(scheduler, [ask(prompt(0, 100) + prompt(9, 20))], first_id=10)
    assert cached(later) == 100


def test_a_short_common_beginning_keeps_nobody_waiting(models: dict[str, NativeModel]) -> None:
    scheduler = fresh(models["unified"])
    start = prompt(0, MIN_SHARED_TOKENS - 1)
    for n in range(1, 4):
        scheduler.add(n, ask(start + prompt(n, 5)))
    scheduler.step()
    assert [scheduler.cancel(n, only_waiting=True) for n in range(1, 4)] == [[], [], []]
    run_all(scheduler)


def test_who_wants_no_sharing_gets_none(scheduler: Scheduler) -> None:
    requests = [ask(prompt(0, 100) + prompt(n, 10), reuse_prefix=False) for n in range(1, 7)]
    assert cached(answers(scheduler, requests)) == 0


def test_conversations_do_not_push_each_other_out(scheduler: Scheduler) -> None:
    """Four conversations behind one system prompt, a turn of each in turn."""
    histories = [prompt(0, 60) + prompt(n, 40) for n in range(1, 5)]
    id = 1
    for turn in range(3):
        for n, history in enumerate(histories):
            (answer,) = answers(scheduler, [ask(history)], first_id=(id := id + 1))
            if turn:
                assert cached([answer]) >= len(history) - 21
            histories[n] = history + answer.tokens + prompt(id, 20)


# ---- what goes together ----


@given(st.integers(2, 40), st.sets(st.integers(0, 39), min_size=1))
def test_no_stream_is_computed_alone(n_streams: int, running: set[int]) -> None:
    sequences = sorted({n % n_streams for n in running})
    found = spans(sequences, n_streams)
    rows = [n for span in found for n in span]
    assert set(sequences) <= set(rows) <= set(range(n_streams))
    assert rows == sorted(set(rows))
    assert all(len(span) > 1 for span in found)
    assert len(rows) <= len(sequences) * (1 + WORTH_FILLING) + 1


def shapes(scheduler: Scheduler, requests: Sequence[Request]) -> list[list[int]]:
    """How many rows of each sequence every batch has had that was computed."""
    model, found = scheduler._model, []
    for id, request in enumerate(requests, 1):
        scheduler.add(id, request)
    while not scheduler.idle:
        scheduler.step()
        n_rows = model.batch.native.n_tokens
        assert int(model.batch.wants_logits[:n_rows].sum()) >= 2
        found.append(np.unique(model.batch.sequences[:n_rows], return_counts=True)[1].tolist())
    return found


def test_prompts_of_other_lengths_are_filled_up_and_computed_together(
    models: dict[str, NativeModel],
) -> None:
    lengths = (20, 31, 1, 26)
    requests = [ask(prompt(n, length), max_tokens=1) for n, length in enumerate(lengths)]
    assert shapes(fresh(models["batch_invariant"]), requests) == [[31] * 4]


def test_much_filling_is_not_worth_it(models: dict[str, NativeModel]) -> None:
    lengths = (100, 10, 12, 90)
    requests = [ask(prompt(n, length), max_tokens=1) for n, length in enumerate(lengths)]
    assert shapes(fresh(models["batch_invariant"]), requests) == [[100], [12, 12], [90]]


def test_a_lone_sequence_generates_beside_a_row_for_nothing(
    models: dict[str, NativeModel],
) -> None:
    scheduler = fresh(models["batch_invariant"])
    answers(scheduler, [ask(prompt(1, 100))] * N_SEQ)  # what the others hold is not to be lost
    assert shapes(scheduler, [ask(prompt(2, 40), max_tokens=3)]) == [[40], [1, 1], [1, 1]]
    assert cached(answers(scheduler, [ask(prompt(1, 100) + prompt(3, 9))], first_id=9)) >= 100


# ---- room ----


def test_few_cells_make_requests_wait_and_none_fail() -> None:
    """Cells for less than two whole requests, four places: it takes longer, that is all."""
    model = NativeModel(str(DEMO), replace(STREAMS["unified"], n_cells=512))
    requests = [ask(prompt(n, 180), max_tokens=40 + n) for n in range(1, 10)]
    requests += [ask(prompt(0, 120) + prompt(n, 50), max_tokens=None) for n in range(1, 10)]
    ended = answers(Scheduler(model), requests)
    assert all(delta.finish_reason in ("stop", "length") for delta in ended)
    assert cached(ended) >= 4 * 120
    model.free()


def test_a_place_is_taken_as_soon_as_it_is_free(models: dict[str, NativeModel]) -> None:
    scheduler = fresh(models["unified"])
    for n in range(1, 9):
        scheduler.add(n, ask(prompt(n, 10), max_tokens=2 if n == 1 else 9))
    for _ in range(2):
        scheduler.step()
    running = scheduler.cancel(5, only_waiting=True)
    assert running != []
    scheduler.step()
    assert scheduler.cancel(6, only_waiting=True) == []  # it has the place of the first


def test_cells_of_a_copied_beginning_are_counted_once() -> None:
    cells = CellAccounting(100)
    cells.cut(0, 0)
    cells.extend(0, 50)
    cells.share(0, 1, 30)
    cells.extend(1, 10)
    assert cells.n_free == 40
    cells.cut(0, 0)
    assert cells.n_free == 60
    cells.cut(1, 35)
    assert (cells.count(1), cells.n_free) == (35, 65)
    cells.cut(1, 0)
    assert cells.n_free == 100


# ---- ends ----


def test_a_follower_can_be_cancelled(scheduler: Scheduler) -> None:
    for n in range(1, 4):
        scheduler.add(n, ask(prompt(0, 200) + prompt(n, 10)))
    scheduler.step()
    (ended,) = scheduler.cancel(2, only_waiting=True)
    assert ended.finish_reason == "cancelled"
    assert scheduler.cancel(2) == []
    assert [id for id, _ in run_out(scheduler)] == [1, 3]


def test_followers_of_a_cancelled_request_are_answered(scheduler: Scheduler) -> None:
    for n in range(1, 4):
        scheduler.add(n, ask(prompt(0, 200) + prompt(n, 10)))
    scheduler.step()
    scheduler.cancel(1)
    ended = run_all(scheduler)
    assert sorted(ended) == [2, 3]
    # one goes on from what the cancelled one had computed, the other waits for it again
    assert cached(list(ended.values())) == 128 + 200


def test_after_a_failure_the_rest_is_answered(scheduler: Scheduler) -> None:
    requests = [ask(prompt(0, 100) + prompt(n, 20)) for n in range(1, 9)]
    for n, request in enumerate(requests, 1):
        scheduler.add(n, request)
    scheduler.step()
    failed = scheduler.fail_all("no reason")
    assert all(isinstance(news, Failed) for news in failed)
    rest = run_all(scheduler)
    assert len(failed) + len(rest) == 8
    assert {news.id for news in failed} | set(rest) == set(range(1, 9))


# ---- company ----


REQUESTS = [
    ask(prompt(1000 + n % 3, 60) * (n % 2) + prompt(n, 1 + 7 * n % 120), max_tokens=16)
    for n in range(60)
]


def asked(engine: EngineProcess, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    """Ask an engine all of them at once; their tokens."""
    inbox: Inbox = queue.SimpleQueue()
    ids = [engine.submit(request, inbox) for request in requests]
    ended: dict[int, tuple[int, ...]] = {}
    while len(ended) < len(ids):
        message = inbox.get(timeout=60)
        assert isinstance(message, Delta), message
        if message.finish_reason:
            ended[message.id] = message.tokens
    return [ended[id] for id in ids]


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_answers_do_not_depend_on_company(kv_type: KvType) -> None:
    """Requests of every length, some sharing, seven at once and each by itself: the same tokens.

    In processes of their own, as llama.cpp chooses a kernel once for all.
    """
    flash = "on" if kv_type == "q8_0" else "off"
    place = replace(ALIKE, n_seq=7, kv_type=kv_type, flash_attention=flash)
    with EngineProcess(engine_environment()) as many, EngineProcess(engine_environment()) as one:
        many.load(str(DEMO), place)
        one.load(str(DEMO), replace(place, n_seq=2))
        together = asked(many, REQUESTS)
        alone = [asked(one, [replace(request, reuse_prefix=False)])[0] for request in REQUESTS]
    assert together == alone


@pytest.mark.parametrize("kind", ["unified", "streams"])
def test_answers_in_company_are_those_given_alone(
    models: dict[str, NativeModel], kind: str
) -> None:
    """As on a GPU, where nothing is padded. Where an answer differs, its two likeliest
    tokens are as close as other micro-batches move the logits after the very same tokens."""
    model = models[kind]
    scheduler = fresh(model)
    together = [a.tokens for a in answers(scheduler, REQUESTS)]
    apart = [replace(request, reuse_prefix=False) for request in REQUESTS]
    alone = [answers(fresh(model), [request])[0].tokens for request in apart]
    differing = [
        n for n, pair in enumerate(zip(together, alone, strict=True)) if pair[0] != pair[1]
    ]
    assert len(differing) <= len(REQUESTS) // 4
    for n in differing:
        agreed = REQUESTS[n].tokens + tuple(alone[n][: common_prefix(together[n], alone[n])])
        rivals = [t[len(agreed) - len(REQUESTS[n].tokens)] for t in (together[n], alone[n])]
        whole, *others = (logits(model, agreed, *shape) for shape in SHAPES)
        rounding = max(float(np.abs(other - whole).max()) for other in others)
        assert abs(whole[rivals[0]] - whole[rivals[1]]) <= 2 * rounding, n


SHAPES = ((128, 0), (1, 0), (30, 0), (30, 98))
"""Of micro-batches: tokens of a sequence at once, and of another beside."""


def logits(
    model: NativeModel, tokens: tuple[int, ...], n_at_once: int, n_beside: int
) -> npt.NDArray[np.float32]:
    """What comes after these tokens, computed by micro-batches of a shape."""
    fresh(model)
    for start in range(0, len(tokens), n_at_once):
        part = tokens[start : start + n_at_once]
        lay(model, 0, 0, part, start)
        lay(model, len(part), 1, prompt(7, n_beside), 0)
        model.keep(1, 0)
        assert model.decode(len(part) + n_beside)
    return model.context.logits(len(part) - 1).copy()


def lay(model: NativeModel, at: int, sequence: int, tokens: Sequence[int], position: int) -> None:
    """Put tokens of a sequence into the batch, their first at place `at`."""
    batch, end = model.batch, at + len(tokens)
    batch.tokens[at:end] = tokens
    batch.positions[at:end] = range(position, position + len(tokens))
    batch.sequences[at:end] = sequence
    batch.wants_logits[at:end] = 0
    if sequence == 0:
        batch.wants_logits[end - 1] = 1


@pytest.mark.parametrize("kind", ["recurrent", "sliding window"])
def test_caches_that_cannot_be_cut_answer_all_the_same(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    make_model(path, SMALL[kind], "Q4_K")
    model = NativeModel(str(path), replace(STREAMS["unified"], n_ubatch=64))
    requests = [ask(tuple(t % 500 for t in prompt(0, 90) + prompt(n, 10))) for n in range(1, 7)]
    together = answers(Scheduler(model), requests)
    assert all(len(answer.tokens) == 6 for answer in together)
    assert cached(together) == (0 if kind == "recurrent" else 5 * 90)
    model.free()


def small(name: str, n_layers: int, **kv: object) -> object:
    family = with_layers(FAMILIES[name], n_layers)
    family = replace(family, n_vocab=512, n_experts=4, n_experts_used=2)
    return replace(family, kv={**family.kv, **kv})  # type: ignore[arg-type]


SMALL = {
    "recurrent": small("granitehybrid", 6),
    "sliding window": small("gpt-oss", 2, **{"attention.sliding_window": 32}),
}


# ---- the order ----


tokens = st.lists(st.integers(0, 1), max_size=80)


@given(tokens, tokens, tokens)
def test_a_common_prefix_is_what_both_begin_with(
    common: list[int], a: list[int], b: list[int]
) -> None:
    first, second = [*common, *a], (*common, *b)
    n = common_prefix(first, second)
    assert tuple(first[:n]) == second[:n]
    assert n == min(len(first), len(second)) or first[n] != second[n]
    assert n >= len(common)


def waiting(id: int, tokens: tuple[int, ...], **options: bool) -> QueuedRequest:
    return QueuedRequest(id, ask(tokens, **options), 0.0)


def popped(waiting: Sequence[QueuedRequest]) -> list[int]:
    queue = RequestQueue()
    for entry in waiting:
        queue.add(entry)
    return [queue.pop().id for _ in range(len(queue))]


def test_nothing_shared_is_first_come_first_served() -> None:
    assert popped([waiting(n, prompt(n, 50)) for n in range(20)]) == list(range(20))


def test_those_sharing_most_come_together() -> None:
    """Two systems with two documents each: never back to one that was left."""
    texts = [prompt(s, 40) + prompt(d, 40) for s in (1, 2) for d in (10 * s, 10 * s + 1)]
    order = popped([waiting(n, texts[n % 4] + prompt(100 + n, 9)) for n in range(20)])
    documents = [n % 4 for n in order]
    assert sum(a != b for a, b in zip(documents, documents[1:], strict=False)) == 3
    assert [d // 2 for d in documents] == [0] * 10 + [1] * 10


def test_requests_that_want_no_sharing_keep_their_order() -> None:
    order = popped([waiting(n, prompt(n % 2, 60), reuse_prefix=False) for n in range(10)])
    assert order == list(range(10))


def test_nobody_is_passed_over_for_ever() -> None:
    queue = RequestQueue()
    queue.add(waiting(0, prompt(0, 50) + (1,)))
    queue.add(waiting(1, prompt(1, 50)))
    assert queue.pop().id == 0
    n_passed = 0
    for n in range(2, 2 * MAX_PASSED):
        queue.add(waiting(n, prompt(0, 50) + (n,)))
        if queue.pop().id == 1:
            break
        n_passed += 1
    assert n_passed == MAX_PASSED


# ---- what a parent can know ----


def test_sharing_is_known_before() -> None:
    prompts = [prompt(0, 512) + prompt(n, 32) for n in range(1, 33)]
    sharing = prefix_sharing_of(prompts, max_tokens=32, n_seq=32)
    assert (sharing.n_prompt, sharing.n_shared) == (32 * 544, 31 * 512)
    assert sharing.n_cells == 512 + 32 * 64
    assert sharing.wants_unified
    nothing = prefix_sharing_of([prompt(n, 900) for n in range(100)], max_tokens=100, n_seq=32)
    assert nothing.n_cells == 32 * 1000
    assert nothing.fraction < 0.01
    assert not nothing.wants_unified


def test_a_cache_is_unified_where_streams_would_take_more_passes_than_it_costs() -> None:
    """Prompts of one length are computed together in streams, those of many lengths aren't."""
    even = [prompt(n, 128) for n in range(64)]
    uneven = [prompt(n, 64 + n) for n in range(64)]
    assert not prefix_sharing_of(even, max_tokens=64, n_seq=64).wants_unified
    assert prefix_sharing_of(uneven, max_tokens=64, n_seq=64).wants_unified
    assert prefix_sharing_of(even, max_tokens=64, n_seq=16).wants_unified  # 48 more passes
    assert not prefix_sharing_of(uneven, max_tokens=1024, n_seq=64).wants_unified


@given(st.lists(tokens.filter(len), min_size=1, max_size=30), st.integers(1, 8))
def test_cells_are_enough_for_requests_next_to_each_other(
    prompts: list[list[int]], n_seq: int
) -> None:
    n_cells = prefix_sharing_of(prompts, 5, n_seq).n_cells
    ordered = sorted(prompts)
    for at in range(len(ordered)):
        together = ordered[at : at + n_seq]
        held = {tuple(p[:n]) for p in together for n in range(1, len(p) + 1)}
        assert len(held) + 5 * len(together) <= n_cells
