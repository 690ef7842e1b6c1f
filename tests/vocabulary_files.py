"""Model files that hold a vocabulary and nothing else, for tests of prompts.

The SentencePiece ones are Mistral's own, out of mistral-common; the byte-level one knows the 256
bytes, a few merges and its control tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
V1_FILE = "tokenizer.model.v1"
V3_FILE = "mistral_instruct_tokenizer_240323.model.v3"


def write_sentencepiece(
    path: Path,
    model_name: str,
    *,
    add_space_prefix: bool | None = None,
    extra_control: Sequence[str] = (),
    extra_user_defined: Sequence[str] = (),
) -> list[str]:
    """Write one of Mistral's vocabularies; gives its control tokens, the unknown token included."""
    model = SentencePieceProcessor(str(MistralTokenizer._data_path() / model_name))
    size = model.vocab_size()
    tokens = [model.id_to_piece(n) for n in range(size)]
    types = [_type(model, n) for n in range(size)]
    scores = [model.get_score(n) for n in range(size)]
    for texts, kind in ((extra_control, CONTROL), (extra_user_defined, USER_DEFINED)):
        tokens += texts
        types += [kind] * len(texts)
        scores += [0.0] * len(texts)
    writer = _writer(path, "llama", tokens, types)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    if add_space_prefix is not None:
        writer.add_add_space_prefix(add_space_prefix)
    return _finish(writer, tokens, types)


def write_byte_level(path: Path, control: Sequence[str], *, bos: int = 256) -> list[str]:
    """Write a byte-level vocabulary; control tokens have the ids from 256 on."""
    letters = _byte_letters()
    tokens = [*letters, *control]
    types = [NORMAL] * len(letters) + [CONTROL] * len(control)
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r")]
    for left, right in merges:
        tokens.append(left + right)
        types.append(NORMAL)
    writer = _writer(path, "gpt2", tokens, types)
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(256)
    return _finish(writer, tokens, types)


def _type(model: SentencePieceProcessor, token: int) -> int:
    if model.is_unknown(token):
        return UNKNOWN
    if model.is_control(token):
        return CONTROL
    if model.is_unused(token):
        return UNUSED
    return BYTE if model.is_byte(token) else NORMAL


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def _writer(path: Path, model: str, tokens: list[str], types: list[int]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    return writer


def _finish(writer: gguf.GGUFWriter, tokens: list[str], types: list[int]) -> list[str]:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return [t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]


def with_renamed_tokens(
    source: Path, path: Path, names: Mapping[int, str], kind: int = CONTROL
) -> None:
    """Copy a model; some of its tokens are control tokens of these names then, or of a `kind`."""
    reader = gguf.GGUFReader(source)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    for id, name in names.items():
        tokens[id], types[id] = name, kind
    changed = {
        "tokenizer.ggml.tokens": MetadataDetails(gguf.GGUFValueType.ARRAY, tokens),
        "tokenizer.ggml.token_type": MetadataDetails(gguf.GGUFValueType.ARRAY, types),
    }
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    copy_with_new_metadata(reader, writer, changed, [])
