"""Reads a JSON schema: checks its keywords, and writes it in one form, Draft 2020-12 without notes.

What others say in their own way is said here in the standard's: OpenAPI's `nullable`, OpenAI's
object around a schema, tuples and exclusive bounds of older drafts, `not` of everything. References
lead to `$defs` alone. Answers are checked against this form (check.py), and what llguidance is
given is made of it (llguidance_schema.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from ..errors import UsageError
from .keywords import (
    ALTERNATIVES,
    HELD,
    SCHEMA_LISTS,
    SCHEMA_MAPS,
    SCHEMAS,
    Path,
    check_keyword,
    is_neutral,
    schema_error,
)
from .patterns import checkable_pattern, is_quick

MAX_SCHEMA_CHARS = 4 << 20
MAX_DEPTH = 48
MAX_SCHEMAS = 20_000
DEFINITION = "#/$defs/"


@dataclass(frozen=True, slots=True)
class ReadSchema:
    """A schema in one form. `places` says where in the user's schema each definition stands."""

    root: Any
    definitions: dict[str, Any]
    places: dict[str, Path]

    def target(self, ref: str) -> Any:
        """Returns what a reference of this form leads to."""
        return self.definitions[ref.removeprefix(DEFINITION)]


def read_schema(text: str) -> ReadSchema:
    """Returns a schema, given as JSON, in one form. Raises UsageError, naming what and where."""
    if len(text) > MAX_SCHEMA_CHARS:
        raise UsageError(f"The JSON schema is larger than {MAX_SCHEMA_CHARS >> 20} MiB.")
    try:
        schema = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        json.dumps(schema, ensure_ascii=False).encode()
        read = _Reader(_unwrapped(schema)).read()
    except UnicodeEncodeError:
        raise UsageError("The JSON schema holds half of a surrogate pair.") from None
    except RecursionError:
        raise UsageError("The JSON schema is nested too deep.", "Make it flatter.") from None
    except (ValueError, OverflowError) as error:
        raise UsageError(f"The JSON schema is not JSON: {_short(error)}.") from None
    _check_circles(read)
    return read


def checked_form(read: ReadSchema, unheld_patterns: Collection[str]) -> Any:
    """Returns a schema for jsonschema, with numbers that compare exactly.

    Python's `re` may take for ever over a pattern: those that are held are only checked where it
    surely doesn't.
    """
    root = _checkable(read.root, unheld_patterns)
    if isinstance(root, bool):
        return root
    definitions = {
        name: _checkable(schema, unheld_patterns) for name, schema in read.definitions.items()
    }
    return json.loads(json.dumps({**root, "$defs": definitions}), parse_float=Decimal)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is too large")
    return value


def _short(error: Exception) -> str:
    return str(error).split(";")[0][:120]


def _unwrapped(schema: Any) -> Any:
    """The schema itself where it comes in OpenAI's object `json_schema`, or in all of
    `response_format`."""
    if isinstance(schema, dict) and schema.get("type") == "json_schema":
        schema = schema.get("json_schema", schema)
    if (
        isinstance(schema, dict)
        and isinstance(schema.get("schema"), (dict, bool))
        and isinstance(schema.get("name", ""), str)
        and not schema.keys() & (HELD | {"$defs", "definitions"})
    ):
        return schema["schema"]
    return schema


