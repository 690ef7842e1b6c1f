"""Every command of the README is true: run here, or held by another check that is named."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("command", [c for c in CODE if "localmoe " in c])
def test_each_localmoe_command_runs(command: str) -> None:
    """As written, but that a chat has nobody to talk to and ends at once."""
    program = f"{shlex.quote(sys.executable)} -m localmoe "
    shell = re.sub(r"\blocalmoe ", lambda _: program, command, count=1)
    result = subprocess.run(
        shell, shell=True, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("program", PYTHON)
def test_each_python_block_runs(program: str) -> None:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_options_that_the_readme_names_exist() -> None:
    from localmoe.cli import cli

    known = {
        name
        for command in cli.commands.values()
        for parameter in command.params
        for name in parameter.opts
    }
    pips = {"--extra-index-url", "--force-reinstall", "--no-cache-dir"}
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    named = set(re.findall(r"`(--?[a-z][a-z-]*)", prose))
    assert {"-c", "--json"} <= named
    assert named <= known | pips | {"--help"}
