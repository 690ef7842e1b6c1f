"""Thinking told from answer: the deltas of an engine -> deltas of kind "thinking" or "text".

Reasoning models part the two with tokens: <think> and its kin around the thinking, or the channels
of OpenAI's harmony format. The split goes by ids. What a person or a model spells in ordinary
tokens is text like any other. The engine lets held text out at each of these tokens, so that no
delta has text of both sides. Where a vocabulary has no such tokens, the split goes by text
(reasoning_tags.py).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..engine.interfaces import Tokenizer
from ..engine.protocol import Delta, Request, TextPiece
from ..structured.check import is_structured
from .messages import Message
from .reasoning_tags import TAG_PAIRS, TagSplitter, TextTags, find_text_tags

Kind = Literal["text", "thinking"]

# <|start|>assistant<|channel|>analysis<|message|>...<|end|>, of gpt-oss
# (https://cookbook.openai.com/articles/openai-harmony)
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
ANSWER_CHANNEL = "final"
N_BEHIND_OPENER = 2
"""A template that opens the thinking for the model ends with <think>, or with a line end more."""


@dataclass(frozen=True, slots=True)
class ThinkMarkers:
    """The tokens around thinking. `header` is the word behind the opener that is no part of it."""

    opens: int
    closes: int
    header: str = ""

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids that part thinking from answer."""
        return (self.opens, self.closes)

    def is_open_after(self, prompt: Sequence[int]) -> bool:
        """Whether an answer to this prompt begins inside the thinking.

        Only an opener at the very end counts: a template may write one in its instructions too.
        """
        behind = prompt[-1 - N_BEHIND_OPENER :]
        return self.opens in behind and self.closes not in behind


@dataclass(frozen=True, slots=True)
class HarmonyMarkers:
    """The tokens around the headers of harmony's messages, and at their ends."""

    start: int
    channel: int
    message: int
    end: int

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids that part channels from each other."""
        return (self.start, self.channel, self.message, self.end)


ReasoningMarkers = ThinkMarkers | HarmonyMarkers | TextTags


def find_reasoning_markers(
    special: frozenset[str], tokenizer: Tokenizer, template: str = ""
) -> ReasoningMarkers:
    """Returns what parts thinking from answer: tokens where a vocabulary has them, else tags.

    `special` are the texts of its control and user-defined tokens. Where there are several kinds,
    that which the `template` names comes first.
    """
    if ids := _single_ids(HARMONY, special, tokenizer):
        return HarmonyMarkers(*ids)
    for pair in sorted(TAG_PAIRS, key=lambda pair: pair.opener not in template):
        if ids := _single_ids((pair.opener, pair.closer), special, tokenizer):
            return ThinkMarkers(ids[0], ids[1], pair.header)
    return find_text_tags(template, tokenizer)


def _single_ids(
    texts: Sequence[str], special: frozenset[str], tokenizer: Tokenizer
) -> list[int] | None:
    """The ids of some special tokens; None where one of the texts isn't a token of its own."""
    if not special.issuperset(texts):
        return None
    encoded = tokenizer.tokenize([TextPiece(text, special=True) for text in texts])
    return [ids[0] for ids in encoded] if all(len(ids) == 1 for ids in encoded) else None


def join_reasoning(
    deltas: Iterable[Delta], markers: ReasoningMarkers | None, request: Request
) -> Answer:
    """An answer from all deltas of a request that wasn't streamed.

    A delta has all text between two markers, so line ends behind these are taken off here.
    """
    answer = Answer()
    for delta in split_reasoning(iter(deltas), markers, request):
        answer.add(delta)
    if answer.thinking:
        answer.thinking, answer.text = answer.thinking.lstrip("\n"), answer.text.lstrip("\n")
    return answer


@dataclass(slots=True)
class Answer:
    """An answer as it grows: its text, what was thought before it, and its last delta.

    `tokens` are all that were sampled; `text_tokens` those of the text alone.
    """

    text: str = ""
    thinking: str = ""
    tokens: tuple[int, ...] = ()
    text_tokens: tuple[int, ...] = ()
    last: Delta | None = None
    has_pending_text: bool = False

    def add(self, delta: Delta) -> None:
        """Takes a delta."""
        if delta.anew:
            self.text, self.thinking, self.tokens, self.text_tokens = "", "", (), ()
        if delta.kind == "thinking":
            self.thinking += delta.text
        else:
            self.text += delta.text
            self.text_tokens += delta.tokens
        self.tokens += delta.tokens
        self.has_pending_text = delta.has_pending_text and delta.kind == "text"
        if delta.finish_reason:
            self.last = delta

    def message(self) -> Message:
        """The answer as a turn of the conversation.

        Cut at a stop string, or left while one might have been going on, its text is less than its
        tokens say; then the text counts.
        """
        cut = self.has_pending_text or (self.last is not None and self.last.stopped_by is not None)
        return Message("assistant", self.text, None if cut else self.text_tokens, self.thinking)


