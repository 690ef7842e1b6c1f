from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.catalog.catalog import read_catalog
from localmoe.catalog.model_name import ModelName, near_name, parse_name
from localmoe.errors import UsageError

CATALOG = read_catalog()
MIXTRAL = "mradermacher/Mixtral-8x7B-Instruct-v0.1-GGUF"
LOW_BITS = "mradermacher/Mixtral-8x7B-Instruct-v0.1-i1-GGUF"
COMMIT = "506d64aa" + "0" * 32


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- the catalog -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "repo", "quant", "file"),
    [
        ("mixtral", "mixtral", MIXTRAL, None, None),
        ("MixTral", "mixtral", MIXTRAL, None, None),
        ("mixtral-8x7b-instruct", "mixtral", MIXTRAL, None, None),
        ("mixtral:q4_k_m", "mixtral", MIXTRAL, "Q4_K_M",
         "Mixtral-8x7B-Instruct-v0.1.Q4_K_M.gguf"),
        ("mixtral:Q5_K_M", "mixtral", MIXTRAL, "Q5_K_M", None),
        ("mixtral:IQ2_XXS", "mixtral", LOW_BITS, "i1-IQ2_XXS",
         "Mixtral-8x7B-Instruct-v0.1.i1-IQ2_XXS.gguf"),
        ("mixtral:i1-q4_k_m", "mixtral", LOW_BITS, "i1-Q4_K_M",
         "Mixtral-8x7B-Instruct-v0.1.i1-Q4_K_M.gguf"),
        ("mixtral:fp16", "mixtral", MIXTRAL, "F16", None),
        ("mixtral:8x7b-instruct-v0.1-q4_K_M", "mixtral", MIXTRAL, "Q4_K_M",
         "Mixtral-8x7B-Instruct-v0.1.Q4_K_M.gguf"),
        ("mixtral:8x7b", "mixtral", MIXTRAL, None, None),
        ("gpt-oss:20b", "gpt-oss-20b", "ggml-org/gpt-oss-20b-GGUF", None, None),
        ("qwen3.6-35b-a3b:q4_k_xl", "qwen3.6-35b-a3b", "unsloth/Qwen3.6-35B-A3B-GGUF",
         "UD-Q4_K_XL", "Qwen3.6-35B-A3B-UD-Q4_K_XL.gguf"),
        ("qwen3:30b-a3b", "qwen3-30b-a3b", "unsloth/Qwen3-30B-A3B-Instruct-2507-GGUF", None, None),
    ],
)  # fmt: skip
def test_names_of_the_catalog(
    text: str, key: str, repo: str, quant: str | None, file: str | None
) -> None:
    name = parse_name(text, CATALOG)
    assert (name.key, name.repo, name.quant, name.file) == (key, repo, quant, file)
    assert name.spec is CATALOG[key]
    assert name.path is None
    assert name.text == text
    assert name.revision == dict(CATALOG[key].repositories)[repo]


