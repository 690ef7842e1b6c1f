"""`localmoe batch` as a person or a script meets it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from vocabulary_files import CONTROL, NORMAL, USER_DEFINED, with_renamed_tokens

from localmoe.api import LocalMoE
from localmoe.batch.runner import BatchProgress, InputCheck, Recovered
from localmoe.gguf.demo import DEMO
from localmoe.terminal.batch_view import (
    Pace,
    check_line,
    progress_line,
    summary_document,
    summary_lines,
)

COMMAND = [sys.executable, "-m", "localmoe", "batch", "demo"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


def localmoe(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, encoding="utf-8", timeout=120
    )


def records(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def lines(*prompts: str, **body: object) -> str:
    return "".join(
        json.dumps({"custom_id": f"id-{n}", "prompt": prompt, **body}) + "\n"
        for n, prompt in enumerate(prompts)
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text(lines("Hi!", "Do you like tea?", "And music?", max_tokens=3, temperature=0))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


# ---- done, failed, gone on with ----


def test_a_file_is_answered_and_a_second_time_there_is_nothing_to_do(
    source: Path, output: Path
) -> None:
    first = localmoe("-i", str(source), "-o", str(output))
    assert (first.returncode, first.stdout) == (0, "")
    assert "3 answered in" in first.stderr
    assert "\x1b" not in first.stderr
    assert {r["custom_id"] for r in records(output)} == {"id-0", "id-1", "id-2"}
    raw = output.read_bytes()
    second = localmoe("-i", str(source), "-o", str(output), "--json")
    assert second.returncode == 0
    assert output.read_bytes() == raw
    document = json.loads(second.stdout)
    assert (document["done_before"], document["answered"]) == (3, 0)


THINKING, TEXT = "'m good", " thank you for asking. How are you doing?"


FAMILIES = {
    "Qwen3": (("<think>", "</think>"), CONTROL),
    "Gemma 4": (("<|channel>", "<channel|>"), USER_DEFINED),
    "fine-tune": (("<think>", "</think>"), NORMAL),
}


@pytest.fixture(scope="module", params=FAMILIES)
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, whose first word is <think> here, and whose first comma ends that."""
    (opener, closer), kind = FAMILIES[request.param]
    path = tmp_path_factory.mktemp("models") / "thinker.gguf"
    with_renamed_tokens(DEMO, path, {268: opener, 4052: closer}, kind)
    return path


@pytest.mark.parametrize("think", ["on", "hide"])
def test_what_a_model_thinks_is_no_part_of_its_answer(
    think: str, thinker: Path, output: Path
) -> None:
    asked = json.dumps({"messages": [{"role": "user", "content": "Hi! How are you today?"}]})
    body = {"model": "", "prompt": "I'm good,"}
    raw = json.dumps({"custom_id": "raw", "method": "POST", "url": "/v1/completions", "body": body})
    command = [*COMMAND[:-1], str(thinker), "-o", str(output), "--think", think, "--temp", "0"]
    subprocess.run([*command, "-q"], input=f"{asked}\n{raw}\n", encoding="utf-8", check=True)
    first, second = sorted(records(output), key=lambda record: record["line"])
    choice = first["response"]["body"]["choices"][0]
    said = {"role": "assistant", "content": TEXT}
    assert choice["message"] == said | ({"reasoning_content": THINKING} if think == "on" else {})
    assert choice["finish_reason"] == "stop"
    assert first["response"]["body"]["usage"]["completion_tokens"] == 15
    assert second["response"]["body"]["choices"][0]["text"]  # a text that goes on has no thinking


def test_an_answer_that_is_all_thinking_is_no_silence(thinker: Path) -> None:
    command = [
        *COMMAND[:-2],
        "run",
        str(thinker),
        "Hi! How are you today?",
        "--temp",
        "0",
        "-n",
        "2",
    ]
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert ran.stdout == "\n"
    assert "while the model was still thinking" in ran.stderr
    document = json.loads(subprocess.check_output([*command, "--json", "-q"]))
    assert (document["text"], document["thinking"]) == ("", THINKING[:1])


