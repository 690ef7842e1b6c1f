"""The pages for developers name modules, functions and words that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "localmoe"
PAGES = ("docs/architecture.md", "CONTRIBUTING.md")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text("utf-8")
MAX_WORDS = 60


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    named = set(re.findall(r"(?<![\w/.])((?:[a-z_]+/)*[a-z_]+\.(?:py|md|yaml))\b", text))
    assert len(named) > 8
    missing = {
        name
        for name in named
        if name != "config.yaml"
        and not any((folder / name).exists() for folder in (ROOT, PACKAGE))
        and not ("/" not in name and any(PACKAGE.rglob(name)))
    }
    assert missing == set()


def test_every_function_that_the_journeys_name_is_defined_there() -> None:
    found = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py):([\w.]+)`", ARCHITECTURE)
    assert len(found) > 15
    for path, name in found:
        body: list[ast.stmt] = ast.parse((PACKAGE / path).read_text("utf-8")).body
        for part in name.split("."):
            (node,) = (
                n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part
            )
            body = node.body


def test_twenty_everyday_changes_have_their_module() -> None:
    table = ARCHITECTURE.split("## Where to change what")[1]
    assert len(re.findall(r"^\| (?!change|---)", table, re.MULTILINE)) == 20


def test_the_picture_shows_every_package_and_no_other() -> None:
    picture = ARCHITECTURE.split("## The layers")[1].split("| room |")[0]
    shown = set(re.findall(r"(?<![\w/])([a-z]+)/", picture)) - {"tests"}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= shown
    assert shown <= packages | {"worker", "native"}


def test_the_glossary_has_few_words_and_each_once() -> None:
    text = (ROOT / "docs/glossary.md").read_text("utf-8")
    words = re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)[1:]
    assert 30 <= len(words) <= MAX_WORDS
    assert len(set(words)) == len(words)
    assert words == sorted(words, key=str.lower)
