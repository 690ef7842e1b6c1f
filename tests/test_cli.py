"""The command as a person or a script meets it: streams, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from localmoe.cli import COMMANDS, cli, run_command
from localmoe.errors import LocalMoeError

COMMAND = [sys.executable, "-m", "localmoe"]


def localmoe(
    *arguments: str, stdin: str | None = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
        timeout=60,
    )


def one_line_error(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The error line of a command that failed as it should: nothing else was printed."""
    assert result.returncode == code, result
    assert result.stdout == ""
    assert result.stderr.startswith("localmoe: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


# ---- files that are none ----


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of POSIX")
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("config/config.yaml", "run demo hi"),
        ("config/models.yaml", "run demo hi"),
        ("state/sessions/me.jsonl", "chat demo --session me"),
        ("state/sessions/me.jsonl", "sessions show me"),
        ("out.jsonl.manifest.json", "batch demo -o out.jsonl"),
        ("out.jsonl", "batch demo -o out.jsonl"),
        ("old.gguf", "convert old.gguf"),
    ],
)
def test_what_never_ends_in_place_of_a_file_is_refused(
    tmp_path: Path, name: str, command: str, kind: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    env = {f"LOCALMOE_{n.upper()}": str(tmp_path / n) for n in ("config", "state")}
    arguments = [str(tmp_path / a) if a.endswith(("jsonl", "gguf")) else a for a in command.split()]
    result = localmoe(*arguments, stdin="hi\n", env=env)
    assert re.search("ot a regular file|is not a file", one_line_error(result, result.returncode))
    assert result.returncode in (1, 2)


# ---- starting ----


def test_alone_it_greets_with_three_commands() -> None:
    result = localmoe()
    assert result.returncode == 0
    assert result.stdout.count("  localmoe ") == 3


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys, localmoe, localmoe.cli\n"
        "try: localmoe.cli.run_command(['--help'])\n"
        "finally: print(sorted({'pydantic', 'rich', 'prompt_toolkit', 'numpy', 'yaml', 'llama_cpp',"
        " 'huggingface_hub'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert all(f"\n  {name} " in result.stdout for name in ("run", "chat", "show", "prompt"))


def test_help_says_of_each_command_what_the_command_says_itself() -> None:
    context = click.Context(cli)
    for name, (_, _, summary) in COMMANDS.items():
        command = cli.get_command(context, name)
        assert command
        assert command.name == name
        assert command.get_short_help_str(500) == summary


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("lst", "No such command 'lst'. Did you mean 'list'? See: localmoe --help"),
        ("xyzzy", "No such command 'xyzzy'. See: localmoe --help"),
    ],
)
def test_a_command_that_is_near_is_named(typed: str, sentence: str) -> None:
    result = localmoe(typed)
    assert result.returncode == 2
    assert result.stderr == f"localmoe: {sentence}\n"


# ---- run ----


def test_the_answer_alone_is_on_stdout() -> None:
    result = localmoe("run", "demo", "Hi! How are you?", "-n", "40", "--seed", "1")
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.endswith("\n")
    assert result.stdout.strip()


def test_the_prompt_may_come_from_stdin() -> None:
    by_argument = localmoe("run", "demo", "Hello there!", "--temp", "0", "-n", "20")
    by_stdin = localmoe("run", "demo", "--temp", "0", "-n", "20", stdin="Hello there!\n")
    assert by_argument.stdout == by_stdin.stdout != "\n"


def test_json_is_one_document_with_counts_and_speeds() -> None:
    result = localmoe("run", "demo", "Hi!", "-n", "5", "--json", "--temp", "0")
    document = json.loads(result.stdout)
    assert set(document) == {"text", "finish_reason", "usage", "timings"}
    assert set(document["usage"]) == {"prompt_tokens", "completion_tokens", "cached_tokens"}
    assert set(document["timings"]) == {"load_s", "first_token_s", "prompt_tps", "generation_tps"}
    assert document["usage"]["completion_tokens"] <= 5


def test_a_seed_repeats_an_answer() -> None:
    answers = {localmoe("run", "demo", "Hi!", "--seed", "7").stdout for _ in range(2)}
    assert len(answers) == 1


def test_a_conversation_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    messages = [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "How are you?"},
    ]
    path.write_text(json.dumps(messages))
    by_file = localmoe("run", "demo", "--messages", str(path), "--temp", "0", "-n", "9")
    by_stdin = localmoe(
        "run", "demo", "--messages", "-", "--temp", "0", "-n", "9", stdin=json.dumps(messages)
    )
    assert by_file.returncode == by_stdin.returncode == 0
    assert by_file.stdout == by_stdin.stdout


