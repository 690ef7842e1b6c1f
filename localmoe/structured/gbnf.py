"""Checks a GBNF grammar before a model is there: its names, left recursion, and how it expands.

llama.cpp keeps a stack for each way in which a text may go on, and makes all of them before the
first character (llama_grammar_advance_stack, src/llama-grammar.cpp). A rule that begins with itself
never ends there, and thirty rules that each name the next twice begin in 2^30 ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError

MAX_BEGINNINGS = 100_000
"""Ways in which a grammar may begin: a tenth of a second in llama.cpp."""
MAX_GRAMMAR_CHARS = 4 << 20
MAX_GROUPS = 4000
"""As many as the engine takes (engine/native/llama.py): llama.cpp's parser recurses on groups."""
RULE = re.compile(r"^[ \t]*([a-zA-Z0-9_-]+)[ \t]*::=", re.MULTILINE)
NAME = re.compile(r"(?<![a-zA-Z0-9_{,-])[a-zA-Z][a-zA-Z0-9_-]*")
COMMENT_OR_TEXT = re.compile(r'(#[^\n]*)|("(?:\\.|[^"\\\n])*"|\[(?:\\.|[^\]\\\n])*\])')
TOKEN = re.compile(r'"|\.|[a-zA-Z0-9_-]+|\(|\)|\||[*+?]|\{[0-9, \t]*\}')


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a sequence: a rule's name, a group, or "" for characters.

    `least` and `most` say how often it stands there; None is without end.
    """

    what: str | tuple[tuple[Part, ...], ...]
    least: int = 1
    most: int | None = 1


Alternatives = tuple[tuple[Part, ...], ...]


class GrammarTooLarge(Exception):
    """A grammar that begins in more ways than llama.cpp could follow."""


class LeftRecursion(Exception):
    """A rule that begins with itself; the exception's text is its name."""


def check_grammar(text: str) -> None:
    """Raises UsageError on a grammar that llama.cpp would surely refuse.

    The rest it says itself, once a model is loaded.
    """
    if not text.strip():
        raise UsageError("The grammar is empty.", "It needs a rule named root.")
    if len(text) > MAX_GRAMMAR_CHARS:
        raise UsageError(f"The grammar is larger than {MAX_GRAMMAR_CHARS >> 20} MiB.")
    bad = re.search("[\0\ud800-\udfff]", text)
    if bad:
        raise UsageError(f"The grammar holds no text at character {bad.start() + 1}.")
    bare = COMMENT_OR_TEXT.sub(" ", text)  # what stands in comments, literals and sets is no name
    rules = set(RULE.findall(bare))
    if "root" not in rules:
        raise UsageError('The grammar has no rule named "root".', "The answer begins with it.")
    stray = re.search(r'["\[\]]', bare)
    if stray:
        line = bare[: stray.start()].count("\n") + 1
        raise UsageError(f"The grammar's line {line} has a {stray[0]} that nothing closes.")
    if text.count("(") > MAX_GROUPS:
        raise UsageError(f"The grammar has more than {MAX_GROUPS} groups.")
    if bare.count("(") != bare.count(")"):
        raise UsageError('The grammar has not as many "(" as ")".')
    for found in NAME.finditer(bare):
        if found[0] not in rules:
            line = bare[: found.start()].count("\n") + 1
            raise UsageError(f'The grammar\'s line {line} names "{found[0]}", which has no rule.')
    try:
        check_expansion(text)
    except LeftRecursion as error:
        raise UsageError(
            f'The grammar\'s rule "{error}" begins with itself (left recursion).',
            "Write repetition instead: item item*.",
        ) from None
    except GrammarTooLarge:
        raise UsageError(
            f"The grammar begins in more than {MAX_BEGINNINGS:,} ways, too many to follow.",
            "Make it simpler.",
        ) from None


