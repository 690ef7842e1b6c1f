"""The virtual environment that scripts/demo, scripts/test and scripts/check share.

It is `.venv` in the checkout, made when it isn't there, and installed into again only when
pyproject.toml has changed. Standard library alone: it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOG = VENV / "install.log"
OLDEST_PYTHON = (3, 10)

COMPILERS = ("c++", "g++", "clang++", "cl")
COMPILER_COMMANDS = {
    "darwin": "xcode-select --install",
    "win32": "winget install Microsoft.VisualStudio.2022.BuildTools "
    '--override "--add Microsoft.VisualStudio.Workload.VCTools --quiet"',
    "linux": "sudo apt install g++  (or your distribution's C++ compiler)",
}


def ensure(extra: str = "") -> Path:
    """The environment's Python, with localmoe installed, and `extra` where one is named.

    Ends the program with one line where something is missing that it can't install.
    """
    stamp = VENV / f".installed{extra and '-' + extra}"
    if not (PYTHON.is_file() and stamp.is_file() and stamp.read_text() == wanted()):
        check_machine()
        if not PYTHON.is_file():
            run_logged([sys.executable, "-m", "venv", str(VENV)], "make a virtual environment")
        install(f"{ROOT}[{extra}]" if extra else str(ROOT))
        stamp.write_text(wanted())
    return PYTHON


def wanted() -> str:
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()


def check_machine() -> None:
    """What must be there before anything can be installed."""
    if sys.version_info < OLDEST_PYTHON:
        stop(f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed, this is "
             f"{sys.version.split()[0]}.")  # fmt: skip
    if not PYTHON.is_file() and importlib.util.find_spec("ensurepip") is None:
        stop("Python's venv module is not complete. Run: sudo apt install python3-venv")
    has_llama = any(VENV.glob("**/site-packages/llama_cpp"))
    if not has_llama and not (os.environ.get("CXX") or any(map(shutil.which, COMPILERS))):
        command = COMPILER_COMMANDS.get(sys.platform, COMPILER_COMMANDS["linux"])
        stop(f"A C++ compiler is missing: llama.cpp is compiled here. Run: {command}")


def install(requirement: str) -> None:
    say("Installing into .venv; compiling llama.cpp takes some minutes, the first time.")
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "-e"]
    run_logged([*command, requirement], "install localmoe")


def run_logged(command: list[str], purpose: str) -> None:
    """Run a command with its output in a log, of which the end is shown if it fails."""
    VENV.mkdir(exist_ok=True)
    with LOG.open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        say("".join(LOG.read_text(errors="replace").splitlines(keepends=True)[-15:]))
        stop(f"Could not {purpose}; all of it is in {LOG}.")


def run(*command: str) -> int:
    """Run a program of the environment in the checkout; gives its exit code."""
    return subprocess.run([str(PYTHON), *command], cwd=ROOT).returncode


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def stop(sentence: str) -> None:
    say(sentence)
    raise SystemExit(1)
