"""Who is told how a download and a load proceed, as data that every layer may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

DownloadPhase = Literal["downloading", "verifying", "waiting"]


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """Over all files of one download; bytes that an earlier run had fetched count as done.

    `bytes_per_s` is that of the last seconds, `seconds_left` None where there is nothing to tell it
    by. Phase "verifying" reads what is here, "waiting" waits for another program's download.
    `trouble` is why nothing comes just now, while it is tried again; "" where all is well.
    """

    n_bytes_done: int
    n_bytes_total: int
    bytes_per_s: float
    seconds_left: float | None
    n_files_done: int
    n_files: int
    file_name: str
    phase: DownloadPhase
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class LoadCallbacks:
    """Who is told how it goes: what the Hub is asked for ("" when it has answered), a download,
    reading a file again (bytes done, bytes in all), loading (0 to 1), llama.cpp's log, remarks and
    warnings in sentences."""

    asking: Callable[[str], None] | None = None
    downloading: Callable[[DownloadProgress], None] | None = None
    verifying: Callable[[int, int], None] | None = None
    loading: Callable[[float], None] | None = None
    log: Callable[[str], None] | None = None
    note: Callable[[str], None] | None = None
    warning: Callable[[str], None] | None = None