class _Reader:
    """A schema while it is read. Definitions are read one after the other, not within another."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._names: dict[Path, str] = {}
        self._waiting: list[tuple[str, Any, Path]] = []
        self._anchors: dict[str, Path] | None = None
        self._n_schemas = 0

    def read(self) -> ReadSchema:
        root = self._schema(self._root, (), 0)
        definitions = {}
        while self._waiting:
            name, schema, path = self._waiting.pop()
            definitions[name] = self._schema(schema, path, 0)
        places = {name: path for path, name in self._names.items()}
        return ReadSchema(root, definitions, places)

    def _schema(self, schema: Any, path: Path, depth: int) -> Any:
        self._n_schemas += 1
        if self._n_schemas > MAX_SCHEMAS:
            raise UsageError(f"The JSON schema has more than {MAX_SCHEMAS} parts.")
        if depth >= MAX_DEPTH:
            raise schema_error(path, f"is nested deeper than {MAX_DEPTH}")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise schema_error(path, "is neither an object nor true")
        self._check_id(schema, path)
        said = _modern(schema, path)
        if said is None:
            return False
        found = {}
        for name, value in said.items():
            check_keyword(name, value, path)
            if name in HELD and not is_neutral(name, value):
                found[name] = self._value(name, value, path, depth + 1)
        if schema.get("nullable") is True and found:
            return {"anyOf": [found, {"type": "null"}]}
        return found

    def _value(self, name: str, value: Any, path: Path, depth: int) -> Any:
        inner = (*path, name)
        if name == "$ref":
            return self._reference(value, path)
        if name in SCHEMAS:
            return self._schema(value, inner, depth)
        if name in SCHEMA_LISTS:
            return [self._schema(one, (*inner, str(i)), depth) for i, one in enumerate(value)]
        if name in SCHEMA_MAPS:
            return {key: self._schema(one, (*inner, key), depth) for key, one in value.items()}
        return value

    # ---- references ----

    def _reference(self, ref: str, path: Path) -> str:
        target, place = self._resolved(ref, path)
        if place not in self._names:
            self._names[place] = str(len(self._names))
            self._waiting.append((self._names[place], target, place))
        return DEFINITION + self._names[place]

    def _resolved(self, ref: str, path: Path) -> tuple[Any, Path]:
        """What a reference points at, and where that stands."""
        base = self._root.get("$id") if isinstance(self._root, dict) else None
        if isinstance(base, str) and base and ref.startswith(base.removesuffix("#")):
            ref = "#" + ref[len(base.removesuffix("#")) :].removeprefix("#")
        parts = tuple(
            unquote(part).replace("~1", "/").replace("~0", "~") for part in ref.split("/")[1:]
        )
        if ref != "#" and not ref.startswith("#/"):
            found = self._anchored().get(ref)
            if found is None:
                hint = 'References look like "#/$defs/name".'
                problem = f"points outside the schema: {ascii(ref)[:60]}"
                raise schema_error((*path, "$ref"), problem, hint)
            parts = found
        target = self._root
        for part in parts:
            if isinstance(target, list) and part.isdecimal() and len(part) < 9:
                target = target[int(part)] if int(part) < len(target) else None
            else:
                target = target.get(part) if isinstance(target, dict) else None
            if target is None:
                raise schema_error((*path, "$ref"), f"points at nothing: {ascii(ref)[:60]}")
        return target, parts

    def _anchored(self) -> dict[str, Path]:
        """The places that have a name of their own, by $anchor or $id."""
        if self._anchors is None:
            self._anchors = {}
            for value, path in _walk(self._root, ()):
                if isinstance(value, dict):
                    for name, prefix in (("$anchor", "#"), ("$id", "")):
                        if isinstance(value.get(name), str):
                            self._anchors.setdefault(prefix + value[name], path)
        return self._anchors

    def _check_id(self, schema: dict[str, Any], path: Path) -> None:
        """References within a schema with an $id of its own would be relative to that."""
        if not path or not isinstance(schema.get("$id"), str):
            return
        for value, _ in _walk(schema, ()):
            ref = value.get("$ref") if isinstance(value, dict) else None
            if isinstance(ref, str) and ref.startswith("#"):
                raise schema_error((*path, "$id"), "changes what references mean", "Leave it out.")


def _walk(value: Any, path: Path) -> Iterator[tuple[Any, Path]]:
    waiting = [(value, path)]
    while waiting:
        value, path = waiting.pop()
        yield value, path
        if isinstance(value, dict):
            waiting += [(inner, (*path, key)) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(inner, (*path, str(i))) for i, inner in enumerate(value)]


def _modern(schema: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The keywords of a schema as Draft 2020-12 has them; None where nothing can satisfy them."""
    said = {name: value for name, value in schema.items() if not is_neutral(name, value)}
    if _is_everything(said.get("not")):
        return None
    for low, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(said.get(low), bool):
            is_open = said.pop(low)
            if is_open and bound in said:
                said[low] = said.pop(bound)
    more = said.pop("additionalItems", True)
    if isinstance(said.get("items"), list):
        if "prefixItems" in said:
            raise schema_error((*path, "items"), "is a list beside prefixItems")
        said["prefixItems"] = said.pop("items")
        if more is not True:
            said["items"] = more
    if "if" not in said or not ("then" in said or "else" in said):
        for name in ("if", "then", "else"):
            said.pop(name, None)
    if "contains" not in said or said.get("minContains") == 0 and "maxContains" not in said:
        for name in ("contains", "minContains", "maxContains"):
            said.pop(name, None)
    return said


def _is_everything(schema: Any) -> bool:
    """Whether a schema surely allows every value."""
    if isinstance(schema, dict):
        return not any(_may_assert(name, value) for name, value in schema.items())
    return schema is True


def _may_assert(name: str, value: Any) -> bool:
    return (name in HELD or name in ("not", "if", "contains")) and not is_neutral(name, value)


def _checkable(schema: Any, unheld_patterns: Collection[str]) -> Any:
    """A schema of one form for jsonschema."""
    if isinstance(schema, bool):
        return schema
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in SCHEMAS:
            found[name] = _checkable(value, unheld_patterns)
        elif name in SCHEMA_LISTS:
            found[name] = [_checkable(one, unheld_patterns) for one in value]
        elif name in SCHEMA_MAPS:
            found[name] = {key: _checkable(one, unheld_patterns) for key, one in value.items()}
        elif name != "pattern":
            found[name] = value
        elif value in unheld_patterns or is_quick(value):
            found[name] = checkable_pattern(value)
    if not all(map(is_quick, found.get("patternProperties", ()))):
        for name in ("patternProperties", "additionalProperties", "unevaluatedProperties"):
            found.pop(name, None)
    return found


def _check_circles(read: ReadSchema) -> None:
    """Raises UsageError where a definition refers to itself with nothing between."""
    done: set[str] = set()
    for start in read.definitions:
        under_way: dict[str, None] = {}
        _follow(start, read, under_way, done)


def _follow(start: str, read: ReadSchema, under_way: dict[str, None], done: set[str]) -> None:
    stack: list[tuple[str, Iterator[str]]] = []

    def enter(name: str) -> None:
        under_way[name] = None
        stack.append((name, iter(list(in_place_references(read.definitions[name])))))

    if start not in done:
        enter(start)
    while stack:
        name, following = stack[-1]
        target = next(following, None)
        if target is None:
            stack.pop()
            del under_way[name]
            done.add(name)
        elif target in under_way:
            raise schema_error(read.places[target], "refers to itself with nothing between")
        elif target not in done:
            enter(target)


def in_place_references(schema: Any) -> Iterator[str]:
    """Yields the definitions that a schema of one form refers to for the same value."""
    if not isinstance(schema, dict):
        return
    if "$ref" in schema:
        yield schema["$ref"].removeprefix(DEFINITION)
    for name in ALTERNATIVES & schema.keys():
        for one in schema[name]:
            yield from in_place_references(one)