def nothing_came(answer: Answer, so: str = "") -> str:
    """Why an answer has no text although it came to its end; `so` says what follows from that."""
    if not answer.thinking:
        return f"The model answered nothing{so}."
    return (
        f"The answer ended while the model was still thinking{so}. "
        "Allow it more tokens (-n), or ask it not to think (--think off)."
    )


def split_reasoning(
    deltas: Iterator[Delta], markers: ReasoningMarkers | None, request: Request
) -> Generator[Delta, None, None]:
    """Yields the deltas of the answer to a request, each of one kind.

    Tokens of markers and headers count as thinking, so that those of the text spell it exactly.
    """
    is_bound = is_structured(request.sampling)  # its text begins at once, whatever a prompt opened
    if markers is None or (isinstance(markers, TextTags) and is_bound):
        yield from deltas
        return
    splitter: _Brackets | _Harmony | TagSplitter
    if isinstance(markers, HarmonyMarkers):
        splitter = _Harmony(markers)
    elif isinstance(markers, TextTags):
        splitter = TagSplitter(markers.closer_after(request.tokens))
    else:
        splitter = _Brackets(markers, not is_bound and markers.is_open_after(request.tokens))
    for delta in deltas:
        yield from splitter.feed(delta)


@dataclass(slots=True)
class _Brackets:
    """Between an opener and a closer all is thinking, and the line ends behind either are nothing.

    Templates put those line ends there and take them off again (Qwen3's: `lstrip('\\n')`).
    """

    markers: ThinkMarkers
    is_open: bool
    is_first: bool = field(init=False)  # whether line ends are still to be left out
    header: str = ""  # what the thinking may begin with that is no part of it
    pending: str = ""  # what came of it so far

    def __post_init__(self) -> None:
        self.is_first = self.is_open

    @property
    def kind(self) -> Kind:
        return "thinking" if self.is_open else "text"

    def feed(self, delta: Delta) -> Iterator[Delta]:
        if self.markers.opens not in delta.tokens and self.markers.closes not in delta.tokens:
            yield self._trimmed(replace(delta, kind=self.kind))
            return
        delta = replace(delta, text=self._without_header(delta.text, is_last=True))
        yield from _before_marker(delta, self.kind)
        self.is_open = delta.tokens[-1] == self.markers.opens
        self.is_first = True
        self.header = self.markers.header if self.is_open else ""

    def _trimmed(self, delta: Delta) -> Delta:
        if not self.is_first or not delta.tokens:
            return delta
        delta = replace(delta, text=self._without_header(delta.text))
        if delta.has_pending_text or delta.text.strip("\n"):
            self.is_first = False
            return replace(delta, text=delta.text.lstrip("\n")) if self.is_open else delta
        return replace(delta, text="", kind="thinking")

    def _without_header(self, text: str, *, is_last: bool = False) -> str:
        text, self.pending = self.pending + text, ""
        if not is_last and text != self.header and self.header.startswith(text):
            self.pending = text
            return ""
        text, self.header = text.removeprefix(self.header), ""
        return text


@dataclass(slots=True)
class _Harmony:
    """Messages with headers; the channel in its header says what a message is.

    An answer goes on after "<|start|>assistant", so it begins with the marker of a channel; where a
    grammar leaves no room for one, it is text from its first token on.
    """

    markers: HarmonyMarkers
    kind: Kind = "text"
    place: Literal["header", "channel", "message"] = "message"
    channel: str = ""

    def feed(self, delta: Delta) -> Iterator[Delta]:
        marker = next((t for t in delta.tokens if t in self.markers.ids), None)
        if marker is None:
            yield self._ordinary(delta)
            return
        if self.place == "channel":
            self.channel += delta.text
        yield from _before_marker(delta, self.kind, says=self.place == "message")
        self._pass(marker)

    def _ordinary(self, delta: Delta) -> Delta:
        if self.place == "channel":
            self.channel += delta.text
        if self.place in ("header", "channel"):
            return replace(delta, text="", kind="thinking")
        return replace(delta, kind=self.kind)

    def _pass(self, marker: int) -> None:
        if marker == self.markers.channel:
            self.place, self.channel = "channel", ""
        elif marker == self.markers.message:
            # a header without a channel is that of an answer
            is_answer = self.channel.split(" ")[0].strip() in ("", ANSWER_CHANNEL)
            self.place, self.kind = "message", "text" if is_answer else "thinking"
        else:  # the next message has a header of its own, even if its start is left out
            self.place, self.channel = "header", ""


def _before_marker(delta: Delta, kind: Kind, *, says: bool = True) -> Iterator[Delta]:
    """What a marker let out, and the marker itself, which is no part of any text."""
    if delta.text and says and kind == "text":
        n_prompt, n_completion = delta.prompt_tokens, delta.completion_tokens
        yield Delta(delta.id, delta.text, prompt_tokens=n_prompt, completion_tokens=n_completion)
        delta = replace(delta, text="")
    yield replace(delta, text=delta.text if says else "", kind="thinking")
