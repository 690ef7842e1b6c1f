"""The SentencePiece vocabulary, and the Mistral V1 prompt format as token ids."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

VOCAB_SIZE = 4096
BOS, EOS = 1, 2


def train_tokenizer(texts: Iterable[str], path: Path) -> None:
    """A BPE vocabulary that llama.cpp reads exactly: nothing normalised, bytes as a fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.9999,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The trained vocabulary."""
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def user_text(content: str) -> str:
    """A user's turn as the one text that is encoded; [INST] is plain text, no control token."""
    return f"[INST] {content} [/INST]"


def encode_conversation(
    tokenizer: sentencepiece.SentencePieceProcessor, turns: list[str]
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which are replies (with their EOS): what is learnt and scored."""
    ids, is_reply = [BOS], [False]
    for index, content in enumerate(turns):
        reply = index % 2 == 1
        piece = tokenizer.encode(content) + [EOS] if reply else tokenizer.encode(user_text(content))
        ids += piece
        is_reply += [reply] * len(piece)
    return ids, is_reply


def encode_all(
    tokenizer: sentencepiece.SentencePieceProcessor, conversations: list[list[str]], n_ctx: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each conversation as (ids, is_reply); those longer than `n_ctx` are cut between exchanges."""
    encoded = []
    for turns in conversations:
        start = 0
        while start < len(turns):
            stop = len(turns)
            ids, is_reply = encode_conversation(tokenizer, turns[start:stop])
            while len(ids) > n_ctx and stop - start > 2:
                stop = start + max(2, (stop - start) * n_ctx // len(ids) // 2 * 2)
                ids, is_reply = encode_conversation(tokenizer, turns[start:stop])
            if len(ids) <= n_ctx:
                encoded.append((np.array(ids, np.uint16), np.array(is_reply)))
            start = stop
    return encoded
