"""Which characters of a rendered prompt come from messages, and where they spell control tokens.

A template is given messages whose characters are replaced, one by one, by *shadows*: private-use
characters that occur nowhere else. Wherever they end up, cut, repeated or turned around, they can
be told from the template's own text, and turned back. Blanks stay as they are, so that a template
can trim; so does the number of characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from ..errors import PromptError

PRIVATE_USE = ((0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))


class TextSpan(NamedTuple):
    """Characters `start` up to `end` of a text."""

    start: int
    end: int


class ControlTokens:
    """The texts of a vocabulary's control tokens, to be found in other texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = frozenset(text for text in texts if text)
        lengths: dict[str, set[int]] = {}
        for text in self._texts:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile(f"[{''.join(map(re.escape, lengths))}]" if lengths else "(?!)")

    def spans(self, text: str) -> list[TextSpan]:
        """Every place where a control token is spelled, the longest of each beginning; in order."""
        places = (self._span_at(text, match.start()) for match in self._first.finditer(text))
        return [span for span in places if span is not None]

    def spelled(self, text: str) -> list[str]:
        """The control tokens that a text spells, in order."""
        return [text[start:end] for start, end in self.spans(text)]

    def _span_at(self, text: str, start: int) -> TextSpan | None:
        for length in self._lengths[text[start]]:
            if text[start : start + length] in self._texts:
                return TextSpan(start, start + length)
        return None


@lru_cache(maxsize=8)
def control_tokens(texts: frozenset[str]) -> ControlTokens:
    """The control tokens of a vocabulary, prepared once."""
    return ControlTokens(texts)


@lru_cache(maxsize=8)
def control_tokens_of_any_case(texts: frozenset[str]) -> ControlTokens:
    """The same, and what a template could make one of by changing its case."""
    return ControlTokens({*texts, *map(str.lower, texts), *map(str.upper, texts)})


def merge_spans(spans: Iterable[TextSpan]) -> list[TextSpan]:
    """Spans in order, those that overlap made one."""
    result: list[TextSpan] = []
    for span in spans:
        if result and span.start < result[-1].end:
            result[-1] = TextSpan(result[-1].start, max(span.end, result[-1].end))
        else:
            result.append(span)
    return result


class Provenance:
    """Shadows for the characters of some texts; none of `taken` is used as one."""

    def __init__(self, texts: Iterable[str], taken: str) -> None:
        characters = set().union(*texts)
        used = characters | set(taken)
        codes = chain.from_iterable(range(*block) for block in PRIVATE_USE)
        self._free = (code for code in codes if chr(code) not in used)
        self._shadow_of = {ord(c): self._next() for c in sorted(characters) if not c.isspace()}
        self._original = {shadow: chr(code) for code, shadow in self._shadow_of.items()}
        self._shadows = frozenset(chr(shadow) for shadow in self._original)

    def mark(self) -> str:
        """One more character that occurs nowhere else."""
        return chr(self._next())

    def cover(self, text: str) -> str:
        """A text in shadows."""
        return text.translate(self._shadow_of)

    def cover_spans(self, text: str, spans: Iterable[TextSpan]) -> str:
        """A text with only these parts of it in shadows."""
        pieces, done = [], 0
        for start, end in merge_spans(spans):
            pieces += [text[done:start], self.cover(text[start:end])]
            done = end
        return "".join([*pieces, text[done:]])

    def uncover(self, text: str) -> str:
        """The text that a person would see; as long as the one in shadows."""
        return text.translate(self._original)

    def holds_shadow(self, text: str) -> bool:
        """Whether a text holds a character that stands for another."""
        return not self._shadows.isdisjoint(text)

    def _next(self) -> int:
        code = next(self._free, None)
        if code is None:
            raise PromptError("The conversation uses too many different characters.")
        return code


def spelled_by_messages(
    rendered: str, shadows: Provenance, control: ControlTokens
) -> list[TextSpan]:
    """The control tokens of a rendered text that hold a character of a message, in order."""
    return merge_spans(
        span
        for span in control.spans(shadows.uncover(rendered))
        if shadows.holds_shadow(rendered[span.start : span.end])
    )