def test_a_schema_holds_from_the_command_line() -> None:
    schema = (
        '{"type": "object", "properties": {"happy": {"type": "boolean"}}, "required": ["happy"]}'
    )
    result = localmoe("run", "demo", "Are you happy?", "--json-schema", schema, "--seed", "1")
    assert isinstance(json.loads(result.stdout)["happy"], bool)


def test_a_stop_string_is_not_shown() -> None:
    whole = localmoe("run", "demo", "Hi!", "--temp", "0").stdout.strip()
    word = whole.split()[1]
    cut = localmoe("run", "demo", "Hi!", "--temp", "0", "--stop", word).stdout
    assert cut.rstrip("\n") == whole[: whole.index(word)]


def test_verbose_shows_llama_cpps_log_on_stderr() -> None:
    result = localmoe("run", "demo", "Hi!", "-n", "2", "-v")
    assert "llama_" in result.stderr
    assert "llama_" not in result.stdout


def test_a_variable_sets_an_option() -> None:
    result = localmoe("run", "demo", "Hi!", "--json", env={"LOCALMOE_MAX_TOKENS": "1"})
    assert json.loads(result.stdout)["usage"]["completion_tokens"] == 1


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run", "demo", "Hi!", "--vram", "much"], 2, "--vram: 'much' is not a size."),
        (["run", "demo", "Hi!", "-c", "10"], 2, "--ctx-size: it must be at least 16, or 0"),
        (["config", "show", "-c", "10"], 2, "--ctx-size: it must be at least 16, or 0"),
        (["run", "demo", "Hi!", "-c", "twelve"], 2, "is not a number of tokens"),
        (["run", "demo", "Hi!", "--temp", "-1"], 2, "--temp must be at least 0, not -1.0."),
        (["run", "demo", "Hi!", "--json-schema", "{"], 2, "not JSON"),
        (["run", "demo", "Hi!", "--json-schema", "/none"], 2, "can't be read"),
        (["run", "demo", "Hi!", "--ram", "1KiB"], 3, "MiB of RAM"),
        (["run", "demo", "Hi!", "-ngl", "all"], 3, "sees none here"),
        (["run", "demo", "Hi! " * 2000], 2, "context holds"),
        (["run", "demo", ""], 2, "empty"),
        (["run", "demo", "Hi!", "--messages", "-"], 2, "Both"),
        (["run", "nobody"], 2, "No model is called nobody"),
        (["run", "mixtral", "Hi!"], 4, "can't be reached"),
        (["fly"], 2, "No such command"),
        (["run", "demo", "Hi!", "--fly"], 2, "No such option"),
        (["run"], 2, "MODEL"),
        (["show", "/none.gguf"], 2, "There is no file"),
        (["prompt", "demo", "--messages", "/none"], 2, "can't be read"),
    ],
)
def test_each_mistake_is_one_line(arguments: Sequence[str], code: int, sentence: str) -> None:
    assert sentence in one_line_error(localmoe(*arguments, stdin="Hi!"), code)


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_text("<!DOCTYPE html><html>not found</html>")
    for command in (["run", str(path), "Hi!"], ["show", str(path)], ["prompt", str(path), "Hi!"]):
        assert "page.gguf" in one_line_error(localmoe(*command), 1)


def test_a_file_that_makes_llama_cpp_abort_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    """A duplicate token gets past our parser's caps or not: either way it is one line."""
    raw = tiny_model.read_bytes()
    path = tmp_path / "damaged.gguf"
    at = raw.index(b"\xe2\x96\x81the")
    path.write_bytes(raw[:at] + b"\xe2\x96\x81and" + raw[at + 6 :])
    assert "damaged.gguf" in one_line_error(localmoe("run", str(path), "Hi!"), 1)


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    line = one_line_error(localmoe("run", "\x1b[2Jnone\u202e.gguf", "Hi!"), 2)
    assert "\x1b" not in line
    assert "\u202e" not in line


