"""The form that an answer must have: checked before anything is loaded, and once it is there.

While it is generated, an answer is held to its schema (structured/llguidance_schema.py). It is
checked all the same: it may be cut short, and some of a schema can't be held.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from typing import Any

from ..engine.protocol import Sampling
from ..errors import LocalMoeError, UsageError
from .gbnf import check_grammar
from .llguidance_schema import hold_schema

DECIMAL = re.compile(r"Decimal\('([^']*)'\)")


class OutputMismatch(LocalMoeError):
    """An answer that isn't what its schema demands."""


def check_sampling(sampling: Sampling) -> None:
    """Raises UsageError where a schema or a grammar can't be held."""
    if sampling.json_schema is not None and sampling.grammar is not None:
        raise UsageError("Both a JSON schema and a grammar were given.", "Leave one of them out.")
    if sampling.json_schema is not None:
        hold_schema(sampling.json_schema)
    if sampling.grammar is not None:
        check_grammar(sampling.grammar)


def with_held_schema(sampling: Sampling) -> Sampling:
    """Returns a request's sampling with what the engine holds its answer to. Raises UsageError."""
    if sampling.json_schema is None:
        return sampling
    return replace(sampling, held_schema=hold_schema(sampling.json_schema).schema)


def unheld_parts(sampling: Sampling) -> tuple[str, ...]:
    """Returns sentences on what an answer is only checked for at its end."""
    if sampling.json_schema is None:
        return ()
    return hold_schema(sampling.json_schema).warnings


def is_structured(sampling: Sampling) -> bool:
    """Whether an answer must have a form."""
    return sampling.json_schema is not None or sampling.grammar is not None


def check_answer(text: str, finish_reason: str | None, sampling: Sampling) -> None:
    """Raises OutputMismatch, with the reason, where an answer hasn't the form that it must have.

    One that was cut short is wrong, but for JSON that was whole just then: an object's last brace
    ends it, while a number might have gone on.
    """
    is_cut = finish_reason not in ("stop", None)
    if sampling.grammar is not None and is_cut:
        raise OutputMismatch(
            "The answer was cut before the grammar's end.", "Give it more tokens: -n."
        )
    if sampling.json_schema is None:
        return
    try:
        value = json.loads(text, parse_float=Decimal)  # 0.3 is three times 0.1
        is_number = isinstance(value, (int, Decimal)) and not isinstance(value, bool)
        if is_cut and is_number:
            raise ValueError("a number that might go on")
    except (ValueError, ArithmeticError, RecursionError) as error:
        if is_cut:
            raise OutputMismatch(
                "The answer was cut before its JSON was whole.",
                "Give it more tokens (-n, -c), or bound strings and lists in the schema.",
            ) from None
        raise OutputMismatch(f"The answer is not JSON: {str(error)[:100]}.") from None
    problem = _validator(sampling.json_schema)(value)
    if problem:
        raise OutputMismatch(f"The answer does not validate: {problem}.")


@lru_cache(maxsize=32)
def _validator(json_schema: str) -> Callable[[Any], str | None]:
    """Gives what is wrong with a value, or None."""
    import jsonschema  # type: ignore[import-untyped]  # start-up, 70 ms

    draft = jsonschema.Draft202012Validator
    types = draft.TYPE_CHECKER.redefine("integer", lambda _, one: _is_whole(one))
    formats = jsonschema.FormatChecker(formats=())
    formats.checks("regex", raises=(re.error, OverflowError, RecursionError))(_is_pattern)
    validator = jsonschema.validators.extend(draft, type_checker=types)(
        hold_schema(json_schema).checked, format_checker=formats
    )

    def problem(value: Any) -> str | None:
        try:
            error = next(validator.iter_errors(value), None)
        except RecursionError:
            return "it is nested too deep"
        except ArithmeticError:
            return "it has a number of too many digits"
        if error is None:
            return None
        place = "/".join(["#", *map(str, error.absolute_path)])
        said = DECIMAL.sub(r"\1", error.message)
        return f"{ascii(said)[1:-1][:100]} at {ascii(place)[1:-1][:80]}"

    return problem


def _is_whole(value: Any) -> bool:
    if isinstance(value, Decimal):
        return value.is_finite() and value == value.to_integral_value()
    return isinstance(value, int) and not isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    return not isinstance(value, str) or bool(re.compile(value))
