"""Regular expressions of a JSON schema as llguidance takes them: Rust's syntax, no lookarounds.

A pattern is parsed by Python's own parser, so that it means here what it means to the check of the
answer, and written anew with all sets of characters spelled out: where Python, Rust and ECMAScript
differ (\\d, \\s, the dot), what all three allow. A lookahead at the beginning becomes a pattern of
its own that must match as well; what a negative one forbids is turned around where that is simple.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as codes  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:  # pragma: no cover
    import sre_constants as codes
    import sre_parse as parser

MAX_PATTERN_CHARS = 20_000
MAX_QUICK_REPEATS = 4
LINE_ENDS = "\\n\\r\\x{2028}\\x{2029}"
ALL_SPACES = (
    "\\x09-\\x0d\\x1c-\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}"
    "\\x{202f}\\x{205f}\\x{3000}\\x{feff}"
)
# what is surely in a class, and all that may be: a negated class is without the latter
CLASSES = {
    codes.CATEGORY_DIGIT: ("0-9", "\\p{Nd}"),
    codes.CATEGORY_WORD: ("0-9A-Z_a-z", "\\p{L}\\p{N}_"),
    codes.CATEGORY_SPACE: ("\\x09-\\x0d\\x20", ALL_SPACES),
}
NEGATED_CLASSES = {
    codes.CATEGORY_NOT_DIGIT: codes.CATEGORY_DIGIT,
    codes.CATEGORY_NOT_WORD: codes.CATEGORY_WORD,
    codes.CATEGORY_NOT_SPACE: codes.CATEGORY_SPACE,
}
PROPERTY = re.compile(r"(?<!\\)\\[pP]\{[A-Za-z_=]+\}")
STARTS = (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING)
ENDS = (codes.AT_END, codes.AT_END_STRING)
LOOKAROUNDS = (codes.ASSERT, codes.ASSERT_NOT)
PARTS_NOT_HELD = {
    codes.ASSERT: "a lookahead or lookbehind that can't be held",
    codes.ASSERT_NOT: "a lookahead or lookbehind that can't be held",
    codes.GROUPREF: "a backreference",
    codes.GROUPREF_EXISTS: "a backreference",
    codes.AT: "\\b or \\B",
}
ANY_SET, WIDE_ANY_SET = f"[^{LINE_ENDS}]", "[^\\n]"


class PatternRefused(Exception):
    """What of a pattern can't be held, in a few words; `has_lookaround` where it is one."""

    def __init__(self, reason: str, *, has_lookaround: bool = False) -> None:
        super().__init__(reason)
        self.has_lookaround = has_lookaround


def rust_patterns(pattern: str) -> list[str]:
    """Returns patterns in Rust's syntax that a text must all match; all they allow, `pattern` does.

    Raises PatternRefused.
    """
    tree = _parsed(pattern)
    if tree is None:
        return [pattern]
    extra: list[str] = []
    kept = tree
    if tree and tree[0][0] is codes.AT and tree[0][1] in STARTS:
        n = 1
        while n < len(tree) and tree[n][0] in LOOKAROUNDS:
            extra += _held_lookahead(*tree[n])
            n += 1
        kept = [tree[0], *tree[n:]]
    is_all = len(kept) == 1 and extra
    return extra if is_all else [*extra, _sequence(kept)]


def checkable_pattern(pattern: str) -> str | None:
    """A pattern as Python's `re` takes it; None for one in a syntax that only others know."""
    named = re.sub(r"\(\?<(?=[A-Za-z_])", "(?P<", pattern)
    points = re.sub(r"\\u\{([0-9a-fA-F]{1,6})\}", lambda m: f"\\U{int(m[1], 16):08x}", named)
    try:
        re.compile(points)
    except (re.error, OverflowError, RecursionError):
        return None
    return points


def is_quick(pattern: str) -> bool:
    """Whether Python's `re` surely doesn't take long over a pattern: nothing that is repeated
    varies within, and little is."""
    readable = checkable_pattern(pattern)
    if readable is None or len(pattern) > MAX_PATTERN_CHARS:
        return False
    try:
        return _n_varying(_nodes(readable), is_repeated=False) <= MAX_QUICK_REPEATS
    except RecursionError:
        return False


