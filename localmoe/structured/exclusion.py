"""Whether the alternatives of a oneOf exclude one another, so that anyOf says the same.

Two do where no answer to the one satisfies the other: by their types or values, by a property that
both must have, or by a name that the one demands and the other has no place for. Answers are held
to less than a schema allows: objects have the names that are listed alone, and a property that
tells alternatives apart is made to be there (pydantic doesn't demand a tag that has a default).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .json_schema import ReadSchema
from .keywords import LOWER_BOUNDS, TYPE_KEYWORDS, TYPES, UPPER_BOUNDS

MAX_SHAPES = 64
MAX_ALTERNATIVES = 400
MAX_PROPERTY_DEPTH = 4
ALL_TYPES = frozenset(TYPES)
RANGES = (("minLength", "maxLength", "string"), ("minItems", "maxItems", "array"))


@dataclass(frozen=True, slots=True)
class Shape:
    """What is surely true of all values of a schema, as far as it matters here.

    `answer_types` are those of an answer that the schema alone holds: where it says no type, that
    has one which its keywords speak of. `values` are texts of JSON; None stands for all. Of a
    property, all schemas hold that are listed. `others` says what the schema has for names that
    aren't listed: "unsaid", "refused" or "allowed". `ranges` are the least and the most that a
    keyword's number may be.
    """

    types: frozenset[str] = ALL_TYPES
    answer_types: frozenset[str] = ALL_TYPES
    values: frozenset[str] | None = None
    properties: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    others: str = "unsaid"
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


UNKNOWN = Shape(others="allowed")


class Shapes:
    """Finds the shapes of schemas; those of a definition once."""

    def __init__(self, read: ReadSchema) -> None:
        self._read = read
        self._of_definitions: dict[str, list[Shape]] = {}

    def of(self, schema: Any) -> list[Shape]:
        """Returns the shapes of a schema, one of which each of its values has."""
        if isinstance(schema, bool):
            return [UNKNOWN] if schema else []
        found = [_own_shape(schema)]
        if "$ref" in schema:
            ref = schema["$ref"]
            if ref not in self._of_definitions:
                self._of_definitions[ref] = self.of(self._read.target(ref))
            found = _both(found, self._of_definitions[ref])
        for part in schema.get("allOf", ()):
            found = _both(found, self.of(part))
        for name in ("anyOf", "oneOf"):
            if name in schema:
                parts = [shape for part in schema[name] for shape in self.of(part)]
                found = _both(found, parts if len(parts) <= MAX_SHAPES else [UNKNOWN])
        return found

    def telling_properties(self, parts: Sequence[Any], *, is_open: bool) -> list[set[str]] | None:
        """Returns which properties each alternative must be made to have so that all exclude one
        another; None where they may overlap.

        With `is_open`, objects may have names that aren't listed.
        """
        if len(parts) > MAX_ALTERNATIVES:
            return None
        known = [self.of(part) for part in parts]
        forced: list[set[str]] = [set() for _ in parts]
        for i, ours in enumerate(known):
            for j in range(i):
                found = self._all_apart(ours, known[j], is_open, 0)
                if found is None:
                    return None
                forced[i] |= found
                forced[j] |= found
        return forced

    def _all_apart(
        self, ours: Sequence[Shape], theirs: Sequence[Shape], is_open: bool, depth: int
    ) -> set[str] | None:
        """The properties that must be there so that no answer is of both; None: they may be."""
        forced: set[str] = set()
        for a in ours:
            for b in theirs:
                found = self._apart(a, b, is_open, depth)
                if found is None:
                    return None
                forced |= found
        return forced

    def _apart(self, a: Shape, b: Shape, is_open: bool, depth: int) -> set[str] | None:
        common = a.types & b.types
        if not is_open:
            common = (a.answer_types & b.types) | (a.types & b.answer_types)
        if not common or (
            a.values is not None and b.values is not None and not a.values & b.values
        ):
            return set()
        forced: set[str] = set()
        for kind in common:
            if kind == "object":
                found = self._objects_apart(a, b, is_open, depth)
                if found is None:
                    return None
                forced |= found
            elif not _ranges_apart(a, b, "number" if kind == "integer" else kind):
                return None
        return forced

    def _objects_apart(self, a: Shape, b: Shape, is_open: bool, depth: int) -> set[str] | None:
        if _lacks(a, b, is_open) and _lacks(b, a, is_open):
            return set()
        if depth >= MAX_PROPERTY_DEPTH:
            return None
        shared = [name for name in a.properties if name in b.properties]
        shared.sort(key=lambda name: not (name in a.required and name in b.required))
        for name in shared:
            ours, theirs = (self.of({"allOf": list(one.properties[name])}) for one in (a, b))
            if self._all_apart(ours, theirs, True, depth + 1) == set():
                return {name}
        return None


def listed_names(found: Sequence[Shape]) -> set[str]:
    """All names of properties of some shapes."""
    return {name for shape in found for name in (*shape.properties, *sorted(shape.required))}


def _own_shape(schema: Mapping[str, Any]) -> Shape:
    kinds = schema.get("type", TYPES)
    types = frozenset([kinds] if isinstance(kinds, str) else kinds)
    if "number" in types:
        types |= {"integer"}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    others = "unsaid"
    if schema.get("additionalProperties", schema.get("unevaluatedProperties")) is False:
        others = "refused"
    elif "additionalProperties" in schema:
        others = "allowed"
    if "patternProperties" in schema:
        others = "allowed"
    ranges = {}
    for low, high, kind in RANGES:
        if low in schema or high in schema:
            ranges[kind] = (schema.get(low, 0), schema.get(high, math.inf))
    lows = [schema[name] for name in LOWER_BOUNDS if name in schema]
    highs = [schema[name] for name in UPPER_BOUNDS if name in schema]
    if lows or highs:
        ranges["number"] = (max(lows, default=-math.inf), min(highs, default=math.inf))
    spoken_of = [kind for kind, names in TYPE_KEYWORDS.items() if names & schema.keys()]
    is_plain = "type" not in schema and values is None and bool(spoken_of)
    return Shape(
        types,
        frozenset(spoken_of) if is_plain else types,
        None if values is None else frozenset(json.dumps(v, sort_keys=True) for v in values),
        {name: (one,) for name, one in schema.get("properties", {}).items()},
        frozenset(schema.get("required", ())),
        others,
        ranges,
    )


def _both(ours: Sequence[Shape], theirs: Sequence[Shape]) -> list[Shape]:
    """The shapes of values that are of both schemas."""
    if len(ours) * len(theirs) > MAX_SHAPES:
        return [UNKNOWN]
    return [_merged(a, b) for a in ours for b in theirs]


def _merged(a: Shape, b: Shape) -> Shape:
    if a.values is None or b.values is None:
        values = b.values if a.values is None else a.values
    else:
        values = a.values & b.values
    said = {a.others, b.others}
    others = next(one for one in ("refused", "allowed", "unsaid") if one in said)
    names = {**a.properties, **b.properties}
    return replace(
        a,
        types=a.types & b.types,
        answer_types=a.types & b.types,
        values=values,
        properties={n: a.properties.get(n, ()) + b.properties.get(n, ()) for n in names},
        required=a.required | b.required,
        others=others,
        ranges={**a.ranges, **b.ranges},
    )


def _ranges_apart(a: Shape, b: Shape, kind: str) -> bool:
    if kind not in a.ranges or kind not in b.ranges:
        return False
    (low, high), (other_low, other_high) = a.ranges[kind], b.ranges[kind]
    return high < other_low or other_high < low


def _lacks(a: Shape, b: Shape, is_open: bool) -> bool:
    """Whether an answer of shape `a` never has all that `b` demands, or has what `b` refuses."""
    is_listed = bool(a.properties or a.required)
    is_closed = a.others == "refused" or (a.others == "unsaid" and not is_open and is_listed)
    if is_closed and b.required - (a.properties.keys() | a.required):
        return True
    return b.others == "refused" and bool(a.required - b.properties.keys())
