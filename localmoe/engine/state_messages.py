"""The messages about states of sequences in files (engine/states.py), a part of the protocol.

A state may be larger than what a pipe should carry: the engine process reads and writes its file
by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SaveState:
    """Write what is held of the longest beginning of `tokens` to the file at `path`.

    Only a model of the same `key` can have it again; what that stands for is the client's to say.
    One of more than `room_bytes` is not written.
    """

    id: int
    path: str
    key: str
    tokens: tuple[int, ...]
    room_bytes: int
    type: Literal["save_state"] = "save_state"


@dataclass(frozen=True, slots=True)
class RestoreState:
    """Hold again what the file at `path` has, for the next requests that begin like it."""

    id: int
    path: str
    key: str
    type: Literal["restore_state"] = "restore_state"


@dataclass(frozen=True, slots=True)
class StateSaved:
    """So many tokens' state is on disk, in a file of `n_bytes`.

    With 0 tokens nothing was written, for this reason; `n_bytes` is then what it would have taken,
    where that was why.
    """

    id: int
    n_tokens: int
    n_bytes: int
    reason: str = ""
    type: Literal["state_saved"] = "state_saved"


@dataclass(frozen=True, slots=True)
class StateRestored:
    """So many tokens are held again; 0 where the file doesn't suit, for this reason."""

    id: int
    n_tokens: int
    reason: str = ""
    type: Literal["state_restored"] = "state_restored"


StateWish = SaveState | RestoreState
StateAnswer = StateSaved | StateRestored
