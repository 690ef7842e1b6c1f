"""`run` as a script meets it: where a prompt comes from, what reaches stdout, and when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_model import SHAPES
from synthetic import gguf_writer, mixtral
from synthetic.gguf_writer import Blueprint
from test_cli import COMMAND, localmoe, one_line_error

from localmoe.cli.options import read_schema
from localmoe.cli.prompt_input import whole_prompt

OBJECT = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}'
OPEN_TEXT = '{"type": "string", "minLength": 400}'


def prompt_text(*arguments: str, stdin: str | None = "") -> str:
    """The text that the demo model would get."""
    result = localmoe("prompt", "demo", *arguments, "--json", stdin=stdin)
    assert result.returncode == 0, result.stderr
    text: str = json.loads(result.stdout)["text"]
    return text


# ---- where the prompt comes from -----------------------------------------------------------------


def test_the_argument_comes_first_and_then_what_is_piped() -> None:
    assert "What went wrong?\n\nline 1\nline 2 [/INST]" in prompt_text(
        "What went wrong?", stdin="line 1\nline 2\n"
    )


def test_nothing_piped_leaves_the_argument_as_it_is() -> None:
    assert "[INST] Hi! [/INST]" in prompt_text("Hi!", stdin="")


def test_files_come_between_argument_and_stdin(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"file {name}\n")
    files = ["-f", str(tmp_path / "a"), "-f", str(tmp_path / "b")]
    told = ["-n", "1", "--temp", "0", "--json"]
    whole = localmoe("run", "demo", "One", *files, *told, stdin="piped\n")
    same = localmoe("run", "demo", "One\n\nfile a\n\nfile b\n\npiped", *told)
    counts = [json.loads(result.stdout)["usage"]["prompt_tokens"] for result in (whole, same)]
    assert counts[0] == counts[1] > 10


def test_an_embedding_model_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    plan = mixtral.blueprint(SHAPES["tiny"], "Q4_K")
    blueprint = Blueprint({**plan.kv, "llama.pooling_type": 3}, plan.tensors)
    (path,) = gguf_writer.write(tmp_path / "embed.gguf", blueprint, None)
    for command in (["run", str(path), "Hi!"], ["plan", str(path)], ["prompt", str(path), "Hi!"]):
        error = one_line_error(localmoe(*command), 1)
        assert error.startswith("localmoe: embed.gguf: an embedding model")


@pytest.mark.parametrize("arguments", [["-f", "-"], ["-"], []])
def test_stdin_alone_is_the_prompt(arguments: list[str]) -> None:
    result = localmoe("run", "demo", *arguments, "-n", "3", "--temp", "0", stdin="Hello!\n")
    assert result.stdout == localmoe("run", "demo", "Hello!", "-n", "3", "--temp", "0").stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
@pytest.mark.parametrize("stdin", ["< /dev/null", "<&-"])
def test_a_stdin_without_anything_is_no_trouble(stdin: str) -> None:
    shell = f'{sys.executable} -m localmoe run demo "Hi!" -n 2 {stdin}'
    result = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("quiet", [False, True])
def test_a_silent_pipe_that_stays_open_is_left_alone(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a program gets it that is started by one which forgets about its stdin."""
    reads, writes = os.pipe()
    with open(reads, encoding="utf-8") as stdin, open(writes, "wb", buffering=0):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert whole_prompt("Sum this up.", quiet=quiet, max_silence_s=0.1) == "Sum this up."
        said = capsys.readouterr().err
    assert said.count("\n") == (0 if quiet else 1)
    assert quiet or "within 0.1 s" in said


