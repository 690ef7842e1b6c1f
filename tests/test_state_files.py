"""States of the cache in files: held again they change nothing; what doesn't suit is as none."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from make_model import FAMILIES, make_model
from synthetic.families import Family, with_layers

from localmoe.chat.kv_snapshot import clear_unfinished, file_key, restore_state, save_state
from localmoe.chat.session import Session, Sessions
from localmoe.config.environment import engine_environment, sessions_folder
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Placement, Request, Sampling, StateRestored, StateSaved
from localmoe.errors import EngineError
from localmoe.gguf.demo import DEMO
from localmoe.prompt.messages import Message

PLACE = Placement(n_threads=2, n_ctx=1024)
PROMPT = (1, *(300 + 7 * n % 1500 for n in range(300)))
MORE = (*PROMPT, *(400 + 11 * n % 1500 for n in range(40)))
LONG, LARGE = PROMPT * 8, replace(PLACE, n_ctx=4096)
ROOM = 1 << 30


@dataclass(frozen=True)
class Outcome:
    tokens: list[int]
    n_cached: int


def ask(engine: EngineProcess, tokens: Sequence[int]) -> Outcome:
    request = Request(tuple(tokens), Sampling(temperature=0), max_tokens=12)
    deltas = list(engine.generate(request))
    usage = deltas[-1].usage
    assert usage
    return Outcome([t for delta in deltas for t in delta.tokens], usage.cached_tokens)


def engine_with(place: Placement = PLACE, path: Path = DEMO) -> EngineProcess:
    engine = EngineProcess(engine_environment())
    engine.load(str(path), place)
    return engine


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of PROMPT on the demo model, with the key "demo"."""
    path = tmp_path_factory.mktemp("saved") / "one.state"
    with engine_with() as engine:
        ask(engine, PROMPT)
        done = engine.save_state(str(path), "demo", PROMPT, ROOM)
    assert done == StateSaved(done.id, len(PROMPT), path.stat().st_size)
    return path


@pytest.fixture(scope="module")
def other() -> Iterator[EngineProcess]:
    """An engine to try files on."""
    with engine_with() as engine:
        yield engine


# ---- in the engine ----


def test_an_answer_is_the_same_with_what_was_held_in_a_file(saved: Path) -> None:
    with engine_with() as engine:
        ask(engine, PROMPT)
        in_memory = ask(engine, MORE)
    with engine_with() as engine:
        restored = engine.restore_state(str(saved), "demo")
        assert restored == StateRestored(restored.id, len(PROMPT))
        from_file = ask(engine, MORE)
        again = ask(engine, PROMPT)
    assert from_file == in_memory
    assert from_file.n_cached == len(PROMPT)
    assert again.n_cached == len(PROMPT) - 1


def test_only_the_conversations_beginning_is_kept(tmp_path: Path, other: EngineProcess) -> None:
    ask(other, MORE)
    done = other.save_state(str(tmp_path / "x"), "demo", (*MORE[:200], 7, 7, 7), ROOM)
    assert done.n_tokens == 200
    with engine_with() as engine:
        assert engine.restore_state(str(tmp_path / "x"), "demo").n_tokens == 200
        assert ask(engine, MORE).n_cached == 200


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (replace(PLACE, n_ctx=4096, n_threads=1, n_ubatch=64), ""),  # all that doesn't matter
        (replace(PLACE, kv_type="q8_0"), "kv_type"),
        (replace(PLACE, flash_attention="off"), "flash_attention"),
        (replace(PLACE, n_seq=2), "n_streams"),
        (replace(PLACE, n_seq=2, kv_unified=True), ""),
        (replace(PLACE, n_ctx=256), "more than the context holds"),
    ],
)
def test_a_state_suits_a_plan_or_is_not_used(saved: Path, place: Placement, why: str) -> None:
    with engine_with(place) as engine:
        restored = engine.restore_state(str(saved), "demo")
        assert why in restored.reason
        assert restored.n_tokens == (0 if why else len(PROMPT))
        if place.n_ctx > len(PROMPT):
            assert ask(engine, PROMPT).n_cached == (0 if why else len(PROMPT) - 1)


def test_two_sequences_of_a_unified_cache_stay_in_their_cells(saved: Path) -> None:
    """What a state fills counts as taken: requests beside it and after it find their room."""
    place = replace(PLACE, n_ctx=512, n_seq=2, kv_unified=True, n_cells=512)
    with engine_with(place) as engine:
        expected = ask(engine, MORE).tokens
    with engine_with(place) as engine:
        assert engine.restore_state(str(saved), "demo").n_tokens
        unlike = [*reversed(PROMPT)]
        ask(engine, unlike)
        assert ask(engine, MORE).tokens == expected


