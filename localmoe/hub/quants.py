"""The quants of a repository: from file names to labels, shards in order, best first.

Names are all there is before a download, and every publisher writes them a little differently:
Q4_K_M, q4_k_m, i1-Q4_K_M, UD-Q4_K_XL, in a folder of that name, in one file or in five.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import ModelFileError, UsageError, printable
from ..gguf.model_meta import SHARD_NAME
from .types import RemoteFile, RemoteRepo

# Labels from the coarsest to the finest, each with the bits that a weight takes in the whole file.
# The order follows the errors that were measured (the tables below, and llama-quantize --help);
# the bits are llama-quantize's dry run on Mixtral 8x7B, or where that has none those of a block
# (ggml-common.h). L and XL are publishers' own mixes, a little above their neighbour.
LADDER: dict[str, float] = {
    "Q1_0": 1.13, "TQ1_0": 1.69, "IQ1_S": 1.68, "IQ1_M": 1.86, "TQ2_0": 2.06, "IQ2_XXS": 2.15,
    "Q2_0": 2.25, "IQ2_XS": 2.38, "IQ2_S": 2.42, "Q2_K_S": 2.75, "IQ2_M": 2.65, "Q2_K": 2.97,
    "Q2_K_L": 2.97, "Q2_K_XL": 2.97, "IQ3_XXS": 3.12, "Q3_K_XS": 3.31, "IQ3_XS": 3.31,
    "Q3_K_S": 3.50, "IQ3_S": 3.50, "IQ3_M": 3.67, "Q3_K_M": 3.86, "Q3_K_L": 4.14, "Q3_K_XL": 4.14,
    "IQ4_XS": 4.35, "Q4_0": 4.53, "IQ4_NL": 4.50, "MXFP4": 4.25, "MXFP4_MOE": 4.25, "NVFP4": 4.50,
    "Q4_1": 5.00, "Q4_K_S": 4.58, "Q4_K_M": 4.87, "Q4_K_L": 4.87, "Q4_K_XL": 4.87, "Q5_0": 5.52,
    "Q5_1": 6.00, "Q5_K_S": 5.52, "Q5_K_M": 5.69, "Q5_K_L": 5.69, "Q5_K_XL": 5.69, "Q6_K": 6.57,
    "Q6_K_L": 6.57, "Q6_K_XL": 6.57, "Q8_0": 8.50, "Q8_K_XL": 8.50, "F16": 16.0, "BF16": 16.0,
    "F32": 32.0,
}  # fmt: skip
OTHER_NAMES = {  # llama-quantize's own, and what other programs call the last three
    "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP16": "F16", "FP32": "F32",
}  # fmt: skip
# i1: quantized with an importance matrix (mradermacher); UD: mixed by layer (Unsloth)
PREFIXES = {"i1": "i1-", "ud": "UD-"}

_LABELS = "|".join(sorted((*LADDER, *OTHER_NAMES), key=len, reverse=True))
# Q4_0_4_4 and its kin were repacked for one processor; llama.cpp no longer loads them
_LABEL = re.compile(
    rf"(?<![A-Za-z0-9])(?:(i1|UD)[-_.])?({_LABELS})(?![A-Za-z0-9]|_\d)", re.IGNORECASE
)
# beside the model: projectors, drafting layers, importance matrices, vocabularies for tests
_NO_MODEL = re.compile(r"(^|[-_./])mmproj([-_./]|$)|(^|/)(mtp[-_/]|imatrix)|ggml-vocab", re.I)
_IMATRIX = re.compile(r"[-_.]imatrix$", re.IGNORECASE)

# Perplexity of Mixtral 8x7B above that at 8 bits, percent (wikitext, context 512), of today's
# mixes. huggingface.co/ikawrakow/mixtral-8x7b-quantized-gguf
MIXTRAL_ERROR_PERCENT: dict[str, float] = {
    "Q2_K": 23.2, "Q3_K_S": 6.82, "Q3_K_M": 4.47, "Q4_0": 2.32, "Q4_1": 1.62, "Q4_K_S": 1.74,
    "Q4_K_M": 1.47, "Q5_0": 0.70, "Q5_K_S": 0.56,
}  # fmt: skip
# Tasks of GSM8K that Mixtral 8x7B Instruct solved, of 100, same items and sampling throughout.
# Qwen3 30B A3B, of 128 small experts, solved 96, 97 and 91 at these: few large experts lose most.
MIXTRAL_GSM8K = {"IQ1_M": 26, "IQ2_XXS": 46, "Q4_K_M": 68}
# What a quant adds to the perplexity of Llama 3 8B, a dense model (llama-quantize --help)
DENSE_ADDED_PERPLEXITY = {"Q2_K": 3.52, "Q4_K_M": 0.18}
MAX_FEW_EXPERTS = 16
"""Up to so many experts count as few and large: Mixtral has 8, Phi-3.5-MoE 16."""


@dataclass(frozen=True, slots=True)
class Quant:
    """A model at one quant: its files, shards in order.

    `label` is as Q4_K_M, UD-Q4_K_XL, i1-IQ2_XXS, and where names say none it is the `stem`: what
    the name of all shards begins with, folder included. `missing` are the numbers of shards, from
    1, that the repository doesn't have.
    """

    label: str
    files: tuple[RemoteFile, ...]
    stem: str
    missing: tuple[int, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.n_bytes for file in self.files)

    @property
    def repo(self) -> str:
        """Its repository."""
        return self.files[0].repo


def quants_of(repo: RemoteRepo) -> tuple[Quant, ...]:
    """The models among a repository's files, best quant first; incomplete ones among them."""
    groups: dict[tuple[str, int], dict[int, RemoteFile]] = {}
    for file in repo.files:
        stem = file.name[: -len(".gguf")]
        if not file.name.lower().endswith(".gguf") or _is_no_model(stem):
            continue
        number, count = 1, 1
        if (shard := SHARD_NAME.search(file.name)) and 1 <= int(shard[1]) <= int(shard[2]):
            stem, number, count = file.name[: shard.start()], int(shard[1]), int(shard[2])
        groups.setdefault((stem, count), {})[number] = file
    quants = (_quant(stem, count, shards) for (stem, count), shards in groups.items())
    return tuple(sorted(quants, key=lambda q: (-rank(q.label), -q.n_bytes, q.stem)))