def test_the_python_door_parts_thinking_too(thinker: Path) -> None:
    asked = [{"role": "user", "content": "Hi! How are you today?"}]
    with LocalMoE(str(thinker), ctx_size=256, tune=False, parallel=2) as moe:
        streamed = moe.chat(asked, temperature=0)
        (result,) = moe.batch([asked], temperature=0)
    assert (result.thinking, result.text) == (THINKING, TEXT)
    assert (streamed.thinking, streamed.text) == (THINKING, TEXT)
    assert result.tokens[0] == 268


def test_tables_and_utf16_are_answered(tmp_path: Path, output: Path) -> None:
    table, powershell = tmp_path / "table.csv", tmp_path / "in.jsonl"
    table.write_text('id,question\n1,"What is a ""router""?"\n2,"one\ntwo"\n', "utf-8")
    told = ["-n", "2", "--ordered", "-q"]
    asked = localmoe("-i", str(table), "-o", str(output), "--template", "{question}", *told)
    assert asked.returncode == 0, asked.stderr
    assert [(r["custom_id"], r["line"]) for r in records(output)] == [("1", 1), ("2", 2)]
    refused = localmoe("-i", str(table))
    assert refused.returncode == 2
    assert "--template, like '{id}'" in refused.stderr
    powershell.write_bytes("\ufeff{}\r\n".format('{"prompt": "Hi"}').encode("utf-16-le"))
    assert localmoe("-i", str(powershell), *told[:2]).returncode == 0


def test_pipes_in_and_out() -> None:
    result = localmoe("-q", "-n", "2", stdin="Hi!\n\nDo you like tea?\n")
    assert (result.returncode, result.stderr) == (0, "")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["custom_id"] for r in found] == ["line-1", "line-3"]


def test_lines_that_fail_are_exit_5_in_a_file_of_their_own(tmp_path: Path, output: Path) -> None:
    errors = tmp_path / "errors.jsonl"
    source = tmp_path / "in.jsonl"
    source.write_text(lines("Hi!", max_tokens=1) + "{\n" + '{"prompt": "a", "tools": [1]}\n')
    arguments = ("-i", str(source), "-o", str(output), "--errors", str(errors), "--json")
    result = localmoe(*arguments)
    assert result.returncode == 5
    assert [r["line"] for r in records(output)] == [1]
    assert [(r["line"], r["error"]["code"]) for r in records(errors)] == [
        (2, "invalid_json"),
        (3, "unsupported_parameter"),
    ]
    assert json.loads(result.stdout)["errors"] == 2
    assert localmoe(*arguments).returncode == 5  # they still stand there as failed


def test_settings_are_defaults_for_all_lines(source: Path, output: Path) -> None:
    schema = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}'
    source.write_text(lines("Are you happy?", "Do you like tea?"))
    result = localmoe("-i", str(source), "-o", str(output), "--json-schema", schema, "--seed", "1")
    assert result.returncode == 0
    for record in records(output):
        content = record["response"]["body"]["choices"][0]["message"]["content"]
        assert isinstance(json.loads(content)["ok"], bool)


def test_another_setting_is_refused_by_name(source: Path, output: Path) -> None:
    assert localmoe("-i", str(source), "-o", str(output)).returncode == 0
    raw = output.read_bytes()
    refused = localmoe("-i", str(source), "-o", str(output), "--top-k", "3", "--seed", "0")
    assert refused.returncode == 2
    assert "top_k not set -> 3, seed not set -> 0" in refused.stderr
    source.write_text(source.read_text() + lines("New?"))
    assert "input in.jsonl" in localmoe("-i", str(source), "-o", str(output)).stderr
    assert output.read_bytes() == raw
    anyway = localmoe("-i", str(source), "-o", str(output), "--resume-anyway")
    assert anyway.returncode == 5  # id-0 is there twice now
    assert output.read_bytes().startswith(raw)