def test_run_answers_beside_a_silent_pipe() -> None:
    command = [*COMMAND, "run", "demo", "Hi!", "-n", "2", "--temp", "0"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        answer, said = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0
    assert answer == localmoe("run", "demo", "Hi!", "-n", "2", "--temp", "0").stdout
    assert said.startswith("Nothing came on stdin within 1 s")
    assert said.count("\n") == 1


def test_a_pipe_that_has_begun_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow it is then."""
    reads, writes = os.pipe()
    program = "import time\nfor n in 'ab': print(n, flush=True); time.sleep(1.2)"
    with open(reads, encoding="utf-8") as stdin:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=writes)
        os.close(writes)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert whole_prompt("Sum this up.") == "Sum this up.\n\na\nb"
        process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_a_terminal_is_not_waited_for() -> None:
    import pexpect

    child = pexpect.spawn(sys.executable, ["-m", "localmoe", "run", "demo", "Hi!", "-n", "2"])
    child.expect(pexpect.EOF, timeout=30)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "demo", " "], "empty"),
        (["run", "demo", "-f", "/none"], "can't be read"),
        (["run", "demo", "-f", "a", "--messages", "b"], "Both"),
        (["run", "demo", "Hi!", "--grammar", "/none"], "can't be read"),
        (["run", "demo", "Hi!", "--json-schema", '{"not": {"type": "string"}}'], "#/not"),
        (["run", "demo", "Hi!", "--json-schema", '{"contains": {}}'], "#/contains"),
    ],
)
def test_each_mistake_is_one_line(arguments: list[str], sentence: str) -> None:
    assert sentence in one_line_error(localmoe(*arguments), 2)


@pytest.mark.parametrize("name", ["true.json", "false-friends.json"])
def test_a_schema_file_may_be_called_anything(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(OBJECT)
    assert read_schema(name) == OBJECT
    assert read_schema(" true ").strip() == "true"


def test_a_schema_and_a_grammar_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "g.gbnf"
    path.write_text('root ::= "a"')
    result = localmoe("run", "demo", "Hi!", "--json-schema", "{}", "--grammar", str(path))
    assert "Leave one" in one_line_error(result, 2)


def test_a_bad_grammar_is_refused_before_a_prompt_is_read(tmp_path: Path) -> None:
    path = tmp_path / "g.gbnf"
    path.write_text('root ::= "a" b\n')
    assert '"b"' in one_line_error(localmoe("run", "demo", "Hi!", "--grammar", str(path)), 2)


# ---- what comes out ------------------------------------------------------------------------------


def test_json_of_a_schema_comes_whole(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(OBJECT)
    result = localmoe("run", "demo", "Are you well?", "--json-schema", str(path), "--seed", "3")
    assert result.returncode == 0, result.stderr
    assert isinstance(json.loads(result.stdout)["ok"], bool)


def test_what_of_a_schema_is_only_checked_at_the_end_is_said_before() -> None:
    schema = '{"type": "array", "items": {"enum": [1]}, "maxItems": 4, "uniqueItems": true}'
    said = localmoe("run", "demo", "Hi!", "--json-schema", schema).stderr
    assert said.count("localmoe: warning: The JSON schema at #/uniqueItems") == 1
    assert "warning" not in localmoe("run", "demo", "Hi!", "-q", "--json-schema", schema).stderr


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_half_an_answer_is_none_where_it_must_have_a_form(extra: list[str]) -> None:
    result = localmoe("run", "demo", "Hi!", "--json-schema", OPEN_TEXT, "-n", "20", *extra)
    assert "cut" in one_line_error(result, 1)


def test_a_cut_answer_without_a_form_is_one() -> None:
    result = localmoe("run", "demo", "Hi!", "-n", "2", "--json")
    assert json.loads(result.stdout)["finish_reason"] == "length"
    assert result.returncode == 0


def test_a_grammar_holds(tmp_path: Path) -> None:
    path = tmp_path / "g.gbnf"
    path.write_text('root ::= "yes" | "no"\n')
    assert localmoe("run", "demo", "Well?", "--grammar", str(path)).stdout in ("yes\n", "no\n")


# ---- a batch -------------------------------------------------------------------------------------


def test_a_batch_refuses_and_checks_schemas_too() -> None:
    lines = [
        {"prompt": "Hi!", "json_schema": {"contains": {"const": 1}}},
        {"prompt": "Hi!", "json_schema": json.loads(OPEN_TEXT), "max_tokens": 10},
        {"prompt": "Hi!", "json_schema": json.loads(OBJECT), "max_tokens": 60},
    ]
    result = localmoe("batch", "demo", "-q", stdin="\n".join(map(json.dumps, lines)))
    assert result.returncode == 5
    replies = {reply["line"]: reply for reply in map(json.loads, result.stdout.splitlines())}
    assert "#/contains" in replies[1]["error"]["message"]
    assert replies[2]["error"]["code"] == "wrong_form"
    text = replies[3]["response"]["body"]["choices"][0]["message"]["content"]
    assert isinstance(json.loads(text)["ok"], bool)


# ---- odd input and odd ends ----------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="arguments of bytes, and /dev/full")
@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([b"run", b"demo", b"Hi \xff"], 2, "surrogate"),
        ([b"run", b"demo", b"Hi!", b"--stop", b"a\xff"], 2, "no UTF-8 text"),
        ([b"run", b"demo", b"Hi!", b"-s", b"a\xff"], 2, "no UTF-8 text"),
        ([b"run", b"no\xff.gguf", b"Hi!"], 2, "There is no file"),
        ([b"run", b"demo", b"Hi!", b"--vram", b"9" * 400], 2, "not a size"),
        ([b"run", b"demo", b"Hi!", b"--seed", b"9" * 30], 2, "seed"),
        (
            [b"run", b"demo", b"Hi!", b"-n", b"9" * 30],
            2,
            "--max-tokens must be at most 2,147,483,647",
        ),
        ([b"run", b"demo", b"Hi!", b"-t", b"9" * 400], 2, "--threads"),
        ([b"run", b"demo", b"Hi!", b"-ncmoe", b"9" * 30], 2, "--n-cpu-moe"),
    ],
)
def test_odd_input_is_one_line(arguments: list[bytes], code: int, sentence: str) -> None:
    result = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, stdin=subprocess.DEVNULL, timeout=60
    )
    assert result.returncode == code
    assert result.stderr.count(b"\n") == 1
    assert sentence in result.stderr.decode()
    assert len(result.stderr) < 300


@pytest.mark.skipif(sys.platform != "linux", reason="file names of bytes")
def test_a_model_whose_name_is_no_text_is_one_line(tmp_path: Path, tiny_model: Path) -> None:
    path = os.fsencode(tmp_path) + b"/a\xff.gguf"
    os.symlink(tiny_model, path)
    result = subprocess.run([*COMMAND, b"run", path, b"Hi!"], capture_output=True, input=b"")
    assert result.returncode == 1
    assert b"not UTF-8" in result.stderr
    assert b"unforeseen" not in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["run", "demo", "Hi!", "-n", "2"], ["config", "show"]]
)
def test_a_full_disk_behind_stdout_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
    assert result.returncode == 1
    assert result.stderr.startswith(b"localmoe: The output can't be written: No space left")
    assert result.stderr.count(b"\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("module", ["localmoe.cli", "click", "localmoe.terminal.console"])
def test_ctrl_c_while_python_still_imports_leaves_no_trace(module: str) -> None:
    """The signal comes as a module is looked for."""
    program = f"""
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = ["localmoe", "--help"]
from localmoe.__main__ import main
main()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_that_is_ignored_stays_so() -> None:
    """A job in the background of a shell must not end at the Ctrl-C of another."""
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.argv = ['localmoe', '--version']\n"
        "import atexit; atexit.register(lambda: print(signal.getsignal(signal.SIGINT).name))\n"
        "from localmoe.__main__ import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "SIG_IGN"


def test_help_is_there_at_once() -> None:
    """Loosely: what is imported is held by test_cli; this is so that nothing waits."""
    assert localmoe("run", "--help").returncode == 0
