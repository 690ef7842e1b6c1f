from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.catalog.catalog import (
    ModelSpec,
    SamplingDefaults,
    catalog_path,
    read_catalog,
    read_models,
)
from localmoe.catalog.model_name import parse_name
from localmoe.config.settings import Settings
from localmoe.errors import LocalMoeError
from localmoe.gguf.demo import DEMO
from localmoe.gguf.model_meta import read_meta
from localmoe.hub.quants import label_of

ROOT = Path(__file__).parent.parent
SHIPPED = read_catalog()
SHA256 = "0123456789abcdef" * 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_catalog_of_a_checkout_is_at_its_top() -> None:
    assert catalog_path() == ROOT / "models.yaml"
    assert list(SHIPPED)[:2] == ["demo", "mixtral"]


def test_a_wheel_has_the_catalog_and_the_demo_model(tmp_path: Path) -> None:
    """Built, unpacked elsewhere, and read there by a Python that knows nothing of the checkout."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.check_call([*build, "-w", str(tmp_path), str(ROOT)])
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from localmoe.catalog.catalog import catalog_path, read_catalog\n"
        "print(catalog_path()); print(len(read_catalog()))\n"
        "print(read_catalog()['demo'].path.is_file())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "site")]
    path, n_models, has_demo = subprocess.check_output(command, cwd=tmp_path, text=True).split(
        "\n"
    )[:3]
    assert Path(path) == tmp_path / "site" / "localmoe" / "models.yaml"
    assert int(n_models) == len(read_catalog())
    assert has_demo == "True"
    assert (tmp_path / "site" / "localmoe" / "py.typed").is_file()


# ---- what ships ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", SHIPPED)
def test_every_entry_says_what_a_person_wants_to_know(key: str) -> None:
    spec = SHIPPED[key]
    assert all((spec.title, spec.about, spec.license))
    assert len(spec.about) <= 100
    assert spec.parameters
    assert spec.active_parameters or key == "stories15m-moe"
    assert spec.reasoning is not None
    assert spec.prompt or key == "stories15m-moe"
    assert spec.path or spec.quants


@pytest.mark.parametrize("key", SHIPPED)
def test_labels_are_those_of_the_file_names(key: str) -> None:
    for label, quant in SHIPPED[key].quants.items():
        assert label_of(quant.file) == label


@pytest.mark.parametrize("key", SHIPPED)
def test_every_name_of_an_entry_leads_to_it(key: str) -> None:
    for called in (key, *SHIPPED[key].aliases, key.upper()):
        assert parse_name(called, SHIPPED).key == key


def test_sampling_defaults_are_settings() -> None:
    """Names and bounds are those that a person's own settings have."""
    assert set(SamplingDefaults.model_fields) <= set(Settings.model_fields)
    for spec in SHIPPED.values():
        Settings(**spec.sampling.model_dump())
    assert SHIPPED["mixtral"].sampling.temperature == 0.5


def test_mixtral_has_its_low_bits_in_another_repository() -> None:
    spec = SHIPPED["mixtral"]
    assert [repo for repo, _ in spec.repositories] == [
        "mradermacher/Mixtral-8x7B-Instruct-v0.1-GGUF",
        "mradermacher/Mixtral-8x7B-Instruct-v0.1-i1-GGUF",
    ]
    assert all(revision for _, revision in spec.repositories)
    assert spec.quants["Q4_K_M"].bytes == 28_448_468_384
    assert spec.parameters == 46_700_000_000


def test_the_demo_entry_says_what_its_file_says() -> None:
    spec = SHIPPED["demo"]
    assert spec.path
    meta = read_meta(spec.path)
    assert spec.context == meta.context_length
    assert spec.parameters == pytest.approx(meta.n_params, rel=0.01)
    assert spec.active_parameters == pytest.approx(meta.n_active_params, rel=0.01)


# ---- names that are files --------------------------------------------------------------------


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "demo").touch()
    assert parse_name("a.gguf", SHIPPED).path == tmp_path / "a.gguf"
    assert parse_name("demo", SHIPPED).path == parse_name("DEMO", SHIPPED).path == DEMO
    assert parse_name("./demo", SHIPPED).path == tmp_path / "demo"


