"""Files and repositories of the Hub as data, which names they may have, and what can fail."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

from ..errors import DownloadError


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """The proxies that requests take, as variables or the system have them.

    `urls` has an address for "http", for "https" and for "all"; none of them shows in a repr,
    because an address may hold a password. `no_proxy` is the text of NO_PROXY. `bypasses` is the
    system's own list of exceptions (macOS, Windows), which counts where no variable is set.
    """

    urls: Mapping[str, str] = field(default_factory=dict, repr=False)
    no_proxy: str = ""
    bypasses: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class HubAccess:
    """How to reach the Hub, and where what comes from it lies.

    `token` None is anonymous; it never shows in a repr. With `offline` only `cache` is used, the
    Hugging Face cache that other tools share. `headers` holds beginnings of remote files,
    `stamps` what was verified: both can be deleted at any time. `ca_file` and `ca_folder` hold the
    certificate authorities to trust in place of the system's.
    """

    endpoint: str
    cache: Path
    headers: Path
    stamps: Path
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    proxies: ProxySettings = field(default_factory=ProxySettings)
    ca_file: Path | None = None
    ca_folder: Path | None = None
    has_symlinks: bool = True  # False: HF_HUB_DISABLE_SYMLINKS asks for real files


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


FaultKind = Literal["dropped", "stalled", "busy", "unreachable", "proxy"]


class TransferFault(DownloadError):
    """A request that may succeed when it is tried again.

    The connection `dropped` or `stalled`, the server is `busy` (429, 5xx; `retry_after_s` where it
    says so), nobody is there (`unreachable`), or a `proxy` that was set can't be used.
    """

    def __init__(
        self,
        kind: FaultKind,
        message: str,
        retry_after_s: float | None = None,
        hint: str = "Try again.",
    ) -> None:
        super().__init__(message, hint)
        self.kind = kind
        self.retry_after_s = retry_after_s


class HttpRefusal(Exception):
    """An answer of 4xx from the endpoint itself, with its headers in lower case."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """How long a busy server asks to wait: seconds or a date, or the Hub's own `RateLimit`."""
    said = headers.get("retry-after", "")
    if said.isdecimal():
        return float(said)
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError):
        found = re.search(r";\s*t=(\d{1,6})", headers.get("ratelimit", ""))
        return float(found[1]) if found else None


OFFLINE_HINT = "Models that are here run without it: localmoe list --installed"
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