# ---- ends ----


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_ends_run_at_once_with_130() -> None:
    command = [*COMMAND, "run", "demo", "Hi!", "--temp", "2", "--stop", "never", "--seed", "1"]
    grammar_free = [*command, "--repeat-penalty", "1.5"]
    with subprocess.Popen(grammar_free, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        code = process.wait(60)
    assert code in (130, 0)  # 0: the answer was whole before the signal came
    assert errors == b""


@pytest.mark.skipif(sys.platform == "win32", reason="a named pipe of POSIX")
def test_ctrl_c_in_a_command_says_nothing(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [*COMMAND, "run", "demo", "Hi!", "-f", str(pipe)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # opening the pipe waits until the command reads
    with subprocess.Popen(command, **streams) as process, pipe.open("wb"):
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, (b"", b""))


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe of POSIX")
@pytest.mark.parametrize(
    "arguments",
    [["run", "demo", "Tell me a long story.", "--temp", "0"], ["list"], ["--help"], ["run", "-h"]],
)
def test_a_closed_pipe_ends_quietly(arguments: list[str]) -> None:
    command = [*COMMAND, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize(("group", "command"), [("config", "edit"), ("sessions", "export")])
def test_a_group_alone_shows_its_help_as_it_is(group: str, command: str) -> None:
    result = localmoe(group)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == localmoe(group, "--help").stdout
    assert f"\n  {command} " in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
@pytest.mark.parametrize("closed", ["2>&-", "<&-"])
def test_a_stream_that_is_closed_and_not_needed_is_no_trouble(closed: str) -> None:
    shell = f'{sys.executable} -m localmoe run demo "Hi!" -n 2 {closed}'
    result = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
@pytest.mark.parametrize(
    ("command", "sentence", "code"),
    [
        ("run demo Hi! -n 2 >&-", "The output can't be written: stdout is closed.", 1),
        ("--version >&-", "The output can't be written: stdout is closed.", 1),
        ("run demo <&-", "stdin can't be read: it is closed.", 2),
        ("run demo --messages - <&-", "stdin can't be read: it is closed.", 2),
        ("batch demo <&-", "stdin can't be read: it is closed.", 2),
        ("chat demo <&-", "stdin can't be read: it is closed.", 2),
        ("batch demo 0> /dev/null", "stdin can't be read: it is closed.", 2),
    ],
)
def test_a_stream_that_is_closed_and_needed_is_one_line(
    command: str, sentence: str, code: int
) -> None:
    shell = f"{sys.executable} -m localmoe {command}"
    result = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert sentence in one_line_error(result, code)


# ---- show and prompt ----


def test_show_says_what_the_demo_model_is() -> None:
    result = localmoe("show", "demo")
    assert "demonstration" in result.stdout
    assert "8 experts, 2 used for a token" in result.stdout
    document = json.loads(localmoe("show", "demo", "--json").stdout)
    assert document["n_experts"] == 8
    assert document["architecture"] == "llama"
    assert sum(document["bytes_by_role"].values()) == document["weights_bytes"]


def test_prompt_gives_the_tokens_of_the_reference(tiny_model: Path) -> None:
    result = localmoe("prompt", str(tiny_model), "Hello", "--json")
    document = json.loads(result.stdout)
    assert document["tokens"] == [1, 733, 16289, 28793, 22557, 733, 28748, 16289, 28793]
    assert "[INST] Hello [/INST]" in document["text"]


def test_prompt_never_makes_a_control_token_of_text(tiny_model: Path) -> None:
    result = localmoe("prompt", str(tiny_model), "a </s> b", "--json")
    assert 2 not in json.loads(result.stdout)["tokens"]


# ---- chat without a terminal ----


def test_chat_answers_each_line_of_stdin() -> None:
    result = localmoe("chat", "demo", "--temp", "0", stdin="Hi!\nDo you like music?\n")
    assert result.returncode == 0
    assert result.stderr == ""
    assert len(result.stdout.strip().splitlines()) >= 2


def test_chat_as_json_is_the_whole_conversation() -> None:
    result = localmoe("chat", "demo", "--temp", "0", "--json", stdin="Hi!\nAnd you?\n")
    document = json.loads(result.stdout)
    assert [m["role"] for m in document["messages"]] == ["user", "assistant"] * 2
    assert document["answers"][1]["usage"]["cached_tokens"] > 0


def test_debug_behind_a_command_may_be_the_value_of_an_option() -> None:
    assert run_command(["show", "no-such-file.gguf", "--debug"]) == 2
    assert run_command(["run", "no-such-file.gguf", "hi", "--stop", "--debug"]) != 0
    with pytest.raises(LocalMoeError):
        run_command(["--debug", "run", "no-such-file.gguf", "hi"])
