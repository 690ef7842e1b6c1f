"""The keywords of JSON Schema: which assert something, and what their values must be.

A keyword that nobody knows only annotates, as JSON Schema has it; but for one that is nearly the
name of a keyword that asserts: then it is a slip, which nothing would hold.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError

Path = tuple[str, ...]

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
LOWER_BOUNDS = ("minimum", "exclusiveMinimum")
UPPER_BOUNDS = ("maximum", "exclusiveMaximum")
BOUNDS = frozenset([*LOWER_BOUNDS, *UPPER_BOUNDS])
COUNTS = frozenset([
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
])  # fmt: skip
SCHEMAS = frozenset([
    "items", "additionalProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems",
])  # fmt: skip
SCHEMA_LISTS = frozenset(["allOf", "anyOf", "oneOf", "prefixItems"])
SCHEMA_MAPS = frozenset(["properties", "patternProperties"])
TYPE_KEYWORDS = {
    "object": frozenset([
        "properties", "patternProperties", "additionalProperties", "propertyNames", "required",
        "minProperties", "maxProperties",
    ]),
    "array": frozenset(["items", "prefixItems", "minItems", "maxItems", "uniqueItems"]),
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "number": frozenset([*BOUNDS, "multipleOf"]),
}  # fmt: skip
ALTERNATIVES = frozenset(["allOf", "anyOf", "oneOf"])
COMBINING = ALTERNATIVES | {"$ref"}
HELD = frozenset([
    "type", "const", "enum", "unevaluatedProperties", "unevaluatedItems", *COMBINING,
]).union(*TYPE_KEYWORDS.values())  # fmt: skip
REFUSED = frozenset([
    "contains", "minContains", "maxContains", "if", "then", "else", "not", "dependencies",
    "dependentRequired", "dependentSchemas", "$dynamicRef", "$recursiveRef",
])  # fmt: skip
"""What asserts something that no grammar of reasonable size can hold."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "dependencies": ({},), "dependentRequired": ({},), "dependentSchemas": ({},), "not": (False,),
    "uniqueItems": (False,), "propertyNames": (True, {}), "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}), "patternProperties": ({},),
}  # fmt: skip
"""Values with which a keyword says nothing."""
ANNOTATIONS = frozenset([
    "$schema", "$id", "$anchor", "$comment", "$defs", "definitions", "title", "description",
    "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
    "nullable", "additionalItems", "contentEncoding", "contentMediaType", "contentSchema", "note",
])  # fmt: skip
SLIP_RATIO = 0.84


def schema_error(path: Path, problem: str, hint: str = "") -> UsageError:
    """The error for what stands at `path` in the schema."""
    place = "/".join(["#", *(part.replace("~", "~0").replace("/", "~1") for part in path)])
    shown = place if len(place) <= 100 else f"{place[:50]}...{place[-47:]}"
    return UsageError(f"The JSON schema at {ascii(shown)[1:-1]} {problem}.", hint)


def check_keyword(name: str, value: Any, path: Path) -> None:
    """Raises UsageError on a keyword that can't be held, that is a slip, or whose value is wrong.

    `path` is that of the schema that it stands in.
    """
    if name in REFUSED:
        raise schema_error((*path, name), "can't be held while answering", "Leave it out.")
    if name in HELD:
        problem = value_problem(name, value)
        if problem:
            raise schema_error((*path, name), problem)
    elif (meant := meant_keyword(name)) and value_problem(meant, value) is None:
        raise schema_error(
            (*path, name),
            "is no keyword that is known",
            f"Did you mean {meant}? (A note of your own begins with x-.)",
        )


def meant_keyword(name: str) -> str | None:
    """The keyword that asserts something and that `name` is a slip of; None for a plain note."""
    if name in ANNOTATIONS or name.startswith(("x-", "$")):
        return None
    asserting = {keyword.lower(): keyword for keyword in [*HELD, *REFUSED]}
    plain = name[:40].lower().replace("_", "").replace("-", "")
    near = difflib.get_close_matches(plain, asserting, n=1, cutoff=SLIP_RATIO)
    return asserting[near[0]] if near else None


def is_neutral(name: str, value: Any) -> bool:
    """Whether a keyword says nothing with this value."""
    return any(
        value == neutral and type(value) is type(neutral) for neutral in NEUTRAL.get(name, ())
    )


def value_problem(name: str, value: Any) -> str | None:
    """What is wrong with the value of a keyword; None where nothing is."""
    if name in COUNTS:
        is_count = is_number(value) and value >= 0 and value == int(value)
        return None if is_count else "must be a whole number of 0 or more"
    if name in BOUNDS:
        return None if is_number(value) else "must be a number"
    if name == "multipleOf":
        return None if is_number(value) and value > 0 else "must be a number above 0"
    if name in ("$ref", "pattern", "format"):
        return None if isinstance(value, str) else "must be a text"
    if name in SCHEMA_MAPS:
        return None if isinstance(value, dict) else "must be an object"
    if name in SCHEMA_LISTS or name in ("enum", "required"):
        return _list_problem(name, value)
    if name == "uniqueItems":
        return None if isinstance(value, bool) else "must be true or false"
    if name == "type":
        kinds = value if isinstance(value, list) and value else [value]
        is_type = all(isinstance(kind, str) and kind in TYPES for kind in kinds)
        return None if is_type else f"must be one of {', '.join(TYPES)}, or a list of them"
    if name in SCHEMAS:
        return None if isinstance(value, (dict, bool)) else "is neither an object nor true"
    return None


def _list_problem(name: str, value: Any) -> str | None:
    if not isinstance(value, list) or (not value and name not in ("required", "prefixItems")):
        return "must be a list of something"
    if name == "required" and not all(isinstance(item, str) for item in value):
        return "must be a list of names"
    return None


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that is finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_of_type(value: Any, kind: str) -> bool:
    """Whether a value of JSON is of a type of JSON Schema."""
    if isinstance(value, bool):
        return kind == "boolean"
    if kind in ("number", "integer"):
        return isinstance(value, int) or (
            isinstance(value, float) and (kind == "number" or value.is_integer())
        )
    kinds: dict[str, type] = {"object": dict, "array": list, "string": str, "null": type(None)}
    return kind in kinds and isinstance(value, kinds[kind])
