"""The keywords of a JSON schema: which there are, which a grammar can't hold, how two schemas
become one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from ..errors import UsageError

Path = tuple[str, ...]

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
# what says nothing about a value
NOTES = frozenset([
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default",
    "examples", "example", "deprecated", "readOnly", "writeOnly", "discriminator",
])  # fmt: skip
NUMBERS = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
COUNTS = frozenset([
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
])  # fmt: skip
LISTS = frozenset(["allOf", "anyOf", "oneOf", "prefixItems", "enum", "required"])
TEXTS = frozenset(["$ref", "pattern", "format"])
KINDS = {
    "object": frozenset([
        "properties", "required", "additionalProperties", "minProperties", "maxProperties",
    ]),
    "array": frozenset(["items", "prefixItems", "minItems", "maxItems"]),
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "number": NUMBERS,
}  # fmt: skip
KNOWN = frozenset(["type", "const", *COUNTS, *LISTS, *TEXTS, *NUMBERS]).union(*KINDS.values())
# what no grammar of reasonable size can hold; some of it may stand where it says nothing
NOT_HELD = {
    "multipleOf": (1,),
    "uniqueItems": (False,),
    "patternProperties": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "unevaluatedProperties": (True, False),
    "unevaluatedItems": (True,),
    "propertyNames": (True,),
    "not": (False,),
    **dict.fromkeys([
        "if", "then", "else", "contains", "minContains", "maxContains", "dependencies",
        "additionalItems", "contentEncoding", "contentMediaType", "contentSchema", "$anchor",
        "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$vocabulary",
    ], ()),
}  # fmt: skip
HIGHEST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
LOWEST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")


def schema_error(path: Path, problem: str, hint: str = "") -> UsageError:
    """The error for what stands at `path` in the schema."""
    place = "/".join(["#", *(part.replace("~", "~0").replace("/", "~1") for part in path)])
    shown = place if len(place) <= 100 else f"{place[:50]}...{place[-47:]}"
    return UsageError(f"The JSON schema at {ascii(shown)[1:-1]} {problem}.", hint)


def check_keywords(schema: dict[str, Any], path: Path) -> None:
    """Raises UsageError on a keyword that isn't known or held, or whose value makes no sense."""
    for name, value in schema.items():
        if name in NOTES or name.startswith("x-"):
            if name == "$id" and path:
                raise schema_error((*path, name), "changes what references mean", "Leave it out.")
        elif name in NOT_HELD:
            if not any(value is neutral or (value == neutral and type(value) is type(neutral))
                       for neutral in NOT_HELD[name]):  # fmt: skip
                raise schema_error((*path, name), "can't be held while answering", "Leave it out.")
        elif name not in KNOWN:
            near = difflib.get_close_matches(name[:40], [*KNOWN, *NOT_HELD, *NOTES], n=1)
            hint = f"Did you mean {near[0]}?" if near else "Leave it out."
            raise schema_error((*path, name), "is no keyword that is known", hint)
        else:
            problem = _problem(name, value)
            if problem:
                raise schema_error((*path, name), problem)


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with the value of a keyword."""
    if name in COUNTS:
        whole = isinstance(value, (int, float)) and not isinstance(value, bool)
        fine = whole and 0 <= value < math.inf and value == int(value)
        return None if fine else "must be a whole number of 0 or more"
    if name in NUMBERS:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if fine else "must be a number"
    if name in TEXTS:
        return None if isinstance(value, str) else "must be a string"
    if name in LISTS:
        return _list_problem(name, value)
    if name == "type":
        kinds = value if isinstance(value, list) and value else [value]
        return None if all(kind in TYPES for kind in kinds if isinstance(kind, str)) and all(
            isinstance(kind, str) for kind in kinds
        ) else f"must be one of {', '.join(TYPES)}, or a list of them"  # fmt: skip
    if name == "properties":
        return None if isinstance(value, dict) else "must be an object"
    if name == "items" and isinstance(value, list):
        return "is a list; write it as prefixItems"
    return None


def _list_problem(name: str, value: Any) -> str | None:
    if not isinstance(value, list) or (not value and name not in ("required", "prefixItems")):
        return "must be a list of something"
    if name == "required" and not all(isinstance(item, str) for item in value):
        return "must be a list of names"
    if name == "oneOf" and not _are_apart(value):
        return "has alternatives that may both hold; if that does no harm, write anyOf"
    return None


def _are_apart(parts: list[Any]) -> bool:
    """Whether no value can be of two of these: by type, or by constants, of the whole or of a
    property that all must have."""
    if len(parts) == 1 or _disjoint([_kinds(part) for part in parts]):
        return True
    if not all(isinstance(part, dict) for part in parts):
        return False
    required = [part.get("required") for part in parts]
    lists = [names if isinstance(names, list) else [] for names in required]
    shared = set.intersection(*({n for n in names if isinstance(n, str)} for names in lists))
    told = [parts, *([_property(name, part) for part in parts] for name in shared)]
    return any(_disjoint([_constants(part) for part in inner]) for inner in told)


def _property(name: str, schema: dict[str, Any]) -> Any:
    properties = schema.get("properties")
    return properties.get(name) if isinstance(properties, dict) else None


def _disjoint(sets: Sequence[set[str] | None]) -> bool:
    """Whether all are known and no two have something in common."""
    known = [each for each in sets if each is not None]
    n_members = sum(map(len, known))
    return len(known) == len(sets) and n_members == len(set().union(*known))


def _constants(part: Any) -> set[str] | None:
    if not isinstance(part, dict):
        return None
    values = [part["const"]] if "const" in part else part.get("enum")
    return {repr(value) for value in values} if isinstance(values, list) else None


def _kinds(part: Any) -> set[str]:
    """The types that a value may be of, as far as "type" says it."""
    given = part.get("type") if isinstance(part, dict) else None
    given = given if isinstance(given, list) else [given]
    kinds = {kind for kind in given if isinstance(kind, str)} or set(TYPES)
    return kinds | {"integer"} if "number" in kinds else kinds


def without_notes(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy with the keywords that say something."""
    return {name: value for name, value in schema.items() if name in KNOWN}


