"""A JSON schema as a grammar (GBNF) that allows only what validates against it.

Draft 2020-12. Every keyword is either held by the grammar or refused by its name, with its place
in the schema; nothing is left out silently. Where a schema allows more than a grammar can say
simply, the grammar allows less: no properties that a schema doesn't name, ASCII digits for \d.
llama-cpp-python's converter (llama_cpp/llama_grammar.py) is not used: it drops bounds, formats and
required names that it doesn't know, and its strings may hold raw control characters, which no
parser takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from ..errors import UsageError
from .number_grammar import Bounds, integers, numbers
from .pattern_grammar import PatternRefused, pattern_rule
from .schema_merge import (
    COUNTS,
    KINDS,
    NUMBERS,
    check_keywords,
    merged,
    resolve,
    schema_error,
    without_notes,
)
from .schema_rules import FORMAT_LENGTHS, FORMATS, Rules, quoted

Path = tuple[str, ...]

MAX_DEPTH = 48
MAX_SCHEMAS = 20_000
MAX_COUNTED = 50_000
"""Longer strings and lists than this aren't counted by the grammar; no context would hold them."""
MAX_BOUND = Decimal(10) ** 100


def schema_grammar(text: str) -> str:
    """GBNF of a schema, given as JSON. Raises UsageError, naming what it can't hold and where."""
    try:
        schema = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        json.dumps(schema, ensure_ascii=False).encode()
        return _Grammar(schema).text()
    except UnicodeEncodeError:
        raise UsageError("The JSON schema holds half of a surrogate pair.") from None
    except RecursionError:
        raise UsageError("The JSON schema is nested too deep.", "Make it flatter.") from None
    except ValueError as error:
        raise UsageError(f"The JSON schema is not JSON: {_short(error)}.") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is too large")
    return value


def _short(error: Exception) -> str:
    return str(error).split(";")[0][:120]


