"""What the Hub said of a repository, kept beside its headers for when there is no network."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

from .cache_layout import COMMIT, SHA256
from .remote import RemoteFile, RemoteRepo


def keep_listing(headers: Path, listed: RemoteRepo, revision: str | None) -> None:
    """Keep what a revision (None: main) and its commit hold. What can't be written isn't kept."""
    files = [asdict(file) for file in listed.files if file.name.lower().endswith(".gguf")]
    text = json.dumps({"commit": listed.commit, "files": files})
    for called in {revision or "main", listed.commit}:
        path = listing_path(headers, listed.repo, called)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f"{path.name}.new")
            beside.write_text(text, "utf-8")
            beside.replace(path)


def kept_listing(headers: Path, repo: str, revision: str | None) -> RemoteRepo | None:
    """What was kept; None where that is nothing, or not what was written."""
    try:
        kept = json.loads(listing_path(headers, repo, revision or "main").read_text("utf-8"))
        commit, files = kept["commit"], tuple(RemoteFile(**file) for file in kept["files"])
        if COMMIT.fullmatch(commit) and all(is_right(file, repo, commit) for file in files):
            return RemoteRepo(repo, commit, files)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


def is_right(file: RemoteFile, repo: str, commit: str) -> bool:
    has_size = isinstance(file.n_bytes, int) and file.n_bytes >= 0
    has_hash = file.sha256 is None or SHA256.fullmatch(file.sha256) is not None
    return has_size and has_hash and (file.repo, file.commit) == (repo, commit)


def listing_path(headers: Path, repo: str, revision: str) -> Path:
    return headers / repo / f"{quote(revision, safe='')}.json"
