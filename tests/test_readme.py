"""Every command of the README is true: run here, or held by another check that is named."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import pytest
from standin_hub import StandInHub

from localmoe.cli import cli
from localmoe.gguf.demo import PACKAGE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CODE = re.findall(r"^    (\S.*)$", README, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# what another check runs: CI runs scripts/check, which runs scripts/test; the fresh-clone check of
# a release runs scripts/demo and pip install
ELSEWHERE = {"scripts/demo", "scripts/test", "pip install ."}


def test_all_blocks_are_known() -> None:
    assert set(ELSEWHERE) <= set(CODE)
    assert PYTHON


@pytest.fixture
def small_mixtral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub where `mixtral` is a model of 10 MB."""
    with StandInHub() as hub:
        hub.add_repo("maker/Small-GGUF", {"small.Q4_K_M.gguf": PACKAGE / "models/demo/demo.gguf"})
        (tmp_path / "models.yaml").write_text("mixtral:\n  repo: maker/Small-GGUF\n")
        monkeypatch.setenv("LOCALMOE_CONFIG", str(tmp_path))
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield


@pytest.mark.parametrize("command", [c for c in CODE if "localmoe " in c])
def test_each_localmoe_command_runs(command: str, small_mixtral: None, tmp_path: Path) -> None:
    """As written, but that a chat has nobody to talk to and ends at once, and Mixtral is small."""
    if " rm " in command or " verify mixtral" in command:
        pull = [sys.executable, "-m", "localmoe", "pull", "mixtral", "-q"]
        subprocess.run(pull, cwd=tmp_path, check=True, timeout=60)
    program = f"{shlex.quote(sys.executable)} -m localmoe "
    shell = re.sub(r"\blocalmoe ", lambda _: program, command, count=1)
    result = subprocess.run(
        shell, shell=True, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("program", PYTHON)
def test_each_python_block_runs(program: str) -> None:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_options_that_the_readme_names_exist() -> None:
    context = click.Context(cli)
    known = {
        name
        for command in map(partial(cli.get_command, context), cli.list_commands(context))
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    others = {"--extra-index-url", "--force-reinstall", "--no-cache-dir", "--fit"}  # pip, llama.cpp
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    named = set(re.findall(r"`(--?[a-z][a-z-]*)", prose))
    assert {"-c", "--json"} <= named
    assert named <= known | others | {"--help"}
