"""A regular expression of a JSON schema as GBNF over the text inside a JSON string.

Parsed by Python's own parser, so what it means here is what it means to the check of the answer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as codes  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:  # pragma: no cover
    import sre_constants as codes
    import sre_parse as parser

LAST = 0x10FFFF
# what stands in a JSON string as itself: no control characters, no quote, no backslash, no half of
# a surrogate pair
PLAIN = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0xA0, 0xD7FF), (0xE000, LAST))
ESCAPED = {'"': r"\"", "\\": r"\\", "\n": r"\n", "\t": r"\t", "\r": r"\r"}
CATEGORIES = {
    codes.CATEGORY_DIGIT: ((0x30, 0x39),),
    codes.CATEGORY_WORD: ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    codes.CATEGORY_SPACE: ((0x20, 0x20), (0x09, 0x0A), (0x0D, 0x0D)),
}
OPPOSITES = {
    codes.CATEGORY_NOT_DIGIT: codes.CATEGORY_DIGIT,
    codes.CATEGORY_NOT_WORD: codes.CATEGORY_WORD,
    codes.CATEGORY_NOT_SPACE: codes.CATEGORY_SPACE,
}
NAMES = {
    codes.ASSERT: "a lookahead",
    codes.ASSERT_NOT: "a lookahead",
    codes.GROUPREF: "a backreference",
    codes.GROUPREF_EXISTS: "a backreference",
    codes.AT: "an anchor in the middle, or \\b",
}
MAX_TIMES = 1000
Span = tuple[int, int]


class PatternRefused(Exception):
    """What of a pattern no grammar can hold, in a few words."""


def pattern_rule(pattern: str, add: Callable[[str], str]) -> str:
    """GBNF of what may stand between the quotes; `add` makes a rule of a body and gives its name.

    Without ^ and $ a pattern may stand anywhere in the text. Raises PatternRefused.
    """
    try:
        parsed: Any = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternRefused(f"not a regular expression: {error}") from None
    if parsed.state.flags & ~re.UNICODE:
        raise PatternRefused("flags")
    tree: list[Any] = list(parsed)
    any_text = add(_spans([(0, LAST)])) + "*"
    opened = bool(tree) and tree[0] == (codes.AT, codes.AT_BEGINNING)
    closed = bool(tree) and tree[-1] == (codes.AT, codes.AT_END)
    body = _sequence(tree[opened : len(tree) - closed], add)
    return " ".join(([] if opened else [any_text]) + [body] + ([] if closed else [any_text]))


def _sequence(nodes: Iterable[Any], add: Callable[[str], str]) -> str:
    return " ".join(_node(code, value, add) for code, value in nodes) or '""'


def _node(code: Any, value: Any, add: Callable[[str], str]) -> str:
    if code is codes.LITERAL:
        return add(_spans([(value, value)]))
    if code is codes.NOT_LITERAL:
        return add(_spans(_complement([(value, value)])))
    if code is codes.ANY:
        return add(_spans(_complement([(0x0A, 0x0A)])))
    if code is codes.IN:
        return add(_spans(_set(value)))
    if code is codes.BRANCH:
        return add(" | ".join(_sequence(branch, add) for branch in value[1]))
    if code is codes.SUBPATTERN:
        _, added, removed, inner = value
        if added or removed:
            raise PatternRefused("flags")
        return add(_sequence(inner, add))
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        low, high, inner = value
        return _repeated(low, high, inner, add)
    raise PatternRefused(NAMES.get(code, str(code).lower()))


def _repeated(low: int, high: Any, inner: Iterable[Any], add: Callable[[str], str]) -> str:
    name = add(_sequence(inner, add))
    if low > MAX_TIMES or (high is not codes.MAXREPEAT and high > MAX_TIMES):
        raise PatternRefused(f"more than {MAX_TIMES} repetitions")
    return f"{name}{{{low},{'' if high is codes.MAXREPEAT else high}}}"


def _set(members: Iterable[Any]) -> list[Span]:
    """The characters of a [...]."""
    spans: list[Span] = []
    negated = ascii_alone = False
    for code, value in members:
        if code is codes.NEGATE:
            negated = True
        elif code is codes.LITERAL:
            spans.append((value, value))
        elif code is codes.RANGE:
            spans.append(value)
        elif value in CATEGORIES:
            spans += CATEGORIES[value]
            ascii_alone = True
        elif value in OPPOSITES:
            # Python's \\d holds the digits of every script, so its \\D none of them
            spans += [span for span in _complement(CATEGORIES[OPPOSITES[value]]) if span[0] < 0x7F]
            spans = [(low, min(high, 0x7E)) for low, high in spans]
        else:
            raise PatternRefused(str(value).lower())
    if not negated:
        return spans
    return _complement([*spans, (0x7F, LAST)] if ascii_alone else spans)


def _complement(spans: Iterable[Span]) -> list[Span]:
    found, at = [], 0
    for low, high in sorted(spans):
        if at < low:
            found.append((at, low - 1))
        at = max(at, high + 1)
    return [*found, (at, LAST)] if at <= LAST else found


def _spans(spans: Iterable[Span]) -> str:
    """The characters as they stand in a JSON string: as themselves, or behind a backslash."""
    spans = list(spans)
    plain = [
        (max(low, first), min(high, last))
        for low, high in spans
        for first, last in PLAIN
        if max(low, first) <= min(high, last)
    ]
    parts = ["[" + "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in plain) + "]"]
    escapes = [
        '"' + escape.replace("\\", "\\\\").replace('"', '\\"') + '"'
        for char, escape in ESCAPED.items()
        if any(low <= ord(char) <= high for low, high in spans)
    ]
    parts = (parts if plain else []) + escapes
    if not parts:
        raise PatternRefused("a set that no character is in")
    return " | ".join(parts)
