"""Which commit a revision stands for, as far as a repository's folder in the cache knows."""

from __future__ import annotations

import re
from pathlib import Path

from .cache_layout import COMMIT, entries

COMMIT_BEGINNING = re.compile(r"[0-9a-f]{7,40}")
"""Fewer digits than git shows are the name of a branch."""


def commit_here(folder: Path, revision: str) -> str | None:
    """The commit of a branch or tag when it was last pulled, of a commit's first digits where a
    snapshot has them, or the commit itself. None for what isn't known here."""
    if COMMIT.fullmatch(revision):
        return revision
    if commit := read_ref(folder, revision):
        return commit
    if COMMIT_BEGINNING.fullmatch(revision):
        found = [commit for commit in snapshots(folder) if commit.startswith(revision)]
        return found[0] if len(found) == 1 else None
    return None


def commits_here(folder: Path) -> list[str]:
    """The commits that the cache has files of: that of the branch main, then the newest first."""
    main = read_ref(folder, "main")
    return sorted(snapshots(folder), key=lambda commit: commit != main)


def read_ref(folder: Path, revision: str) -> str | None:
    """What refs/<branch> says."""
    try:
        commit = (folder / "refs" / revision).read_text("utf-8").strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def snapshots(folder: Path) -> list[str]:
    """The commits with a snapshot, the one that changed last before the others."""
    found = [path for path in entries(folder / "snapshots") if COMMIT.fullmatch(path.name)]
    return [path.name for path in sorted(found, key=_changed, reverse=True)]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
