"""Completion of command lines, in a real bash where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import localmoe


def completed(words: str, env: dict[str, str] | None = None) -> list[str]:
    """What bash would be offered for the last of these words."""
    variables = {
        "_LOCALMOE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    result = localmoe(env={**variables, **(env or {})})
    assert result.stderr == ""
    return [line.partition(",")[2] for line in result.stdout.splitlines()]


def test_models_are_completed_by_name() -> None:
    assert "mixtral" in completed("localmoe run mix")
    assert completed("localmoe chat dem") == ["demo"]
    assert completed("localmoe rm mixt")[0] == "mixtral"


def test_own_models_and_those_that_are_here_are_completed(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("my-own:\n  path: ~/a.gguf\n")
    snapshot = tmp_path / "hub" / "models--some--thing-GGUF" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "a.gguf").touch()
    env = {"LOCALMOE_CONFIG": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    assert completed("localmoe run my-", env) == ["my-own"]
    assert completed("localmoe run so", env) == ["some/thing-GGUF"]


def test_a_path_is_left_to_the_shell() -> None:
    result = localmoe(
        env={"_LOCALMOE_COMPLETE": "bash_complete", "COMP_WORDS": "localmoe run ./",
             "COMP_CWORD": "2"}
    )  # fmt: skip
    assert result.stdout == "file,./\n"


def test_options_and_their_values_are_completed() -> None:
    assert "--json-schema" in completed("localmoe run demo --json")
    assert completed("localmoe run demo --load-mode p") == ["pinned"]
    assert completed("localmoe config e") == ["edit"]


def test_sessions_are_completed_by_name(tmp_path: Path) -> None:
    (tmp_path / "sessions").mkdir()
    for name in ("garden", "no name"):
        (tmp_path / "sessions" / f"{name}.jsonl").touch()
    env = {"LOCALMOE_STATE": str(tmp_path)}
    for words in ("localmoe chat demo --session", "localmoe sessions rm"):
        assert completed(f"{words} g", env) == ["garden"]
        assert "no name" not in completed(f"{words} n", env)


def test_completion_takes_no_time_and_no_network() -> None:
    """What is not imported takes none."""
    program = (
        "import sys; from localmoe.cli import completion;"
        "print(*{'urllib3', 'llama_cpp', 'numpy', 'rich'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, text=True) == "\n"
    assert "mixtral" in completed("localmoe run mix")


@pytest.mark.parametrize(
    ("shell", "sign"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --no-file")]
)
def test_the_script_of_each_shell_is_printed(shell: str, sign: str) -> None:
    result = localmoe("completion", shell)
    assert result.returncode == 0
    assert sign in result.stdout
    assert f"_LOCALMOE_COMPLETE={shell}_complete" in result.stdout


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_real_bash_completes(tmp_path: Path) -> None:
    command = tmp_path / "localmoe"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m localmoe "$@"\n')
    command.chmod(0o755)
    program = """
        eval "$(localmoe completion bash)"
        COMP_WORDS=(localmoe run mix); COMP_CWORD=2
        _localmoe_completion localmoe mix run
        echo "${COMPREPLY[@]}"
    """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True,
        env={**os.environ, "PATH": path}, timeout=60,
    )  # fmt: skip
    assert "mixtral" in result.stdout.split(), result.stderr
