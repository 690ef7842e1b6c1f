"""Texts that were cut into pieces, encoded as if they had not been.

llama.cpp encodes every piece as a text of its own. With a SentencePiece vocabulary it then puts a
space before it, as it does at the beginning and after each control token (src/llama-vocab.cpp,
llama_vocab::impl::tokenize); in the middle of a text that space would be one too many. There a
piece is encoded behind an anchor, a character that no vocabulary merges with anything, and the
anchor's ids are taken off again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..engine.interfaces import Tokenizer
from ..engine.protocol import TextPiece
from ..errors import PromptError

ANCHOR = "\U0010fffd"
Ids = tuple[int, ...]
Part = TextPiece | Ids


@dataclass(frozen=True, slots=True)
class PromptSegment:
    """A piece; it `goes_on` if a space would come before it that the whole text doesn't have."""

    piece: TextPiece
    goes_on: bool = False


def encode_parts(
    parts: Iterable[Part], tokenizer: Tokenizer, *, puts_space: bool, control: frozenset[str]
) -> list[int]:
    """The ids of a prompt: pieces encoded, ids as they are. One call of the tokenizer, seldom more.

    `puts_space`: the tokenizer puts a space before each text, and after the `control` tokens.
    """
    there = [p for p in parts if (p.text if isinstance(p, TextPiece) else p)]
    ends = tuple(text for text in control if text)
    cuts = [
        PromptSegment(part, puts_space and not (before is None or after_control(before, ends)))
        for before, part in zip([None, *there], there, strict=False)
        if isinstance(part, TextPiece)
    ]
    encoded = iter(encode_segments(cuts, tokenizer, puts_space))
    ids: list[int] = []
    for part in there:
        ids += next(encoded) if isinstance(part, TextPiece) else part
    return ids


def after_control(before: Part, control: tuple[str, ...]) -> bool:
    """Whether what comes next follows a control token."""
    return isinstance(before, TextPiece) and before.special and before.text.endswith(control)


def encode_segments(
    cuts: Sequence[PromptSegment], tokenizer: Tokenizer, puts_space: bool
) -> list[Ids]:
    """The ids of each piece.

    Some vocabularies hold control tokens that llama.cpp finds even in plain text (those of the type
    USER_DEFINED). A plain piece that came out as one is encoded character by character.
    """
    plain = [cut.piece.text for cut in cuts if not cut.piece.special]
    anchor, *encoded = tokenizer.tokenize(
        [
            TextPiece(ANCHOR),
            *(replace(cut.piece, text=ANCHOR * cut.goes_on + cut.piece.text) for cut in cuts),
            *(TextPiece(text, special=True) for text in plain),
        ]
    )
    control = dict(zip(plain, encoded[len(cuts) :], strict=True))
    result = []
    for cut, ids in zip(cuts, encoded, strict=False):
        if cut.goes_on:
            ids = without_anchor(ids, anchor, cut.piece, tokenizer)
        if not cut.piece.special and ids == control[cut.piece.text]:
            ids = break_up(cut, tokenizer, puts_space)
        result.append(ids)
    return result


def without_anchor(ids: Ids, anchor: Ids, piece: TextPiece, tokenizer: Tokenizer) -> Ids:
    """What follows the anchor; where a vocabulary merged it all the same, the piece by itself."""
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    return tokenizer.tokenize([piece])[0]


def break_up(cut: PromptSegment, tokenizer: Tokenizer, puts_space: bool) -> Ids:
    """The ids of a piece, each of its characters kept apart from the others."""
    text = cut.piece.text
    if len(text) < 2:
        raise PromptError(
            f"A message holds the character {ascii(text)}, which is a control token of this model.",
            "Take it out.",
        )
    goes_on = [cut.goes_on, *[puts_space] * (len(text) - 1)]
    apart = [TextPiece(ANCHOR * on + letter) for on, letter in zip(goes_on, text, strict=True)]
    anchor, *encoded = tokenizer.tokenize([TextPiece(ANCHOR), *apart])
    ids: list[int] = []
    for on, letter, found in zip(goes_on, text, encoded, strict=True):
        ids += without_anchor(found, anchor, TextPiece(letter), tokenizer) if on else found
    return tuple(ids)
