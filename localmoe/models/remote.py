"""Files on the Hub, as data: what hub.py finds out, and what downloads, headers and quants take."""

from __future__ import annotations

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
        return self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class RemoteRepo:
    """A repository at one commit (40 hex digits), with all its files."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]