def find_quant(quants: Sequence[Quant], label: str) -> Quant:
    """The quant that a person means by `label`; case does not matter, nor a prefix where one is
    the only choice. Raises UsageError naming those that are there, ModelFileError for one of which
    shards are missing.
    """
    found = quants_called(quants, label)
    if not found:
        raise UsageError(*_not_there(quants, printable(label)))
    if len(found) > 1:
        names = " and ".join(q.files[0].name for q in found[:3])
        first = f"{found[0].repo}/{found[0].files[0].name}"
        raise UsageError(
            f"{found[0].repo} has {len(found)} models at {printable(label)}: {printable(names)}.",
            f"Name the file: {printable(first)}",
        )
    return complete(found[0])


def quants_called(quants: Sequence[Quant], label: str) -> list[Quant]:
    """Those that `label` means: as written, else behind a prefix, else as the name of the file."""
    wanted = (parse_label(label) or label).lower()
    found = [q for q in quants if q.label.lower() == wanted]
    found = found or [q for q in quants if base_label(q.label).lower() == wanted]
    return found or [q for q in quants if q.stem.rsplit("/", 1)[-1].lower() == label.lower()]


def quant_of_file(quants: Sequence[Quant], name: str) -> Quant:
    """The quant that a file belongs to, with its other shards. Raises as find_quant does."""
    for quant in quants:
        if any(file.name == name for file in quant.files):
            return complete(quant)
    names = [file.name for quant in quants for file in quant.files]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {printable(near[0])}?" if near else "Look at its list of files."
    raise UsageError(f"The repository has no model file {printable(name)[:200]}.", hint)


def complete(quant: Quant) -> Quant:
    """`quant` itself. Raises ModelFileError where the repository lacks some of its shards."""
    if not quant.missing:
        return quant
    n_shards = len(quant.files) + len(quant.missing)
    shown = ", ".join(map(str, quant.missing[:5])) + (", …" if len(quant.missing) > 5 else "")
    raise ModelFileError(
        f"{quant.repo} has {len(quant.files)} of {n_shards} shards of {printable(quant.label)}; "
        f"missing: {shown}.",
        "Choose another quant or another repository.",
    )


