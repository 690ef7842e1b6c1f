"""The engine process with a real model: what it answers, and what happens when it ends."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from jsonschema import validate
from make_model import SHAPES, make_model

from localmoe.config.environment import engine_environment
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Delta, Placement, Request, Sampling, TextPiece
from localmoe.errors import EngineError, RequestError
from localmoe.structured.check import with_held_schema

GREEDY = Sampling(temperature=0)
PROMPT = (1, 733, 16289, 28793, 22557, 733, 28748, 16289, 28793)
LONG_PROMPT = (1, *(300 + 7 * i % 20000 for i in range(400)))


def answer(engine: EngineProcess, request: Request) -> list[Delta]:
    return list(engine.generate(request))


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def test_an_answer_counts_what_it_used(tiny_engine: EngineProcess) -> None:
    deltas = answer(tiny_engine, Request(PROMPT, GREEDY, max_tokens=12))
    last = deltas[-1]
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert last.timings is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (9, 12)
    assert len(tokens_of(deltas)) == 12
    assert [d.completion_tokens for d in deltas if d.tokens] == list(range(1, 13))
    assert last.timings.first_token_s > 0
    assert last.timings.prompt_tps > 0
    assert last.timings.generation_tps > 0


def test_text_is_that_of_the_tokens(tiny_engine: EngineProcess) -> None:
    deltas = answer(tiny_engine, Request(PROMPT, GREEDY, max_tokens=30))
    whole = tiny_engine.detokenize(tokens_of(deltas))
    assert text_of(deltas) == whole


def test_the_space_before_an_answer_is_left_out(tiny_engine: EngineProcess) -> None:
    plain = text_of(answer(tiny_engine, Request(PROMPT, GREEDY, max_tokens=8)))
    begun = text_of(
        answer(tiny_engine, Request(PROMPT, GREEDY, max_tokens=8, strip_leading_space=True))
    )
    assert begun == plain.removeprefix(" ")


def test_what_is_held_is_not_computed_again(tiny_engine: EngineProcess) -> None:
    first = answer(tiny_engine, Request(LONG_PROMPT, GREEDY, max_tokens=10))
    again = answer(tiny_engine, Request(LONG_PROMPT, GREEDY, max_tokens=10))
    assert again[-1].usage is not None
    assert again[-1].usage.cached_tokens == len(LONG_PROMPT) - 1
    assert tokens_of(again) == tokens_of(first)
    longer = (*LONG_PROMPT, *tokens_of(first), 2, 733)
    onwards = answer(tiny_engine, Request(longer, GREEDY, max_tokens=1))
    assert onwards[-1].usage is not None
    assert onwards[-1].usage.cached_tokens == len(LONG_PROMPT) + 9  # the last was never decoded


def test_a_prompt_in_steps_tells_how_far_it_is(tiny_model: Path, engine: EngineProcess) -> None:
    engine.load(str(tiny_model), Placement(n_threads=2, n_ctx=512, n_ubatch=128))
    deltas = answer(engine, Request(LONG_PROMPT, GREEDY, max_tokens=1))
    assert [d.prompt_tokens for d in deltas] == [128, 256, 384, 401]


def test_micro_batches_change_nothing_in_the_answer(
    tiny_model: Path, engine: EngineProcess
) -> None:
    answers = []
    for n_ubatch in (32, 512):
        with EngineProcess(engine_environment()) as other:
            other.load(str(tiny_model), Placement(n_threads=2, n_ctx=512, n_ubatch=n_ubatch))
            answers.append(tokens_of(answer(other, Request(LONG_PROMPT, GREEDY, max_tokens=8))))
    assert answers[0] == answers[1]


def test_a_seed_repeats_an_answer(tiny_engine: EngineProcess) -> None:
    def draw(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return tokens_of(answer(tiny_engine, Request(PROMPT, sampling, max_tokens=20)))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_repeat_penalty_avoids_what_was_said(tiny_engine: EngineProcess) -> None:
    sampling = Sampling(temperature=0, repeat_penalty=1000.0, repeat_last_n=512)
    tokens = tokens_of(answer(tiny_engine, Request(PROMPT, sampling, max_tokens=40)))
    assert len(set(tokens)) == 40
    assert not set(tokens) & set(PROMPT)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_other_penalties_are_for_what_the_answer_said(
    tiny_engine: EngineProcess, name: str
) -> None:
    """A token of the prompt is free to come once, and none comes twice."""
    favourite = PROMPT[-1]
    sampling = replace(GREEDY, **{name: 1000.0}, logit_bias=((favourite, 100.0),))
    tokens = tokens_of(answer(tiny_engine, Request(PROMPT, sampling, max_tokens=40)))
    assert tokens[0] == favourite
    assert len(set(tokens)) == 40


def test_a_biased_token_comes_always_or_never(tiny_engine: EngineProcess) -> None:
    usual = tokens_of(answer(tiny_engine, Request(PROMPT, GREEDY, max_tokens=5)))
    never = replace(GREEDY, logit_bias=tuple((token, -100.0) for token in sorted(set(usual))))
    other = tokens_of(answer(tiny_engine, Request(PROMPT, never, max_tokens=5)))
    assert not set(other) & set(usual)
    always = replace(GREEDY, temperature=1.0, seed=1, logit_bias=((usual[0], 100.0),))
    assert tokens_of(answer(tiny_engine, Request(PROMPT, always, max_tokens=5))) == usual[:1] * 5


def test_a_stop_string_ends_an_answer_and_is_not_in_it(tiny_engine: EngineProcess) -> None:
    whole = text_of(answer(tiny_engine, Request(PROMPT, GREEDY, max_tokens=30)))
    stop = whole[10:14]
    deltas = answer(tiny_engine, Request(PROMPT, GREEDY, max_tokens=30, stop=(stop,)))
    assert deltas[-1].stopped_by == stop
    assert deltas[-1].finish_reason == "stop"
    assert text_of(deltas) == whole[: whole.index(stop)]


def test_a_grammar_holds(tiny_engine: EngineProcess) -> None:
    sampling = Sampling(temperature=1.0, seed=3, grammar='root ::= "yes" | "no"')
    deltas = answer(tiny_engine, Request(PROMPT, sampling, max_tokens=20))
    assert text_of(deltas) in ("yes", "no")
    assert deltas[-1].finish_reason == "stop"


def test_a_json_schema_holds(tiny_engine: EngineProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    for seed in range(5):
        sampling = with_held_schema(
            Sampling(temperature=1.0, seed=seed, json_schema=json.dumps(schema))
        )
        deltas = answer(tiny_engine, Request(PROMPT, sampling, max_tokens=200))
        if deltas[-1].finish_reason == "stop":
            validate(json.loads(text_of(deltas)), schema)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request(()), "no tokens"),
        (Request((1,) * 600), "600 tokens; the context holds 512"),
        (Request((1, 99_999_999)), "outside the vocabulary"),
        (Request((1, -1)), "outside the vocabulary"),
        (Request((1,), max_tokens=0), "max_tokens is 0"),
        (Request((1,), Sampling(grammar="root := nonsense")), "not valid GBNF"),
        (Request((1,), Sampling(grammar=" \n")), "grammar is empty"),
        (Request((1,), Sampling(json_schema='{"not": {}}')), "JSON schema"),
        (Request((1,), Sampling(grammar='root ::= "a"', json_schema="{}")), "both"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_lives(
    tiny_engine: EngineProcess, request_: Request, sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        answer(tiny_engine, request_)
    assert answer(tiny_engine, Request(PROMPT, GREEDY, max_tokens=1))


def test_a_full_context_ends_an_answer(tiny_engine: EngineProcess) -> None:
    deltas = answer(tiny_engine, Request(LONG_PROMPT, Sampling(seed=1)))
    if deltas[-1].finish_reason == "length":
        assert len(LONG_PROMPT) + len(tokens_of(deltas)) == 512


def test_two_answers_at_once_are_those_given_alone(tiny_engine: EngineProcess) -> None:
    requests = [Request(PROMPT, GREEDY, max_tokens=30), Request(LONG_PROMPT, GREEDY, max_tokens=30)]
    alone = [tokens_of(answer(tiny_engine, request)) for request in requests]
    together: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        together[number] = tokens_of(answer(tiny_engine, requests[number]))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[0], together[1]] == alone


def test_more_requests_than_sequences_wait_their_turn(tiny_engine: EngineProcess) -> None:
    request = Request(PROMPT, GREEDY, max_tokens=5)
    generators = [tiny_engine.generate(request) for _ in range(5)]
    firsts = [next(generator) for generator in generators[:2]]
    assert all(firsts)
    rest = [list(generator) for generator in generators]
    assert all(deltas[-1].finish_reason == "length" for deltas in rest)


def test_an_answer_left_early_is_cancelled(tiny_engine: EngineProcess) -> None:
    generator = tiny_engine.generate(Request(PROMPT, Sampling(seed=1)))
    next(generator)
    generator.close()
    deltas = answer(tiny_engine, Request(PROMPT, GREEDY, max_tokens=3))
    assert deltas[-1].finish_reason == "length"


@pytest.mark.skipif(sys.platform == "win32", reason="a Ctrl-C can't be sent to one process")
def test_ctrl_c_gives_up_a_prompt_under_way(tiny_model: Path) -> None:
    """One micro-batch of seconds: Ctrl-C comes back at once, and so does the next answer."""
    program = (
        "import os, sys, time\n"
        "from localmoe.engine.client import EngineProcess\n"
        "from localmoe.engine.protocol import Placement, Request, Sampling\n"
        "engine = EngineProcess(dict(os.environ))\n"
        "engine.load(sys.argv[1], Placement(n_threads=1, n_ctx=8192, n_ubatch=8192))\n"
        "def ask(n, first):\n"
        "    prompt = (first, *(300 + 7 * i % 20000 for i in range(n)))\n"
        "    started = time.perf_counter()\n"
        "    try:\n"
        "        list(engine.generate(Request(prompt, Sampling(temperature=0), max_tokens=3)))\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        "    return time.perf_counter() - started\n"
        "print(ask(7000, 1), flush=True)\n"
        "print('asking', flush=True)\n"
        "print(ask(7000, 2), ask(10, 3), flush=True)\n"
        "engine.close()\n"
    )
    command = [sys.executable, "-c", program, str(tiny_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        whole = float(process.stdout.readline())
        assert process.stdout.readline() == "asking\n"
        time.sleep(whole / 4)
        process.send_signal(signal.SIGINT)
        given_up, following = map(float, process.stdout.readline().split())
    assert given_up < whole
    assert following < whole / 2


def test_k_quants_answer(tmp_path: Path, engine: EngineProcess) -> None:
    """Dense Q4_K matrices, many tokens: repacked for AMX, llama.cpp can crash on them."""
    path = tmp_path / "k-quants.gguf"
    make_model(path, replace(SHAPES["tiny"], n_embd=256, n_ff=256, n_vocab=32000), "Q4_K")
    engine.load(str(path), Placement(n_threads=2, n_ctx=512))
    assert len(tokens_of(answer(engine, Request(LONG_PROMPT, GREEDY, max_tokens=3)))) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="maps of a process as Linux shows them")
def test_another_model_takes_the_place_of_the_first(
    tiny_model: Path, tmp_path: Path, engine: EngineProcess
) -> None:
    second = tmp_path / "second.gguf"
    shutil.copy(tiny_model, second)
    for path in (tiny_model, second):
        engine.load(str(path), Placement(n_threads=1, n_ctx=256))
        assert answer(engine, Request(PROMPT, GREEDY, max_tokens=2))
    maps = {found.path for found in psutil.Process(engine.pid).memory_maps()}
    assert str(second) in maps
    assert str(tiny_model) not in maps


def test_the_vocabulary_alone_tokenizes(tiny_model: Path, engine: EngineProcess) -> None:
    loaded = engine.load(str(tiny_model), Placement(n_threads=1), vocab_only=True)
    assert loaded.vocabulary.bos == 1
    assert loaded.vocabulary.eog == (2,)
    pieces = [TextPiece("</s> you"), TextPiece("</s>", special=True), TextPiece("")]
    plain, special, nothing = engine.tokenize(pieces)
    assert 2 not in plain
    assert special[-1:] == (2,)
    assert nothing == ()
    with pytest.raises(RequestError, match="No model"):
        answer(engine, Request(PROMPT))


def test_tokens_can_outnumber_bytes(tiny_engine: EngineProcess) -> None:
    text = " " * 50 + "\u0000\ufffd🙂" * 20
    assert tiny_engine.detokenize(tiny_engine.tokenize([TextPiece(text)])[0]).endswith(text)


def test_loading_tells_how_far_it_is(tiny_model: Path, engine: EngineProcess) -> None:
    seen: list[float] = []
    engine.load(str(tiny_model), Placement(n_threads=1, n_ctx=256), on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_the_cpu_is_a_device(engine: EngineProcess) -> None:
    found = engine.devices()
    assert "cpu" in {device.kind for device in found.devices}
    assert "AVX" in found.system_info or "NEON" in found.system_info


def test_a_failed_load_says_llama_cpps_own_reason(tmp_path: Path, engine: EngineProcess) -> None:
    path = tmp_path / "text.gguf"
    path.write_bytes(b"no model at all")
    with pytest.raises(EngineError, match=r"text\.gguf can't be loaded: .*magic"):
        engine.load(str(path), Placement(n_threads=1))


# ---- ends ----


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (signal.SIGKILL, "killed, most likely because memory ran out"),
        (signal.SIGSEGV, "invalid memory access"),
        (signal.SIGBUS, "could not read the model file"),
        (signal.SIGILL, "more features than this one"),
        (signal.SIGABRT, "gave up"),
        (signal.SIGTERM, "from outside"),
    ],
)
def test_each_way_to_die_is_a_sentence(
    tiny_model: Path, engine: EngineProcess, number: int, sentence: str
) -> None:
    engine.load(str(tiny_model), Placement(n_threads=1, n_ctx=512))
    generator = engine.generate(Request(PROMPT, Sampling(seed=1)))
    next(generator)
    os.kill(engine.pid, number)
    with pytest.raises(EngineError, match=sentence) as raised:
        list(generator)
    assert "\n" not in str(raised.value)
    assert raised.value.hint
    with pytest.raises(EngineError, match=sentence):
        engine.tokenize([TextPiece("still there?")])


def test_a_file_that_makes_llama_cpp_abort_is_a_sentence(
    tiny_model: Path, tmp_path: Path, engine: EngineProcess
) -> None:
    """A token that comes twice: our parser refuses it, but an engine may be handed it."""
    path = tmp_path / "damaged.gguf"
    path.write_bytes(tiny_model.read_bytes().replace("▁the".encode(), "▁and".encode(), 1))
    with pytest.raises(EngineError, match=r"gave up: GGML_ASSERT\(.*\) failed") as raised:
        engine.load(str(path), Placement(n_threads=1, n_ctx=512))
    assert "\n" not in str(raised.value)


def test_a_file_cut_while_it_is_mapped_is_a_sentence(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_model.read_bytes())
    with EngineProcess(engine_environment()) as engine:
        engine.load(str(path), Placement(n_threads=1, n_ctx=512))
        os.truncate(path, 4096)
        with pytest.raises(EngineError, match="could not read the model file"):
            answer(engine, Request(PROMPT, GREEDY, max_tokens=5))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_engine_outlives_its_parent(tiny_model: Path, how: int) -> None:
    program = (
        "import os, sys, time\n"
        "from localmoe.engine.client import EngineProcess\n"
        "from localmoe.engine.protocol import Placement, Request\n"
        "engine = EngineProcess(dict(os.environ))\n"
        "engine.load(sys.argv[1], Placement(n_threads=1, n_ctx=4096))\n"
        "deltas = engine.generate(Request((1, 733)))\n"
        "next(deltas)\n"
        "print(engine.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tiny_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(how)
    child.wait(5)


def test_a_closed_engine_leaves_no_process(tiny_model: Path) -> None:
    engine = EngineProcess(engine_environment())
    engine.load(str(tiny_model), Placement(n_threads=1, n_ctx=512))
    generator = engine.generate(Request(PROMPT, Sampling(seed=1)))
    next(generator)
    engine.close()
    assert not psutil.pid_exists(engine.pid)
    del generator
    gc.collect()


def test_the_working_directory_is_not_imported_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    for name in ("numpy", "localmoe", "llama_cpp", "json", "pydantic"):
        (tmp_path / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "."]))
    with EngineProcess(engine_environment()) as engine:
        assert engine.devices().devices
    assert not ran.exists()


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"Hello, I print to stdout.", "a frame of 1214606444 bytes"),
        (b"\0\0\0\2{}", "not a message"),
        (b"\0\0\0\x09{", "cut short"),
    ],
)
def test_what_is_no_message_is_told_as_that(tmp_path: Path, sent: bytes, told: str) -> None:
    """An engine that closes its output, or writes what is no frame, and lives on."""
    server = tmp_path / "localmoe/engine/worker/server.py"
    server.parent.mkdir(parents=True)
    (tmp_path / "localmoe/__init__.py").touch()
    server.write_text(
        "import os\n"
        "def main():\n"
        f"    os.write(1, {sent!r})\n"
        "    os.close(1)\n"
        "    os.read(os.pipe()[0], 1)\n"  # for ever: it is killed
    )
    env = {**engine_environment(), "PYTHONPATH": str(tmp_path)}
    with EngineProcess(env) as engine, pytest.raises(EngineError, match=told) as raised:
        engine.devices()
    assert "memory" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_nothing_secret_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    with EngineProcess(engine_environment()) as engine:
        assert "hf_secret" not in psutil.Process(engine.pid).environ().values()
        assert engine.devices()


def test_the_parent_never_imports_llama_cpp(tiny_model: Path) -> None:
    program = (
        "import sys\n"
        "from localmoe import LocalMoE\n"
        f"with LocalMoE({str(tiny_model)!r}) as moe:\n"
        "    moe.chat([{'role': 'user', 'content': 'Hi'}], max_tokens=2)\n"
        "print('llama_cpp' in sys.modules)\n"
    )
    assert subprocess.check_output([sys.executable, "-c", program]).strip() == b"False"