def _nodes(readable: str) -> list[Any]:
    parsed: Any = parser.parse(readable)
    return list(parsed)


def _n_varying(nodes: Iterable[Any], *, is_repeated: bool) -> int:
    """The parts whose length varies; too many where one of them stands in what is repeated."""
    n = 0
    for code, value in nodes:
        if code in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN, codes.AT):
            continue
        if code is codes.SUBPATTERN:
            n += _n_varying(value[3], is_repeated=is_repeated)
        elif code in LOOKAROUNDS:
            n += _n_varying(value[1], is_repeated=is_repeated)
        elif is_repeated:
            return MAX_QUICK_REPEATS + 1
        elif code is codes.BRANCH:
            n += sum(_n_varying(branch, is_repeated=False) for branch in value[1])
        elif code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            low, high, inner = value
            n += low != high
            n += _n_varying(inner, is_repeated=high is codes.MAXREPEAT or high > 1)
        else:
            return MAX_QUICK_REPEATS + 1
    return n


def _parsed(pattern: str) -> list[Any] | None:
    """The parts of a pattern; None where Python can't read it, and Rust may."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise PatternRefused(f"more than {MAX_PATTERN_CHARS} characters")
    readable = checkable_pattern(pattern)
    if readable is None and checkable_pattern(PROPERTY.sub(r"\\w", pattern)) is None:
        raise PatternRefused("a mistake")
    if readable is None:
        return None
    parsed: Any = parser.parse(readable)
    if parsed.state.flags & ~(re.UNICODE | re.ASCII):
        raise PatternRefused("flags")
    return list(parsed)


# ---- lookaheads at the beginning -----------------------------------------------------------------


def _held_lookahead(code: Any, value: tuple[int, Any]) -> list[str]:
    held = _lookahead(code, value)
    if held is None:
        raise PatternRefused(PARTS_NOT_HELD[code], has_lookaround=True)
    return held


def _lookahead(code: Any, value: tuple[int, Any]) -> list[str] | None:
    """A lookahead at the beginning of a text as patterns of the whole text; None where it isn't."""
    direction, inner = value[0], list(value[1])
    if direction != 1:
        return None
    if inner and inner[0][0] is codes.AT and inner[0][1] in STARTS:
        inner = inner[1:]
    if code is codes.ASSERT:
        return [f"^(?:{_sequence(inner)})"]
    if len(inner) == 1 and inner[0][0] is codes.SUBPATTERN:
        inner = list(inner[0][1][3])
    if len(inner) == 1 and inner[0][0] is codes.BRANCH:
        branches = [_lookahead(code, (1, branch)) for branch in inner[0][1][1]]
        return None if None in branches else [one for branch in branches for one in branch or ()]
    return _forbidden(inner)


def _forbidden(inner: list[Any]) -> list[str] | None:
    """Patterns of the texts that don't begin with what these parts match."""
    is_ended = bool(inner) and inner[-1][0] is codes.AT and inner[-1][1] in ENDS
    body = inner[:-1] if is_ended else inner
    sets = [_one_set(node) for node in body]
    if body and None not in sets:
        return [f"^(?:{_not_beginning([one for one in sets if one], is_ended)})"]
    repeat = _repeated_set(body[0]) if body else None
    if repeat is None:
        return None
    low, chars = repeat
    if is_ended and len(body) == 1 and low <= 1:  # not all of a set
        return [f"{_turned(chars)}" if low == 0 else f"^$|{_turned(chars)}"]
    if low == 0 and chars == WIDE_ANY_SET and not is_ended and None not in sets[1:]:
        return _never(sets[1:])
    return None


def _never(sets: Sequence[str | None]) -> list[str] | None:
    """Patterns of the texts without these characters one after the other."""
    if len(sets) == 1 and sets[0]:
        return [f"^{_turned(sets[0])}*$"]
    if len(sets) == 2 and sets[0] and sets[0] == sets[1]:
        return [f"^(?:{sets[0]}?{_turned(sets[0])})*{sets[0]}?$"]
    return None


