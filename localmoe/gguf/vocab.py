"""Tokenizer facts out of a header; the texts of ordinary tokens stay undecoded."""

from __future__ import annotations

from dataclasses import dataclass

from .metadata import Metadata
from .reader import StringArray

# enum llama_token_type (include/llama.h)
CONTROL, USER_DEFINED = 3, 4


@dataclass(frozen=True, slots=True)
class VocabMeta:
    """How text becomes tokens. An id is None where the header has none; llama.cpp then has its own
    default for the tokenizer's kind. `control_tokens` are texts that stand for a control token,
    `user_tokens` those of tokens that are matched whole but are plain text.
    """

    model: str
    pre: str
    n_vocab: int
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    eom_id: int | None
    unk_id: int | None
    pad_id: int | None
    bos_text: str
    eos_text: str
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    control_tokens: tuple[str, ...]
    user_tokens: tuple[str, ...]


def read_tokenizer(keys: Metadata) -> VocabMeta:
    """Raises ModelFileError for a vocabulary that llama.cpp refuses or aborts on."""
    tokens = keys.strings("tokenizer.ggml.tokens")
    if tokens is None:
        raise keys.refuse("damaged: no vocabulary (tokenizer.ggml.tokens) in its header")
    _check_tokens(keys, tokens)
    types = (keys.numbers("tokenizer.ggml.token_type", "i") or ())[: len(tokens)]
    bos, eos = (_token_id(keys, name, len(tokens)) for name in ("bos", "eos"))
    return VocabMeta(
        model=keys.text("tokenizer.ggml.model"),
        pre=keys.text("tokenizer.ggml.pre"),
        n_vocab=len(tokens),
        bos_id=bos,
        eos_id=eos,
        eot_id=_token_id(keys, "eot", len(tokens)),
        eom_id=_token_id(keys, "eom", len(tokens)),
        unk_id=_token_id(keys, "unknown", len(tokens)),
        pad_id=_token_id(keys, "padding", len(tokens)),
        bos_text="" if bos is None else tokens[bos],
        eos_text="" if eos is None else tokens[eos],
        add_bos=keys.flag("tokenizer.ggml.add_bos_token"),
        add_eos=keys.flag("tokenizer.ggml.add_eos_token"),
        add_space_prefix=keys.flag("tokenizer.ggml.add_space_prefix"),
        control_tokens=tuple(tokens[i] for i, kind in enumerate(types) if kind == CONTROL),
        user_tokens=tuple(tokens[i] for i, kind in enumerate(types) if kind == USER_DEFINED),
    )


def _check_tokens(keys: Metadata, tokens: StringArray) -> None:
    """What llama_vocab::impl::load (src/llama-vocab.cpp) asserts or throws on."""
    if not tokens:
        raise keys.refuse("damaged: its vocabulary is empty")
    # empty texts get a name of their own in llama.cpp
    texts = [raw or b"[EMPTY_%d]" % i for i, raw in enumerate(tokens.raws())]
    distinct = set(texts)
    if len(distinct) != len(texts):
        n = len(texts) - len(distinct)
        raise keys.refuse(f"damaged: {n:,} of its {len(texts):,} tokens come twice")
    if keys.text("tokenizer.ggml.model") == "llama":
        _check_bytes(keys, distinct)
    for key, typecodes in (("scores", "fi"), ("token_type", "i")):
        if f"tokenizer.ggml.{key}" not in keys:
            continue
        values = keys.numbers(f"tokenizer.ggml.{key}", typecodes)
        if values is None or len(values) < len(tokens):
            raise keys.refuse(f"damaged: tokenizer.ggml.{key} doesn't fit {len(tokens):,} tokens")


def _check_bytes(keys: Metadata, texts: set[bytes]) -> None:
    """SentencePiece falls back to a token for each byte; llama.cpp ends the process at the first
    text that needs one which isn't there (llama_vocab::byte_to_token).
    """
    missing = [b for b in range(256) if not {b"<0x%02X>" % b, bytes([b])} & texts]
    if missing:
        reason = (
            f"{len(missing)} byte tokens missing from its vocabulary, <0x{missing[0]:02X}> first"
        )
        raise keys.refuse(f"damaged: {reason}")


def _token_id(keys: Metadata, name: str, n_vocab: int) -> int | None:
    """llama.cpp ignores ids outside the vocabulary, with a warning."""
    token_id = keys.get(f"tokenizer.ggml.{name}_token_id")
    valid = isinstance(token_id, int) and 0 <= token_id < n_vocab
    return token_id if valid and isinstance(token_id, int) else None
