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
from .gbnf import MAX_BEGINNINGS, GrammarTooLarge, LeftRecursion, check_expansion
from .llguidance_schema import hold_schema

MAX_GRAMMAR_CHARS = 4 << 20
MAX_GROUPS = 4000
"""As many as the engine takes (engine/native/llama.py): llama.cpp's parser recurses on groups."""
RULE = re.compile(r"^[ \t]*([a-zA-Z0-9_-]+)[ \t]*::=", re.MULTILINE)
# comments, literals and sets: what stands in them names no rule
NOT_NAMES = re.compile(r'#[^\n]*|"(?:\\.|[^"\\\n])*"|\[(?:\\.|[^\]\\\n])*\]')
DECIMAL = re.compile(r"Decimal\('([^']*)'\)")
NAME = re.compile(r"(?<![a-zA-Z0-9_{,-])[a-zA-Z][a-zA-Z0-9_-]*")


class OutputMismatch(LocalMoeError):
    """An answer that isn't what its schema demands."""


def check_grammar(text: str) -> None:
    """Raises UsageError on a grammar that llama.cpp would surely refuse.

    The rest it says itself, once a model is loaded.
    """
    if not text.strip():
        raise UsageError("The grammar is empty.", "It needs a rule named root.")
    if len(text) > MAX_GRAMMAR_CHARS:
        raise UsageError(f"The grammar is larger than {MAX_GRAMMAR_CHARS >> 20} MiB.")
    bad = re.search("[\0\ud800-\udfff]", text)
    if bad:
        raise UsageError(f"The grammar holds no text at character {bad.start() + 1}.")
    bare = NOT_NAMES.sub(lambda found: " " if found[0][0] != "\n" else "\n", text)
    rules = set(RULE.findall(bare))
    if "root" not in rules:
        raise UsageError('The grammar has no rule named "root".', "The answer begins with it.")
    stray = re.search(r'["\[\]]', bare)
    if stray:
        line = bare[: stray.start()].count("\n") + 1
        raise UsageError(f"The grammar's line {line} has a {stray[0]} that nothing closes.")
    if text.count("(") > MAX_GROUPS:
        raise UsageError(f"The grammar has more than {MAX_GROUPS} groups.")
    if bare.count("(") != bare.count(")"):
        raise UsageError('The grammar has not as many "(" as ")".')
    for found in NAME.finditer(bare):
        if found[0] not in rules:
            line = bare[: found.start()].count("\n") + 1
            raise UsageError(f'The grammar\'s line {line} names "{found[0]}", which has no rule.')
    try:
        check_expansion(text)
    except LeftRecursion as error:
        raise UsageError(
            f'The grammar\'s rule "{error}" begins with itself (left recursion).',
            "Write repetition instead: item item*.",
        ) from None
    except GrammarTooLarge:
        raise UsageError(
            f"The grammar begins in more than {MAX_BEGINNINGS:,} ways, too many to follow.",
            "Make it simpler.",
        ) from None


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
