"""Batches with a real engine, and with a fake one where it has to die at the right moment."""

from __future__ import annotations

import io
import json
import queue
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from soak import batch as soak

from localmoe.batch import dispatch, runner
from localmoe.batch.dispatch import Dispatcher, Outcome, StopFlag
from localmoe.batch.encoder import Encoder
from localmoe.batch.manifest import Manifest, input_file
from localmoe.batch.pending import PendingRequests
from localmoe.batch.requests import Defaults
from localmoe.batch.responses import FileOutput, StreamOutput
from localmoe.callbacks import LoadCallbacks
from localmoe.catalog.model_name import ModelName
from localmoe.catalog.resolve import ResolvedModel
from localmoe.chat.chat import AnswerOptions
from localmoe.config.environment import engine_environment
from localmoe.config.settings import load_settings
from localmoe.engine.client import EngineProcess, Inbox
from localmoe.engine.protocol import (
    Delta,
    Failed,
    FromEngine,
    Placement,
    Request,
    Sampling,
    TextPiece,
    Timings,
    Usage,
)
from localmoe.errors import EngineError, PromptError
from localmoe.gguf.demo import PACKAGE
from localmoe.gguf.model_meta import read_meta
from localmoe.gguf.reader import read_header
from localmoe.gguf.writer import encode_header, raw_entries
from localmoe.loading import format_of, load_to_talk

GREEDY = Sampling(temperature=0)
DEFAULTS = Defaults(AnswerOptions(GREEDY, max_tokens=3))
N_SEQ = 16
DEMO = PACKAGE / "models" / "demo" / "demo.gguf"
DEATH = EngineError("The engine was killed.", "Try again.")
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def demo(n_seq: int = N_SEQ) -> EngineProcess:
    engine = EngineProcess(engine_environment())
    engine.load(str(DEMO), Placement(n_threads=2, n_ctx=256, n_seq=n_seq))
    return engine


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with demo() as engine:
        yield engine


@pytest.fixture(scope="module")
def encoder(engine: EngineProcess) -> Encoder:
    return Encoder(format_of(read_meta(DEMO)), engine, 256)


