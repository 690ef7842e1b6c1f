"""What a person calls a model -> which model that is: in the catalog, on the Hub, or a file here.

    mixtral   mixtral:Q5_K_M   ./model.gguf   user/repo   user/repo:Q4_K_M   user/repo@COMMIT
    user/repo/file.gguf   hf.co/user/repo:Q4_K_M   https://huggingface.co/user/repo/blob/main/a.gguf

Nothing is asked of the Hub here; of the disk only whether a file is there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from ..errors import UsageError, printable
from ..hub.quants import base_label, label_of, near_labels, parse_label
from ..hub.types import REPO, is_file_name, is_repo_name, is_revision

if TYPE_CHECKING:
    from .catalog import ModelSpec


QUANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
NO_MODELS = {"datasets", "spaces", "collections", "papers", "docs", "blog", "buckets"}
PAGES = {"blob", "resolve", "raw", "tree"}

_ON_HUB = re.compile(
    r"(?P<repo>[^/:@]+/[^/:@]+?)(?:@(?P<revision>[^/:]*))?(?:/(?P<file>[^:]*))?(?::(?P<quant>.*))?",
    re.DOTALL,
)
_PATH = re.compile(r"(\.{1,2}|~[^/\\]*)?([/\\]|\Z)|[A-Za-z]:[\\/]")
_LINK = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|(?:hf\.co|(?:www\.)?huggingface\.co)/)", re.I)


@dataclass(frozen=True, slots=True)
class ModelName:
    """A name, understood. Either `path` is given, or `repo` with what else the name says.

    `key` and `spec` are the catalog's entry, where the name is one of it. `revision` is a commit,
    or for a link whatever branch that names. `quant` is a label as hub/quants.py writes it; None
    leaves the choice open. `file` is a path within the repository.
    """

    text: str
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    quant: str | None = None
    file: str | None = None
    key: str | None = None
    spec: ModelSpec | None = None


def parse_name(text: str, catalog: Mapping[str, ModelSpec]) -> ModelName:
    """The model that `text` means. Raises UsageError: no such name, file, or form of a name.

    A name of the catalog comes before a file of that name, and a file that is here before one on
    the Hub; `./` before a file's name, `hf.co/` before a repository's leave no doubt.
    """
    if not text.strip():
        raise UsageError(*_malformed(text))
    name = _in_catalog(text, catalog)
    if name:
        return name
    if _LINK.match(text):
        return _linked(text)
    path = _here(text)
    if path:
        return ModelName(text, path=path)
    if _is_on_hub(text):
        return _on_hub(text)
    raise UsageError(*_unknown(text, catalog))


# ---- the catalog -----------------------------------------------------------------------------


def _in_catalog(text: str, catalog: Mapping[str, ModelSpec]) -> ModelName | None:
    called, colon, tag = text.partition(":")
    key = catalog_key(called, catalog)
    if key is None:
        return None
    spec = catalog[key]
    if spec.path:
        if colon:
            raise UsageError(f"{key} is a single file, without quants.", f"Try: localmoe run {key}")
        return ModelName(text, path=spec.path, key=key, spec=spec)
    label = _tagged(key, spec, tag) if colon else None
    found = catalog_quant(spec, label) if label else None
    if found is None:
        return ModelName(text, None, spec.repo, spec.revision, label, None, key, spec)
    quant = spec.quants[found]
    revision = quant.revision if quant.repo else quant.revision or spec.revision
    return ModelName(text, None, quant.repo or spec.repo, revision, found, quant.file, key, spec)


def catalog_key(called: str, catalog: Mapping[str, ModelSpec]) -> str | None:
    """The entry that is called so, by its own name or another; case does not matter."""
    called = called.lower()
    if called in catalog:
        return called
    return next((key for key, spec in catalog.items() if called in spec.aliases), None)


def catalog_quant(spec: ModelSpec, label: str) -> str | None:
    """The label in the catalog that `label` means: itself, or the only one with a prefix."""
    if label in spec.quants:
        return label
    prefixed = [known for known in spec.quants if base_label(known) == label]
    return prefixed[0] if len(prefixed) == 1 else None


def _tagged(key: str, spec: ModelSpec, tag: str) -> str | None:
    """The label in what follows the colon: Q4_K_M, or as Ollama has it, 8x7b-instruct-q4_K_M.

    What stands before the label must describe the entry: mixtral:8x22b-q4_0 is another model.
    """
    if label := parse_label(tag):
        return label
    label = label_of(tag)
    rest = _words(tag) - _words(label or "")
    if _words(tag) and rest <= _words(key, spec.title, *spec.aliases):
        return label
    known = [base_label(quant) for quant in spec.quants]
    hint = near_labels(tag, known) or f"Try: localmoe run {key}"
    raise UsageError(f"{printable(tag)[:80] or 'Nothing'} is no quant of {key}.", hint)


def _words(*texts: str) -> set[str]:
    return {word for text in texts for word in re.split(r"[^a-z0-9.]+", text.lower()) if word}


# ---- files here ------------------------------------------------------------------------------


def _here(text: str) -> Path | None:
    """The file that is here, absolute but with links kept: those of the Hub's cache have the names
    of shards. None where `text` may be something else; raises UsageError where it can't.
    """
    is_path = bool(_PATH.match(text)) or "\\" in text
    shown = printable(text)[:80]
    try:
        path = Path(text).expanduser()
        if path.is_file():
            return path.absolute()
        is_folder = path.is_dir()
    except (RuntimeError, OSError, ValueError):
        is_path, is_folder = True, False
    if _is_on_hub(text) and not is_path:
        return None
    if is_folder:
        raise UsageError(f"{shown} is a folder.", "Give the GGUF file in it; of shards, the first.")
    if is_path or text.lower().endswith(".gguf"):
        raise UsageError(f"There is no file {shown}.", "Check the path; `demo` needs no file.")
    return None


# ---- the Hub ---------------------------------------------------------------------------------


def _is_on_hub(text: str) -> bool:
    """Whether it has the form of user/repo...; `folder/file.gguf` is a file's."""
    match = _ON_HUB.fullmatch(text)
    if not match or not REPO.fullmatch(match["repo"]):
        return False
    return not match["repo"].lower().endswith(".gguf")