def resolve(root: Any, ref: str, path: Path) -> tuple[Any, Path]:
    """What a reference within the schema points at, and its place. Raises UsageError."""
    if ref != "#" and not ref.startswith("#/"):
        hint = 'References look like "#/$defs/name".'
        raise schema_error((*path, "$ref"), f"points outside the schema: {ascii(ref)[:60]}", hint)
    parts = [unquote(p).replace("~1", "/").replace("~0", "~") for p in ref.split("/")[1:]]
    target = root
    for part in parts:
        if isinstance(target, list) and part.isdecimal() and len(part) < 9:
            target = target[int(part)] if int(part) < len(target) else None
        else:
            target = target.get(part) if isinstance(target, dict) else None
        if target is None:
            raise schema_error((*path, "$ref"), f"points at nothing: {ascii(ref)[:60]}")
    return target, tuple(parts)


def merged(a: dict[str, Any], b: dict[str, Any], path: Path) -> dict[str, Any]:
    """The schema of what is of both. Raises UsageError where that can't be written as one."""
    for one, other in ((a, b), (b, a)):
        if one.get("additionalProperties", True) is not True and (
            other.get("properties", {}).keys() - one.get("properties", {}).keys()
        ):
            raise schema_error(
                path, 'has "additionalProperties" beside properties of another schema'
            )
    found = dict(a)
    for name, value in b.items():
        found[name] = _both(name, found[name], value, path) if name in found else value
    return found


def _both(name: str, a: Any, b: Any, path: Path) -> Any:
    if a == b and type(a) is type(b):
        return a
    if name in HIGHEST:
        return max(a, b)
    if name in LOWEST:
        return min(a, b)
    if name == "required":
        return [*a, *(item for item in b if item not in a)]
    if name == "properties":
        return {
            key: {"allOf": [a[key], b[key]]} if key in a and key in b else a.get(key, b.get(key))
            for key in [*a, *(key for key in b if key not in a)]
        }
    if name == "allOf":
        return [*a, *b]
    if name == "type":
        return _common_types(a, b, path)
    if name == "enum":
        return [value for value in a if value in b]
    raise schema_error(path, f'says "{name}" twice, and differently')


def _common_types(a: Any, b: Any, path: Path) -> list[str]:
    ours, theirs = ([kinds] if isinstance(kinds, str) else kinds for kinds in (a, b))
    common = [kind for kind in ours if kind in theirs]
    if "number" in ours and "integer" in theirs or "integer" in ours and "number" in theirs:
        common.append("integer")
    if not common:
        raise schema_error(path, "allows nothing at all")
    return list(dict.fromkeys(common))
