"""The parent's side of rendering: starts the child of templates.py, feeds it, and ends it.

    texts = render(RenderJob(template, [Rendering(messages)]), env={})

One child renders one template, for as many conversations as there are in the job. It is given no
more of the environment than it needs to start, and the file of the child is run by its path, so
that no file of the working directory is taken for a module.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

CHILD = Path(__file__).with_name("templates.py")
MAX_TEMPLATE_CHARS = 1 << 20
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

    messages: Sequence[Mapping[str, str]]
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
    try:
        result = json.loads(output)
        if "texts" in result:
            return [str(text) for text in result["texts"]]
        kind, message = result["error"], result["message"]
    except (ValueError, KeyError, TypeError):
        raise _died(code, job.limits) from None
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
        raise RenderError("limit", f"it was still at work after {limits.wall_s:g} s") from None
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
    return output, process.returncode


def _start(env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a child; -I: the working directory and PYTHON* have no say in what it imports."""
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            start_new_session=True,  # a Ctrl-C at the terminal is for the parent to interpret
        )
    except OSError as error:
        raise RenderError("failed", f"no process could be started for it ({error})") from None


def _died(code: int, limits: Limits) -> RenderError:
    """A child that ended without a word was ended by the system."""
    return RenderError(
        "limit",
        f"it took more than {limits.cpu_s} s of processor time or "
        f"{limits.memory_bytes >> 20} MiB of memory (its process ended with {code})",
    )


def _one_line(text: str) -> str:
    """A template's own words, without anything that a terminal would obey."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 160 else f"{line[:157]}..."