def _on_hub(text: str, shown: str | None = None) -> ModelName:
    match = _ON_HUB.fullmatch(text)
    if not match:
        raise UsageError(*_malformed(shown or text))
    repo, file, quant = _repo(match["repo"]), match["file"] or None, match["quant"]
    if file and quant is not None:
        raise UsageError(
            f"{printable(text)[:80]} names a file and a quant.", "Leave out what follows the colon."
        )
    return ModelName(
        shown or text,
        repo=repo,
        revision=None if match["revision"] is None else _revision(match["revision"]),
        quant=None if quant is None else _quant(quant),
        file=_file(file) if file else None,
    )


def _linked(text: str) -> ModelName:
    """A link to a repository, to a file of it, or to what its pages show of one."""
    try:
        link = urlsplit(text if "://" in text else f"https://{text}")
    except ValueError:
        raise UsageError(*_malformed(text)) from None
    if (link.hostname or "") not in HOSTS or link.scheme not in ("http", "https"):
        raise UsageError(
            f"{printable(text)[:80]} is not a link to Hugging Face.",
            "Download the file, then: localmoe run ./FILE.gguf",
        )
    parts = [unquote(part) for part in link.path.split("/") if part]
    shown = parse_qs(link.query).get("show_file_info")
    if shown and len(parts) >= 2:
        return ModelName(text, repo=_repo("/".join(parts[:2])), file=_file(shown[0]))
    if parts and parts[0].lower() in NO_MODELS:
        raise UsageError(f"{printable(text)[:80]} is not a link to a model.")
    if len(parts) < 4 or parts[2] not in PAGES:
        return _on_hub("/".join(parts), text)
    repo, revision, rest = _repo("/".join(parts[:2])), _revision(parts[3]), parts[4:]
    quant = parse_label(rest[-1]) if rest and parts[2] == "tree" else None
    file = _file("/".join(rest)) if rest and not quant else None
    return ModelName(text, repo=repo, revision=revision, quant=quant, file=file)


def _repo(repo: str) -> str:
    if not is_repo_name(repo):
        raise UsageError(
            f"{printable(repo)[:80]} can't be the name of a repository.", "Write it as user/repo."
        )
    return repo


def _revision(revision: str) -> str:
    if not is_revision(revision):
        raise UsageError(
            f"{printable(revision)[:80]!r} can't be a revision.", "Give a commit or a branch."
        )
    return revision


def _quant(quant: str) -> str:
    if not QUANT.fullmatch(quant):
        raise UsageError(f"{printable(quant)[:80]!r} can't be a quant.", "Write it like Q4_K_M.")
    return parse_label(quant) or quant


def _file(file: str) -> str:
    if not is_file_name(file):
        raise UsageError(f"{printable(file)[:80]} can't be a file of a repository.")
    if not file.lower().endswith(".gguf"):
        raise UsageError(
            f"{printable(file)[:80]} is not a GGUF file.", "Name one that ends in .gguf."
        )
    return file


# ---- what to say -----------------------------------------------------------------------------


def _malformed(text: str) -> tuple[str, str]:
    return (
        f"{printable(text)[:80]!r} names no model.",
        "Write user/repo, user/repo:Q4_K_M or user/repo/file.gguf; a path begins with ./",
    )


def _unknown(text: str, catalog: Mapping[str, ModelSpec]) -> tuple[str, str]:
    if "/" in text:
        return _malformed(text)
    near = near_name(text, catalog)
    hint = f"Did you mean {near}?" if near else "Try: localmoe run demo, or localmoe list"
    return f"No model is called {printable(text)[:80]}.", hint


def near_name(text: str, catalog: Mapping[str, ModelSpec]) -> str | None:
    """The name in the catalog that comes nearest, in Ollama's spelling too (qwen3:30b-a3b)."""
    names = [name for key, spec in catalog.items() for name in (key, *spec.aliases)]
    for called in (text.lower().replace(":", "-"), text.lower().partition(":")[0]):
        near = difflib.get_close_matches(called[:100], names, n=1)
        near = near or [name for name in names if len(called) > 2 and name.startswith(called)]
        if near:
            return near[0]
    return None
