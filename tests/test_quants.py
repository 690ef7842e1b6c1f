from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from localmoe.errors import ModelFileError, UsageError
from localmoe.gguf.architectures import ARCHITECTURES, refuse_unknown
from localmoe.hub.quants import (
    LADDER,
    Quant,
    base_label,
    bits,
    find_quant,
    label_of,
    parse_label,
    poor_quality,
    quant_of_file,
    quants_of,
    rank,
)
from localmoe.hub.types import RemoteFile, RemoteRepo

COMMIT = "0" * 40


def repo_of(*names: str, repo: str = "user/repo") -> RemoteRepo:
    """A repository with these files, each larger than the one before."""
    files = tuple(RemoteFile(repo, COMMIT, n, 1000 + i, None) for i, n in enumerate(names))
    return RemoteRepo(repo, COMMIT, files)


def labels(quants: tuple[Quant, ...]) -> list[str]:
    return [quant.label for quant in quants]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Mixtral-8x7B-Instruct-v0.1.Q4_K_M.gguf", "Q4_K_M"),
        ("Mixtral-8x7B-Instruct-v0.1.i1-IQ2_XXS.gguf", "i1-IQ2_XXS"),
        ("olmoe-1b-7b-0924-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("Qwen3.6-35B-A3B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Qwen3-30B-A3B-Instruct-2507-UD-TQ1_0.gguf", "UD-TQ1_0"),
        ("gpt-oss-20b-MXFP4.gguf", "MXFP4"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("GLM-4.7-Flash-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("gemma-4-26B_q4_0-it.gguf", "Q4_0"),
        ("gemma-3-27b-it-qat-q4_0.gguf", "Q4_0"),
        ("stories15M_MOE-F16.gguf", "F16"),
        ("model-bf16.gguf", "BF16"),
        ("model.fp16.gguf", "F16"),
        ("Q4_K_M/GLM-4.5-Air-Q4_K_M-00001-of-00002.gguf", "Q4_K_M"),
        ("BF16/model-00001-of-00002.gguf", "BF16"),
        ("Mixtral-8x22B-Instruct-v0.1.Q2_K-00003-of-00005.gguf", "Q2_K"),
        ("dolphin-2.7-mixtral-8x7b.Q3_K_L.gguf", "Q3_K_L"),
        ("F16-merged.Q8_0.gguf", "Q8_0"),  # the last one is the file's
        ("mixtral.q4_k.gguf", "Q4_K_M"),  # llama-quantize's other name for it
        ("model-IQ4_KSS.gguf", None),  # another program's
        ("model-Q4_0_4_4.gguf", None),  # repacked, no longer loaded
        ("model.gguf", None),
        ("Q4.gguf", None),
    ],
)
def test_the_label_in_a_file_name(name: str, label: str | None) -> None:
    assert label_of(name) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("q5_k_m", "Q5_K_M"),
        ("ud-q4_k_xl", "UD-Q4_K_XL"),
        ("I1-iq1_m", "i1-IQ1_M"),
        ("mxfp4", "MXFP4"),
        ("x-Q4_K_M", None),
        ("Q4_K_M ", None),
        ("", None),
    ],
)
def test_a_label_that_a_person_writes(text: str, label: str | None) -> None:
    assert parse_label(text) == label


def test_quants_come_best_first_and_without_what_is_no_model() -> None:
    repo = repo_of(
        "README.md", "mmproj-F16.gguf", "gemma-mmproj-BF16.gguf", "mtp-gemma-4.gguf",
        "MTP/gemma-4-Q8_0.gguf", "imatrix_unsloth.gguf", "M.imatrix.gguf", "ggml-vocab-llama.gguf",
        "M-UD-Q4_K_XL.gguf", "M-Q2_K.gguf", "M-Q8_0.gguf", "M-Q4_K_M.gguf", "M-IQ1_M.gguf",
        "M-BF16.gguf", "M.gguf.part1of2", "M-Q6_K.gguf",
    )  # fmt: skip
    wanted = ["BF16", "Q8_0", "Q6_K", "UD-Q4_K_XL", "Q4_K_M", "Q2_K", "IQ1_M"]
    assert labels(quants_of(repo)) == wanted


