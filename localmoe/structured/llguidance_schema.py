"""Writes a JSON schema for llguidance, which holds answers to it while they are generated.

llguidance takes fewer keywords than people write, and drops what it doesn't know. So each keyword
is written here as what it takes, or is refused by name and place; three are left to the check of
the answer, with a warning: `uniqueItems`, `propertyNames` and formats that can't be held. Where a
schema allows more than is asked for, less is allowed: no properties that aren't listed, nothing
after a tuple.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..engine.schema_grammar import grammar_problem
from ..errors import UsageError
from .exclusion import Shapes, listed_names
from .formats import CHECKED_AT_THE_END, LENGTHS, PATTERNS, canonical_format
from .json_schema import DEFINITION, ReadSchema, checked_form, read_schema
from .keywords import (
    COMBINING,
    TYPE_KEYWORDS,
    Path,
    schema_error,
)
from .numbers import multiple_for, within_integers, within_numbers
from .patterns import PatternRefused, is_quick, rust_patterns
from .values import CHECKED_BY_FITS, allowed_values, needs_escape

MAX_COUNTED = 50_000
"""Longer strings and lists than this aren't counted; no context would hold them."""
MAX_VALUES_BESIDE = 1000
ESCAPES = 'nrbtf\\"'
"""Without u: by that, a name that isn't listed could spell one that is."""
WHITESPACE = "(\n {0,16}| )"
CONSTANTS = frozenset(["const", "enum"])
UNEVALUATED = frozenset(["unevaluatedProperties", "unevaluatedItems"])
NOT_REQUIRED = "names {}, which may not be there"


@dataclass(frozen=True, slots=True)
class HeldSchema:
    """A schema that answers can be held to.

    `schema` is JSON for llguidance, `checked` what jsonschema checks an answer by; `warnings` say
    what is only checked at the end.
    """

    schema: str
    checked: Any
    warnings: tuple[str, ...]


@lru_cache(maxsize=32)
def hold_schema(text: str) -> HeldSchema:
    """Returns how answers are held to a schema, given as JSON. Raises UsageError where they can't.

    It takes no model, and bounded time and memory whatever the schema is.
    """
    read = read_schema(text)
    writer = _Writer(read)
    try:
        schema = writer.write()
    except RecursionError:
        raise UsageError("The JSON schema is nested too deep.", "Make it flatter.") from None
    problem = grammar_problem(schema)
    if problem:
        raise _refusal(problem)
    return HeldSchema(schema, checked_form(read, writer.unheld_patterns), tuple(writer.warnings))


def _refusal(problem: str) -> UsageError:
    """llguidance's reason as a sentence of ours."""
    if "Unsatisfiable" in problem or "unsatisfiable" in problem:
        reason = problem.removeprefix("Unsatisfiable schema: ")[:120]
        return UsageError(f"Nothing can satisfy the JSON schema: {ascii(reason)[1:-1]}.")
    if "too large" in problem or "too big" in problem or "limit" in problem:
        return UsageError("The JSON schema is too large for a grammar.", "Make it simpler.")
    return UsageError(
        f"The JSON schema can't be held while answering: {ascii(problem[:160])[1:-1]}."
    )