# ---- a person's own entries ------------------------------------------------------------------


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "models.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_own_entries_come_over_those_that_ship(tmp_path: Path) -> None:
    write(tmp_path, "mine: {repo: me/mine}\nmixtral:\n  repo: me/mixtral\n  aliases: [glm-flash]\n")
    catalog = read_catalog(tmp_path)
    assert list(catalog) == [*SHIPPED, "mine"]
    assert catalog["mine"] == ModelSpec(title="mine", repo="me/mine")
    # replaced whole: nothing of the entry that ships is left
    assert catalog["mixtral"] == ModelSpec(
        title="mixtral", repo="me/mixtral", aliases=("glm-flash",)
    )
    assert parse_name("glm-flash", catalog).key == "mixtral"
    assert catalog["qwen3-30b-a3b"] == SHIPPED["qwen3-30b-a3b"]


def test_an_own_entry_may_be_called_as_another_s_alias(tmp_path: Path) -> None:
    write(tmp_path, "mixtral-8x7b: {repo: me/mine}")
    catalog = read_catalog(tmp_path)
    assert parse_name("mixtral-8x7b", catalog).repo == "me/mine"
    assert "mixtral-8x7b" not in catalog["mixtral"].aliases


def test_an_own_alias_may_not_hide_an_entry_that_ships(tmp_path: Path) -> None:
    path = write(tmp_path, "mine:\n  repo: me/mine\n  aliases:\n    - other\n    - mixtral\n")
    with pytest.raises(LocalMoeError) as refused:
        read_catalog(tmp_path)
    assert refused.value.message == f"{path}:5: mine: mixtral is already a name of mixtral."


def test_an_own_entry_may_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path, f"one: {{path: '{tmp_path / 'a.gguf'}'}}\ntwo: {{path: ~/b.gguf}}")
    catalog = read_catalog(tmp_path)
    assert catalog["one"].path == tmp_path / "a.gguf"
    assert parse_name("two", catalog).path == tmp_path / "b.gguf"


def test_without_own_entries_there_are_those_that_ship(tmp_path: Path) -> None:
    assert read_catalog(tmp_path) == SHIPPED
    assert read_catalog(tmp_path / "none") == SHIPPED
    write(tmp_path, "# nothing yet\n")
    assert read_catalog(tmp_path) == SHIPPED


def test_a_full_entry_is_read_whole(tmp_path: Path) -> None:
    text = f"""\
my-model:
  title: My Model
  about: for me
  license: MIT
  aliases: [mine]
  repo: me/mine
  revision: {COMMIT}
  context: 4096
  parameters: 1.5B
  active_parameters: 400M
  prompt: chatml
  reasoning: true
  sampling: {{temperature: 0, top_k: 1, top_p: 1, min_p: 0, repeat_penalty: 1}}
  notes: none
  quants:
    Q8_0: {{file: a/b-Q8_0.gguf, bytes: 1600000000, sha256: {SHA256}}}
    UD-Q2_K_XL: {{file: c-00001-of-00002.gguf, repo: me/other, revision: {COMMIT}}}
"""
    spec = read_models(write(tmp_path, text))["my-model"]
    assert (spec.parameters, spec.active_parameters) == (1_500_000_000, 400_000_000)
    assert spec.sampling.top_k == 1
    assert spec.repositories == (("me/mine", COMMIT), ("me/other", COMMIT))
    name = parse_name("mine:q2_k_xl", {"my-model": spec})
    assert (name.repo, name.quant, name.file) == ("me/other", "UD-Q2_K_XL", "c-00001-of-00002.gguf")


# ---- refusals, each with its line ------------------------------------------------------------

