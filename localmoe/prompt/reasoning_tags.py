"""Thinking between tags that are plain text, for vocabularies without tokens of their own for it.

Many fine-tunes write <think> letter by letter. An answer that begins with such a tag, or whose
prompt ends with one, has thought until the tag is closed. A tag anywhere else is text like any
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from ..engine.interfaces import Tokenizer
from ..engine.protocol import Delta, TextPiece


class TagPair(NamedTuple):
    """What stands around thinking; `header` is the word behind the opener that is no part of it."""

    opener: str
    closer: str
    header: str = ""


TAG_PAIRS = (
    TagPair("<think>", "</think>"), TagPair("[THINK]", "[/THINK]"),
    TagPair("<seed:think>", "</seed:think>"), TagPair("<|channel>", "<channel|>", "thought"),
    TagPair("<|START_THINKING|>", "<|END_THINKING|>"),
    TagPair("<|begin_of_thought|>", "<|end_of_thought|>"), TagPair("<thinking>", "</thinking>"),
    TagPair("<thought>", "</thought>"), TagPair("<reasoning>", "</reasoning>"),
    TagPair("◁think▷", "◁/think▷"),
    TagPair("Here is my thought process:", "Here is my response:"),
)  # fmt: skip
"""Qwen3, DeepSeek, GLM and most others; Magistral; Seed-OSS; Gemma 4; Command A; Sky-T1; EXAONE;
Kimi; Granite 3.2. A vocabulary may have tokens for them (reasoning.py), or they are plain text."""
TAGS = tuple((pair.opener + pair.header, pair.closer) for pair in TAG_PAIRS)
"""As plain text, a header is a part of its opener."""
BEHIND_OPENER = ("", "\n", "\n\n")
N_TAIL = 2


@dataclass(frozen=True, slots=True)
class TextTags:
    """The tags, and by which ids a prompt ends with each opener."""

    tails: tuple[tuple[tuple[int, ...], str], ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """No ids part thinking from answer here."""
        return ()

    def closer_after(self, prompt: Sequence[int]) -> str:
        """Returns what closes the thinking that a prompt opened; "" where it opened none."""
        end = tuple(prompt[-N_TAIL:])
        return next((closer for tail, closer in self.tails if end[-len(tail) :] == tail), "")


def find_text_tags(template: str, tokenizer: Tokenizer) -> TextTags:
    """Returns the tags that an answer's thinking may stand between.

    Only those that the template names are looked for at the end of a prompt.
    """
    named = [tags for tags in TAGS if tags[0] in template]
    ends = [(opener + behind, closer) for opener, closer in named for behind in BEHIND_OPENER]
    encoded = tokenizer.tokenize([TextPiece(text, special=True) for text, _ in ends])
    return TextTags(
        tuple((ids[-N_TAIL:], closer) for ids, (_, closer) in zip(encoded, ends, strict=True))
    )


@dataclass(slots=True)
class TagSplitter:
    """Gives each delta its kind, by the text that came so far.

    `closer` is that of the thinking which the prompt opened. Text behind a closer has no tokens of
    its own, since one token may reach over the closer's end: such an answer is known by its text.
    """

    closer: str = ""
    place: Literal["start", "thinking", "text", "answer"] = field(init=False)
    _pending: str = ""  # what may be the beginning of a tag
    _held: list[Delta] = field(default_factory=list)
    _is_first: bool = True  # whether line ends are still to be left out

    def __post_init__(self) -> None:
        self.place = "thinking" if self.closer else "start"

    def feed(self, delta: Delta) -> Iterator[Delta]:
        """Yields the deltas that a delta brings."""
        if self.place == "start":
            yield from self._begin(delta)
        elif self.place == "thinking":
            yield from self._think(delta)
        elif self.place == "answer":
            yield from self._answer(delta, delta.text)
        else:
            yield delta

    def _begin(self, delta: Delta) -> Iterator[Delta]:
        if not (delta.text or delta.tokens or delta.finish_reason):
            yield delta  # how far the prompt is
            return
        self._pending += delta.text
        said = self._pending.lstrip()
        found = [tags for tags in TAGS if said.startswith(tags[0])]
        may_follow = any(opener.startswith(said) for opener, _ in TAGS)
        if not found and may_follow and not delta.finish_reason:
            self._held.append(delta)
            return
        held, self._held, self._pending = self._held, [], ""
        if not found:
            self.place = "text"
            yield from held
            yield delta
            return
        opener, self.closer = found[0]
        self.place = "thinking"
        yield from (replace(one, text="", kind="thinking") for one in held)
        yield from self._think(replace(delta, text=said.removeprefix(opener)))

    def _think(self, delta: Delta) -> Iterator[Delta]:
        text, self._pending = self._pending + delta.text, ""
        before, closer, behind = text.partition(self.closer)
        if not closer and not delta.finish_reason:
            n_kept = next(n for n in range(len(text) + 1) if self.closer.startswith(text[n:]))
            before, self._pending = text[:n_kept], text[n_kept:]
        thought = self._without_line_ends(before)
        if not closer:
            yield replace(delta, text=thought, kind="thinking")
            return
        yield Delta(delta.id, thought, delta.tokens, delta.prompt_tokens, kind="thinking")
        self.place, self._is_first = "answer", True
        yield from self._answer(replace(delta, tokens=()), behind)

    def _answer(self, delta: Delta, text: str) -> Iterator[Delta]:
        if delta.tokens:
            yield Delta(delta.id, "", delta.tokens, kind="thinking")
        text = self._without_line_ends(text)
        if text or delta.finish_reason or not delta.tokens:
            yield replace(delta, text=text, tokens=())

    def _without_line_ends(self, text: str) -> str:
        if self._is_first:
            text = text.lstrip("\n")
            self._is_first = not text
        return text