class _Writer:
    """A schema while it is written. A definition has two forms: one for itself, and an open one,
    whose objects may have other names, for where it is part of something larger."""

    def __init__(self, read: ReadSchema) -> None:
        self._read = read
        self._shapes = Shapes(read)
        self._names: dict[tuple[str, bool], str] = {}
        self._waiting: list[tuple[str, str, bool]] = []
        self._definitions: dict[str, Any] = {}
        self._patterns_tried: set[str] = set()
        self._pattern_names: dict[str, str] = {}
        self._needs_escapes = False
        self.unheld_patterns: set[str] = set()
        self.warnings: dict[str, None] = {}

    def write(self) -> str:
        """Returns the schema for llguidance as JSON."""
        root = self._schema(self._read.root, (), False)
        while self._waiting:
            name, ref, is_open = self._waiting.pop()
            path = self._read.places[ref.removeprefix(DEFINITION)]
            self._definitions[name] = self._schema(self._read.target(ref), path, is_open)
        if root is False:
            raise UsageError("Nothing can satisfy the JSON schema.", "It refuses every value.")
        options = {
            "whitespace_flexible": True,
            "whitespace_pattern": WHITESPACE,
            "json_allowed_escapes": ESCAPES + ("u" if self._needs_escapes else ""),
        }
        rest = {"$defs": self._definitions} if self._definitions else {}
        return json.dumps({**({} if root is True else root), **rest, "x-guidance": options})

    def _schema(self, schema: Any, path: Path, is_open: bool) -> Any:
        if isinstance(schema, bool):
            return schema
        if not COMBINING & schema.keys():
            return self._plain(schema, path, is_open)
        own = {name: value for name, value in schema.items() if name not in COMBINING}
        parts = schema.get("allOf", [])
        if not own and len(schema) == 1:
            if "$ref" in schema:
                return {"$ref": self._reference(schema["$ref"], is_open)}
            if len(parts) == 1:
                return self._schema(parts[0], (*path, "allOf", "0"), is_open)
            for name in ("anyOf", "oneOf"):
                if name in schema:
                    return self._either(name, schema, path, is_open, None)
        return self._intersection(own, schema, path, is_open)

    def _reference(self, ref: str, is_open: bool) -> str:
        key = (ref, is_open)
        if key not in self._names:
            self._names[key] = str(len(self._names))
            self._waiting.append((self._names[key], ref, is_open))
        return DEFINITION + self._names[key]

    def _warn(self, path: Path, reason: str) -> None:
        """Notes what an answer is checked for only at its end."""
        error = schema_error(path, f"{reason}; answers are checked for it at their end")
        self.warnings.setdefault(error.message)

    # ---- several schemas for one value ----

    def _intersection(
        self, own: dict[str, Any], schema: dict[str, Any], path: Path, is_open: bool
    ) -> Any:
        """What is of all parts. Objects get a list of all names, unless a part speaks of others."""
        base = {name: value for name, value in schema.items() if name not in ("anyOf", "oneOf")}
        found = self._shapes.of(base)
        must_close = self._closes_unevaluated(own, schema, path, found)
        closes = not is_open and all(shape.others == "unsaid" for shape in found)
        own = {name: value for name, value in own.items() if name not in UNEVALUATED}
        parts = [self._plain(own, path, True)] if own else []
        if "$ref" in schema:
            parts.append({"$ref": self._reference(schema["$ref"], True)})
        for i, part in enumerate(schema.get("allOf", ())):
            parts.append(self._schema(part, (*path, "allOf", str(i)), True))
        names = listed_names(found) if closes or must_close else None
        choices = [name for name in ("anyOf", "oneOf") if name in schema]
        for name in choices:
            if names is not None and len(choices) > 1:
                names |= listed_names(self._shapes.of(schema))
            parts.append(self._either(name, schema, path, is_open, names))
        if names is not None and (names or must_close) and not choices:
            parts.append(_closing(names))
        return False if False in parts else {"allOf": parts}

    def _closes_unevaluated(
        self, own: Mapping[str, Any], schema: Mapping[str, Any], path: Path, found: Sequence[Any]
    ) -> bool:
        """Whether objects have to be closed, so that nothing in them is unevaluated."""
        for name in UNEVALUATED & own.keys():
            is_simple = len(found) == 1 and found[0].others in ("unsaid", "refused")
            one_choice = not ("anyOf" in schema and "oneOf" in schema)
            if (
                name == "unevaluatedItems"
                or own[name] is not False
                or not (is_simple and one_choice)
            ):
                raise schema_error((*path, name), "can't be held while answering", "Leave it out.")
        return "unevaluatedProperties" in own

    def _either(
        self,
        name: str,
        schema: Mapping[str, Any],
        path: Path,
        is_open: bool,
        names: set[str] | None,
    ) -> Any:
        """One of several schemas. With `names`, objects have these and those of the one alone."""
        parts = schema[name]
        is_part = len(schema) > 1
        forced: Sequence[set[str]] = [set()] * len(parts)
        if name == "oneOf" and len(parts) > 1:
            forced = self._forced(parts, schema, path, is_open or names is None and is_part)
        found, refused = [], []
        for i, part in enumerate(parts):
            try:
                branch = self._schema(part, (*path, name, str(i)), is_open or is_part)
            except _PatternError as error:
                refused.append(error)
                continue
            more = [{"required": sorted(forced[i])}] if forced[i] else []
            ours = listed_names(self._shapes.of(part)) if names is not None else set()
            if names is not None and names | ours:
                more.append(_closing(names | ours))
            if branch is not False:
                found.append({"allOf": [branch, *more]} if more else branch)
        if refused and not found:
            raise refused[0]
        for one in refused:
            self.warnings.setdefault(f"{one.message.rstrip('.')}: no answer takes that form.")
        return {"anyOf": found} if found else False

    def _forced(
        self, parts: Sequence[Any], schema: Mapping[str, Any], path: Path, is_open: bool
    ) -> Sequence[set[str]]:
        base = {name: value for name, value in schema.items() if name != "oneOf"}
        is_open = is_open or "anyOf" in base
        whole = [{"allOf": [base, part]} for part in parts] if base else parts
        forced = self._shapes.telling_properties(whole, is_open=is_open)
        if forced is None:
            raise schema_error(
                (*path, "oneOf"),
                "has alternatives that may both hold",
                "If that does no harm, write anyOf; or give each a required property with a const.",
            )
        return forced

    # ---- one schema ----

    def _plain(self, schema: dict[str, Any], path: Path, is_open: bool) -> Any:
        """A schema without references and alternatives."""
        if "const" in schema or "enum" in schema:
            return self._values(schema, path)
        found: dict[str, Any] = {}
        kinds = schema.get("type")
        if kinds is None and not is_open:
            kinds = [kind for kind, names in TYPE_KEYWORDS.items() if names & schema.keys()]
            kinds += ["object"] * ("unevaluatedProperties" in schema and "object" not in kinds)
            kinds += ["array"] * ("unevaluatedItems" in schema and "array" not in kinds)
        if kinds:
            found["type"] = kinds[0] if len(kinds) == 1 else kinds
        of = set(kinds if isinstance(kinds, list) else [kinds]) if kinds else {*TYPE_KEYWORDS}
        if of & {"number", "integer"}:
            found |= self._number(schema, path, of)
        for kind, write in self._writers().items():
            if kind in of:
                found |= write(schema, path, is_open)
        if set(found) == {"type", "pattern"} and found["type"] == "string":
            return self._shared(found)
        return found

    def _writers(self) -> Mapping[str, Callable[[dict[str, Any], Path, bool], dict[str, Any]]]:
        return {"string": self._string, "array": self._array, "object": self._object}

    def _shared(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A definition for a text of a pattern, which llguidance then compiles once."""
        pattern = schema["pattern"]
        if pattern not in self._pattern_names:
            self._pattern_names[pattern] = f"text{len(self._pattern_names)}"
            self._definitions[self._pattern_names[pattern]] = schema
        return {"$ref": DEFINITION + self._pattern_names[pattern]}

    def _values(self, schema: dict[str, Any], path: Path) -> Any:
        """Constants; keywords that hold more than values are tried by stand beside them."""
        values = allowed_values(schema, path)
        self._needs_escapes = self._needs_escapes or needs_escape(values)
        beside = {key: schema[key] for key in schema if key not in CHECKED_BY_FITS | CONSTANTS}
        if beside and any(isinstance(value, (str, list, dict)) for value in values):
            if len(values) > MAX_VALUES_BESIDE:
                problem = (
                    f"are more than {MAX_VALUES_BESIDE:,} beside {', '.join(map(ascii, beside))}"
                )
                raise schema_error((*path, "enum"), problem)
            return {"allOf": [{"enum": values}, self._plain(beside, path, True)]}
        return {"enum": values}

    def _number(self, schema: Mapping[str, Any], path: Path, of: set[str]) -> dict[str, Any]:
        if "integer" in of and "number" not in of:
            found = within_integers(schema, path)
        else:
            found = within_numbers(schema, path)
        if "multipleOf" in schema:
            found["multipleOf"] = multiple_for(schema["multipleOf"], path)
        return found

    # ---- strings ----

    def _string(self, schema: dict[str, Any], path: Path, is_open: bool) -> dict[str, Any]:
        low, high = _counts(schema, "minLength", "maxLength", path)
        said = str(schema.get("format", ""))
        form = canonical_format(said)
        if form in CHECKED_AT_THE_END:
            self._warn((*path, "format"), f"is {ascii(form)}, which isn't held while answering")
        patterns = [f"^(?:{PATTERNS[form]})$"] if form in PATTERNS else []
        fewest, most = LENGTHS.get(form, (math.inf, 0))
        if low <= fewest and (high is None or high >= most) and patterns:
            low, high = 0, None  # every text of this format is as long as it must be
        if "pattern" in schema:
            patterns = self._with_pattern(schema["pattern"], patterns, (*path, "pattern"))
        found: dict[str, Any] = {}
        if low:
            found["minLength"] = low
        if high is not None:
            found["maxLength"] = high
        if len(patterns) == 1:
            found["pattern"] = patterns[0]
        elif patterns:
            found["allOf"] = [{"pattern": pattern} for pattern in patterns]
        return found

    def _with_pattern(self, pattern: str, of_format: list[str], path: Path) -> list[str]:
        """The patterns that a text must match; beside a format, that holds what lookaheads say."""
        try:
            found = of_format + self._patterns(pattern, path)
            whole = {"type": "string", "allOf": [{"pattern": one} for one in found]}
            if len(found) == 1 or not grammar_problem(json.dumps(whole)):
                return found
            reason = "what llguidance can't combine"
        except _PatternError as error:
            if not error.has_lookaround:
                raise
            reason = "a lookahead or lookbehind that can't be held"
        if not of_format or not is_quick(pattern):
            raise _PatternError(path, reason)
        self._warn(path, "isn't held while answering beside its format")
        self.unheld_patterns.add(pattern)
        return of_format

    def _patterns(self, pattern: str, path: Path) -> list[str]:
        """A pattern as those that llguidance takes."""
        try:
            found = rust_patterns(pattern)
        except PatternRefused as error:
            raise _PatternError(path, str(error), error.has_lookaround) from None
        for one in found:
            if one not in self._patterns_tried:
                problem = grammar_problem(json.dumps({"type": "string", "pattern": one}))
                if problem:
                    raise _PatternError(path, f"what llguidance refuses: {ascii(problem)[1:100]}")
                self._patterns_tried.add(one)
        return found

    # ---- lists ----

    def _array(self, schema: dict[str, Any], path: Path, is_open: bool) -> dict[str, Any]:
        low, high = _counts(schema, "minItems", "maxItems", path)
        found: dict[str, Any] = {}
        first = schema.get("prefixItems", [])
        if first:
            found["prefixItems"] = [
                self._schema(one, (*path, "prefixItems", str(i)), False)
                for i, one in enumerate(first)
            ]
        rest = schema.get("items", schema.get("unevaluatedItems"))
        if rest is not None:
            name = "items" if "items" in schema else "unevaluatedItems"
            found["items"] = self._schema(rest, (*path, name), False)
        elif first and not is_open and low <= len(first):
            found["items"] = False  # a tuple: what comes after it is not asked for
        if schema.get("uniqueItems") and (high is None or high > 1):
            self._warn((*path, "uniqueItems"), "isn't held while answering")
        if low:
            found["minItems"] = low
        if high is not None:
            found["maxItems"] = high
        return found

    # ---- objects ----

    def _object(self, schema: dict[str, Any], path: Path, is_open: bool) -> dict[str, Any]:
        properties = dict(schema.get("properties", {}))
        patterns = dict(schema.get("patternProperties", {}))
        others = schema.get("additionalProperties", schema.get("unevaluatedProperties"))
        others_name = (
            "additionalProperties" if "additionalProperties" in schema else "unevaluatedProperties"
        )
        required = list(dict.fromkeys(schema.get("required", ())))
        if "propertyNames" in schema:
            properties, patterns, others = self._named(
                schema, properties, patterns, others, (*path, "propertyNames")
            )
        if others is None and not is_open:
            if not patterns:
                properties |= {name: True for name in required if name not in properties}
            if properties.keys() >= set(required) and (properties or patterns):
                others = False
        missing = [name for name in required if properties.get(name, others) is False]
        if missing and not patterns:
            raise schema_error((*path, "required"), NOT_REQUIRED.format(ascii(missing[0])[:60]))
        found: dict[str, Any] = {}
        if properties:
            found["properties"] = {
                name: self._schema(one, (*path, "properties", name), False)
                for name, one in properties.items()
            }
        if patterns:
            found["patternProperties"] = self._pattern_properties(patterns, path)
        if others is not None:
            found["additionalProperties"] = self._schema(others, (*path, others_name), False)
        if required:
            found["required"] = required
        return found | _name_counts(schema, properties, required, found, path)

    def _pattern_properties(self, patterns: Mapping[str, Any], path: Path) -> dict[str, Any]:
        found = {}
        for pattern, one in patterns.items():
            inner = (*path, "patternProperties", pattern)
            written = self._patterns(pattern, inner)
            if len(written) > 1:
                raise schema_error(inner, "can't be held: it has a lookahead")
            found[written[0]] = self._schema(one, inner, False)
        return found

    def _named(
        self,
        schema: Mapping[str, Any],
        properties: dict[str, Any],
        patterns: dict[str, Any],
        others: Any,
        path: Path,
    ) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """Properties, those by pattern and all others, with the names that `propertyNames` allows.

        Names are held where they are listed, or are of a pattern while nothing else is said.
        """
        names = schema["propertyNames"]
        shapes = self._shapes.of(names)
        if others is False and not patterns:
            others_matter = False
        else:
            others_matter = others is not None or not properties
        values = [shape.values for shape in shapes]
        if None not in values:
            listed = [json.loads(text) for texts in values for text in sorted(texts or ())]
            allowed = {name for name in listed if isinstance(name, str)}
            properties = {name: one for name, one in properties.items() if name in allowed}
            if others_matter and not patterns:
                rest = True if others is None else others
                more = [name for name in _listed_order(names) if name in allowed]
                properties |= {name: rest for name in more if name not in properties}
                others = False
            return properties, patterns, others
        if isinstance(names, dict) and set(names) <= {"type"}:
            return properties, patterns, others  # every name is a text
        if others_matter and not properties and not patterns and _is_simple_name(names):
            pattern = self._name_pattern(names, path)
            if pattern is not None:
                return {}, {pattern: True if others is None else others}, False
        self._warn(path, "isn't held while answering")
        self._mark_unheld(names, path)
        return properties, patterns, others

    def _name_pattern(self, names: Mapping[str, Any], path: Path) -> str | None:
        """A pattern of names, from a schema that has one, or lengths."""
        low, high = _counts(names, "minLength", "maxLength", path)
        form = canonical_format(str(names.get("format", "")))
        if "pattern" in names and not (low or high is not None or form in PATTERNS):
            return str(names["pattern"])
        if form in PATTERNS and not ("pattern" in names or low or high is not None):
            return f"^(?:{PATTERNS[form]})$"
        if low or high is not None:
            return (
                None
                if "pattern" in names
                else f"^[^\\x00-\\x1f]{{{low},{'' if high is None else high}}}$"
            )
        return None

    def _mark_unheld(self, names: Any, path: Path) -> None:
        """Has the patterns of names checked at the end; refuses those that may take for ever."""
        waiting = [names]
        while waiting:
            one = waiting.pop()
            if not isinstance(one, dict):
                continue
            if "pattern" in one:
                if not is_quick(one["pattern"]):
                    raise schema_error(path, "has a pattern that can't be held", "Make it simpler.")
                self.unheld_patterns.add(one["pattern"])
            waiting += [part for name in ("allOf", "anyOf", "oneOf") for part in one.get(name, ())]


class _PatternError(UsageError):
    """A pattern that can't be held."""

    def __init__(self, path: Path, reason: str, has_lookaround: bool = False) -> None:
        error = schema_error(path, f"can't be held: it has {reason}")
        super().__init__(error.message, error.hint)
        self.has_lookaround = has_lookaround


def _is_simple_name(names: Any) -> bool:
    return isinstance(names, dict) and set(names) <= {
        "type", "pattern", "minLength", "maxLength", "format",
    }  # fmt: skip


def _listed_order(names: Any) -> list[Any]:
    """The names that a schema lists, in its order where it does so itself."""
    if isinstance(names, dict):
        found = [names["const"]] if "const" in names else list(names.get("enum", ()))
        for part in (p for name in ("anyOf", "oneOf", "allOf") for p in names.get(name, ())):
            found += _listed_order(part)
        return list(dict.fromkeys(name for name in found if isinstance(name, str)))
    return []


def _closing(names: Iterable[str]) -> dict[str, Any]:
    return {
        "properties": dict.fromkeys(sorted(names), True),
        "additionalProperties": False,
    }


def _counts(
    schema: Mapping[str, Any], lowest: str, highest: str, path: Path
) -> tuple[int, int | None]:
    low, high = int(schema.get(lowest, 0)), schema.get(highest)
    if high is not None and low > high:
        raise schema_error((*path, lowest), f'is more than "{highest}"')
    if low > MAX_COUNTED:
        raise schema_error((*path, lowest), f"is more than {MAX_COUNTED}, which no answer holds")
    return low, None if high is None or high > MAX_COUNTED else int(high)


def _name_counts(
    schema: Mapping[str, Any],
    properties: Mapping[str, Any],
    required: Sequence[str],
    found: Mapping[str, Any],
    path: Path,
) -> dict[str, int]:
    """The bounds on how many properties there are that don't follow from their names.

    llguidance counts those that aren't listed, where all that are listed are required; and can
    tell none from one.
    """
    low, high = _counts(schema, "minProperties", "maxProperties", path)
    is_closed = found.get("additionalProperties") is False and "patternProperties" not in found
    n_most = sum(one is not False for one in properties.values())
    counts = {}
    if low > len(required):
        counts["minProperties"] = low
    if high is not None and not (is_closed and n_most <= high):
        counts["maxProperties"] = high
    can_count = set(properties) <= set(required) or (
        counts.get("minProperties", 1) == 1 and counts.get("maxProperties", 1) == 1
    )
    if counts and not can_count:
        name = next(iter(counts))
        raise schema_error((*path, name), "can't be held while answering",
                           'Name what must be there in "required".')  # fmt: skip
    return counts