def test_a_model_made_with_an_importance_matrix_is_one() -> None:
    assert labels(quants_of(repo_of("M-Q4_K_M-imatrix.gguf"))) == ["Q4_K_M"]


def test_shards_are_one_quant_in_order() -> None:
    folder = "Q4_K_M/GLM-4.5-Air-Q4_K_M-0000{}-of-00003.gguf"
    repo = repo_of(folder.format(3), folder.format(1), "small-Q8_0.gguf", folder.format(2))
    quant = find_quant(quants_of(repo), "q4_k_m")
    assert [file.name for file in quant.files] == [folder.format(i) for i in (1, 2, 3)]
    assert quant.n_bytes == 1000 + 1001 + 1003
    assert quant.missing == ()
    assert quant_of_file(quants_of(repo), folder.format(2)) == quant


def test_a_quant_that_lacks_shards_is_listed_and_refused_when_chosen() -> None:
    name = "M.Q2_K-0000{}-of-00005.gguf"
    quants = quants_of(repo_of(name.format(1), name.format(4)))
    assert quants[0].missing == (2, 3, 5)
    for choose in (find_quant, quant_of_file):
        asked = "Q2_K" if choose is find_quant else name.format(4)
        with pytest.raises(ModelFileError, match="has 2 of 5 shards of Q2_K; missing: 2, 3, 5"):
            choose(quants, asked)


def test_a_shard_number_that_is_impossible_is_a_name_like_any_other() -> None:
    quants = quants_of(repo_of("M-Q2_K-00007-of-00005.gguf", "M-Q2_K-00000-of-00005.gguf"))
    assert [len(quant.files) for quant in quants] == [1, 1]
    assert [quant.missing for quant in quants] == [(), ()]


def test_two_models_at_one_quant_are_both_there_and_must_be_told_apart() -> None:
    quants = quants_of(repo_of("one-Q4_K_M.gguf", "two-Q4_K_M.gguf"))
    assert sorted(quant.stem for quant in quants) == ["one-Q4_K_M", "two-Q4_K_M"]
    with pytest.raises(UsageError, match=r"one-Q4_K_M\.gguf") as refused:
        find_quant(quants, "Q4_K_M")
    assert "two-Q4_K_M.gguf" in refused.value.message
    assert find_quant(quants, "two-q4_k_m").stem == "two-Q4_K_M"


def test_a_prefix_may_be_left_out_where_one_quant_has_it() -> None:
    quants = quants_of(repo_of("M-UD-IQ2_XXS.gguf", "M-UD-Q4_K_M.gguf", "M-Q4_K_M.gguf"))
    assert find_quant(quants, "iq2_xxs").label == "UD-IQ2_XXS"
    assert find_quant(quants, "Q4_K_M").label == "Q4_K_M"
    assert find_quant(quants, "ud-q4_k_m").label == "UD-Q4_K_M"
    with pytest.raises(UsageError, match="has no quant i1-Q4_K_M"):
        find_quant(quants, "i1-Q4_K_M")


def test_a_quant_that_is_not_there_is_refused_with_those_that_are() -> None:
    quants = quants_of(repo_of("M-Q4_K_M.gguf", "M-Q8_0.gguf"))
    with pytest.raises(UsageError) as refused:
        find_quant(quants, "Q5_K_M")
    assert refused.value.message == "user/repo has no quant Q5_K_M; there are: Q8_0, Q4_K_M."
    assert refused.value.hint == "Did you mean Q4_K_M?"
    with pytest.raises(UsageError, match="has no GGUF model"):
        find_quant((), "Q4_K_M")


def test_a_file_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Did you mean M-Q4_K_M\.gguf"):
        quant_of_file(quants_of(repo_of("M-Q4_K_M.gguf")), "M-Q4_K_S.gguf")


def test_a_model_without_a_label_is_known_by_its_file() -> None:
    (quant,) = quants_of(repo_of("model.gguf"))
    assert quant.label == "model"
    assert find_quant((quant,), "model") == quant
    assert (rank(quant.label), bits(quant.label)) == (0, None)


