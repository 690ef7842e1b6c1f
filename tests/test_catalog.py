from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from localmoe.errors import LocalMoeError, UsageError
from localmoe.models.catalog import catalog_path, read_catalog, resolve

ROOT = Path(__file__).parent.parent


def test_the_catalog_of_a_checkout_is_at_its_top() -> None:
    assert catalog_path() == ROOT / "models.yaml"
    assert {"demo", "mixtral"} <= set(read_catalog())


def test_a_wheel_has_the_catalog_and_the_demo_model(tmp_path: Path) -> None:
    """Built, unpacked elsewhere, and read there by a Python that knows nothing of the checkout."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.check_call([*build, "-w", str(tmp_path), str(ROOT)])
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from localmoe.models.catalog import catalog_path, read_catalog, resolve\n"
        "print(catalog_path()); print(len(read_catalog())); print(resolve('demo').is_file())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "site")]
    path, n_models, has_demo = subprocess.check_output(command, cwd=tmp_path, text=True).split(
        "\n"
    )[:3]
    assert Path(path) == tmp_path / "site" / "localmoe" / "models.yaml"
    assert int(n_models) == len(read_catalog())
    assert has_demo == "True"
    assert (tmp_path / "site" / "localmoe" / "py.typed").is_file()


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "demo").touch()
    assert resolve("a.gguf") == tmp_path / "a.gguf"
    assert resolve("demo") == resolve("DEMO") != tmp_path / "demo"
    assert resolve("./demo") == tmp_path / "demo"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mixtrall", "Did you mean mixtral"),
        ("xyzzy", "No model is called xyzzy"),
        ("./there-is-none.gguf", "There is no file"),
        ("none.gguf", "There is no file"),
        (".", "is a folder"),
        ("mixtral", "hf download"),
        ("mixtral:Q4_K_M", "hf download"),
    ],
)
def test_what_can_t_be_resolved_says_what_to_do(name: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        resolve(name)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("m: {title: t, about: a, license: l, colour: red}", "m|colour"),
        ("m: {title: t, about: a, license: l, revision: main}", "revision"),
        (
            "m: {title: t, about: a, license: l, files: {Q4: {name: n, bytes: 1, sha256: x}}}",
            "sha256",
        ),
        ("m: [", "can't be read"),
    ],
)
def test_a_bad_catalog_is_refused_with_its_place(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    with pytest.raises(LocalMoeError, match=where):
        read_catalog(path)