QUANT = "m:\n  repo: a/b\n  parameters: 8B\n  quants:\n    "


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        ("m:\n  repo: a/b\n  abuot: x\n", 3, "m.abuot is not known. Did you mean about? Known"),
        ("m:\n  repo: a/b\n  sampling:\n    temprature: 1\n", 4, "Did you mean temperature?"),
        (QUANT + "Q4_0:\n      file: f.gguf\n      sha: x\n", 7, "m.quants.Q4_0.sha is not known."),
        ("m:\n  repo: a/b\n  revision: main\n", 3, "m.revision is not a commit (40 hex digits in"),
        (f"m:\n  repo: a/b\n  revision: {COMMIT.upper()}\n", 3, "m.revision is not a commit"),
        (QUANT + "Q4_0: {file: f.gguf, sha256: 123abc}\n", 5, "sha256 is not a sha256 (64 hex"),
        (QUANT + f"Q4_0: {{file: f.gguf, sha256: {COMMIT}}}\n", 5, "case): 40 characters."),
        (QUANT + "Q4_0: {file: f.gguf, revision: v1}\n", 5, "m.quants.Q4_0.revision is not a comm"),
        (QUANT + "Q4_0: {file: f.gguf, repo: b}\n", 5, "m.quants.Q4_0.repo is not a repository's"),
        (QUANT + "Q4_0:\n      file: f.gguf\n      bytes: 12\n", 7, "can't be a model's size: 12"),
        (QUANT + "Q4_0:\n      file: f.gguf\n      bytes: -1\n", 7, "can't be a model's size"),
        (QUANT + "Q4_0:\n      file: f.gguf\n      bytes: 28 GB\n", 7, "m.quants.Q4_0.bytes: "),
        (QUANT + "Q4_0:\n      file: f.gguf\n      bytes: 453000000\n", 7,
         "m: Q4_0 can't be 453,000,000 bytes; about 4,530,000,000 are likely."),
        (QUANT + "Q4_KM: {file: f.gguf}\n", 5, "is no quant that is known. Did you mean Q4_K_M?"),
        (QUANT + "q4_k_m: {file: f.gguf}\n", 5, "m.quants.q4_k_m is written Q4_K_M."),
        (QUANT + "Q4_0: {bytes: 4530000000}\n", 5, "m.quants.Q4_0.file is missing."),
        (QUANT + "Q4_0: f.gguf\n", 5, "m.quants.Q4_0 has no fields."),
        (QUANT + "Q4_0: {file: f.bin}\n", 5, "file is not the name of a GGUF file"),
        (QUANT + "Q4_0: {file: ../f.gguf}\n", 5, "file is not the name of a GGUF file"),
        (QUANT + f"Q4_0: {{file: f-00001-of-00002.gguf, sha256: {SHA256}}}\n", 5,
         "m: Q4_0 is in shards: bytes and sha256 come from the Hub."),
        ("m:\n  repo: a/b\n  prompt: chatlm\n", 3, "m.prompt is none that is known. Did you mean"),
        ("m:\n  repo: just-a-name\n", 2, "m.repo is not a repository's name, as user/repo."),
        ("m:\n  about: x\n", 1, "m: give either repo or path."),
        ("a: {repo: a/b}\nm:\n  repo: a/b\n  path: /x.gguf\n", 2, "m: give either repo or path."),
        ("m:\n  path: x.gguf\n", 2, "m: path is not absolute; begin it with / or ~."),
        ("m:\n  path: ~nobody-here/x.gguf\n", 2, "m: path is not absolute"),
        ("m:\n  path: /x.gguf\n  quants: {Q4_0: {file: f.gguf}}\n", 2, "belong to a repo"),
        ("m:\n  repo: a/b\n  parameters: 1B\n  active_parameters: 2B\n", 4, "m: more parameters"),
        ("m:\n  repo: a/b\n  parameters: many\n", 3, "m.parameters: "),
        ("m:\n  repo: a/b\n  reasoning: 1\n", 3, "m.reasoning is neither true nor false."),
        ("m:\n  repo: a/b\n  title: 2024\n", 3, "m.title is not text; put it in quotes."),
        ("m:\n  repo: a/b\n  title: 2024-01-01\n", 3, "m.title is not text; put it in quotes."),
        ("m:\n  repo: a/b\n  title: 2024-13-01\n", 3, "this is no value; put text in quotes."),
        ("m:\n  repo: a/b\n  context: 0\n", 3, "m.context: "),
        ("m:\n  repo: a/b\n  sampling:\n    top_p: 1.5\n", 4, "m.sampling.top_p: "),
        ("m:\n  repo: a/b\n  sampling:\n    temperature: .nan\n", 4, "m.sampling.temperature: "),
        ('m:\n  repo: a/b\n  about: "\\e[2J"\n', 3, "m.about holds a line break or a control"),
        ("m:\n  repo: a/b\n  aliases:\n    - a\n    - B\n", 5, "m.aliases.1 is no name for a mode"),
        ("m:\n  repo: a/b\n  aliases: x\n", 3, "m.aliases is not a list."),
        ("m:\n  repo: a/b\n  aliases: [x]\nn:\n  repo: a/b\n  aliases: [x]\n", 6,
         "n: x is already a name of m."),
        ("m: {repo: a/b}\n\nM: {repo: a/b}\n", 3, "M is no name for a model: lower case letters"),
        ("a/b: {repo: a/b}\n", 1, "a/b is no name for a model"),
        ("x.gguf: {repo: a/b}\n", 1, "x.gguf is no name for a model"),
        ("m:\n", 1, "m has no fields."),
        ("m: {repo: a/b}\nm: {repo: a/b}\n", 2, "m comes twice."),
        ("m:\n  repo: a/b\n  repo: a/c\n", 3, "repo comes twice."),
        ("- m\n", 1, "no names; begin each entry with NAME:"),
        ("m\n", 1, "no names; begin each entry with NAME:"),
        ("[a, b]: x\n", 1, "a name must be plain text."),
        ("m:\n  repo: [\n", 3, "expected"),
        ("m:\n\trepo: a/b\n", 2, "found character"),
        ("m: {repo: a/b}\n---\nn: {repo: a/b}\n", 2, "but found another document"),
        ("m: &a {repo: a/b}\nn: *a\n", 2, "aliases (*name) are not read; write it out."),
        ("m: !!python/object:os.system {a: b}\n", 1, "is not read here."),
        ("m:\n  repo: !!python/name:os.system x\n", 2, "could not determine a constructor"),
        ("m:\n  repo: " + "[" * 5000, 2, "this is nested too deep."),
        ("a: " + "{a: " * 100 + "}" * 100, 1, "this is nested too deep."),
        (b"m:\n  repo: a/b\n  title: \xff\n", 3, "this is not UTF-8 text."),
        (b"m:\n  title: a\x1b[2J\n", 2, "a control character."),
        ("m: {repo: a/b}\n#" + "x" * (1 << 20), 1, "the file is larger than 1 MiB."),
        ("m: {context: " + "9" * 5000 + "}", 1, "this is no value"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, line: int, sentence: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(LocalMoeError) as refused:
        read_catalog(tmp_path)
    assert refused.value.message.startswith(f"{path}:{line}: ")
    assert sentence in str(refused.value)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < len(str(path)) + 400


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    assert list(read_models(write(tmp_path, b"\xef\xbb\xbfm: {repo: a/b}\r\n"))) == ["m"]


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").mkdir()
    with pytest.raises(LocalMoeError, match="models.yaml can't be read: "):
        read_catalog(tmp_path)


PIECES = st.sampled_from(
    ["m:", "\n", "  ", "repo:", " a/b", "quants:", "Q4_K_M:", "file:", " x.gguf", "bytes:", " 1e9",
     "{", "}", "[", "]", ",", "&a", "*a", "<<:", "!!int", "!!set", "? ", "- ", "'", '"', "|", ">",
     "%", "@", "#", "\t", "---", "...", "~", ".nan", "0x1F", "2024-01-01", "1:2:3", "\x1b", "é"]
)  # fmt: skip


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=20).map("".join)))
def test_whatever_the_file_holds_is_a_catalog_or_refused(
    tmp_path_factory: pytest.TempPathFactory, held: bytes | str
) -> None:
    path = write(tmp_path_factory.getbasetemp(), held)
    try:
        read_models(path)
    except LocalMoeError as error:
        said = error.message
    else:
        said = ""
    assert said.startswith(f"{path}:") or not said