def test_long_prompts_are_refused_with_counts_or_cut(source: Path, output: Path) -> None:
    source.write_text(lines("tea and " * 500, "Hi!", max_tokens=2))
    arguments = ("-i", str(source), "-o", str(output), "-c", "128")
    result = localmoe(*arguments)
    assert result.returncode == 5
    errors = [r["error"] for r in records(output) if r["error"]]
    assert re.search(r"has \d{3,4} tokens; the context holds 128", errors[0]["message"])
    cut = localmoe(*arguments, "--truncate", "middle", "--resume-anyway", "--retry-errors")
    assert cut.returncode == 0
    assert "1 are cut to fit" in cut.stderr
    bodies = [r["response"]["body"] for r in records(output)]
    found = next(body for body in bodies if "truncated_prompt_tokens" in body)
    assert found["usage"]["prompt_tokens"] <= 126
    assert found["truncated_prompt_tokens"] > 300


def test_an_ordered_output_has_the_order_of_the_input(tmp_path: Path, output: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(lines("Hi!", "Hi!", max_tokens=1) + "{\n" + lines("x").replace("id-0", "z"))
    assert localmoe("-i", str(source), "-o", str(output), "--ordered", "-n", "1").returncode == 5
    assert [r["line"] for r in records(output)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-i", "/none"], "/none can't be read"),
        (["-i", "IN", "-o", "IN"], "must be different files"),
        (["-i", "IN", "-o", "OUT", "--errors", "OUT"], "is -o and --errors"),
        (["-i", "IN", "-o", "OUT", "--errors", "OUT.manifest.json"], "is the manifest of -o and"),
        (["-i", "OUT.manifest.json", "-o", "OUT"], "is the manifest of -o and -i"),
        (["-i", "TEMPORARY", "-o", "OUT"], "the name of a temporary file"),
        (["-i", "IN", "-o", "LINK"], "is -o and -i"),
        (["-i", "IN", "-o", "OUT", "--errors", "LINK"], "is --errors and -i"),
        (["-i", "LOOP", "-o", "OUT"], "loop can't be read: Too many levels"),
        (["-i", "IN", "-o", "LOOP"], "loop can't be read: Too many levels"),
        (["-i", "IN", "-o", "OUT", "--errors", "LOOP"], "loop can't be read: Too many levels"),
        (["-i", "IN", "-o", "/none/out"], "There is no folder /none"),
        (["-i", "IN", "--ordered"], "need a file to write"),
        (["-i", "IN", "--json"], "can't both be on stdout"),
        (["-i", "IN", "--parallel", "many"], "--parallel is many"),
        (["-i", "IN", "--truncate", "left"], "'left' is not one of"),
        (["-i", "LIST"], "jq -c"),
    ],
)
def test_each_mistake_is_one_line(tmp_path: Path, arguments: Sequence[str], sentence: str) -> None:
    (tmp_path / "in.jsonl").write_text(lines("Hi!"))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "link").hardlink_to(tmp_path / "in.jsonl")
    names = {"IN": str(tmp_path / "in.jsonl"), "LIST": str(tmp_path / "list.json")}
    (tmp_path / "loop").symlink_to("loop")
    for name in ("OUT", "OUT.manifest.json", "LINK", "LOOP"):
        names[name] = str(tmp_path / name.lower())
    names["TEMPORARY"] = str(tmp_path / ".out.0123abcd.new")
    result = localmoe(*(names.get(argument, argument) for argument in arguments))
    assert (result.returncode, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_output_that_is_not_ours_is_left_alone(source: Path, output: Path) -> None:
    output.write_text("my thesis\n")
    result = localmoe("-i", str(source), "-o", str(output))
    assert (result.returncode, output.read_text()) == (2, "my thesis\n")


# ---- interrupted ----


def begin(source: Path, output: Path) -> subprocess.Popen[str]:
    """A run that has written something and is far from its end."""
    source.write_text(lines(*(f"Number {n}?" for n in range(400)), temperature=0, max_tokens=20))
    arguments = ["-i", str(source), "-o", str(output), "--no-share"]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    while not output.exists() or not output.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    return process


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_what_is_computed(
    source: Path, output: Path, number: signal.Signals
) -> None:
    process = begin(source, output)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finishing what is being computed" in said
    assert "Run the same command again to go on." in said
    assert 1 <= len(records(output)) < 400
    assert all(r["response"] for r in records(output))


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_which_all_is_answered_is_no_stop(
    tmp_path: Path, source: Path, output: Path, number: signal.Signals
) -> None:
    (tmp_path / "long.gbnf").write_text("root ::= [a-z]{300}")
    asked = [{"prompt": text, "max_tokens": n} for text, n in (("Hi!", 1), ("A", 400), ("B", 400))]
    source.write_text("".join(json.dumps(line) + "\n" for line in asked))
    arguments = ["-i", str(source), "-o", str(output), "--grammar", str(tmp_path / "long.gbnf")]
    command = [*COMMAND, *arguments, "--parallel", "3", "--ordered"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not output.exists() or not output.stat().st_size:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)  # all are being computed
    _, said = process.communicate(timeout=60)
    assert "finishing what is being computed" in said
    answered = [bool(r["response"]) for r in records(output)]
    is_done = len(answered) == 3  # on a busy machine one may not have been begun
    assert ("Stopped" in said) is not is_done
    assert process.returncode == (5 if is_done else 130)  # one token is too short for that form
    assert answered == [False, True, True][: len(answered)]


@posix
def test_the_second_ctrl_c_drops_it(source: Path, output: Path) -> None:
    process = begin(source, output)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)  # two signals at once are one
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert len(records(output)) < 400
    assert process.returncode == 130
    assert "Run the same command again to go on." in said
    assert "Traceback" not in said
    assert children
    assert not any(child.is_running() for child in children)
    assert output.read_bytes().endswith(b"\n")