def test_an_entry_that_is_a_file_is_that_file() -> None:
    name = parse_name("DEMO", CATALOG)
    assert name.path
    assert name.path.is_file()
    assert name.key == "demo"
    assert name.repo is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("xyzzy", "No model is called xyzzy. Try: localmoe run demo"),
        ("mixtrall", "No model is called mixtrall. Did you mean mixtral?"),
        ("gemma", "No model is called gemma. Did you mean gemma4?"),
        ("qwen3:235b-a22b", "235b-a22b is no quant of qwen3-30b-a3b."),
        ("qwen3.6:latest", "latest is no quant of qwen3.6-35b-a3b. Try: localmoe run qwen3.6-35b-"),
        ("mistral:7b", "No model is called mistral:7b. Did you mean mixtral"),
        ("mixtral:8x22b-instruct-q4_0", "8x22b-instruct-q4_0 is no quant of mixtral"),
        ("mixtral:Q4_K_X", "Q4_K_X is no quant of mixtral. Did you mean Q4_K_M?"),
        ("mixtral:", "Nothing is no quant of mixtral"),
        ("mixtral:-", "- is no quant of mixtral"),
        ("demo:Q4_K_M", "demo is a single file, without quants"),
        ("", "'' names no model"),
        ("  ", "'  ' names no model"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_name(text, CATALOG)
    assert sentence in str(refused.value)


def test_a_near_name_is_one_that_can_be_typed() -> None:
    for text in ("mixtral8x7b", "gpt-oss:120b", "qwen3.6:35b", "granite", "LFM"):
        near = near_name(text, CATALOG)
        assert near
        assert parse_name(near, CATALOG).spec


# ---- the Hub ---------------------------------------------------------------------------------

AIR = "Q4_K_M/GLM-4.5-Air-Q4_K_M-00001-of-00002.gguf"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("user/repo", ("user/repo", None, None, None)),
        ("user/repo/", ("user/repo", None, None, None)),
        ("TheBloke/Mixtral-8x7B-v0.1-GGUF:q4_k_m",
         ("TheBloke/Mixtral-8x7B-v0.1-GGUF", None, "Q4_K_M", None)),
        ("user/repo:ud-q4_k_xl", ("user/repo", None, "UD-Q4_K_XL", None)),
        ("user/repo:my-model", ("user/repo", None, "my-model", None)),
        ("user/repo/file.gguf", ("user/repo", None, None, "file.gguf")),
        (f"unsloth/GLM-4.5-Air-GGUF/{AIR}", ("unsloth/GLM-4.5-Air-GGUF", None, None, AIR)),
        (f"user/repo@{COMMIT}", ("user/repo", COMMIT, None, None)),
        ("user/repo@main:Q8_0", ("user/repo", "main", "Q8_0", None)),
        (f"user/repo@{COMMIT}/file.gguf", ("user/repo", COMMIT, None, "file.gguf")),
        ("hf.co/user/repo", ("user/repo", None, None, None)),
        ("hf.co/user/repo:q8_0", ("user/repo", None, "Q8_0", None)),
        ("HF.co/user/repo/a b.gguf", ("user/repo", None, None, "a b.gguf")),
        ("huggingface.co/user/repo", ("user/repo", None, None, None)),
        ("https://huggingface.co/user/repo", ("user/repo", None, None, None)),
        ("https://hf.co/user/repo:Q8_0", ("user/repo", None, "Q8_0", None)),
        ("https://www.huggingface.co/user/repo/?a=b#c", ("user/repo", None, None, None)),
        (f"https://huggingface.co/user/repo/tree/{COMMIT}", ("user/repo", COMMIT, None, None)),
        ("https://huggingface.co/user/repo/blob/main", ("user/repo", "main", None, None)),
        ("https://huggingface.co/user/repo?show_file_info=a%2Fb-Q4_K_M.gguf&x=1",
         ("user/repo", None, None, "a/b-Q4_K_M.gguf")),
        ("https://huggingface.co/user/repo/tree/main/Q4_K_M",
         ("user/repo", "main", "Q4_K_M", None)),
        ("https://huggingface.co/user/repo/blob/main/file.gguf",
         ("user/repo", "main", None, "file.gguf")),
        (f"https://huggingface.co/unsloth/GLM-4.5-Air-GGUF/resolve/{COMMIT}/{AIR}?download=true",
         ("unsloth/GLM-4.5-Air-GGUF", COMMIT, None, AIR)),
        ("http://hf.co/user/repo/blob/refs%2Fpr%2F4/a%20b.gguf",
         ("user/repo", "refs/pr/4", None, "a b.gguf")),
    ],
)  # fmt: skip
def test_names_on_the_hub(text: str, wanted: tuple[str | None, ...]) -> None:
    name = parse_name(text, CATALOG)
    assert (name.repo, name.revision, name.quant, name.file) == wanted
    assert name.text == text
    assert (name.path, name.spec, name.key) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("user/repo/README.md", "README.md is not a GGUF file. Name one that ends in .gguf."),
        ("user/repo/Q4_K_M", "Q4_K_M is not a GGUF file"),
        ("user/repo/file.gguf:Q4_K_M", "names a file and a quant"),
        ("user/repo:", "'' can't be a quant"),
        ("user/repo:../x", "'../x' can't be a quant"),
        ("user/repo:" + "x" * 101, "can't be a quant"),
        ("user/repo@", "'' can't be a revision"),
        ("user/repo@a..b", "'a..b' can't be a revision"),
        ("user/../repo.gguf", "There is no file"),
        ("user/repo/../../etc/x.gguf", "can't be a file of a repository"),
        ("user/repo/.hidden.gguf", "can't be a file of a repository"),
        ("user/repo//x.gguf", "can't be a file of a repository"),
        ("user/repo/a./x.gguf", "can't be a file of a repository"),
        ("user/repo/a\nb.gguf", "can't be a file of a repository"),
        ("user/repo/a\u202eb.gguf", "can't be a file of a repository"),
        ("user/repo/" + "x" * 200 + ".gguf", "can't be a file of a repository"),
        ("us--er/repo", "us--er/repo can't be the name of a repository. Write it as user/repo."),
        ("user/repo.git", "can't be the name of a repository"),
        ("user/re..po", "can't be the name of a repository"),
        ("user/" + "r" * 97, "names no model"),
        ("us er/repo", "names no model"),
        ("user/repo\n", "names no model"),
        ("https://huggingface.co/", "names no model"),
        ("https://huggingface.co/user", "names no model"),
        ("https://huggingface.co/user/repo/discussions/4", "is not a GGUF file"),
        ("https://huggingface.co/user/repo/tree/main/folder", "folder is not a GGUF file"),
        ("https://huggingface.co/user/repo/blob/main/%2e%2e/x.gguf", "can't be a file"),
        ("https://huggingface.co/user/repo/blob/..%2F..%2Fx/a.gguf", "can't be a revision"),
        ("https://huggingface.co/datasets/user/repo", "is not a link to a model"),
        ("https://huggingface.co.evil.com/user/repo", "is not a link to Hugging Face"),
        ("https://huggingface.co@evil.com/user/repo", "is not a link to Hugging Face"),
        ("https://example.com/file.gguf", "is not a link to Hugging Face. Download the file"),
        ("ftp://huggingface.co/user/repo", "is not a link to Hugging Face"),
        ("https://[huggingface.co/user/repo", "names no model"),
    ],
)
def test_what_names_nothing_on_the_hub_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_name(text, CATALOG)
    assert sentence in str(refused.value)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


