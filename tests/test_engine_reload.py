"""An engine that dies: killed for real, in the middle of an answer and between turns."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.api import LocalMoE
from localmoe.callbacks import LoadCallbacks
from localmoe.chat.chat import Chat
from localmoe.config.settings import Settings, load_settings
from localmoe.engine.protocol import Placement
from localmoe.errors import EngineError, LocalMoeError
from localmoe.hardware.system import SystemAccess
from localmoe.loading import EngineReloader, OpenModel, kept_bytes, oom_kills, open_engine, safer
from localmoe.perf.figures import Figure
from localmoe.planner.plan import SMALLEST_N_CTX, Memory, Plan
from localmoe.prompt.messages import Message
from localmoe.prompt.reasoning import Answer

if sys.platform == "win32":
    pytest.skip("needs signals", allow_module_level=True)

SETTINGS = load_settings({"ctx_size": 512, "tune": False, "n_gpu_layers": 0, "temperature": 0}, {})
HI = "Hi! How are you today?"
WHOLE = re.compile(r"[A-Z][A-Za-z ,.!?']{600}")  # too long to be done before its end is seen
LONG = f"root ::= {WHOLE.pattern}"


@pytest.fixture
def loaded() -> Iterator[OpenModel]:
    with open_engine("demo", SETTINGS) as loaded:
        yield loaded


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def chat(loaded: OpenModel, notes: list[str]) -> Chat:
    options = loaded.options(SETTINGS)
    return Chat(
        loaded.model, options, on_note=notes.append, revive=EngineReloader(loaded, SETTINGS)
    )


@pytest.fixture
def long_chat(chat: Chat) -> Chat:
    chat.options = replace(chat.options, sampling=replace(chat.options.sampling, grammar=LONG))
    return chat


def kill(loaded: OpenModel, how: signal.Signals = signal.SIGKILL) -> None:
    """End the engine, and return when it is gone; words that it sent may still be on their way."""
    os.kill(loaded.engine.pid, how)
    loaded.engine._process.wait(5)


def answered(chat: Chat, text: str) -> str:
    answer = Answer()
    for delta in chat.ask(text):
        answer.add(delta)
    return answer.text


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_in_the_middle_of_an_answer(
    how: signal.Signals, long_chat: Chat, loaded: OpenModel, notes: list[str]
) -> None:
    first = answered(long_chat, HI)
    died, answer = loaded.engine.pid, Answer()
    for delta in long_chat.ask("What do you like?"):
        answer.add(delta)
        if delta.text and loaded.engine.pid == died and loaded.engine.is_alive:
            kill(loaded, how)
    assert loaded.engine.pid != died
    assert long_chat.model.engine is loaded.engine
    assert [m.content for m in long_chat.messages] == [
        HI,
        first,
        "What do you like?",
        answer.text,
    ]
    assert WHOLE.fullmatch(answer.text)  # what came before the end is not in it
    (note,) = notes
    assert "killed" in note if how == signal.SIGKILL else "crashed" in note
    assert note.endswith("It is started again. The answer begins anew.")


def test_killed_between_turns(chat: Chat, loaded: OpenModel, notes: list[str]) -> None:
    answered(chat, HI)
    kill(loaded)
    assert answered(chat, "And what do you like?")
    assert len(chat.messages) == 4
    assert [note.endswith("It is started again.") for note in notes] == [True]
    kill(loaded)
    assert chat.n_tokens() > 20
    assert len(notes) == 2


def test_one_that_always_dies_is_told_and_the_question_stays(
    long_chat: Chat, loaded: OpenModel, notes: list[str]
) -> None:
    answered(long_chat, HI)
    before, pids = list(long_chat.messages), set[int]()

    def ask_and_kill() -> None:
        for delta in long_chat.ask("What do you like?"):
            if loaded.engine.pid not in pids and not delta.anew:
                pids.add(loaded.engine.pid)
                kill(loaded)

    with pytest.raises(EngineError, match="killed"):
        ask_and_kill()
    assert len(pids) == 3  # the first, and two more
    assert len(notes) == 2
    assert long_chat.undo() == Message("user", "What do you like?")
    assert long_chat.messages[: len(before)] == before
    assert answered(long_chat, "What do you like?")


def test_a_model_file_that_is_gone_is_an_error_and_the_question_stays(
    tmp_path: Path, loaded: OpenModel
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(loaded.meta.paths[0].read_bytes())
    with open_engine(str(path), SETTINGS) as copy:
        chat = Chat(copy.model, copy.options(SETTINGS), revive=EngineReloader(copy, SETTINGS))
        path.unlink()
        kill(copy)
        with pytest.raises(LocalMoeError):
            answered(chat, HI)
        assert chat.undo() == Message("user", HI)


def test_the_python_door_comes_back_too() -> None:
    with LocalMoE("demo", ctx_size=256, tune=False) as moe:
        messages = [{"role": "user", "content": HI}]
        kill(moe._loaded)
        assert WHOLE.fullmatch(moe.chat(messages, temperature=0, grammar=LONG).text)
        pid, seen = moe._loaded.engine.pid, Answer()
        for delta in moe.stream(messages, temperature=0, grammar=LONG):
            seen.add(delta)
            if delta.text and moe._loaded.engine.pid == pid and moe._loaded.engine.is_alive:
                kill(moe._loaded)
        assert moe._loaded.engine.pid != pid
        assert WHOLE.fullmatch(seen.text)
    moe.close()
    for use in (lambda: moe.chat(messages), lambda: moe.stream(messages)):
        with pytest.raises(LocalMoeError, match="closed"):
            use()
    with pytest.raises(LocalMoeError, match="closed"):
        next(moe.batch(["Hi"]))


def test_no_engine_stays_where_a_callback_raises_behind_the_load() -> None:
    def give_up(_: str) -> None:
        raise KeyboardInterrupt

    before = psutil.Process().children()
    settings = SETTINGS.model_copy(update={"think": "low"})  # which is noted as unknown
    with pytest.raises(KeyboardInterrupt):
        open_engine("demo", settings, LoadCallbacks(note=give_up))
    assert psutil.Process().children() == before


def test_threads_whose_engine_died_share_its_next_one() -> None:
    with LocalMoE("demo", ctx_size=256, tune=False, parallel=4) as moe:
        messages = [{"role": "user", "content": HI}]
        streams = [moe.stream(messages, temperature=0, grammar=LONG) for _ in range(4)]
        firsts = [next(stream) for stream in streams]
        kill(moe._loaded)
        answers = [Answer() for _ in streams]

        def listen(number: int) -> None:
            for delta in (firsts[number], *streams[number]):
                answers[number].add(delta)

        pids = set[int]()
        threads = [threading.Thread(target=listen, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
            pids.add(moe._loaded.engine.pid)
        assert len(pids) == 1
        assert all(WHOLE.fullmatch(answer.text) for answer in answers)


# ---- the safer plan ----


def plan(
    kv: int = 512, compute: int = 330, repacked: int = 0, pinned: int = 0, **place: Any
) -> Plan:
    """A plan that takes so many MiB of RAM."""
    figures = [Figure(n << 20, "formula") for n in (4096, kv, compute, 0)]
    ram = Memory("RAM", 8 << 30, *figures, pinned_bytes=pinned << 20)
    ram = replace(ram, repacked=Figure(repacked << 20, "formula"))
    placement = Placement(n_threads=2, **{"n_ctx": 4096, "n_ubatch": 512, **place})
    return Plan(True, "cpu", placement, (ram,), ())


def test_first_goes_what_costs_only_speed() -> None:
    less = safer(Settings(), plan())
    assert (less.ubatch_size, less.ctx_size, less.tune) == (128, None, False)
    copies = safer(Settings(), plan(kv=4096, repacked=2048))
    assert (copies.ctx_size, copies.tune) == (None, False)
    assert safer(Settings(), plan(pinned=2048, kv=4096)).load_mode == "mmap"


def test_the_context_goes_where_that_is_not_enough() -> None:
    assert safer(Settings(), plan(kv=4096)).ctx_size == 2048
    assert safer(Settings(ctx_size=4096), plan(n_ubatch=64)).ctx_size == 2048


@given(st.integers(1, 9000), st.integers(1, 900), st.integers(1, 512), st.integers(512, 65536))
def test_going_on_like_that_ends_at_the_smallest(kv: int, work: int, n_ubatch: int, n: int) -> None:
    settings, at = Settings(), plan(kv, work, n_ubatch=n_ubatch, n_ctx=n)
    for _ in range(12):
        before = kept_bytes(at.memory[0])
        settings = safer(settings, at)
        place = replace(
            at.placement,
            n_ctx=settings.ctx_size or at.placement.n_ctx,
            n_ubatch=settings.ubatch_size or at.placement.n_ubatch,
        )
        assert place.n_ctx >= SMALLEST_N_CTX
        kv = kv * place.n_ctx // at.placement.n_ctx
        work = work * place.n_ubatch // at.placement.n_ubatch
        at = plan(kv, work, n_ctx=place.n_ctx, n_ubatch=place.n_ubatch)
        assert kept_bytes(at.memory[0]) <= before
    assert (at.placement.n_ctx, at.placement.n_ubatch <= 64) == (SMALLEST_N_CTX, True)


def machine(folder: Path, vmstat: str = "", events: str | None = None) -> SystemAccess:
    proc, group = folder / "proc", folder / "sys/fs/cgroup"
    proc.mkdir(exist_ok=True)
    group.mkdir(parents=True, exist_ok=True)
    (proc / "vmstat").write_text(vmstat)
    if events is not None:
        (group / "memory.events").write_text(events)
    return SystemAccess(proc=proc, sys=folder / "sys")


def test_the_kernels_count_of_those_it_killed(tmp_path: Path) -> None:
    assert oom_kills(machine(tmp_path)) is None
    assert oom_kills(machine(tmp_path, "nr_free 5\noom_kill 3\n")) == 3
    assert oom_kills(machine(tmp_path, "oom_kill 3\n", "oom 9\noom_kill 2\n")) == 5


def test_a_smaller_context_is_said_and_the_conversation_goes_on(
    chat: Chat, loaded: OpenModel, notes: list[str]
) -> None:
    """The engine says that memory ran out; the cache is all that there is to save on."""
    settings = SETTINGS.model_copy(update={"ctx_size": 2048, "ubatch_size": 64})
    with open_engine("demo", settings) as large:
        revival = EngineReloader(large, settings)
        chat.model, chat.revive = large.model, revival
        answered(chat, HI)
        kill(large)
        revive = chat.revive
        chat.revive = lambda _: revive(EngineError("llama.cpp gave up: out of memory."))
        assert answered(chat, "And you?")
        assert large.plan.placement.n_ctx == 1024
        assert chat.model.n_ctx == 1024
        assert notes[-1] == "The context has 1,024 tokens now; it had 2,048."
        assert len(chat.messages) == 4


def use_all_memory(loaded: OpenModel) -> None:
    """Let the engine have no memory beyond what it has by now."""
    import resource

    if not hasattr(resource, "prlimit"):
        pytest.skip("Linux alone can limit another process")
    n_bytes = psutil.Process(loaded.engine.pid).memory_info().vms - (1 << 20)
    resource.prlimit(loaded.engine.pid, resource.RLIMIT_AS, (n_bytes, n_bytes))


def test_memory_that_runs_out_in_mid_chat_makes_a_smaller_plan(
    chat: Chat, loaded: OpenModel, notes: list[str]
) -> None:
    answered(chat, HI)
    before = loaded.plan.placement
    use_all_memory(loaded)
    assert answered(chat, "hello there " * 150)
    assert "memory ran out" in notes[0]
    after = loaded.plan.placement
    assert after.n_ubatch == before.n_ubatch // 4
    assert len(chat.messages) == 4