def jsonl(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


@dataclass
class Run:
    """A batch in a folder, to be run again and again."""

    folder: Path
    encoder: Encoder
    engine_of: Callable[[], Any]
    source: bytes = b""
    checked: runner.InputCheck = field(default_factory=runner.InputCheck)

    @property
    def path(self) -> Path:
        return self.folder / "out.jsonl"

    def __call__(
        self, stop: StopFlag | None = None, *, ordered: bool = False, **options: Any
    ) -> runner.BatchProgress:
        stream = io.BytesIO(self.source)
        manifest = Manifest(input_file("in.jsonl", stream), {"model file": "demo"})
        anyway = options.pop("resume_anyway", False)
        on_progress = options.pop("on_progress", None)
        with (
            FileOutput(self.path, manifest, resume_anyway=anyway) as out,
            PendingRequests() as backlog,
        ):
            runner.recover(out, backlog, **options)
            self.checked = runner.check_input(
                stream, "json", DEFAULTS, lambda: self.encoder, backlog, out
            )
            if out.changes:
                runner.drop_superseded(out, backlog)
            run_options = runner.RunOptions("demo", reuse_prefix=False)
            stop = stop or StopFlag()
            done = runner.run_batch(backlog, out, self.engine_of, run_options, stop, on_progress)
            if ordered:
                out.put_in_order(backlog)
        return done

    def records(self) -> dict[str, Any]:
        return {r["custom_id"]: r for r in map(json.loads, self.path.read_bytes().splitlines())}


@pytest.fixture
def run(tmp_path: Path, encoder: Encoder, engine: EngineProcess) -> Run:
    return Run(tmp_path, encoder, lambda: engine)


# ---- many requests in one engine ----


def collect(inbox: Inbox, n: int) -> dict[int, FromEngine]:
    found: dict[int, FromEngine] = {}
    while len(found) < n:
        message = inbox.get(timeout=20)
        assert not isinstance(message, EngineError)
        found[message.id] = message
    return found


def test_requests_that_are_not_streamed_end_in_one_delta_with_everything(
    engine: EngineProcess,
) -> None:
    prompts = [(1, 300 + n, 301 + n) for n in range(12)]
    streamed = [list(engine.generate(Request(p, GREEDY, max_tokens=6))) for p in prompts]
    inbox: Inbox = queue.SimpleQueue()
    ids = [
        engine.submit(Request(p, GREEDY, max_tokens=6, stream=False, stop=("\n\n",)), inbox)
        for p in prompts
    ]
    found = collect(inbox, len(ids))
    assert inbox.empty()
    for id, deltas in zip(ids, streamed, strict=True):
        last = found[id]
        assert isinstance(last, Delta)
        assert last.text == "".join(delta.text for delta in deltas)
        assert last.tokens == tuple(token for delta in deltas for token in delta.tokens)
        assert (last.finish_reason, last.usage) != (None, None)


def test_a_request_that_is_refused_is_so_in_the_inbox(engine: EngineProcess) -> None:
    inbox: Inbox = queue.SimpleQueue()
    id = engine.submit(Request((1,) * 300, GREEDY, stream=False), inbox)
    message = collect(inbox, 1)[id]
    assert isinstance(message, Failed)
    assert "300 tokens" in message.message


def test_only_what_waits_is_cancelled_where_that_is_wanted(engine: EngineProcess) -> None:
    inbox: Inbox = queue.SimpleQueue()
    # a grammar without an end keeps each going up to max_tokens
    endless = Sampling(temperature=0, grammar='root ::= [a-z ]+ "\\x00"')
    running = [
        engine.submit(Request((1, 300), endless, max_tokens=60), inbox) for _ in range(N_SEQ)
    ]
    begun = set()
    while len(begun) < N_SEQ:
        message = inbox.get(timeout=20)
        assert isinstance(message, Delta)
        begun.add(message.id)
    waiting = [engine.submit(Request((1, 300), endless, 60), inbox) for _ in range(4)]
    for id in (*running, *waiting):
        engine.cancel(id, only_waiting=True)
    ends: dict[int, str] = {}
    while len(ends) < N_SEQ + 4:
        message = inbox.get(timeout=20)
        assert isinstance(message, Delta)
        if message.finish_reason:
            ends[message.id] = message.finish_reason
    assert {ends[id] for id in running} == {"length"}
    assert {ends[id] for id in waiting} == {"cancelled"}


def test_without_sharing_nothing_held_is_used(engine: EngineProcess) -> None:
    inbox: Inbox = queue.SimpleQueue()
    for _ in range(2):
        engine.submit(
            Request((1, 310, 311, 312), GREEDY, 2, stream=False, reuse_prefix=False), inbox
        )
    for message in collect(inbox, 2).values():
        assert isinstance(message, Delta)
        assert message.usage is not None
        assert message.usage.cached_tokens == 0


@posix
def test_the_death_of_an_engine_is_told_once(tiny_model: Path) -> None:
    inbox: Inbox = queue.SimpleQueue()
    with EngineProcess(engine_environment()) as engine:
        engine.load(str(tiny_model), Placement(n_threads=1, n_ctx=512))
        for _ in range(5):
            engine.submit(Request((1, 300), GREEDY, max_tokens=400, stream=False), inbox)
        engine.kill()
        message = inbox.get(timeout=20)
        while not isinstance(message, EngineError):
            message = inbox.get(timeout=20)
        assert inbox.empty()
        with pytest.raises(EngineError, match="killed"):
            engine.submit(Request((1, 300)), inbox)


# ---- engines that die ----


@dataclass
class FakeEngine:
    """Answers at once, or dies of a request whose tokens hold a poison."""

    poison: frozenset[int] = frozenset()
    asked: list[int] = field(default_factory=list)
    under_way: dict[int, Inbox] = field(default_factory=dict)
    most_under_way: int = 0
    holds_back: bool = False
    dead: bool = False

    def submit(self, request: Request, inbox: Inbox) -> int:
        if self.dead:
            raise DEATH
        id = len(self.asked)
        self.asked.append(request.tokens[0])
        self.under_way[id] = inbox
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        if request.tokens[0] in self.poison:
            self.dead = True
            inbox.put(DEATH)
        elif not self.holds_back and not self.poison:
            self.answer(id)
        return id

    def answer(self, id: int, reason: Any = "stop") -> None:
        usage, timings = Usage(1, 1, 0), Timings(0, 0, 0)
        delta = Delta(id, "x", (1,), finish_reason=reason, usage=usage, timings=timings)
        self.under_way.pop(id).put(delta)

    def cancel(self, id: int, *, only_waiting: bool = False) -> None:
        if id in self.under_way and not (only_waiting and id < 2):
            self.answer(id, "cancelled")

    def kill(self) -> None:
        self.dead = True


@dataclass
class Poisoned(FakeEngine):
    """Answers what came before the poison only when more is asked."""

    def submit(self, request: Request, inbox: Inbox) -> int:
        id = super().submit(request, inbox)
        if not self.dead:
            self.answer(id)
        return id


def outcomes(dispatcher: Dispatcher[int]) -> list[Outcome[int]]:
    return [outcome for group in dispatcher.outcomes() for outcome in group]


def requests(n: int) -> Iterator[tuple[int, Request]]:
    return ((number, Request((number,))) for number in range(n))


def test_all_are_answered_by_an_engine_that_lives() -> None:
    found = outcomes(Dispatcher(requests(3000), FakeEngine))
    assert [outcome.key for outcome in found] == list(range(3000))


def test_no_more_are_under_way_than_memory_allows() -> None:
    engine = FakeEngine(holds_back=True)
    long = ((n, Request((n,) * 100_000)) for n in range(100))
    dispatcher = Dispatcher(long, lambda: engine)
    groups = dispatcher.outcomes()
    next(groups)
    assert len(engine.under_way) == dispatch.MAX_TOKENS_AHEAD // 100_000 + 1


@pytest.mark.parametrize("poison", [{0}, {5}, {5, 6, 7}, {5, 1500, 2999}, {0, 40, 80, 120, 160}])
def test_what_an_engine_dies_of_ends_alone(poison: set[int]) -> None:
    """Each engine dies at once, with much under way; only the poison itself has no answer."""
    engines: list[FakeEngine] = []

    def engine_of() -> FakeEngine:
        engines.append(Poisoned(frozenset(poison)))
        return engines[-1]

    found = outcomes(Dispatcher(requests(3000), engine_of))
    assert sorted(outcome.key for outcome in found) == list(range(3000))
    assert {outcome.key for outcome in found if outcome.answer is None} == poison
    for engine in engines:
        assert engine.dead or engine is engines[-1]
    asked = [number for engine in engines for number in engine.asked]
    assert max(asked.count(number) for number in poison) == 3
    given_up = [outcome for outcome in found if outcome.answer is None]
    assert all("died 3 times" in outcome.message for outcome in given_up)


def test_what_died_in_company_is_asked_in_ever_less() -> None:
    sizes = []

    class Silent(FakeEngine):
        def submit(self, request: Request, inbox: Inbox) -> int:
            id = super().submit(request, inbox)
            if len(self.under_way) == (1024, 32, 1, 1)[min(len(sizes), 3)]:
                sizes.append(len(self.under_way))
                inbox.put(DEATH)
            return id

    found = Dispatcher(requests(1024), lambda: Silent(holds_back=True)).outcomes()
    while len(sizes) < 5:
        next(found)
    assert sizes == [1024, 32, 1, 1, 1]


def test_where_nothing_is_ever_answered_the_run_ends() -> None:
    with pytest.raises(EngineError, match="killed"):
        outcomes(Dispatcher(requests(3000), lambda: FakeEngine(frozenset(range(3000)))))


def test_a_wish_to_stop_finishes_what_is_computed() -> None:
    engine, stop = FakeEngine(holds_back=True), StopFlag()
    groups = Dispatcher(requests(100), lambda: engine, stop).outcomes()
    next(groups)
    stop.wanted = True
    assert next(groups) == []
    for id in (0, 1):
        engine.answer(id)
    assert [outcome.key for group in groups for outcome in group] == [0, 1]
    assert len(engine.asked) == 100


def test_left_early_nothing_goes_on() -> None:
    engine = FakeEngine(holds_back=True)
    groups = Dispatcher(requests(10), lambda: engine).outcomes()
    next(groups)
    groups.close()  # type: ignore[attr-defined]
    assert engine.under_way.keys() <= {0, 1}


# ---- whole batches ----

HOSTILE = [
    b"{",
    b"nonsense",
    b'\xef\xbb\xbf{"prompt": "a"}',
    b'{"prompt": "a\xff"}',
    b'{"prompt": "a\0b"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "\\ud800"}',
    b'{"custom_id": "good-0", "prompt": "again"}',
    b"[" * 50_000,
    b'{"prompt": "' + b"long " * 400 + b'"}',
    b'{"prompt": "a", "tools": [{"type": "function"}]}',
    b'{"a": ' * 50_000,
    b"\0\0\0",
    b'"\r"',
]


def test_hostile_lines_are_errors_of_their_own_among_good_ones(run: Run) -> None:
    """500 and 500, in random order, with blank lines and CRLF between them."""
    rng = random.Random(7)
    good = [
        f'{{"custom_id": "good-{n}", "prompt": "Hi {n}!", "max_tokens": 1}}' for n in range(500)
    ]
    lines = [(line.encode(), True) for line in good]
    lines[1:] = [*lines[1:], *((HOSTILE[n % len(HOSTILE)], False) for n in range(500))]
    rest = lines[1:]
    rng.shuffle(rest)
    raw, bad, number = b"", set(), 0
    for line, is_good in [lines[0], *rest]:
        for blank in [b"\r\n"] * rng.randrange(2):
            raw, number = raw + blank, number + 1
        raw, number = raw + line + rng.choice([b"\n", b"\r\n"]), number + 1
        if not is_good:
            bad.add(number)
    run.source = raw
    done = run()
    records = [json.loads(line) for line in run.path.read_bytes().splitlines()]
    assert {r["line"] for r in records if r["error"]} == bad
    assert {r["custom_id"] for r in records if r["response"]} == {f"good-{n}" for n in range(500)}
    assert len(records) == 1000
    assert (done.n_answered, run.checked.n_bad) == (500, 500)


def test_an_answer_is_an_openai_response_with_counts_and_timings(run: Run) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi!"}]}
    run.source = jsonl(
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "t", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 2}},
        {"prompt": "Hi!"},
        {"custom_id": "g", "prompt": "Hi!", "grammar": 'root ::= "a"\n | "b"'},
    )
    run()
    records = run.records()
    body = records["c"]["response"]["body"]
    assert records["c"]["response"]["status_code"] == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["choices"][0]["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert body["timings"]["first_token_s"] > 0
    assert records["t"]["response"]["body"]["object"] == "text_completion"
    assert records["t"]["response"]["body"]["usage"]["prompt_tokens"] == 2
    said = records["line-3"]["response"]["body"]["choices"][0]["message"]["content"]
    assert said == body["choices"][0]["message"]["content"]
    assert records["g"]["error"]["code"] == "refused"
    assert "GBNF" in records["g"]["error"]["message"]


def test_an_answer_that_was_begun_is_gone_on_with(run: Run) -> None:
    """It goes on with the very tokens that the whole answer has there, spaces kept."""
    asked = [{"role": "user", "content": "Hi!"}]
    run.source = jsonl({"custom_id": "whole", "messages": asked, "temperature": 0})
    run()
    whole = run.records()["whole"]["response"]["body"]["choices"][0]["message"]["content"]
    begun, rest = whole[: whole.index(" ")], whole[whole.index(" ") :]
    said = [*asked, {"role": "assistant", "content": begun}]
    empty = [*asked, {"role": "assistant", "content": ""}]
    run.source = jsonl(
        {"custom_id": "begun", "messages": said, "temperature": 0},
        {"custom_id": "empty", "messages": empty, "temperature": 0},
    )
    run(resume_anyway=True)
    answers = {
        name: record["response"]["body"]["choices"][0]["message"]["content"]
        for name, record in run.records().items()
    }
    assert (answers["begun"], answers["empty"]) == (rest, whole)


MANY = jsonl(*({"id": n, "prompt": f"Do you like number {n}?"} for n in range(40)))


def test_a_run_that_was_stopped_goes_on_where_it_was(run: Run) -> None:
    run.source = MANY
    stop = StopFlag()

    def soon(progress: runner.BatchProgress) -> None:
        stop.wanted = progress.n_answered >= 5

    first = run(stop, on_progress=soon)
    raw = run.path.read_bytes()
    assert 5 <= first.n_answered < 40
    assert len(raw.splitlines()) == first.n_answered
    second = run()
    assert run.checked.n_done == first.n_answered
    assert first.n_answered + second.n_answered == 40
    assert run.path.read_bytes().startswith(raw)
    assert len(run.records()) == 40
    assert run().n_total == 0


def test_an_ordered_output_is_in_the_order_of_the_input(run: Run) -> None:
    run.source = jsonl({"prompt": "Hi!", "n": 3}) + MANY
    run(ordered=True)
    lines = [json.loads(line)["line"] for line in run.path.read_bytes().splitlines()]
    assert lines == list(range(1, 42))


def test_failed_requests_are_asked_again_where_that_is_wanted(run: Run) -> None:
    run.source = MANY
    run.engine_of, engine_of = (lambda: FakeEngine(frozenset({1}))), run.engine_of  # all begin so
    with pytest.raises(EngineError):
        run()
    failed = [r for r in run.records().values() if r["error"]]
    assert failed
    run.engine_of = engine_of
    assert run().n_answered == 40 - len(failed)
    again = run(retry_errors=True)
    assert again.n_answered == len(failed)
    assert [r["error"] for r in run.records().values()] == [None] * 40


def test_a_changed_input_keeps_what_is_the_same(run: Run) -> None:
    run.source = jsonl(*({"id": n, "prompt": f"Number {n}?"} for n in "abc"))
    run()
    before = run.records()
    run.source = jsonl(
        {"id": "z", "prompt": "New?"},
        {"id": "a", "prompt": "Number a?"},
        {"id": "b", "prompt": "?"},
    )
    done = run(resume_anyway=True)
    after = run.records()
    assert done.n_answered == 2
    assert len(run.path.read_bytes().splitlines()) == 4
    assert (after["a"], after["c"]) == (before["a"], before["c"])
    assert after["b"] != before["b"]


def test_a_stream_gets_the_lines_as_text(encoder: Encoder, engine: EngineProcess) -> None:
    said: list[str] = []
    output = StreamOutput(said.append)
    with PendingRequests() as backlog:
        stream = io.BytesIO(jsonl({"prompt": "Hi!"}, {"prompt": ""}))
        runner.check_input(stream, "json", DEFAULTS, lambda: encoder, backlog, output)
        runner.run_batch(backlog, output, lambda: engine, runner.RunOptions("demo"), StopFlag())
    assert [json.loads(line)["line"] for line in said] == [2, 1]


def test_answers_for_a_program_come_as_they_finish(encoder: Encoder, engine: EngineProcess) -> None:
    asked = ["Hi!", {"id": "x", "prompt": "Hi!", "n": 2}, [{"role": "user", "content": "Hi!"}], 3]
    found = {r.index: r for r in runner.answers(asked, encoder, lambda: engine, DEFAULTS)}
    assert found[0].text == found[2].text != ""
    assert found[0].usage is not None
    assert found[0].finish_reason in ("stop", "length")
    assert '"n"' in found[1].error
    assert found[1].custom_id == "x"
    assert "not a JSON object" in found[3].error


# ---- kill -9 ----


@posix
def test_50_kills_lose_nothing_double_nothing_and_change_nothing(tmp_path: Path) -> None:
    assert "nothing lost" in soak.report(soak.DIRECT, tmp_path, n_kills=50, seed=3)


# ---- base models ----


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model without its chat template."""
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    with DEMO.open("rb") as source:
        header = read_header(source)
        entries = raw_entries(source, header)
        del entries["tokenizer.chat_template"]
        head = encode_header(
            header.version, list(entries.values()), header.tensors, header.alignment
        )
        source.seek(header.data_offset)
        path.write_bytes(head + source.read())
    return path


def test_a_base_model_continues_texts_and_refuses_conversations(base_model: Path) -> None:
    """Completions and plain prompts need no template; only more than one message does."""
    meta = read_meta(base_model)
    words = meta.tokenizer
    with EngineProcess(engine_environment()) as engine:
        engine.load(str(base_model), Placement(n_threads=1, n_ctx=256, n_seq=N_SEQ))
        encoder = Encoder(format_of(meta), engine, 256)
        requests = [
            {"url": "/v1/completions", "body": {"prompt": "The weather is", "max_tokens": 4}},
            {"prompt": "The weather is", "max_tokens": 4},
            {"messages": [
                {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi!"},
            ]},
        ]  # fmt: skip
        found = {
            result.index: result
            for result in runner.answers(requests, encoder, lambda: engine, DEFAULTS)
        }
        plain = engine.tokenize([TextPiece("The weather is")])[0]
    assert len(found[0].tokens) == 4
    assert found[0].tokens == found[1].tokens
    assert found[1].usage is not None
    assert found[1].usage.prompt_tokens == len(plain) + bool(words.add_bos)
    assert "no chat template" in found[2].error


def test_a_base_model_is_not_talked_to(base_model: Path) -> None:
    found = ResolvedModel(
        ModelName(str(base_model), path=base_model), base_model, read_meta(base_model)
    )
    with pytest.raises(PromptError, match="no chat template") as error:
        load_to_talk(found, load_settings({}), LoadCallbacks())
    assert "Instruct" in error.value.hint