# ---- files here ------------------------------------------------------------------------------


def test_a_file_here_comes_before_the_hub_and_after_the_catalog(tmp_path: Path) -> None:
    (tmp_path / "user" / "repo").mkdir(parents=True)
    for name in ("user/repo/file.gguf", "a.gguf", "mixtral", "no-ending"):
        (tmp_path / name).touch()
    for text in ("user/repo/file.gguf", "./user/repo/file.gguf", "a.gguf", "./a.gguf", "no-ending"):
        assert parse_name(text, CATALOG) == ModelName(text, path=tmp_path / text)
    assert parse_name(str(tmp_path / "a.gguf"), CATALOG).path == tmp_path / "a.gguf"
    assert parse_name("mixtral", CATALOG).repo == MIXTRAL
    assert parse_name("./mixtral", CATALOG).path == tmp_path / "mixtral"
    # the folder is here, and still the repository is meant
    assert parse_name("user/repo", CATALOG).repo == "user/repo"
    assert parse_name("hf.co/user/repo/file.gguf", CATALOG).file == "file.gguf"


def test_links_are_kept_for_their_names_say_which_shard(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "blob")
    assert parse_name("link.gguf", CATALOG).path == tmp_path / "link.gguf"


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.gguf").touch()
    assert parse_name("~/a.gguf", CATALOG).path == tmp_path / "a.gguf"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (".", "is a folder. Give the GGUF file in it"),
        ("/", "is a folder"),
        ("./none", "There is no file ./none. Check the path"),
        ("../none/none.gguf", "There is no file"),
        ("/none/none.gguf", "There is no file"),
        ("none.gguf", "There is no file none.gguf"),
        ("folder/none.gguf", "There is no file folder/none.gguf"),
        ("~/none.gguf", "There is no file"),
        ("~nobody-here/none.gguf", "There is no file"),
        ("C:\\models\\none.gguf", "There is no file C:\\models\\none.gguf"),
        ("C:/models/none.gguf", "There is no file"),
        ("..\\none.gguf", "There is no file"),
        ("models\\none", "There is no file"),
        ("\\\\server\\share\\none.gguf", "There is no file"),
        ("./\0.gguf", "There is no file ./?.gguf"),
        ("x" * 5000, "There is no file xxx"),
    ],
)
def test_a_path_to_nothing_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_name(text, CATALOG)
    assert sentence in str(refused.value)
    assert str(refused.value).isprintable()


# ---- whatever it is --------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["mixtral", "demo", "user", "repo", "/", ":", "@", "..", ".", "~", "\\", "Q4_K_M", ".gguf",
     "hf.co/", "https://", "huggingface.co/", "blob", "tree", "main", "%2F", "%00", "?", "#", "[",
     "-00001-of-00002", " ", "\0", "\x1b", "\u202e", "é", "C:"]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=12).map("".join))


def outcome(text: str) -> ModelName | UsageError:
    try:
        return parse_name(text, CATALOG)
    except UsageError as error:
        return error


@settings(max_examples=500)
@given(TEXTS)
def test_whatever_a_person_types_is_a_name_or_refused_in_a_line(text: str) -> None:
    said = outcome(text)
    if isinstance(said, UsageError):
        assert str(said).isprintable()
        assert len(str(said)) < 400
        return
    assert (said.path is None) != (said.repo is None)
    for part in (said.repo, said.file, said.quant, said.revision):
        assert part is None or (part.isprintable() and ".." not in part.split("/"))