@posix
def test_ctrl_c_before_anything_is_asked_ends_at_once(source: Path, output: Path) -> None:
    command = [*COMMAND, "-i", str(source), "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not output.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "Stopped. Run the same command again to go on.\n")


@posix
def test_a_second_run_on_the_same_output_is_refused(source: Path, output: Path) -> None:
    process = begin(source, output)
    try:
        other = localmoe("-i", str(source), "-o", str(output))
        assert other.returncode == 2
        assert "Another run is writing" in other.stderr
    finally:
        process.kill()
        process.wait()
        assert process.stderr
        process.stderr.close()


@posix
def test_a_closed_pipe_ends_quietly(source: Path) -> None:
    command = [*COMMAND, "-i", str(source), "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


@posix
def test_a_full_disk_is_one_line_and_can_be_gone_on_with(source: Path, output: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, resource.RLIM_INFINITY))

    source.write_text(lines(*(f"Number {n}?" for n in range(12)), temperature=0, max_tokens=2))
    arguments = ["-i", str(source), "-o", str(output), "-q", "--parallel", "2"]
    full = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 1
    assert "out.jsonl can't be written: File too large" in full.stderr
    assert "goes on where it stopped" in full.stderr
    assert full.stderr.count("\n") == 1
    raw = output.read_bytes()
    assert len(records(output)) >= 1
    assert localmoe(*arguments).returncode == 0
    assert output.read_bytes().startswith(raw)
    assert len({r["custom_id"] for r in records(output)}) == len(records(output)) == 12


# ---- what the system sees ----


@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace")
def test_each_write_is_followed_by_its_fsync_before_it_is_acknowledged(
    tmp_path: Path, source: Path, output: Path
) -> None:
    """The direct program of the soak says on stdout what is safe; the trace has the order."""
    soak = Path(__file__).parents[1] / "scripts" / "soak" / "batch.py"
    trace = tmp_path / "trace"
    tracing = ["strace", "-f", "-y", "-e", "trace=write,fsync,openat,rename", "-o", str(trace)]
    command = [sys.executable, str(soak), "--one", "-i", str(source), "-o", str(output)]
    result = subprocess.run([*tracing, *command], capture_output=True, text=True)
    if "ptrace" in result.stderr:
        pytest.skip("this system lets nobody trace")
    assert result.returncode == 0
    flat = [
        line for line in trace.read_text().splitlines() if str(output) in line or "safe" in line
    ]
    events: list[str | int] = []
    for line in flat:
        if re.search(r"openat\(.*out\.jsonl\".*O_CREAT", line):
            assert "O_APPEND" in line
        elif "write(" in line and "safe " in line:
            events.append(int(re.findall(r"safe (\d+)", line)[0]))
        elif f"<{output}>" in line and (call := re.search(r"\b(write|fsync)\(", line)):
            events.append(call[1])
    assert "write" in events
    assert events[-1] == 3
    assert all(
        following == "fsync"
        for event, following in zip(events, events[1:], strict=False)
        if event == "write"
    )
    manifest = [line for line in flat if "manifest.json" in line]
    at = next(n for n, line in enumerate(flat) if "write(" in line and f"<{output}>" in line)
    assert any("rename" in line and line in flat[:at] for line in manifest)


def peak_kib(*arguments: str) -> int:
    """The most memory that the command itself used, its engines apart."""
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return usage.ru_maxrss


@posix
def test_a_huge_line_takes_no_memory(tmp_path: Path, source: Path) -> None:
    small = peak_kib("-i", str(source), "-o", str(tmp_path / "small.jsonl"))
    huge = tmp_path / "huge.jsonl"
    with huge.open("wb") as file:
        file.write(lines("Hi!", max_tokens=1).encode())
        file.truncate(150 << 20)  # zeros, up to a line end far away
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + lines("Hi!", max_tokens=1).replace("id-0", "id-1").encode())
    output = tmp_path / "out.jsonl"
    assert peak_kib("-i", str(huge), "-o", str(output)) < small + (50 << 10)
    assert {r["line"]: r["error"] and r["error"]["code"] for r in records(output)} == {
        1: None,
        2: "line_too_long",
        3: None,
    }


