"""Where the machine is looked at: its files, its tools, the environment to start them with.

Every detector takes these as a parameter, so that a test hands it real files and real small
programs of a machine that doesn't exist. What they say is foreign text: it is bounded and cleaned.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import printable

TOOL_TIMEOUT_S = 5.0
"""nvidia-smi takes 30 ms where the driver stays loaded, a second a card where it doesn't."""

MAX_OUTPUT_BYTES = 1 << 20
MAX_NAME_LENGTH = 80
REAP_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class SystemAccess:
    """The machine as it can be looked at; the defaults are the one that this runs on.

    `env` is the environment of the tools (its PATH finds them): config.engine_environment().
    `cpus` are the logical ones that this process may use, None asks the system. `llama_folder` is
    the folder of the installed llama_cpp package, None looks for it.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    system: str = field(default_factory=platform.system)
    arch: str = field(default_factory=platform.machine)
    cpus: frozenset[int] | None = None
    llama_folder: Path | None = None
    tool_timeout_s: float = TOOL_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class ToolResult:
    """How a tool ended: its exit code (None: it had to be stopped) and what it printed."""

    code: int | None
    output: str


def tool_path(name: str, sources: SystemAccess) -> str | None:
    """Where a program lies on the PATH. One of the working directory is never taken."""
    found = shutil.which(name, path=sources.env.get("PATH", os.defpath))
    return found if found and os.path.isabs(found) else None


def run_tool(command: Sequence[str], sources: SystemAccess) -> ToolResult | None:
    """Run a program for what it prints; None where there is no such program.

    It may hang in the kernel (a driver in trouble) or never stop printing: the wait and the output
    are bounded, and a process that can't be killed is left behind.
    """
    path = tool_path(command[0], sources)
    if path is None:
        return None
    try:
        process = subprocess.Popen(
            [path, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**sources.env, "LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError as error:
        return ToolResult(None, error.strerror or str(error))
    output, ended = _bounded_output(process, sources.tool_timeout_s)
    if not ended:
        _end(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(REAP_SECONDS)
    return ToolResult(process.returncode if ended else None, output)


def _bounded_output(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[str, bool]:
    """What a process prints in the time it has, and whether it came to an end by itself."""
    pieces: list[bytes] = []

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as stdout:
            pieces.append(stdout.read(MAX_OUTPUT_BYTES))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout_s)
    raw = b"".join(pieces)
    ended = not reader.is_alive() and len(raw) < MAX_OUTPUT_BYTES
    return raw.decode("utf-8", "replace"), ended


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it started: a child of a script would keep the pipe open."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def read_text(path: Path) -> str:
    """A file of the kernel; empty where it can't be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_OUTPUT_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""


def read_number(path: Path) -> int | None:
    """A file that holds one number, decimal or 0x...; None where it doesn't."""
    try:
        return int(read_text(path), 0)
    except ValueError:
        return None


def clean(text: str) -> str:
    """A name as a driver gives it, without what isn't a printable character, and not too long."""
    return printable(" ".join(text.split()), "")[:MAX_NAME_LENGTH]