def check_expansion(text: str) -> None:
    """Raises LeftRecursion or GrammarTooLarge. What is no grammar is llama.cpp's to refuse."""
    counter = _Counter(rules_of(text))
    try:
        counter.n_beginnings("root")
        for name in counter.rules:
            counter.n_beginnings(name)
        for name, alternatives in counter.rules.items():
            counter.check_repetitions(name, alternatives)
    except RecursionError:
        raise GrammarTooLarge from None


def rules_of(text: str) -> dict[str, Alternatives]:
    """Returns the alternatives of each rule, as far as they are grammar."""
    marks = {"": '"', '""': "()"}
    bare = COMMENT_OR_TEXT.sub(
        lambda found: "" if found[1] else marks.get(found[2], marks[""]), text
    )
    heads = list(RULE.finditer(bare))
    ends = [*(head.start() for head in heads[1:]), len(bare)]
    return {
        head[1]: _alternatives(iter(TOKEN.findall(bare[head.end() : end])))
        for head, end in zip(heads, ends, strict=True)
    }


def _alternatives(tokens: Iterator[str]) -> Alternatives:
    """What stands up to the end, or up to the group's closing parenthesis."""
    found: list[tuple[Part, ...]] = []
    sequence: list[Part] = []
    for token in tokens:
        if token == ")":
            break
        if token == "|":
            found.append(tuple(sequence))
            sequence = []
        elif token == "(":
            sequence.append(Part(_alternatives(tokens)))
        elif token[0] in "*+?{":
            if sequence:
                sequence[-1] = Part(sequence[-1].what, *_counts(token))
        else:
            sequence.append(Part("" if token in '".' else token))
    return (*found, tuple(sequence))


def _counts(token: str) -> tuple[int, int | None]:
    """How often a part stands there, by what is behind it: *, +, ?, {2}, {2,} or {2,3}."""
    known = {"*": (0, None), "+": (1, None), "?": (0, 1)}
    if token in known:
        return known[token]
    least, comma, most = token[1:-1].replace(" ", "").partition(",")
    low = int(least or 0)
    return low, (int(most) if most else None) if comma else low


class _Counter:
    """Counts in how many ways each rule begins, every rule once."""

    def __init__(self, rules: Mapping[str, Alternatives]) -> None:
        self.rules = rules
        self._counts: dict[str, tuple[int, bool]] = {}
        self._under_way: list[str] = []

    def n_beginnings(self, name: str) -> tuple[int, bool]:
        """Returns how many ways there are, and whether the rule may be empty."""
        if name in self._counts:
            return self._counts[name]
        if name in self._under_way:
            raise LeftRecursion(name)
        self._under_way.append(name)
        found = self._of_alternatives(self.rules.get(name, ()))
        self._under_way.pop()
        if found[0] > MAX_BEGINNINGS:
            raise GrammarTooLarge
        self._counts[name] = found
        return found

    def check_repetitions(self, name: str, alternatives: Alternatives) -> None:
        """Raises LeftRecursion where what may be empty is repeated without end.

        llama.cpp repeats by a rule that calls itself behind what is repeated. Every rule must be
        counted.
        """
        for part in (part for sequence in alternatives for part in sequence):
            if part.most is None and self._of_part(part)[1]:
                raise LeftRecursion(name)
            if isinstance(part.what, tuple):
                self.check_repetitions(name, part.what)

    def _of_part(self, part: Part) -> tuple[int, bool]:
        if part.what == "":
            return 1, False
        if isinstance(part.what, str):
            return self.n_beginnings(part.what)
        return self._of_alternatives(part.what)

    def _of_alternatives(self, alternatives: Alternatives) -> tuple[int, bool]:
        counts = [self._of_sequence(sequence) for sequence in alternatives]
        return sum(n for n, _ in counts), any(is_empty for _, is_empty in counts)

    def _of_sequence(self, sequence: Sequence[Part]) -> tuple[int, bool]:
        total = 0
        for part in sequence:
            if part.most == 0:
                continue
            n, is_empty = self._of_part(part)
            total += n * (part.most or 1 if is_empty else 1)
            if total > MAX_BEGINNINGS:
                raise GrammarTooLarge
            if not is_empty and part.least:
                return total, False
        return total + 1, True