# ---- what a person sees ----


def test_progress_is_told_in_one_line() -> None:
    progress = BatchProgress(500, 120, 2, 0, 10_000, 4_000, 3_000, 60.0)
    assert progress_line(progress, 42.4) == (
        "122 of 500 done, 2 failed, 42 tok/s (50 on average), 40% of prompts shared, 3 min left"
    )
    assert progress_line(BatchProgress(500), 0.0) == "0 of 500 done"


def test_a_pace_does_not_jump_where_answers_end_together() -> None:
    """48 tokens every 3 seconds are 16 tok/s, whenever one looks."""
    pace = Pace()
    seen = [pace(t / 4, 48 * (t // 12)) for t in range(12, 400)]
    assert seen == pytest.approx([16.0] * len(seen))


def test_a_single_lot_does_not_make_a_pace() -> None:
    pace = Pace()
    for second in range(1, 21):
        pace(second, 20 * second)
    assert 20 < pace(20.1, 400 + 40) < 40  # 400 tok/s, but for a tenth of a second


def test_a_pace_follows_what_comes() -> None:
    pace = Pace()
    assert pace(1.0, 10) == 10.0
    assert pace(2.0, 20) == 10.0
    for second in range(3, 20):
        pace(float(second), 20 + 100 * (second - 2))
    assert 95 < pace(20.0, 20 + 1800) < 100
    assert 45 < pace(30.0, 20 + 1800) < 50  # nothing for 10 seconds


def test_a_check_and_an_end_are_told() -> None:
    checked = InputCheck(n_lines=1000, n_done=300, n_bad=2, n_to_ask=698, n_truncated=1)
    assert check_line(checked, Recovered(300, 0, 17)) == (
        "1,000 requests: 300 are done already, 2 can't be asked, 1 are cut to fit the context, "
        "17 bytes of a line left unfinished were taken off."
    )
    assert check_line(InputCheck(1), None) == "1 request."
    progress = BatchProgress(698, 697, 1, 2, 10_000, 4_000, 3_000, 60.0)
    assert summary_lines(progress, 3) == [
        "697 answered in 1 min: 10,000 prompt tokens, 3,000 generated, 50.0 tok/s.",
        "Sharing saved 40% of the prompt tokens.",
        "The engine died and was started again 2 times.",
        "3 failed: see the lines with an error; --retry-errors asks again.",
    ]
    assert summary_document(checked, progress, 3, False)["usage"]["cached_tokens"] == 4_000
