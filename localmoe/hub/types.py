"""Files and repositories of the Hub as data, and which names they may have."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HubAccess:
    """How to reach the Hub, and where what comes from it lies.

    `token` None is anonymous; it never shows in a repr. With `offline` only `cache` is used, the
    Hugging Face cache that other tools share. `headers` holds beginnings of remote files,
    `stamps` what was verified: both can be deleted at any time.
    """

    endpoint: str
    cache: Path
    headers: Path
    stamps: Path
    token: str | None = field(default=None, repr=False)
    offline: bool = False


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository at one commit. `sha256` is the Hub's own (LFS), None for a file that
    lies in git itself. `name` is its path within the repository, with forward slashes."""

    repo: str
    commit: str
    name: str
    n_bytes: int
    sha256: str | None

    @property
    def base_name(self) -> str:
        """Its name without folders."""
        return self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class RemoteRepo:
    """A repository at one commit (40 hex digits), with all its files."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]


# Stricter than the Hub's own rules (huggingface_hub, utils/_validators.py): always user/repo.
# A quant may also be the stem of a file whose name has no label.
REPO = re.compile(r"(?=.{3,96}\Z)\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
REVISION = re.compile(r"\w[\w./+-]{0,199}", re.ASCII)
FILE_PART = re.compile(r"[^/\\:*?\"<>|.][^/\\:*?\"<>|]*")
MAX_FILE_CHARS = 200


def is_repo_name(text: str) -> bool:
    """Whether a repository may be called so; its folder in the cache then has its own name."""
    odd = ".." in text or "--" in text or text.endswith(".git")
    return not odd and REPO.fullmatch(text) is not None


def is_revision(text: str) -> bool:
    """Whether a branch, tag or commit may be called so."""
    return ".." not in text and REVISION.fullmatch(text) is not None


def is_file_name(file: str) -> bool:
    """Whether a repository's file may be called so; it then lies within its folder everywhere."""
    if len(file) > MAX_FILE_CHARS or not file.isprintable():
        return False
    # Windows drops dots and spaces at the end of a name
    return all(FILE_PART.fullmatch(part) and part[-1] not in ". " for part in file.split("/"))
