"""The rules of a grammar as they are made, and those that every grammar of a schema begins with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..errors import UsageError
from .number_grammar import ANY_INTEGER, ANY_NUMBER

MAX_GRAMMAR_CHARS = 2 << 20
MAX_GROUPS = 4000
"""As many as the engine takes (engine/native/llama.py): llama.cpp's parser recurses on groups."""
CHUNK = 500
"""llama.cpp refuses {n} above some 2,000 (src/llama-grammar.cpp, MAX_REPETITION_THRESHOLD)."""

HEX = "[0-9a-fA-F]"
BASE = f"""\
ws ::= | " " | "\\n" " "{{0,16}}
char ::= [ !#-\\x5b\\x5d-~\\u00A0-\\uD7FF\\uE000-\\U0010FFFF] | "\\\\" escape
escape ::= ["\\\\/bfnrt] | "u" [0-9a-ce-fA-CE-F] {HEX}{{3}} | "u" [dD] [0-7] {HEX}{{2}}
string ::= "\\"" char* "\\""
boolean ::= "true" | "false"
null ::= "null"
integer ::= {ANY_INTEGER}
number ::= {ANY_NUMBER}
value ::= object | array | string | number | boolean | null
object ::= "{{" ws (string ":" ws value ("," ws string ":" ws value)* ws)? "}}"
array ::= "[" ws (value ("," ws value)* ws)? "]"
"""
# 29 February is left out, since it isn't in every year
DATE = (
    '[1-9] [0-9]{3} "-" ( ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8])'
    ' | ("0" [13-9] | "1" [0-2]) "-" ("29" | "30") | ("0" [13578] | "10" | "12") "-31" )'
)
TIME = (
    '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})?'
    ' ("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
)
BYTE = '("25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9] [0-9] | [0-9])'
LABEL = "[a-zA-Z0-9] [a-zA-Z0-9]{0,30}"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f'{DATE} "T" {TIME}',
    "uuid": ' "-" '.join(f"{HEX}{{{n}}}" for n in (8, 4, 4, 4, 12)),
    "ipv4": ' "." '.join([BYTE] * 4),
    "uri": f'"http" "s"? "://" {LABEL} ("." {LABEL}){{1,3}} ("/" [a-zA-Z0-9._~-]{{0,20}}){{0,4}}',
    "email": f'{LABEL} ("." {LABEL}){{0,3}} "@" {LABEL} ("." {LABEL}){{1,3}}',
}

FORMAT_LENGTHS = {
    "date": (10, 10), "time": (9, 21), "date-time": (20, 32), "uuid": (36, 36), "ipv4": (7, 15),
    "uri": (10, 219), "email": (5, 255),
}  # fmt: skip
"""The fewest and the most characters of each."""


class Rules:
    """Rules of GBNF by name; the same body has one name. What makes rules gives their names."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._n_chars = 0

    def text(self, start: str) -> str:
        """The grammar, beginning with the rule `start`. Raises UsageError."""
        lines = [f"root ::= {start}", *(f"{name} ::= {rule}" for name, rule in self._rules.items())]
        grammar = "\n".join([*lines, BASE])
        if grammar.count("(") > MAX_GROUPS:
            raise UsageError("The JSON schema is too large for a grammar.", "Make it simpler.")
        return grammar

    def add(self, body: str, name: str | None = None) -> str:
        """The name of the rule with this body, the same for the same body."""
        if name is None and body in self._names:
            return self._names[body]
        self._n_chars += len(body)
        if self._n_chars > MAX_GRAMMAR_CHARS:
            raise UsageError("The JSON schema is too large for a grammar.", "Make it simpler.")
        name = name or f"r{len(self._rules)}"
        self._rules[name] = body
        self._names.setdefault(body, name)
        return name

    def one_of(self, texts: Iterable[str]) -> str:
        """One of these texts, however many there are."""
        return self.add(self._tree(sorted(set(texts)), 0))

    def _tree(self, texts: Sequence[str], at: int) -> str:
        """Texts, all equal before `at`, as alternatives that differ in their first character."""
        groups: dict[str, list[str]] = {}
        for text in texts:
            groups.setdefault(text[at : at + 1], []).append(text)
        return " | ".join(self._branch(group, at) for group in groups.values())

    def _branch(self, texts: Sequence[str], at: int) -> str:
        if len(texts) == 1:
            return quoted(texts[0][at:])
        first, last = texts[0], texts[-1]  # sorted: what these share, all share
        end = at
        while end < len(first) and first[end : end + 1] == last[end : end + 1]:
            end += 1
        return f"{quoted(first[at:end])} {self.add(self._tree(texts, end))}"

    def times(self, name: str, low: int, high: int | None) -> str:
        """So many of a rule; large numbers by chunks that share their rules."""
        parts = [self.add(f"{name}{{{CHUNK}}}")] * (low // CHUNK)
        if low % CHUNK:
            parts.append(f"{name}{{{low % CHUNK}}}")
        if high is None:
            return " ".join([*parts, f"{name}*"])
        if high == low:
            return " ".join(parts)
        tail = f"{name}{{0,{(high - low) % CHUNK}}}"
        rest = self.add(tail)
        for _ in range((high - low) // CHUNK):
            whole = self.add(f"{name}{{{CHUNK}}}")
            rest = self.add(f"{whole} {rest} | {self.add(f'{name}{{0,{CHUNK - 1}}}')}")
        return " ".join([*parts, rest])

    def key_unlike(self, names: Iterable[str]) -> str:
        """A key that is none of these, and that no escape could make one of them."""
        if not names:
            return "string"
        return self.add(f'"\\"" {self._unlike(sorted(set(names)), 0)} "\\""')

    def _unlike(self, names: Sequence[str], at: int) -> str:
        groups: dict[str, list[str]] = {}
        for name in names:
            if len(name) > at:
                groups.setdefault(name[at], []).append(name)
        barred = "".join(f"\\U{ord(char):08x}" for char in groups)
        found = [f'[^"\\\\\\x00-\\x1f\\x7f-\\x9f{barred}] char*']
        found += [f"{quoted(c)} {self._unlike(group, at + 1)}" for c, group in groups.items()
                  if c not in '"\\']  # fmt: skip
        if all(len(name) > at for name in names):
            found.append('""')
        return self.add(" | ".join(found))


def quoted(text: str) -> str:
    """A text as a literal of GBNF."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "(": "\\x28"}
    return '"' + re.sub(r'[\\"\n\r\t(]', lambda found: escapes[found[0]], text) + '"'
