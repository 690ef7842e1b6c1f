"""Files that are GGUF and no model that writes text: adapters, projectors, embedding models.

What they are stands in their headers: general.type, the architecture, or how their tensors are
called. llama.cpp aborts on some of them, and makes others write garbage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import ModelFileError, model_file_error
from .metadata import Metadata

MODEL_HINT = "Take a chat model: localmoe list"
ADAPTER = "an adapter (LoRA), not a whole model"
PROJECTOR = "a projector for images or sound (mmproj), not a language model"
MATRIX = "an importance matrix (imatrix), with which models are quantized, not a model"
CONTROL_VECTOR = "a control vector, not a whole model"
VOCABULARY = "a vocabulary alone, without weights"
IMAGES = "a diffusion model for images or video, not a language model"
SPEECH = "a model for speech, not a language model"
EMBEDDING = "an embedding model, which makes vectors and writes no text"
RERANKER = "a reranking model, which scores texts and writes none"
ENCODER = "an encoder, which makes vectors and writes no text"
ENCODER_DECODER = "an encoder-decoder model, which localmoe doesn't run"
TEXT_DIFFUSION = "a diffusion language model (non-causal), which localmoe doesn't run"
NON_CAUSAL = "a model without causal attention, which can't write one token after another"
DRAFT = "a draft model, which only guesses the tokens of a larger one"

# enum GGUFType (gguf-py/gguf/constants.py)
TYPES = {"adapter": ADAPTER, "mmproj": PROJECTOR, "imatrix": MATRIX}
# general.architecture of what other programs read: ComfyUI-GGUF (tools/convert.py) and
# stable-diffusion.cpp, whisper.cpp
OTHER_PROGRAMS = {
    "clip": PROJECTOR, "controlvector": CONTROL_VECTOR,
    **dict.fromkeys([
        "flux", "flux2", "sd1", "sd2", "sd3", "sdxl", "aura", "hidream", "cosmos", "ltxv", "hyvid",
        "wan", "lumina2", "qwen_image", "chroma", "z_image", "pig", "stable-diffusion",
    ], IMAGES),
    **dict.fromkeys(["whisper", "parler-tts", "kokoro", "dia", "orpheus"], SPEECH),
}  # fmt: skip
# architectures that the pinned llama.cpp loads for something else than writing text
NO_GENERATION = {
    **dict.fromkeys([
        "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2",
        "jina-bert-v3", "eurobert", "gemma-embedding", "llama-embed",
    ], EMBEDDING),
    "t5": ENCODER_DECODER, "t5encoder": ENCODER,
    **dict.fromkeys(["dream", "llada", "llada-moe", "rnd1"], TEXT_DIFFUSION),
    **dict.fromkeys(["wavtokenizer-dec", "qwen3tts", "pockettts"], SPEECH),
    **dict.fromkeys(["eagle3", "dflash", "gemma4-assistant"], DRAFT),
}  # fmt: skip
# some files have neither a type nor an architecture of their own
TENSORS = (
    (re.compile(r"\.lora_[ab]$|\.loraA$|\.loraB$"), ADAPTER),
    (re.compile(r"\.(in_sum2|counts)$"), MATRIX),
    (re.compile(r"^direction\.\d+$"), CONTROL_VECTOR),
    (re.compile(r"^(v|a|mm)\.(blk|patch_embd|position_embd)\b"), PROJECTOR),
    (
        re.compile(
            r"^(model\.diffusion_model\.|first_stage_model\.|double_blocks\.|single_blocks\."
            r"|joint_blocks\.|transformer_blocks\.|input_blocks\.|down_blocks\.)"
        ),
        IMAGES,
    ),
)
POOLING_NONE, POOLING_RANK = 0, 4  # enum llama_pooling_type (include/llama.h)


def refuse_other_kinds(keys: Metadata, tensor_names: Iterable[str]) -> ModelFileError | None:
    """Returns the error for a file that is no language model at all, or None.

    `tensor_names` are those of all shards: the first of them may hold metadata alone.
    """
    names = list(tensor_names)
    kind = TYPES.get(keys.text("general.type").lower())
    kind = kind or OTHER_PROGRAMS.get(keys.architecture.lower()) or _kind_of_tensors(names)
    if kind is None and not names and keys.architecture:
        kind = VOCABULARY
    return model_file_error(keys.header.name, kind, MODEL_HINT) if kind else None


def _kind_of_tensors(names: Iterable[str]) -> str | None:
    for name in names:
        for pattern, kind in TENSORS:
            if pattern.search(name):
                return kind
        if name.startswith("blk.") and name.endswith(".weight"):
            return None
    return None


def why_no_generation(keys: Metadata, tensor_names: Iterable[str]) -> str:
    """Returns what a sound model is that can't write text, or "" for one that can."""
    pooling = keys.get("pooling_type")
    pools = isinstance(pooling, int) and pooling > POOLING_NONE
    if pools and pooling == POOLING_RANK:
        return RERANKER
    if kind := NO_GENERATION.get(keys.architecture):
        return kind
    if pools:
        return EMBEDDING
    if any(name.startswith(("cls.", "dense_2.", "dense_3.")) for name in tensor_names):
        return RERANKER
    return NON_CAUSAL if keys.flag("attention.causal") is False else ""