# ---- labels ----------------------------------------------------------------------------------


def parse_label(text: str) -> str | None:
    """`text` as a label is written, where it is nothing else: q4_k_m is Q4_K_M. Or None."""
    match = _LABEL.fullmatch(text)
    return _written(match) if match else None


def label_of(name: str) -> str | None:
    """The label in a file's name, the last one where it has several, or that of its folder."""
    for part in reversed(SHARD_NAME.sub("", name).split("/")):
        matches = list(_LABEL.finditer(part))
        if matches:
            return _written(matches[-1])
    return None


def base_label(label: str) -> str:
    """`label` without i1- or UD-."""
    return next((label[len(p) :] for p in PREFIXES.values() if label.startswith(p)), label)


def near_labels(label: str, there: Iterable[str]) -> str:
    """A sentence with the label that is nearest to one that isn't there, or an empty one."""
    labels = {known.lower(): known for known in there}
    near = difflib.get_close_matches(label.lower(), labels, n=1, cutoff=0.5)
    return f"Did you mean {labels[near[0]]}?" if near else ""


def bits(label: str) -> float | None:
    """Bits that a weight takes at this label, roughly; None for a label that isn't known."""
    return LADDER.get(base_label(label))


def rank(label: str) -> float:
    """Where a label stands in quality: more is better, 0 is unknown.

    With an importance matrix (i1) or mixed by layer (UD) a quant stands above its plain one.
    """
    base = base_label(label)
    if base not in LADDER:
        return 0.0
    return list(LADDER).index(base) + 1 + (0.5 if base != label else 0.0)


def is_coarse(label: str) -> bool:
    """Whether all but models of many small experts lose much at it."""
    return 0 < rank(base_label(label)) <= rank("Q2_K")


def poor_quality(label: str, n_experts: int) -> str | None:
    """A sentence of warning where a quant is known to be poor, with what was measured, or None.

    `n_experts` is 0 for a dense model.
    """
    if not is_coarse(label) or n_experts > MAX_FEW_EXPERTS:
        return None
    if not n_experts:
        added = " and ".join(f"{n:g} at {known}" for known, n in DENSE_ADDED_PERPLEXITY.items())
        return f"{label} is poor in a dense model: Llama 3 8B's perplexity grows by {added}."
    few = f"{label} is poor in a model of few large experts"
    if percent := MIXTRAL_ERROR_PERCENT.get(base_label(label)):
        return f"{few}: it raises Mixtral's perplexity by {percent:g} %."
    if rank(base_label(label)) >= rank("IQ2_M"):
        return None
    solved = ", ".join(f"{n} at {known}" for known, n in MIXTRAL_GSM8K.items())
    return f"{few}: of 100 tasks of GSM8K Mixtral solved {solved}."


# ---- files -----------------------------------------------------------------------------------


def _written(match: re.Match[str]) -> str:
    prefix, label = match[1] or "", match[2].upper()
    return PREFIXES.get(prefix.lower(), "") + OTHER_NAMES.get(label, label)


def _is_no_model(stem: str) -> bool:
    is_matrix = _IMATRIX.search(stem) and label_of(stem.rsplit("/", 1)[-1]) is None
    return bool(is_matrix or _NO_MODEL.search(stem))


def _quant(stem: str, count: int, shards: dict[int, RemoteFile]) -> Quant:
    files = tuple(shards[number] for number in sorted(shards))
    missing = tuple(number for number in range(1, count + 1) if number not in shards)
    return Quant(label_of(stem) or stem, files, stem, missing)


def _not_there(quants: Sequence[Quant], label: str) -> tuple[str, str]:
    if not quants:
        return (
            "The repository has no GGUF model.",
            "Look for one whose name ends in -GGUF.",
        )
    labels = list(dict.fromkeys(printable(q.label) for q in quants))
    shown = ", ".join(labels[:24]) + (", …" if len(labels) > 24 else "")
    sentence = f"{quants[0].repo} has no quant {label[:80]}; there are: {shown}."
    return sentence, near_labels(label, labels) or f"Try: {quants[0].repo}:{labels[0]}"