class _Grammar:
    """The rules as they are made. Methods give the name of the rule for what they are given."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._rules = Rules()
        self._refs: dict[str, str] = {}
        self._under_way: set[str] = set()  # refs that lead to themselves with nothing between
        self._n_schemas = 0
        self._depth = 0

    def text(self) -> str:
        return self._rules.text(self._schema(self._root, ()))

    # ---- what a schema is ----

    def _schema(self, schema: Any, path: Path) -> str:
        self._n_schemas += 1
        if self._n_schemas > MAX_SCHEMAS:
            raise UsageError(f"The JSON schema has more than {MAX_SCHEMAS} parts.")
        if self._depth >= MAX_DEPTH:
            raise schema_error(path, f"is nested deeper than {MAX_DEPTH}")
        if schema is True:
            return "value"
        if schema is False:
            raise schema_error(path, "allows nothing at all")
        if not isinstance(schema, dict):
            raise schema_error(path, "is neither an object nor true")
        check_keywords(schema, path)
        self._depth += 1
        name = self._combined(without_notes(schema), path)
        self._depth -= 1
        return name

    def _combined(self, schema: dict[str, Any], path: Path) -> str:
        """$ref, allOf, anyOf and oneOf, which stand for other schemas."""
        if "$ref" in schema:
            return self._ref(schema, path)
        if "allOf" in schema:
            rest = {name: value for name, value in schema.items() if name != "allOf"}
            for i, part in enumerate(schema["allOf"]):
                rest = merged(rest, self._plain(part, (*path, "allOf", str(i))), path)
            return self._schema(rest, path)
        for name in ("anyOf", "oneOf"):
            if name in schema:
                rest = {key: value for key, value in schema.items() if key != name}
                return self._alternatives(schema[name], rest, (*path, name))
        return self._of_kind(schema, path)

    def _alternatives(self, parts: Sequence[Any], rest: dict[str, Any], path: Path) -> str:
        found = []
        for i, part in enumerate(parts):
            if part is False:
                continue
            inner = (*path, str(i))
            if rest:
                part = merged(rest, self._plain(part, inner), inner)
            found.append(self._schema(part, inner))
        if not found:
            raise schema_error(path, "allows nothing at all")
        return self._rules.add(" | ".join(dict.fromkeys(found)))

    def _plain(self, part: Any, path: Path) -> dict[str, Any]:
        """A part that is to be merged, a reference in it resolved."""
        if part is True:
            return {}
        if not isinstance(part, dict):
            raise schema_error(path, "allows nothing at all")
        check_keywords(part, path)
        plain = without_notes(part)
        seen: set[str] = set()
        while "$ref" in plain:
            if plain["$ref"] in seen:
                raise schema_error(path, "refers to itself")
            seen.add(plain["$ref"])
            target, target_path = resolve(self._root, plain.pop("$ref"), path)
            plain = merged(plain, self._plain(target, target_path), path)
        return plain

    def _ref(self, schema: dict[str, Any], path: Path) -> str:
        ref = schema["$ref"]
        if len(schema) > 1:
            return self._schema(self._plain(schema, path), path)
        if ref in self._under_way:
            raise schema_error(path, "refers to itself")
        if ref not in self._refs:
            name = self._refs[ref] = f"ref{len(self._refs)}"
            target, target_path = resolve(self._root, ref, path)
            self._under_way.add(ref)
            body = self._schema(target, target_path)
            self._under_way.discard(ref)
            self._rules.add(body, name)
        return self._refs[ref]

    def _inside(self, schema: Any, path: Path) -> str:
        """A schema inside an object or a list: there, one may refer to itself."""
        under_way, self._under_way = self._under_way, set()
        name = self._schema(schema, path)
        self._under_way = under_way
        return name

    # ---- by type ----

    def _of_kind(self, schema: dict[str, Any], path: Path) -> str:
        if "enum" in schema or "const" in schema:
            return self._literals(schema, path)
        kinds = schema.get("type")
        if isinstance(kinds, list):
            found = [self._of_kind({**schema, "type": kind}, path) for kind in dict.fromkeys(kinds)]
            return self._rules.add(" | ".join(found))
        if kinds is None:
            implied = [kind for kind, names in KINDS.items() if names & schema.keys()]
            if not implied:
                return "value"
            return self._of_kind({**schema, "type": implied}, path)
        makers: dict[str, Callable[[dict[str, Any], Path], str]] = {
            "object": self._object, "array": self._array, "string": self._string,
            "number": self._number, "integer": self._number,
        }  # fmt: skip
        return makers[kinds](schema, path) if kinds in makers else str(kinds)

    def _literals(self, schema: dict[str, Any], path: Path) -> str:
        values = [schema["const"]] if "const" in schema else list(schema["enum"])
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) or kinds is None else [kinds]
        values = [v for v in values if kinds is None or any(_is_of(v, kind) for kind in kinds)]
        if "const" in schema and "enum" in schema:
            values = [v for v in values if any(_same(v, other) for other in schema["enum"])]
        rest = {name: schema[name] for name in schema.keys() - {"enum", "const", "type"}}
        besides = sorted(rest.keys() - COUNTS - NUMBERS)
        if besides:
            raise schema_error(path, f'has "{besides[0]}" beside "enum" or "const"')
        if rest:
            # start-up, 70 ms
            from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

            values = [v for v in values if Draft202012Validator(rest).is_valid(v)]
        if not values:
            raise schema_error(path, "allows nothing at all")
        return self._rules.one_of(json.dumps(value, ensure_ascii=False) for value in values)

    # ---- numbers and strings ----

    def _number(self, schema: dict[str, Any], path: Path) -> str:
        limits = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
        given = {name: Decimal(repr(schema[name])) for name in limits if name in schema}
        if not given:
            return str(schema["type"])
        for name, value in given.items():
            if abs(value) > MAX_BOUND or (value and abs(value) < 1 / MAX_BOUND):
                raise schema_error((*path, name), "is beyond what a grammar counts to")
        low, low_open = _tighter(given.get("minimum"), given.get("exclusiveMinimum"), 1)
        high, high_open = _tighter(given.get("maximum"), given.get("exclusiveMaximum"), -1)
        bounds = Bounds(low, high, low_open, high_open)
        found = (integers if schema["type"] == "integer" else numbers)(bounds)
        if not found:
            raise schema_error(path, f"allows no {schema['type']} at all")
        return self._rules.add(" | ".join(found))

    def _string(self, schema: dict[str, Any], path: Path) -> str:
        low, high = _counts(schema, "minLength", "maxLength", path)
        lengths = [name for name in ("minLength", "maxLength") if name in schema]
        counted = low > 0 or high is not None
        fewest, most = FORMAT_LENGTHS.get(str(schema.get("format")), (0, 0))
        if "format" in schema and low <= fewest and (high is None or high >= most):
            counted = False  # every text of this form is as long as it must be
        forms = [name for name in ("pattern", "format") if name in schema]
        if len(forms) + counted > 1:
            other = forms[1:] or lengths
            raise schema_error((*path, other[0]), f'can\'t be held beside "{forms[0]}"')
        if "format" in schema:
            if schema["format"] not in FORMATS:
                known = ", ".join(FORMATS)
                raise schema_error((*path, "format"), "can't be held", f"Formats held: {known}.")
            return self._rules.add(f'"\\"" {FORMATS[schema["format"]]} "\\""')
        if "pattern" in schema:
            try:
                return self._rules.add(
                    f'"\\"" {pattern_rule(schema["pattern"], self._rules.add)} "\\""'
                )
            except PatternRefused as error:
                raise schema_error((*path, "pattern"), f"can't be held: it has {error}") from None
        if not counted:
            return "string"
        return self._rules.add(f'"\\"" {self._rules.times("char", low, high)} "\\""')

    # ---- lists and objects ----

    def _array(self, schema: dict[str, Any], path: Path) -> str:
        low, high = _counts(schema, "minItems", "maxItems", path)
        first = schema.get("prefixItems", [])
        if high is not None:
            first = first[:high]
        names = [self._inside(s, (*path, "prefixItems", str(i))) for i, s in enumerate(first)]
        items = schema.get("items", True)
        low, high = max(0, low - len(names)), high and max(0, high - len(names))
        if items is False:
            high = 0
        elif first and "items" not in schema:
            high = low  # a tuple: what comes after it is not asked for
        if high is not None and low > high:
            raise schema_error((*path, "minItems"), "asks for more items than may be there")
        separator = ' "," ws '
        if high == 0:
            return self._rules.add(f'"[" ws {separator.join(names)} {"ws " if names else ""}"]"')
        item = self._inside(items, (*path, "items"))
        more = self._rules.add(f'"," ws {item}')
        if names:
            body = f"{separator.join(names)} {self._rules.times(more, low, high)} ws"
        else:
            some = f"{item} {self._rules.times(more, max(0, low - 1), high and high - 1)} ws"
            body = some if low else f"({some})?"
        return self._rules.add(f'"[" ws {body} "]"')

    def _object(self, schema: dict[str, Any], path: Path) -> str:
        properties: dict[str, Any] = dict(schema.get("properties", {}))
        additional = schema.get("additionalProperties", True)
        required = set(schema.get("required", ()))
        for name in schema.get("required", ()):
            if name in properties:
                continue
            if additional is False:
                raise schema_error(
                    (*path, "required"), f"names {ascii(name)}, which may not be there"
                )
            properties[name] = additional
        _check_count(schema, properties, required, path)
        if not properties and "additionalProperties" not in schema:
            return "object"
        pairs = {}
        for name, inner in properties.items():
            if inner is False and name not in required:
                continue
            rule = self._inside(inner, (*path, "properties", name))
            key = quoted(json.dumps(name, ensure_ascii=False))
            pairs[name] = self._rules.add(f'{key} ":" ws {rule}')
        extra = None
        if "additionalProperties" in schema and additional is not False:
            rule = self._inside(additional, (*path, "additionalProperties"))
            extra = self._rules.add(f'{self._rules.key_unlike(properties)} ":" ws {rule}')
        return self._members(pairs, required, extra)

    def _members(self, pairs: Mapping[str, str], required: set[str], extra: str | None) -> str:
        """Pairs in their order. `after` is what may follow once something stands there, `first`
        what may come while nothing does yet."""
        more = extra and self._rules.add(f'"," ws {extra}')
        after = self._rules.add(f"{more}*" if more else '""')
        first = self._rules.add(f"{extra} {more}*" if extra else '""')
        may_be_empty = True
        for name, pair in reversed(list(pairs.items())):
            must = name in required
            first = self._rules.add(f"{pair} {after}" + ("" if must else f" | {first}"))
            after = self._rules.add(f'"," ws {pair} {after}' + ("" if must else f" | {after}"))
            may_be_empty = may_be_empty and not must
        if extra and may_be_empty:
            first = self._rules.add(f'{first} | ""')
        return self._rules.add(f'"{{" ws {first} ws "}}"')


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind in ("number", "integer"):
        return isinstance(value, int) or (
            isinstance(value, float) and (kind == "number" or value.is_integer())
        )
    kinds: dict[str, type] = {"object": dict, "array": list, "string": str, "null": type(None)}
    return kind in kinds and isinstance(value, kinds[kind])


def _same(a: Any, b: Any) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _tighter(
    closed: Decimal | None, opened: Decimal | None, direction: int
) -> tuple[Decimal | None, bool]:
    """The bound that says more, and whether it is itself left out."""
    if opened is None or (closed is not None and (closed - opened) * direction > 0):
        return closed, False
    return opened, True


def _counts(
    schema: Mapping[str, Any], lowest: str, highest: str, path: Path
) -> tuple[int, int | None]:
    low, high = int(schema.get(lowest, 0)), schema.get(highest)
    if high is not None and low > high:
        raise schema_error((*path, lowest), f'is more than "{highest}"')
    if low > MAX_COUNTED:
        raise schema_error((*path, lowest), f"is more than {MAX_COUNTED}, which no answer holds")
    return low, None if high is None or high > MAX_COUNTED else int(high)


def _check_count(
    schema: Mapping[str, Any], properties: Mapping[str, Any], required: set[str], path: Path
) -> None:
    """The number of properties isn't counted; bounds on it must follow from the names."""
    is_closed = properties and schema.get("additionalProperties", False) in (False, True)
    is_closed = is_closed and "additionalProperties" not in schema or (
        schema.get("additionalProperties") is False
    )  # fmt: skip
    if schema.get("minProperties", 0) > len(required):
        raise schema_error((*path, "minProperties"), "can't be held", 'Name them in "required".')
    if "maxProperties" in schema and not (is_closed and schema["maxProperties"] >= len(properties)):
        raise schema_error((*path, "maxProperties"), "can't be held", "List the properties.")
