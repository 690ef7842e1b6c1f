"""A short-lived child that renders one template, within limits.

The parent's side is jinja_client.py.

It reads one job from stdin and writes one result to stdout, both JSON; started with `many`, a job a
line and a result a line, until its input ends. A job holds `template`,
`renders` (each with `messages` and `add_generation_prompt`), `variables`, `now` (ISO time) and
`limits`; a result is {"texts": [...]}, a text for each render, or {"error": kind, "message": ...}.

Templates come with model files, so they are hostile until shown otherwise: Jinja's immutable
sandbox keeps them from Python's objects, and what it leaves open, time, memory and size, is limited
here and by the parent. On Windows there are no resource limits; there the checked operators, the
limit on output and the parent's clock have to do. The surroundings of a template are those that
Hugging Face gives (transformers, utils/chat_template_utils.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

if sys.platform != "win32":
    import resource

MAX_POWER_BITS = 4096
MAX_FORMAT = 200
MAX_MESSAGE = 300


class TemplateRaised(TemplateError):
    """The template itself said no."""


class OverLimit(Exception):
    """The template wanted more than there is for it."""


def main() -> None:
    """Do the job that stdin holds, or with `many` each that it holds a line of."""
    if sys.argv[1:] == ["many"]:
        for line in sys.stdin.buffer:
            do(json.loads(line), many=True)
    else:
        do(json.loads(sys.stdin.buffer.read()))


def do(job: dict[str, Any], many: bool = False) -> None:
    """Write the result of a job."""
    limit_process(job["limits"], many)
    result = json.dumps(answer(job), ensure_ascii=False)
    sys.stdout.buffer.write(result.encode("utf-8", "replace") + b"\n" * many)
    sys.stdout.buffer.flush()


def limit_process(limits: dict[str, int], many: bool) -> None:
    """Let the system end this process where it takes too much; where a limit isn't known, go on.

    With `many` jobs, each may take the processor time anew: its soft limit moves along.
    """
    if sys.platform == "win32":
        return
    for name, value in {
        "RLIMIT_CPU": limits["cpu_s"],
        "RLIMIT_AS": limits["memory_bytes"],
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
    }.items():
        hard = value
        if many and name == "RLIMIT_CPU":
            used = resource.getrusage(resource.RUSAGE_SELF)
            value += math.ceil(used.ru_utime + used.ru_stime)
            hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (value, hard))


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Every render's text, or what went wrong with the first one that failed."""
    try:
        return {"texts": render_all(job)}
    except TemplateRaised as error:
        return failure("raised", str(error))
    except SecurityError as error:
        return failure("unsafe", str(error))
    except TemplateSyntaxError as error:
        return failure("syntax", f"line {error.lineno}: {error.message}")
    except OverLimit as error:
        return failure("limit", str(error))
    except MemoryError:
        return failure("limit", "it needs too much memory")
    except RecursionError:
        return failure("limit", "it is nested too deeply")
    except Exception as error:  # whatever a template does wrong is an answer, not a crash
        return failure("failed", f"{type(error).__name__}: {error}")


def failure(kind: str, message: str) -> dict[str, str]:
    """The result of a job that failed."""
    return {"error": kind, "message": message[:MAX_MESSAGE]}


def render_all(job: dict[str, Any]) -> list[str]:
    """The text of each render; all of them together are limited."""
    template = compiled(job["template"], job["limits"]["output_chars"], job["now"])
    room = job["limits"]["output_chars"]
    texts = []
    for render in job["renders"]:
        chunks = []
        for chunk in template.generate(**job["variables"], tools=None, documents=None, **render):
            room -= len(chunk)
            if room < 0:
                raise OverLimit(f"it writes more than {job['limits']['output_chars']} characters")
            chunks.append(chunk)
        texts.append("".join(chunks))
    return texts


@lru_cache(maxsize=1)
def compiled(template: str, max_chars: int, now: str) -> Template:
    """A template ready to render; of many jobs, mostly all have the same."""
    return Sandbox(max_chars, now).from_string(template)


class Generation(Extension):
    """The tag {% generation %}, which marks answers for training and means nothing here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parses the block as if the tag were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox as Hugging Face sets it up, with operators that can't outgrow the limits."""

    # an intercepted operator isn't computed while compiling either
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, max_chars: int, now: str) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
        )
        self.max_chars = max_chars
        self.filters["tojson"] = to_json
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = clock(datetime.fromisoformat(now))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator, if the result can be of a reasonable size."""
        if size_of_result(operator, left, right) > self.max_chars:
            raise OverLimit("it makes values that are too large")
        return super().call_binop(context, operator, left, right)


def size_of_result(operator: str, left: Any, right: Any) -> int:
    """About how large the result of an operator is, in characters or elements; 0: small."""
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        # exact powers only of what fits; beyond, it counts as endless
        return sys.maxsize if left.bit_length() * right > MAX_POWER_BITS else 0
    if operator == "*":
        for one, other in ((left, right), (right, left)):
            if hasattr(one, "__len__") and isinstance(other, int):
                return len(one) * other
    if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        return len(left) + len(right)
    return 0


def raise_exception(message: object) -> None:
    """What templates call to refuse a conversation."""
    raise TemplateRaised(str(message))


def clock(now: datetime) -> Callable[[str], str]:
    """The function strftime_now, at a time that stands still."""

    def strftime_now(format: str) -> str:
        if len(format) > MAX_FORMAT:
            raise OverLimit("it has a date format that is too long")
        return now.strftime(format)

    return strftime_now


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson, which unlike Jinja's own doesn't escape for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


if __name__ == "__main__":
    main()