def _not_beginning(sets: Sequence[str], is_ended: bool) -> str:
    """All of a text that doesn't begin with these characters, or with `is_ended` isn't them."""
    first, rest = sets[0], sets[1:]
    others = f"$|{_turned(first)}(?s:.*)$"
    if rest:
        return f"{others}|{first}(?:{_not_beginning(rest, is_ended)})"
    return f"{others}|{first}(?s:.+)$" if is_ended else others


def _one_set(node: Any) -> str | None:
    """All characters that one part may match, where it matches exactly one."""
    code, value = node
    if code is codes.SUBPATTERN and not (value[1] or value[2]) and len(value[3]) == 1:
        return _one_set(value[3][0])
    if code is codes.ANY:
        return WIDE_ANY_SET
    if code is codes.IN:
        return _set(value, is_wide=True)
    return _node(code, value) if code in (codes.LITERAL, codes.NOT_LITERAL) else None


def _repeated_set(node: Any) -> tuple[int, str] | None:
    """The least count and the characters of a set that may be repeated without end."""
    code, value = node
    if code not in (codes.MAX_REPEAT, codes.MIN_REPEAT) or value[1] is not codes.MAXREPEAT:
        return None
    inner = list(value[2])
    chars = _one_set(inner[0]) if len(inner) == 1 else None
    return (value[0], chars) if chars else None


def _turned(chars: str) -> str:
    """The set of all other characters."""
    return f"[{chars[2:]}" if chars.startswith("[^") else f"[^{chars[1:]}"


# ---- in Rust's syntax ----------------------------------------------------------------------------


def _sequence(nodes: Iterable[Any]) -> str:
    return "".join(_node(code, value) for code, value in nodes)


def _node(code: Any, value: Any) -> str:
    if code is codes.LITERAL:
        return f"[{_char(value)}]"
    if code is codes.NOT_LITERAL:
        return f"[^{_char(value)}]"
    if code is codes.ANY:
        return ANY_SET
    if code is codes.IN:
        return _set(value)
    if code is codes.BRANCH:
        return f"(?:{'|'.join(_sequence(branch) for branch in value[1])})"
    if code is codes.SUBPATTERN:
        _, added, removed, inner = value
        if added or removed:
            raise PatternRefused("flags")
        return f"(?:{_sequence(inner)})"
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        return _repeated(*value)
    if code is codes.AT and value in STARTS:
        return "^"
    if code is codes.AT and value in ENDS:
        return "$"
    reason = PARTS_NOT_HELD.get(code, str(code).lower())
    raise PatternRefused(reason, has_lookaround=code in LOOKAROUNDS)


def _repeated(low: int, high: Any, inner: Iterable[Any]) -> str:
    body = _sequence(inner)
    if high is codes.MAXREPEAT:
        counts = {0: "*", 1: "+"}.get(low, f"{{{low},}}")
    else:
        counts = "?" if (low, high) == (0, 1) else f"{{{low},{high}}}"
    return f"(?:{body}){counts}"


def _set(members: Iterable[Any], *, is_wide: bool = False) -> str:
    """The characters that are surely of a [...]; with `is_wide`, all that may be."""
    members = list(members)
    is_negated = (codes.NEGATE, None) in members
    widest = is_negated != is_wide
    parts = []
    for code, value in members:
        if code is codes.LITERAL:
            parts.append(_char(value))
        elif code is codes.RANGE:
            parts.append(f"{_char(value[0])}-{_char(value[1])}")
        elif code is codes.CATEGORY and value in CLASSES:
            parts.append(CLASSES[value][widest])
        elif code is codes.CATEGORY:
            parts.append(f"[^{CLASSES[NEGATED_CLASSES[value]][not widest]}]")
    return f"[{'^' if is_negated else ''}{''.join(parts)}]"


def _char(code_point: int) -> str:
    if 0xD800 <= code_point <= 0xDFFF:
        raise PatternRefused("half of a surrogate pair")
    char = chr(code_point)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code_point:x}}}"