def test_another_models_state_is_not_used(
    saved: Path, other: EngineProcess, tiny_model: Path
) -> None:
    assert other.restore_state(str(saved), "demo:Q4").reason == "it is of another model file"
    with engine_with(path=tiny_model) as engine:  # the key is the client's word; llama.cpp checks
        assert engine.restore_state(str(saved), "demo").n_tokens == 0
        assert ask(engine, PROMPT).n_cached == 0


def damages(raw: bytes) -> dict[str, bytes]:
    at = len(raw) // 2
    flipped = bytes([raw[at] ^ 1])
    _, n_head, n_tokens, n_data = struct.unpack("=IIIQ", raw[8:28])
    return {
        "empty": b"",
        "another file": b"GGUF" + raw[4:],
        "no more than its magic": raw[:8],
        "cut short": raw[:-1],
        "too long": raw + b"\0",
        "cut in its front": raw[:100],
        "a bit of its data": raw[:at] + flipped + raw[at + 1 :],
        "the last bit": raw[:-1] + bytes([raw[-1] ^ 128]),
        "a bit of its tokens": raw[:600] + bytes([raw[600] ^ 1]) + raw[601:],
        "zeros": bytes(len(raw)),
        "zeros at its end": raw[:at] + bytes(len(raw) - at),
        "a head of 4 GB": raw[:12] + struct.pack("=IIQ", 2**32 - 1, n_tokens, n_data) + raw[28:],
        "4 billion tokens": raw[:12] + struct.pack("=IIQ", n_head, 2**32 - 1, n_data) + raw[28:],
        "data of 2^64": raw[:12] + struct.pack("=IIQ", n_head, n_tokens, 2**64 - 1) + raw[28:],
    }


def test_a_damaged_state_is_not_used(saved: Path, other: EngineProcess, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    for how, raw in damages(saved.read_bytes()).items():
        path.write_bytes(raw)
        restored = other.restore_state(str(path), "demo")
        assert restored.n_tokens == 0, how
        assert restored.reason in ("it is damaged", "it is cut short", "it is no state"), how
    assert other.restore_state(str(tmp_path), "demo").n_tokens == 0
    assert other.restore_state(str(tmp_path / "none"), "demo").n_tokens == 0
    assert other.restore_state(str(saved), "demo").n_tokens == len(PROMPT)


def test_what_is_not_worth_it_or_too_large_is_not_written(
    tmp_path: Path, other: EngineProcess
) -> None:
    path = tmp_path / "x"
    ask(other, PROMPT)
    assert other.save_state(str(path), "demo", PROMPT[:20], ROOM).n_tokens == 0
    assert other.save_state(str(path), "demo", (5, *PROMPT), ROOM).n_tokens == 0
    refused = other.save_state(str(path), "demo", PROMPT, 10_000)
    assert refused.n_tokens == 0
    assert refused.n_bytes > 10_000
    assert other.save_state(str(tmp_path / "no" / "x"), "demo", PROMPT, ROOM).n_tokens == 0
    assert list(tmp_path.iterdir()) == []
    assert other.save_state(str(path), "demo", PROMPT, refused.n_bytes).n_bytes == refused.n_bytes
    assert path.stat().st_mode & 0o777 == 0o600


def small(name: str, n_layers: int, n_embd: int, **kv: object) -> Family:
    family = with_layers(FAMILIES[name], n_layers)
    family = replace(family, n_vocab=512, n_embd=n_embd, n_experts=4, n_experts_used=2)
    return replace(family, kv={**family.kv, **kv})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "can_be_cut"),
    [
        (small("granitehybrid", 6, 1536), False),
        (small("gpt-oss", 2, 256, **{"attention.sliding_window": 32}), True),
    ],
    ids=["recurrent", "sliding window"],
)
def test_caches_that_keep_no_beginning_go_on_from_their_end(
    tmp_path: Path, family: Family, can_be_cut: bool
) -> None:
    make_model(tmp_path / "model.gguf", family, "Q4_K")
    tokens, more = (tuple(token % 500 for token in all_) for all_ in (PROMPT, MORE))
    path, cut = tmp_path / "x", tmp_path / "cut"
    with engine_with(path=tmp_path / "model.gguf") as engine:
        answer = tuple(ask(engine, tokens).tokens)
        n_held = len(tokens) + len(answer) - 1
        going_on = (*tokens, *answer, *more[len(tokens) :])
        assert engine.save_state(str(path), "demo", going_on, ROOM).n_tokens == n_held
        in_memory = ask(engine, going_on)
        assert in_memory.n_cached == n_held
        done = engine.save_state(str(cut), "demo", tokens[:100], ROOM)
        assert done.n_tokens == (100 if can_be_cut else 0)
        assert ("can't be cut" in done.reason) != can_be_cut
    with engine_with(path=tmp_path / "model.gguf") as engine:
        assert engine.restore_state(str(path), "demo").n_tokens == n_held
        assert ask(engine, going_on) == in_memory
        parting = ask(engine, more)  # what parts from it is computed whole
        assert parting.n_cached == 0
    with engine_with(path=tmp_path / "model.gguf") as engine:
        assert ask(engine, more) == parting


