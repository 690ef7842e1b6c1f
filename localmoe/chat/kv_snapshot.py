"""The states of sessions: what a model's cache held at the end of a chat, to go on from at once.

They only save time. A state that is missing, damaged or of another model is as none: then the
conversation is computed from its text. All of them together may take QUOTA_BYTES; the oldest make
room for a new one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from ..engine.interfaces import Engine
from ..errors import EngineError, LocalMoeError, RequestError
from ..files import TEMPORARY_SUFFIX, open_regular_unbuffered
from .session import STATE, Session, Sessions

QUOTA_BYTES = 8 << 30
"""Bytes that the states of all sessions may take together."""
FREE_BYTES = 1 << 30
"""Bytes of a disk that are left to others."""
HEADER_BYTES = 1 << 20
N_SAMPLES = 64
SAMPLE_BYTES = 4096


def file_key(paths: Sequence[Path]) -> str:
    """What tells a model's files from all others, in milliseconds: their sizes, how they begin,
    and pieces of 4 KiB all over them. Found out once for a path. Raises LocalMoeError."""
    try:
        return _file_key(tuple(paths))
    except OSError as error:
        raise LocalMoeError(f"{error.filename} can't be read: {error.strerror}.") from None


@lru_cache(maxsize=16)
def _file_key(paths: tuple[Path, ...]) -> str:
    hashed = blake2b(digest_size=16)
    for path in paths:
        n_bytes = path.stat().st_size
        hashed.update(n_bytes.to_bytes(8, "big"))
        with open_regular_unbuffered(path) as file:
            hashed.update(file.read(HEADER_BYTES))
            for n in range(1, N_SAMPLES + 1):
                file.seek(max(0, n_bytes * n // N_SAMPLES - SAMPLE_BYTES))
                hashed.update(file.read(SAMPLE_BYTES))
    return hashed.hexdigest()


def restore_state(session: Session, engine: Engine) -> int:
    """Let a loaded model hold what a session's state has; gives how many tokens it does.

    0 where there is none that suits. The model has to be the one that the session goes on with
    (Session.use). A state that ended the engine is deleted: the next engine does without.
    """
    if not os.path.exists(session.state_path):
        return 0
    try:
        n_tokens = engine.restore_state(str(session.state_path), session.file).n_tokens
        if n_tokens:
            session.is_state_current = True
            with contextlib.suppress(OSError):
                os.utime(session.state_path)  # the oldest that go are those that nobody used
        return n_tokens
    except RequestError:
        return 0
    except EngineError:
        with contextlib.suppress(OSError):
            session.state_path.unlink()
        return 0


def save_state(
    sessions: Sessions,
    session: Session,
    engine: Engine,
    tokens: Sequence[int],
    quota_bytes: int = QUOTA_BYTES,
) -> int:
    """Keep what a model holds of a conversation's `tokens`; gives how many of them.

    0 where it can't be kept: then what was there before stays, and where there is nothing new to
    keep. Nothing is kept of a chat that has no text.
    """
    if session.is_state_current or not os.path.exists(session.path) or not session.file:
        return 0
    clear_unfinished(sessions)
    store = _Store(sessions.folder, session.state_path, quota_bytes)
    path, key = str(session.state_path), session.file
    try:
        saved = engine.save_state(path, key, tokens, store.room_bytes())
        if not saved.n_tokens and saved.n_bytes and store.make_room(saved.n_bytes):
            saved = engine.save_state(path, key, tokens, store.room_bytes())
    except EngineError:
        return 0
    return saved.n_tokens


def clear_unfinished(sessions: Sessions) -> None:
    """Delete what was left of states whose writing was cut short."""
    for path in sessions.folder.glob(f".*{STATE}*{TEMPORARY_SUFFIX}"):
        name = path.name[1:].rpartition(STATE)[0]
        with contextlib.suppress(LocalMoeError, OSError):
            lock = sessions.lock(name)  # of one in use the writing may be going on
            try:
                path.unlink(missing_ok=True)
            finally:
                sessions.unlock(name, lock)


@dataclass(frozen=True, slots=True)
class _Store:
    """The states beside one that is about to be written, and how much there may be of all."""

    folder: Path
    own: Path
    quota_bytes: int

    def room_bytes(self) -> int:
        """How large one more may be."""
        n_taken = sum(n_bytes for _, n_bytes in self._others())
        return max(0, min(self.quota_bytes - n_taken, self._disk_bytes()))

    def make_room(self, n_bytes: int) -> bool:
        """Delete the oldest until there is room for so much; False, and none is deleted, where
        there could not be."""
        others = self._others()
        if n_bytes > min(self.quota_bytes, self._disk_bytes() + sum(size for _, size in others)):
            return False
        for path, _ in others:
            if self.room_bytes() >= n_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
        return True

    def _others(self) -> list[tuple[Path, int]]:
        """The states of other sessions with their sizes, the oldest first."""
        found: list[tuple[float, Path, int]] = []
        for path in self.folder.glob(f"*{STATE}"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                if path != self.own:
                    found.append((facts.st_mtime, path, facts.st_size))
        return [(path, n_bytes) for _, path, n_bytes in sorted(found)]

    def _disk_bytes(self) -> int:
        try:
            return shutil.disk_usage(self.folder).free - FREE_BYTES
        except OSError:
            return 0