def test_names_from_a_server_cannot_steer_a_terminal() -> None:
    quants = quants_of(repo_of("a\x1b[2J\u202e.gguf", "b.gguf"))
    with pytest.raises(UsageError) as refused:
        find_quant(quants, "Q4_K_M\x1b")
    assert str(refused.value).isprintable()


# ---- quality ---------------------------------------------------------------------------------


def test_every_label_has_bits_that_grow_with_its_rank() -> None:
    by_family = [label for label in LADDER if label.startswith("Q") and "_K" in label]
    assert [bits(label) for label in by_family] == sorted(bits(label) or 0 for label in by_family)
    assert (
        rank("BF16") > rank("Q8_0") > rank("Q4_K_M") > rank("Q4_0") > rank("Q2_K") > rank("IQ1_M")
    )
    assert rank("i1-Q4_K_M") > rank("Q4_K_M") < rank("UD-Q4_K_M") < rank("Q4_K_L")


def test_bits_are_those_of_real_files() -> None:
    """Mixtral's files on the Hub: 46,702,792,704 parameters."""
    for label, n_bytes in (
        ("Q4_K_M", 28_448_468_384), ("i1-IQ1_M", 10_847_178_368), ("i1-IQ2_XXS", 12_556_357_248),
    ):  # fmt: skip
        assert bits(label) == pytest.approx(n_bytes * 8 / 46_702_792_704, rel=0.005)


@pytest.mark.parametrize(
    ("label", "n_experts", "sentence"),
    [
        ("IQ1_M", 8, "solved 26 at IQ1_M, 46 at IQ2_XXS, 68 at Q4_K_M"),
        ("i1-IQ2_XXS", 8, "i1-IQ2_XXS is poor"),
        ("Q2_K_S", 8, "few large experts"),
        ("Q2_K", 8, "Q2_K is poor in a model of few large experts: it raises Mixtral's perplexity"),
        ("i1-Q2_K", 8, "perplexity by 23.2 %"),
        ("IQ2_M", 8, None),
        ("UD-IQ1_M", 128, None),
        ("Q2_K", 0, "grows by 3.52 at Q2_K and 0.18 at Q4_K_M"),
        ("IQ3_XXS", 0, None),
        ("model", 8, None),
    ],
)
def test_warnings_of_poor_quants(label: str, n_experts: int, sentence: str | None) -> None:
    said = poor_quality(label, n_experts)
    assert (said is None) if sentence is None else (said and sentence in said)


def test_base_label() -> None:
    assert [base_label(text) for text in ("UD-Q4_K_XL", "i1-IQ1_M", "Q8_0")] == [
        "Q4_K_XL", "IQ1_M", "Q8_0",
    ]  # fmt: skip


# ---- architectures ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> bytes:
    """The native library of the installed llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec
    assert spec.submodule_search_locations
    (folder,) = spec.submodule_search_locations
    found = [p for pattern in ("libllama.so", "libllama.dylib", "llama.dll")
             for p in (Path(folder) / "lib").glob(pattern)]  # fmt: skip
    return found[0].read_bytes()


def test_every_architecture_is_in_the_installed_library(library: bytes) -> None:
    absent = [name for name in ARCHITECTURES if name.encode() + b"\0" not in library]
    assert absent == []
    assert b"mixtralnext9\0" not in library  # the search can fail
    assert len(ARCHITECTURES) > 100


def test_an_unknown_architecture_is_refused_before_a_download() -> None:
    assert refuse_unknown("llama", "a.gguf") is None
    refused = refuse_unknown("qwen9moe", "a.gguf")
    assert refused
    assert str(refused).startswith("a.gguf: of the architecture qwen9moe, unknown to this version")
    assert "qwen3moe is known" in refused.message or "qwen2moe is known" in refused.message
    assert "newer localmoe" in refused.hint
    for odd in ("", "clip", "x" * 5000, "a\x1b[2J"):
        error = refuse_unknown(odd, "a.gguf")
        assert error
        assert str(error).isprintable()
        assert len(str(error)) <= 200
