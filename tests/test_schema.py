"""JSON schemas: what a grammar holds, what is refused by name, and answers that are checked."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field, HttpUrl
from synthetic.schemas import random_schema

from localmoe.config.environment import engine_environment
from localmoe.engine.client import EngineProcess
from localmoe.engine.protocol import Placement, Request, Sampling, TextPiece
from localmoe.engine.schema_grammar import schema_grammar
from localmoe.errors import LocalMoeError, UsageError
from localmoe.gguf.demo import DEMO
from localmoe.structured.check import (
    OutputMismatch,
    check_answer,
    unheld_parts,
    with_held_schema,
)
from localmoe.structured.formats import PATTERNS as FORMAT_PATTERNS
from localmoe.structured.gbnf import check_grammar
from localmoe.structured.keywords import HELD, REFUSED, TYPES
from localmoe.structured.llguidance_schema import hold_schema

KEYWORDS = sorted([*HELD, *REFUSED, "$defs", "title"])


@pytest.fixture(scope="module")
def demo() -> Iterator[EngineProcess]:
    with EngineProcess(engine_environment()) as engine:
        engine.load(str(DEMO), Placement(n_threads=2, n_ctx=1024))
        yield engine


def answer_of(
    engine: EngineProcess,
    schema: Any,
    seed: int,
    temperature: float = 0.7,
    max_tokens: int | None = None,
) -> Any:
    """What the demo model answers to a schema, checked as every answer is."""
    text = json.dumps(schema)
    prompt = engine.tokenize([TextPiece("Tell me something about yourself.")])[0]
    sampling = Sampling(temperature=temperature, seed=seed, json_schema=text)
    deltas = list(
        engine.generate(Request(prompt, with_held_schema(sampling), max_tokens=max_tokens))
    )
    answer = "".join(delta.text for delta in deltas)
    check_answer(answer, deltas[-1].finish_reason, sampling)
    return json.loads(answer)


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_random_schemas_are_answered_as_they_demand(demo: EngineProcess, seed: int) -> None:
    """scripts/soak/schemas.py does the same with 200 and more."""
    schema = random_schema(seed)
    Draft202012Validator(schema).validate(answer_of(demo, schema, seed))


def test_no_raw_control_character_gets_into_a_string(demo: EngineProcess) -> None:
    """At a temperature that makes all tokens about equally likely."""
    form = json.dumps({"type": "string", "minLength": 200, "maxLength": 200})
    answers = []
    for seed in range(3):
        sampling = Sampling(50, top_k=0, top_p=1, min_p=0, seed=seed, json_schema=form)
        deltas = list(demo.generate(Request((1,), with_held_schema(sampling))))
        answers.append("".join(delta.text for delta in deltas))
        check_answer(answers[-1], deltas[-1].finish_reason, sampling)
    assert any(not text.isascii() for text in answers)


@pytest.mark.parametrize(
    "value", ['say "hi"', "back\\slash", "a\\", "naïve 😀", "a\nb", {"a b": [1, "]"]}, "", 'x"y\\"']
)
def test_a_constant_is_given_back_as_it_is(demo: EngineProcess, value: Any) -> None:
    assert answer_of(demo, {"const": value}, 1) == value
    assert answer_of(demo, {"type": "object", "properties": {"k": {"enum": [value]}},
                            "required": ["k"]}, 1) == {"k": value}  # fmt: skip


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a b": {"type": "integer"}, "a-b": {"type": "null"},
         "a_b": {"type": "boolean"}}, "required": ["a b", "a-b", "a_b"]},
        {"$defs": {"a": {"x": {"type": "integer"}}, "b": {"x": {"type": "boolean"}}},
         "type": "array", "prefixItems": [{"$ref": "#/$defs/a/x"}, {"$ref": "#/$defs/b/x"}],
         "minItems": 2, "maxItems": 2},
        {"allOf": [{"$ref": "#/$defs/base"}, {"properties": {"b": {"type": "boolean"}},
         "required": ["b"]}], "$defs": {"base": {"type": "object", "properties":
         {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]}}},
        {"anyOf": [{"minLength": 2}, {"const": "x"}], "type": "string", "maxLength": 4},
        {"type": "object", "additionalProperties": {"type": "integer"},
         "properties": {"ab": {"type": "boolean"}, "ac": {"type": "null"}}, "required": ["ab"]},
        {"type": ["string", "null"], "maxLength": 3},
        {"type": "object", "required": ["sure"], "properties": {}},
        {"oneOf": [{"type": "object", "properties": {"t": {"const": n}, n: {"type": "boolean"}},
         "required": ["t", n]} for n in ("cat", "dog")]},
        {"type": "array", "items": {}, "maxItems": 2},
        {"items": {"type": "null"}, "maxItems": 3},
        {"type": "string", "pattern": "a{2,3}|b"},
        {"type": "string", "pattern": '^["\\\\\\n]{2}.$'},
        {"type": "integer", "minimum": 10**14, "maximum": 10**14 + 3},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e-3},
    ],
)  # fmt: skip
def test_what_people_write_is_held(demo: EngineProcess, schema: dict[str, Any]) -> None:
    try:
        found = answer_of(demo, schema, 1, max_tokens=100)
    except OutputMismatch as error:
        if "cut" not in error.message:  # in an open string a small model goes on for long
            raise
    else:
        Draft202012Validator(schema).validate(found)


class Address(BaseModel):
    street: Annotated[str, Field(max_length=12)]
    zip: Annotated[str, Field(pattern=r"^\d{5}$")]


class Person(BaseModel):
    """What people give a schema by."""

    name: Annotated[str, Field(max_length=10, description="In full.")]
    age: Annotated[int, Field(ge=0, lt=130)]
    score: Annotated[float, Field(gt=0, le=1)] = 0.5
    mood: Literal["good", "bad (very)"]
    homes: Annotated[list[Address], Field(max_length=2)]
    born: date | None = None
    id: UUID
    place: tuple[int, bool]
    page: HttpUrl


def test_a_pydantic_model_is_filled(demo: EngineProcess) -> None:
    found = answer_of(demo, Person.model_json_schema(), 0)
    assert Person.model_validate(found).age < 130


def test_a_tree_may_refer_to_itself() -> None:
    node = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "left": {"$ref": "#"}},
        "required": ["value"],
    }
    hold_schema(json.dumps(node))
    assert "#/$defs/0" in hold_schema(json.dumps(node)).schema


def test_a_number_ends_whatever_the_model_would_say(demo: EngineProcess) -> None:
    """Where all tokens are about equally likely, digits would go on to the end of the context."""
    schema = json.dumps({"type": "number"})
    for seed in range(6):
        sampling = Sampling(50, top_k=0, top_p=1, min_p=0, seed=seed, json_schema=schema)
        request = Request((1,), with_held_schema(sampling), max_tokens=100)
        text = "".join(delta.text for delta in demo.generate(request))
        assert max(map(len, re.findall("[0-9]+", text))) <= 40
        check_answer(text, "stop", sampling)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"not": {"type": "string"}}, "#/not"),
        ({"properties": {"a": {"if": {}, "then": {}}}}, "#/properties/a/if"),
        ({"dependentRequired": {"a": ["b"]}}, "#/dependentRequired"),
        ({"type": "integer", "minimum": 10**20}, "too large"),
        ({"type": "object", "patternProperties": {"a": {}, "b": {}}}, "not disjoint"),
        ({"type": "string", "multipleof": 3}, "multipleOf"),
        ({"type": "array", "contains": {"const": 1}}, "#/contains"),
        ({"$ref": "https://example.com/schema"}, "#/$ref"),
        ({"$ref": "#/$defs/none"}, "#/$ref"),
        ({"type": "string", "maxlength": 3}, "maxLength"),
        ({"type": "strin"}, "#/type"),
        ({"type": "string", "pattern": "(?=a)b"}, "#/pattern"),
        ({"type": "string", "pattern": "(a)\\1"}, "#/pattern"),
        ({"type": "string", "pattern": "(a"}, "#/pattern"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no integer"),
        ({"type": "integer", "exclusiveMinimum": 4, "exclusiveMaximum": 5}, "no integer"),
        ({"type": "string", "minLength": 5, "maxLength": 4}, "#/minLength"),
        ({"type": "array", "minItems": 2_000_000_000}, "#/minItems"),
        ({"enum": []}, "#/enum"),
        ({"type": "string", "enum": [1]}, "#/enum allows nothing"),
        ({"$ref": "#"}, "refers to itself"),
        ({"not": {}}, "Nothing"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf"),
        ({"required": ["b"], "additionalProperties": False, "properties": {"a": {}}}, "#/required"),
        ({"properties": {"a": False}, "required": ["a"]}, "#/required"),
        (False, "Nothing"),
        ([1], "neither"),
        ({"properties": {"x/y": {"items": 3}}}, "#/properties/x~1y/items"),
    ],
)  # fmt: skip
def test_what_can_not_be_held_is_refused_by_its_place(schema: Any, place: str) -> None:
    with pytest.raises(UsageError) as caught:
        hold_schema(json.dumps(schema))
    assert place in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{", "nonsense", '{"const": NaN}', '{"maximum": 1e999}', '{"const": "\\ud800"}',
        '{"minimum": ' + "9" * 5000 + "}", '{"minLength": 1' + "0" * 400 + "}",
        '{"minimum": 1' + "0" * 400 + "}", "[" * 100_000, '{"items":' * 100_000,
        '{"items":' * 200 + "{}" + "}" * 200,
        json.dumps({"enum": [hashlib.sha256(b"%d" % n).hexdigest() for n in range(100_000)]}),
        json.dumps({"enum": [{"a": n} for n in range(100_000)]}),
        json.dumps({"type": "string", "pattern": "(" * 20_000 + ")" * 20_000}),
        json.dumps({"type": "object", "minProperties": 20, "properties": {
            f"p{n}": {} for n in range(40)}}),
        json.dumps({"$ref": "#/$defs/0", "$defs": {str(n): {"anyOf": [
            {"$ref": f"#/$defs/{n + 1}", "type": "object"}] * 2} for n in range(60)}}),
    ],
)  # fmt: skip
def test_hostile_schemas_are_one_line_at_once(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        hold_schema(text)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 5000},
        {"type": "string", "maxLength": 2_000_000_000},
        {"type": "string", "minLength": 40_000, "maxLength": 40_001},
        {"type": "array", "maxItems": 50_000, "items": {"type": "string", "maxLength": 50_000}},
        {"enum": [f"value {n * 7919 % 100_003}" for n in range(20_000)]},
        {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(2000)}},
        {"$ref": "#/$defs/0", "$defs": {str(n): {"allOf": [
            {"$ref": f"#/$defs/{n + 1}"}, {"$ref": f"#/$defs/{n + 1}", "type": "object"}]}
            for n in range(40)} | {"40": {}}},
        {"type": "number"},
    ],
)  # fmt: skip
def test_large_schemas_are_answered_too(demo: EngineProcess, schema: dict[str, Any]) -> None:
    sampling = Sampling(seed=1, json_schema=json.dumps(schema))
    hold_schema(json.dumps(schema))
    deltas = list(demo.generate(Request((1,), with_held_schema(sampling), max_tokens=10)))
    assert deltas[-1].finish_reason in ("stop", "length")


# ---- what llguidance is given --------------------------------------------------------------------


def holds(schema: Any, text: str) -> bool:
    """Whether the grammar of a schema allows a text."""
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), schema_grammar(hold_schema(json.dumps(schema)).schema))
    raw = list(text.encode())
    return matcher.try_consume_tokens(raw) == len(raw) and matcher.is_accepting()


PATTERNS = (
    "^a$|^b$", "(^a$|^b$)", "a|^b$", "^[^\\s]{2,5}$", "^\\W$", "^\\D\\S$", "^.$", "[[]a",
    "^[\\w.-]+@x$", "a", "^(?:a|b)+?c$", "^[&&a~~]$", "^[-a]$", "\\/", "^\\w+$",
    "^\\u0041\\x42$", "^[^a-c]{2}$",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=st.text(st.sampled_from("abcAB \n\x1c\u2028é٣_-&~[]{,}2.@x/\x7f"), max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_pattern_allows_nothing_that_python_refuses(pattern: str, text: str) -> None:
    if holds({"type": "string", "pattern": pattern}, json.dumps(text, ensure_ascii=False)):
        assert re.search(pattern, text)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [("^a$|^b$", "b"), ("(^a$|^b$)", "a"), ("a", "xay"), ("^\\W$", "-"), ("^[[]$", "["),
     ("^\\/$", "/"),
     ("^\\u{1F600}$", "😀"), ("^\\p{Lu}$", "É"), ("^(?<year>\\d{4})$", "2026"),
     ("^(a?){500}a{500}$", "a" * 700)],
)  # fmt: skip
def test_a_pattern_finds_what_ecma_262_says(pattern: str, text: str) -> None:
    assert holds({"type": "string", "pattern": pattern}, json.dumps(text, ensure_ascii=False))


@pytest.mark.parametrize(
    "pattern", ["(?=a)b", "(?<!a)b", "(a)\\1", "\\bab", "(a", "a)", "[a", "*a", "a\\", "[b-a]"]
)
def test_a_pattern_that_can_not_be_held_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="#/pattern can't be held"):
        hold_schema(json.dumps({"type": "string", "pattern": pattern}))


@given(st.integers(-12_000, 12_000), st.integers(0, 3000), st.integers(-15_000, 15_000))
@settings(max_examples=60, deadline=None)
def test_exactly_the_integers_between_bounds(low: int, width: int, n: int) -> None:
    schema = {"type": "integer", "minimum": low, "maximum": low + width}
    for value in (n, low - 1, low, low + width, low + width + 1):
        assert holds(schema, str(value)) == (low <= value <= low + width)


@given(
    st.decimals(-999, 999, places=3), st.decimals(0, 50, places=2),
    st.decimals(-1100, 1100, places=4), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_decimal_beyond_bounds(
    low: Decimal, width: Decimal, value: Decimal, low_open: bool, high_open: bool
) -> None:
    high = low + width + 1
    schema = {
        "type": "number",
        "exclusiveMinimum" if low_open else "minimum": float(low),
        "exclusiveMaximum" if high_open else "maximum": float(high),
    }
    for number in (value, low, high):
        if holds(schema, f"{number:f}"):
            assert Draft202012Validator(schema).is_valid(float(number))


ONE_OF = {
    "tags": [
        {"properties": {"t": {"const": n}}, "required": ["t"], "type": "object"} for n in (1, 2)
    ],
    "types": [{"type": "string"}, {"type": ["integer", "null"]}],
    "enums": [{"enum": ["a", 1]}, {"const": "b"}],
    "optional tags": [{"properties": {"t": {"const": n}}, "type": "object"} for n in "ab"],
    "own names": [{"properties": {n: {"type": "null"}}, "required": [n]} for n in "ab"],
    "anchors": [{"$ref": "#x"}, {"$ref": "#/definitions/y"}],
}


@pytest.mark.parametrize("name", ONE_OF)
def test_alternatives_that_are_apart_are_accepted(demo: EngineProcess, name: str) -> None:
    schema = {"oneOf": ONE_OF[name], "definitions": {
        "x": {"$anchor": "x", "type": "boolean"}, "y": {"type": "null"}}}  # fmt: skip
    found = answer_of(demo, schema, 1, max_tokens=60)
    Draft202012Validator(schema).validate(found)


def test_alternatives_that_overlap_are_refused_with_a_hint() -> None:
    with pytest.raises(UsageError, match="may both hold") as caught:
        hold_schema('{"oneOf": [{"type": "string"}, {"minLength": 3}]}')
    assert "anyOf" in caught.value.hint


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "number", "multipleOf": 1}, "7", "7.5"),
        ({"type": "number", "multipleOf": 0.1}, "0.3", "0.35"),
        ({"type": "string", "nullable": True}, "null", "1"),
        ({"enum": ["a"], "nullable": True}, "null", '"b"'),
        ({"type": "array", "items": [{"type": "null"}], "additionalItems": False}, "[null]", "[1]"),
        ({"minimum": 3, "exclusiveMinimum": True, "type": "integer"}, "4", "3"),
        ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, '{"a":1}', "{}"),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1}, '{"b":1}',
         '{"a":1,"b":1}'),
        ({"type": "object", "patternProperties": {"^x": {"type": "null"}}}, '{"x1":null}',
         '{"y":1}'),
        ({"propertyNames": {"enum": ["a"]}, "additionalProperties": {"type": "null"},
          "type": "object"}, '{"a":null}', '{"b":null}'),
        ({"name": "n", "strict": True, "schema": {"type": "null"}}, "null", "1"),
        ({"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {}}}],
          "$defs": {"a": {"type": "object", "properties": {"a": {"type": "null"}}}}},
         '{"a":null,"b":1}', '{"c":1}'),
        ({"$id": "https://a.example/x", "$ref": "y", "$defs": {"a": {"$id": "y", "type": "null"}}},
         "null", "1"),
        ({"properties": {"a": {"type": "null"}}, "additionalProperties": True}, '{"b":1}',
         '{"\\u0061":1}'),
        ({"type": "object", "if": {"type": "object"}, "uiHint": "wide"}, "{}", "1"),
    ],
)  # fmt: skip
def test_each_keyword_is_held_as_it_is_written(schema: Any, good: str, bad: str) -> None:
    assert holds(schema, good)
    assert not holds(schema, bad)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "#/uniqueItems"),
        ({"properties": {"a": {}}, "propertyNames": {"maxLength": 3}}, "#/propertyNames"),
        ({"type": "string", "format": "regex"}, "#/format"),
    ],
)
def test_what_is_only_checked_at_the_end_is_named(schema: Any, place: str) -> None:
    assert place in (" ".join(unheld_parts(Sampling(json_schema=json.dumps(schema)))))
    bad = {"array": "[null, null]", "string": '"("'}.get(schema.get("type"), '{"long": 1}')
    with pytest.raises(OutputMismatch):
        check_answer(bad, "stop", Sampling(json_schema=json.dumps(schema)))


@pytest.mark.parametrize("name", ["path", "binary", "password", "float", "my-own", "color"])
def test_a_format_that_says_nothing_of_the_text_is_accepted(name: str) -> None:
    assert unheld_parts(Sampling(json_schema=json.dumps({"format": name}))) == ()


@pytest.mark.parametrize("name", FORMAT_PATTERNS)
def test_a_format_is_held_alone_and_beside_a_length(name: str) -> None:
    hold_schema(json.dumps({"type": "string", "format": name}))
    assert not holds({"type": "string", "format": name}, '"?? ??"')


def test_a_pattern_with_lookaheads_beside_a_format_is_held_by_the_format() -> None:
    schema = {"type": "string", "format": "email", "pattern": r"^(?!\.)(?!.*\.\.)[^ ]+@[^ ]+$"}
    assert holds(schema, '"ab@cd.org"')
    assert not holds(schema, '"ab"')


HOSTILE_PATTERNS = (
    "^(a?){500}a{500}$", "^((a|aa)+)+$", "^(a|b)*a(a|b){30}$", "^a{1000000000}$", "(.*a.{300}){3}",
    "(((((a{9}){99}){99}){99}){99}){99}",
)  # fmt: skip


@pytest.mark.parametrize("pattern", HOSTILE_PATTERNS)
def test_a_hostile_pattern_ends_and_the_engine_goes_on(demo: EngineProcess, pattern: str) -> None:
    hostile = Sampling(seed=1, json_schema=json.dumps({"type": "string", "pattern": pattern}))
    said = ""
    try:
        deltas = list(demo.generate(Request((1,), with_held_schema(hostile), max_tokens=30)))
    except LocalMoeError as error:
        said = str(error)
    else:
        assert deltas[-1].finish_reason in ("stop", "length")
    assert "\n" not in said
    assert answer_of(demo, {"const": 1}, 1) == 1


# ---- the check of an answer ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason", "problem"),
    [
        ('{"a": 1', "length", "cut"),
        ("12", "length", "cut"),
        ('{"a": "x"}', "stop", "does not validate"),
        ('{"a": 1', "stop", "not JSON"),
        ("[" * 100_000, "length", "cut"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_an_error(
    text: str, reason: str, problem: str
) -> None:
    schema = '{"properties": {"a": {"type": "integer"}}}'
    with pytest.raises(OutputMismatch, match=problem):
        check_answer(text, reason, Sampling(json_schema=schema))


def test_an_answer_that_was_whole_when_it_was_cut_is_one() -> None:
    check_answer('{"a": 1}', "length", Sampling(json_schema="{}"))
    check_answer("anything", "length", Sampling())
    with pytest.raises(OutputMismatch, match="cut"):
        check_answer("ab", "length", Sampling(grammar='root ::= "abc"'))


# ---- grammars ------------------------------------------------------------------------------------


def doubled(rule: str, last: str = '"a"') -> str:
    """A grammar of 30 rules that each name the next, mostly twice."""
    rules = "".join(rule.format(n, n + 1) for n in range(30))
    return f"root ::= r0\n{rules}r30 ::= {last}\n"


@pytest.mark.parametrize(
    ("grammar", "sentence"),
    [
        ("", "empty"),
        ("answer ::= \"a\"", "root"),
        ('root ::= "a" thing', '"thing"'),
        ('root ::= ("a"', '"\\("'),
        ('root ::= "a', "nothing closes"),
        ("root ::= [a-z", "nothing closes"),
        ('root ::= root "a" | "b"', 'rule "root" begins with itself'),
        ('root ::= a\na ::= b? c\nb ::= "x"\nc ::= "y"* a "z" | "w"', "begins with itself"),
        ('root ::= ("a"?)* (root | "b")', 'rule "root" begins with itself'),
        ('root ::= a\na ::= "a" ("" | b)*\nb ::= "b" | ""', 'rule "a" begins with itself'),
        (doubled("r{0} ::= r{1} r{1}\n", '"" | "a"'), "more than 100,000 ways"),
        (doubled("r{0} ::= r{1}{{0,9}}\n", '"" | "a"'), "more than 100,000 ways"),
        (doubled("r{0} ::= r{1} | r{1}\n"), "more than 100,000 ways"),
        (doubled("r{0} ::= r{1}? r{1}?\n"), "more than 100,000 ways"),
        (doubled("r{0} ::= (r{1} | \"b\" | r{1})\n"), "more than 100,000 ways"),
        ('root ::= "a" # fine\nb ::= x', "line 2"),
        ('root ::= "\ud800"', "character 11"),
    ],
)  # fmt: skip
def test_a_bad_grammar_is_refused_before_a_model_is_there(grammar: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        check_grammar(grammar)


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "yes" | "no"',
        'root ::= "a" root | "b"',
        doubled("r{0} ::= r{1} r{1}\n"),
        'root ::= [a-z]+ ("," root)?',
        'root ::= ("a" | "b"?) [0-9]{2,} {0} "c"'.replace(" {0}", ""),
        'root ::= item{2,3} # "a comment\nitem ::= [a-z\\]"]+ "\\"" | ("x" "(")?\n',
        'root::=a-b\na-b ::= "a" |\n "b"',
        "root ::= [^\\n]* .",
    ],
)
def test_a_good_grammar_passes_and_runs(demo: EngineProcess, grammar: str) -> None:
    check_grammar(grammar)
    request = Request((1,), Sampling(grammar=grammar, seed=1), max_tokens=4)
    assert list(demo.generate(request))[-1].finish_reason


def random_json(rng: random.Random, depth: int) -> Any:
    """Keywords in places where they make no sense."""
    kind = rng.random()
    if kind < 0.35 and depth:
        return {rng.choice(KEYWORDS): random_json(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    if kind < 0.5 and depth:
        return [random_json(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    plain = (0, 1, -1, 2.5, 1e300, 10**30, True, False, None, "a", "#", "#/$defs/a", "^a$", "(")
    return rng.choice([*plain, *TYPES])


@pytest.mark.parametrize("seed", range(4))
def test_schemas_without_sense_are_refused_and_nothing_worse(seed: int) -> None:
    rng = random.Random(seed)
    n_refused = 0
    for _ in range(1500):
        text = json.dumps({rng.choice(KEYWORDS): random_json(rng, 3) for _ in range(2)})
        try:
            hold_schema(text)
        except UsageError:
            n_refused += 1
    assert 1000 < n_refused < 1500
