"""The chat without a terminal: each line of stdin is a message."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from localmoe.chat.session import Sessions
from localmoe.gguf.demo import DEMO
from localmoe.prompt.messages import Message


def chat(lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "localmoe", "chat", "demo", "--temp", "0", *options]
    return subprocess.run(
        command, input=lines, capture_output=True, encoding="utf-8", timeout=60, check=False
    )


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALMOE_STATE", str(tmp_path))
    monkeypatch.setenv("LOCALMOE_TUNE", "no")
    return tmp_path


def test_each_line_is_answered_and_nothing_else_is_on_stdout(state: Path) -> None:
    done = chat("Hi!\n\n/help\n")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert done.stdout.count("\n") == 2  # an answer to a line, also to one that begins with a slash
    assert not (state / "sessions").exists()


def test_the_document_is_printed_where_a_later_line_is_refused() -> None:
    done = chat("Hi!\n" + "long " * 300 + "\nHello?\n", "--json", "-c", "128")
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert [m["role"] for m in document["messages"]] == ["user", "assistant"]
    assert document["messages"][0]["content"] == "Hi!"
    assert document["answers"][0]["finish_reason"] == "stop"
    assert done.stderr.startswith("localmoe: The message has")
    assert done.stderr.count("\n") == 1


def test_a_line_that_never_ends_is_refused() -> None:
    done = chat("Hi!\n" + "x" * ((16 << 20) + 1))
    assert done.returncode == 2
    assert done.stderr == "localmoe: A line of stdin has more than 16,777,216 characters.\n"
    assert done.stdout.count("\n") == 1


def test_a_named_session_is_kept_and_goes_on() -> None:
    chat("My name is Tom.\n", "--session", "piped")
    done = chat("What is my name?\n", "--session", "piped", "--json")
    document = json.loads(done.stdout)
    assert [m["role"] for m in document["messages"]] == ["user", "assistant"] * 2
    assert document["messages"][0]["content"] == "My name is Tom."


def test_a_question_that_was_not_answered_is_said_and_stays(state: Path) -> None:
    with Sessions(state / "sessions").open_or_new("broken", "demo") as session:
        session.sync([Message("user", "Hi!"), Message("assistant", "Ho."), Message("user", "Why?")])
    before = session.path.read_bytes()
    done = chat("\n", "--session", "broken")
    assert "The last question of broken was not answered: Why?" in done.stderr
    assert session.path.read_bytes() == before


def test_a_session_knows_its_model_from_everywhere_and_says_where_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "own.gguf"
    shutil.copy(DEMO, model)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "localmoe", "chat"]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options], input="Hi!\n", capture_output=True, encoding="utf-8",
            timeout=60, check=False,
        )  # fmt: skip

    assert run("./own.gguf", "--session", "p1").returncode == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("--session", "p1").returncode == 0
    model.unlink()
    done = run("--session", "p1")
    assert done.returncode == 2
    assert f"The session p1 was with {model}. There is no file" in done.stderr
    assert done.stderr.endswith("Try: localmoe chat MODEL --session p1\n")
