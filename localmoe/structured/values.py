"""Constants of a schema, `const` and `enum`: which of them the other keywords leave."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .keywords import LOWER_BOUNDS, UPPER_BOUNDS, Path, is_number, is_of_type, schema_error
from .numbers import is_exact, is_multiple

MAX_NESTED_VALUES = 20_000
"""Values within lists and objects, of which llguidance makes a rule each: 0.1 ms and 4 kB."""
NEEDS_ESCAPE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")
CHECKED_BY_FITS = frozenset([
    "type", "minLength", "maxLength", *LOWER_BOUNDS, *UPPER_BOUNDS, "multipleOf",
])  # fmt: skip


def allowed_values(schema: Mapping[str, Any], path: Path) -> list[Any]:
    """Returns the constants that `const`, `enum` and simple keywords beside them all allow.

    Raises UsageError where there are none, too many, or one that can't be held.
    """
    name = "const" if "const" in schema else "enum"
    inner = (*path, name)
    values = [schema["const"]] if name == "const" else schema["enum"]
    if name == "const" and "enum" in schema:
        values = [value for value in values if _is_among(value, schema["enum"])]
    kept = list({json.dumps(value): value for value in values if _fits(value, schema)}.values())
    if not kept:
        raise schema_error(inner, "allows nothing at all beside the other keywords")
    n_nested = 0
    for value in kept:
        for one in _within(value):
            n_nested += isinstance(value, (list, dict))
            if is_number(one) and not is_exact(one):
                raise schema_error(inner, "holds a number of more digits than can be held")
    if n_nested > MAX_NESTED_VALUES:
        raise schema_error(inner, f"has more than {MAX_NESTED_VALUES:,} values in lists or objects")
    return kept


def needs_escape(value: Any) -> bool:
    """Returns whether a text within a constant can only be written by `\\u` and a number."""
    return any(isinstance(one, str) and NEEDS_ESCAPE.search(one) for one in _within(value))


def _within(value: Any) -> Iterator[Any]:
    """A value of JSON and all that it holds, names included."""
    yield value
    for one in value if isinstance(value, (list, dict)) else ():
        yield from _within(one)
    for one in value.values() if isinstance(value, dict) else ():
        yield from _within(one)


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a constant is of the type, the length and within the bounds of a schema."""
    kinds = schema.get("type")
    if kinds and not any(
        is_of_type(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)
    ):
        return False
    if isinstance(value, str):
        low, high = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        return bool(low <= len(value) <= high)
    if not is_number(value):
        return True
    step = schema.get("multipleOf")
    return (
        all(value >= schema[name] for name in ("minimum",) if name in schema)
        and all(value > schema[name] for name in ("exclusiveMinimum",) if name in schema)
        and all(value <= schema[name] for name in ("maximum",) if name in schema)
        and all(value < schema[name] for name in ("exclusiveMaximum",) if name in schema)
        and (step is None or is_multiple(value, step))
    )


def _is_among(value: Any, values: Iterable[Any]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)