def test_a_full_disk_leaves_the_state_before_it(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.state"
    path.write_bytes(before := saved.read_bytes())
    program = (
        "import resource, signal, runpy\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)\n"
        "import os, sys\n"
        "from localmoe.engine.client import EngineProcess\n"
        "from localmoe.engine.protocol import Placement, Request, Sampling\n"
        "engine = EngineProcess(dict(os.environ))\n"
        "engine.load(sys.argv[1], Placement(n_threads=2, n_ctx=1024))\n"
        "tokens = tuple(range(300, 600))\n"
        "list(engine.generate(Request(tokens, Sampling(temperature=0), max_tokens=1)))\n"
        "print(engine.save_state(sys.argv[2], 'demo', tokens, 1 << 30).reason)\n"
    )
    command = [sys.executable, "-c", program, str(DEMO), str(path)]
    said = subprocess.check_output(command, text=True, env=engine_environment())
    assert "can't be written: File too large" in said
    assert [path.read_bytes() == before, *tmp_path.iterdir()] == [True, path]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state that takes a while to write."""
    path = tmp_path_factory.mktemp("large") / "large.state"
    with engine_with(LARGE) as engine:
        ask(engine, LONG)
        assert engine.save_state(str(path), "demo", LONG, ROOM).n_tokens == len(LONG)
    return path


def killed_while_saving(large: Path, path: Path, delay_s: float) -> None:
    """End an engine so long after it began to write the large state to `path`."""
    with engine_with(LARGE) as engine:
        assert engine.restore_state(str(large), "demo").n_tokens == len(LONG)

        def save() -> None:
            with suppress(EngineError):
                engine.save_state(str(path), "demo", LONG, ROOM)

        writing = threading.Thread(target=save)
        writing.start()
        while not list(path.parent.glob(f".{path.name}.*.new")) and writing.is_alive():
            pass
        time.sleep(delay_s)
        os.kill(engine.pid, signal.SIGKILL)
        writing.join()


def test_a_kill_while_a_state_is_written_leaves_the_old_one(
    saved: Path, large: Path, other: EngineProcess, tmp_path: Path
) -> None:
    path, left = tmp_path / "one.state", []
    for delay_s in (0.0, 0.001, 0.003, 0.01):
        path.write_bytes(before := saved.read_bytes())
        killed_while_saving(large, path, delay_s)
        left.append(path.read_bytes())
        assert left[-1] in (before, large.read_bytes())
        clear_unfinished(Sessions(tmp_path))
        assert list(tmp_path.iterdir()) == [path]
    assert before in left  # one kill at least came in the middle


# ---- of sessions ----


@dataclass
class FakeEngine:
    """Writes files of the sizes that it is given; what `save_state` would need is their size."""

    sizes: list[int]
    rooms: list[int] = field(default_factory=list)

    def save_state(self, path: str, key: str, tokens: Sequence[int], room_bytes: int) -> StateSaved:
        self.rooms.append(room_bytes)
        if self.sizes[0] > room_bytes:
            return StateSaved(1, 0, self.sizes[0], "no room")
        Path(path).write_bytes(b"x" * self.sizes.pop(0))
        return StateSaved(1, len(tokens), 0)

    def restore_state(self, path: str, key: str) -> StateRestored:
        raise EngineError("llama.cpp gave up.")


def session_with_text(store: Sessions, name: str) -> Session:
    session = store.open_or_new(name, "demo")
    session.use("demo", "key")
    session.sync([Message("user", "Hi"), Message("assistant", "Ho")])
    return session


def test_the_oldest_states_make_room_for_a_new_one(tmp_path: Path) -> None:
    store, engine = Sessions(tmp_path), FakeEngine([400, 400, 300, 100, 1001])
    for n, name in enumerate(["a", "b", "c", "d"]):
        with session_with_text(store, name) as session:
            assert save_state(store, session, engine, PROMPT, 1000) == len(PROMPT)
            os.utime(session.state_path, (n, n))
    states = {name for name in "abcd" if store.state_path(name).exists()}
    assert states == {"b", "c", "d"}
    with session_with_text(store, "b") as session:  # more than there may be of all: none goes
        assert save_state(store, session, engine, PROMPT, 1000) == 0
    assert {name for name in "abcd" if store.state_path(name).exists()} == states
    assert store.names() == ["a", "b", "c", "d"]


def test_a_state_that_is_still_right_is_not_written_again(saved: Path, tmp_path: Path) -> None:
    store = Sessions(tmp_path)
    with engine_with() as engine, store.new("a", "demo") as session:
        session.use("demo", "demo")
        session.sync([Message("user", "Hi")])
        session.state_path.write_bytes(saved.read_bytes())
        os.utime(session.state_path, (0, 0))
        assert restore_state(session, engine) == len(PROMPT)
        assert session.state_path.stat().st_mtime > 0  # it counts as new: others go first
        os.utime(session.state_path, (0, 0))
        assert save_state(store, session, engine, PROMPT) == 0
        assert session.state_path.stat().st_mtime == 0
        session.sync([Message("user", "Hi"), Message("assistant", "Ho")])
        assert save_state(store, session, engine, PROMPT) == len(PROMPT)
        assert session.state_path.stat().st_mtime > 0


def test_a_session_without_text_has_no_state(tmp_path: Path) -> None:
    store, engine = Sessions(tmp_path), FakeEngine([10])
    with store.new("a", "demo") as session:
        session.use("demo", "key")
        assert save_state(store, session, engine, PROMPT) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_ends_the_engine_is_tried_once(tmp_path: Path) -> None:
    store = Sessions(tmp_path)
    with session_with_text(store, "a") as session:
        session.state_path.write_bytes(b"x")
        assert restore_state(session, FakeEngine([])) == 0
        assert not session.state_path.exists()


def test_what_was_cut_short_is_cleared_unless_it_is_being_written(tmp_path: Path) -> None:
    store = Sessions(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f".{name}.state.0f12ab34.new").write_bytes(b"x")
    with session_with_text(store, "b") as session:
        clear_unfinished(store)
        assert [p.name for p in tmp_path.glob("*.new")] == [".b.state.0f12ab34.new"]
        assert session.path.exists()


def test_files_of_one_size_and_header_have_keys_of_their_own(tmp_path: Path) -> None:
    raw = bytearray(DEMO.read_bytes())
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "c.gguf"]
    paths[0].write_bytes(raw)
    paths[1].write_bytes(raw)
    raw[-100] ^= 1
    paths[2].write_bytes(raw)
    keys = [file_key([path]) for path in paths]
    assert keys[0] == keys[1] == file_key([DEMO])
    assert keys[2] != keys[0]
    assert file_key(paths[:2]) != keys[0]


# ---- the whole way ----


def chat(lines: str, *options: str) -> tuple[list[str], list[int]]:
    """The answers of `localmoe chat demo`, in a process of its own, and for each of them how many
    tokens of its prompt had to be computed."""
    command = [sys.executable, "-m", "localmoe", "chat", "demo", "--json", "-q", "--temp", "0"]
    done = subprocess.run([*command, *options], input=lines, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    usages = [answer["usage"] for answer in said["answers"]]
    texts = [m["content"] for m in said["messages"] if m["role"] == "assistant"]
    return texts, [usage["prompt_tokens"] - usage["cached_tokens"] for usage in usages]


def test_a_chat_goes_on_as_if_it_had_never_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALMOE_STATE", str(tmp_path))
    monkeypatch.setenv("LOCALMOE_TUNE", "no")
    first = "Hi! My name is Ada and I like to bake bread on rainy days.\nWhat should I bake?\n"
    second = "Do you like rain?\n"
    whole, computed_in_one = chat(first + second, "--session", "whole")
    chat(first, "--session", "parts")
    store = Sessions(sessions_folder())
    assert store.state_path("parts").stat().st_size > 4096
    text, state = store.path("parts").read_bytes(), store.state_path("parts").read_bytes()
    restored, computed = chat(second, "--session", "parts")
    assert restored == whole
    assert computed == computed_in_one[-1:]
    store.path("parts").write_bytes(text)
    store.state_path("parts").write_bytes(state[:-9] + b"x" * 9)
    from_text, computed = chat(second, "--continue")
    assert from_text == whole
    assert computed[0] > computed_in_one[-1] + 20
    store.path("parts").write_bytes(text)
    store.state_path("parts").write_bytes(state)
    _, computed = chat(second, "--continue", "-ctk", "q8_0")  # another layout
    assert computed[0] > computed_in_one[-1] + 20
