"""The parent's side of rendering: starts the child of jinja_sandbox.py, feeds it, and ends it.

    texts = render(RenderJob(template, [Rendering(messages)]), env={})

One child renders one template, for as many conversations as there are in the job. It is given no
more of the environment than it needs to start, and the file of the child is run by its path, so
that no file of the working directory is taken for a module. Where many conversations come one after
the other, a Renderer keeps its child for some of them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from ..errors import printable

CHILD = Path(__file__).with_name("jinja_sandbox.py")
MAX_TEMPLATE_CHARS = 1 << 20
JOBS_OF_A_CHILD = 100
# what a Python on Windows needs to start, and what a Python elsewhere may
NEEDED_ENV = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")

Kind = Literal["raised", "unsafe", "syntax", "limit", "failed"]
KINDS: tuple[Kind, ...] = ("raised", "unsafe", "syntax", "limit", "failed")


class RenderError(Exception):
    """A template didn't give a text. `kind` "raised" means that the template itself refused."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


@dataclass(frozen=True, slots=True)
class Limits:
    """What one child may take; the output is that of all renders together.

    Processor time and memory are limited by the system, and so not on Windows.
    """

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    output_chars: int = 8 << 20


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation to render; with `add_generation_prompt`, up to where the answer begins."""

    messages: Sequence[Mapping[str, object]]
    add_generation_prompt: bool = True


@dataclass(frozen=True, slots=True)
class RenderJob:
    """A template, the conversations to render with it, and what else it may ask for."""

    template: str
    renders: Sequence[Rendering]
    variables: Mapping[str, object] = field(default_factory=dict)
    now: datetime = field(default_factory=datetime.now)
    limits: Limits = Limits()


def render(job: RenderJob, env: Mapping[str, str]) -> list[str]:
    """The text of each conversation. Raises RenderError; takes at most `limits.wall_s` seconds.

    Of `env` the child gets only what a Python needs to start.
    """
    if len(job.template) > MAX_TEMPLATE_CHARS:
        raise RenderError("limit", f"it is longer than {MAX_TEMPLATE_CHARS} characters")
    output, code = _run(_encoded(job), env, job.limits)
    texts = _texts(output)
    if texts is None:
        raise _died(code, job.limits)
    return texts


class Renderer:
    """Renders one job after the other, each under its own limits, as `render` does.

    A child is replaced after `jobs_of_a_child`, and whenever one ended it. Close it.
    """

    def __init__(self, env: Mapping[str, str], jobs_of_a_child: int = JOBS_OF_A_CHILD) -> None:
        self._env = env
        self._jobs_of_a_child = jobs_of_a_child
        self._child: subprocess.Popen[bytes] | None = None
        self._n_jobs = 0

    def render(self, job: RenderJob) -> list[str]:
        """The text of each conversation of a job. Raises RenderError."""
        if len(job.template) > MAX_TEMPLATE_CHARS:
            raise RenderError("limit", f"it is longer than {MAX_TEMPLATE_CHARS} characters")
        child = self._ready_child()
        late = threading.Event()

        def end() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(job.limits.wall_s, end)
        timer.start()
        try:
            output = _exchange(child, _encoded(job) + b"\n")
        finally:
            timer.cancel()
        texts = _texts(output) if output.endswith(b"\n") else None
        if texts is None:
            code = self._end()
            raise _late(job.limits) if late.is_set() else _died(code, job.limits)
        return texts

    def close(self) -> None:
        """Ends the child process."""
        self._end()

    def _ready_child(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._n_jobs == self._jobs_of_a_child:
            self._end()
            needed = {name: self._env[name] for name in NEEDED_ENV if name in self._env}
            self._child, self._n_jobs = _start(needed, "many"), 0
        self._n_jobs += 1
        return self._child

    def _end(self) -> int:
        if self._child is None:
            return 0
        self._child.kill()
        code = self._child.wait()
        _close(self._child)
        self._child = None
        return code


def _exchange(child: subprocess.Popen[bytes], line: bytes) -> bytes:
    """The line that a child answers one with; not a whole one where it ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(OSError):
        child.stdin.write(line)
        child.stdin.flush()
        return child.stdout.readline()
    return b""


def _texts(output: bytes) -> list[str] | None:
    """The texts of a result; None where it isn't one. Raises RenderError with what went wrong."""
    try:
        result = json.loads(output)
        if "texts" in result:
            return [str(text) for text in result["texts"]]
        kind, message = result["error"], result["message"]
    except (ValueError, KeyError, TypeError):
        return None
    raise RenderError(kind if kind in KINDS else "failed", _one_line(str(message)))


def _encoded(job: RenderJob) -> bytes:
    fields: dict[str, Any] = {
        "template": job.template,
        "renders": [
            {"messages": list(r.messages), "add_generation_prompt": r.add_generation_prompt}
            for r in job.renders
        ],
        "variables": dict(job.variables),
        "now": job.now.isoformat(),
        "limits": asdict(job.limits),
    }
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")


def _run(job: bytes, env: Mapping[str, str], limits: Limits) -> tuple[bytes, int]:
    """What the child wrote, and its exit code. Raises RenderError where its time is up."""
    process = _start({name: env[name] for name in NEEDED_ENV if name in env})
    try:
        output, _ = process.communicate(job, timeout=limits.wall_s)
    except subprocess.TimeoutExpired:
        raise _late(limits) from None
    finally:
        process.kill()
        process.wait()
        _close(process)
    return output, process.returncode


def _close(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None and not stream.closed:
            with contextlib.suppress(OSError):
                stream.close()


def _start(env: Mapping[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    """Start a child; -I: the working directory and PYTHON* have no say in what it imports."""
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(CHILD), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            start_new_session=True,  # a Ctrl-C at the terminal is for the parent to interpret
        )
    except OSError as error:
        raise RenderError("failed", f"no process could be started for it ({error})") from None


def _late(limits: Limits) -> RenderError:
    return RenderError("limit", f"it was still at work after {limits.wall_s:g} s")


def _died(code: int, limits: Limits) -> RenderError:
    """A child that ended without a word was ended by the system."""
    return RenderError(
        "limit",
        f"it took more than {limits.cpu_s} s of processor time or "
        f"{limits.memory_bytes >> 20} MiB of memory (its process ended with {code})",
    )


def _one_line(text: str) -> str:
    """A template's own words, without anything that a terminal would obey."""
    line = " ".join(printable(text, " ").split())
    return line if len(line) <= 160 else f"{line[:157]}..."
