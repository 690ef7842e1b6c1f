"""What is wrong with a value of a setting, in words of our own for each of pydantic's error types
(pydantic's docs, errors/validation_errors)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import UsageError

MAX_SHOWN = 60
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "bool": "yes or no",
    "string": "text",
    "tuple": "text or a list",
}
"""By how pydantic's types begin (int_parsing, int_type, int_from_float, ...)."""
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def bad_value(shown: str, problems: Sequence[Mapping[str, Any]], hint: str = "") -> UsageError:
    """The error for a setting that a person knows as `shown`. `problems` are pydantic's, of which
    a value that may be one thing or another has one for each; `hint` is for where none is nearer.
    """
    first = problems[0]
    cause = first.get("ctx", {}).get("error")
    if cause is not None:  # said by a check of our own
        said = cause.args[0]
        if isinstance(said, UsageError):
            return UsageError(f"{shown}: {said.message}", said.hint or hint)
        return UsageError(f"{shown}: {said}.", hint)
    words = dict.fromkeys(_must_be(one) for one in problems if one["input"] is first["input"])
    return UsageError(f"{shown} must be {' or '.join(words)}, not {_short(first['input'])}.", hint)


def _must_be(problem: Mapping[str, Any]) -> str:
    kind, context = str(problem["type"]), problem.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind in BOUNDS:
        words, key = BOUNDS[kind]
        return f"{words} {_number(context[key])}"
    if kind == "int_parsing_size":
        return "a whole number of fewer digits"
    return WORDS.get(kind.partition("_")[0], "something else")


def _number(value: float) -> str:
    return f"{int(value) if value == int(value) else value:,}"


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
