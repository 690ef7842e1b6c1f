"""How finding, fetching and loading a model is shown: one line that changes, and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..callbacks import LoadCallbacks
from ..catalog.resolve import ModelResolver
from . import console
from .cells import n_cells

if TYPE_CHECKING:
    from ..callbacks import DownloadProgress, LoadCallbacks
    from ..catalog.resolve import ModelResolver
    from ..config.settings import Settings
    from ..loading import OpenModel
    from ..planner.search import Workload


COLUMNS, MIN_NAME = 79, 12


class WaitingLine(console.StatusLine):
    """A status line that can also say what is being waited for."""

    def ask(self, what: str) -> None:
        """Show at once that the Hub is asked for something; "" takes it away again."""
        if not what:
            return self.done()
        self._started = -math.inf  # no progress will come of it that could be shown later
        return self.show(f"Asking the Hub for {what}…")


@contextmanager
def load_callbacks(
    name: str, quiet: bool = False, verbose: bool = False
) -> Iterator[LoadCallbacks]:
    """A Watch that shows what it is told on stderr; its line is gone at the end."""
    line = WaitingLine(quiet)
    try:
        yield LoadCallbacks(
            asking=line.ask,
            downloading=lambda progress: line.show(download_line(progress), takes_minutes=True),
            verifying=lambda done, whole: line.show(f"Verifying {name} {share(done, whole)}"),
            loading=lambda fraction: line.show(f"Loading {name} {fraction:4.0%}"),
            log=console.log_line if verbose else None,
            note=None if quiet else line.around(console.note),
            warning=None if quiet else line.around(console.warning),
        )
    finally:
        line.done()


@contextmanager
def model_resolver(
    settings: Settings,
    name: str = "",
    quiet: bool = False,
    workload: Workload = "run",
    verbose: bool = False,
) -> Iterator[ModelResolver]:
    """Finds models, and says on stderr what it has to say."""
    with (
        load_callbacks(name, quiet, verbose) as callbacks,
        ModelResolver(settings, callbacks, workload) as search,
    ):
        yield search


def load_with_progress(
    model: str,
    settings: Settings,
    workload: Workload,
    verbose: bool,
    quiet: bool,
    n_prompt: int | None = None,
) -> OpenModel:
    """Load a model with its progress shown, for a prompt of about `n_prompt` tokens."""
    from ..loading import open_engine  # start-up, 40 ms; a chat loads it beside its prompt

    with load_callbacks(model, quiet, verbose) as callbacks:
        return open_engine(model, settings, callbacks, workload, n_prompt)


def share(done: int, whole: int) -> str:
    """A share in per cent."""
    return f"{done / whole:4.0%}" if whole else "100%"


def of_whole(n_bytes: int, n_all: int) -> str:
    """`1.21 of 26.50 GiB`"""
    whole = console.size(n_all)
    power = ("B", "KiB", "MiB", "GiB").index(whole.split()[1])
    return f"{n_bytes / 1024**power:.{len(whole.split()[0].partition('.')[2])}f} of {whole}"


def download_line(progress: DownloadProgress) -> str:
    """`Downloading  12%, 11.3 MiB/s, 38 min left, 3.18 of 26.50 GiB: name`, in 79 columns."""
    doing = {"downloading": "Downloading", "verifying": "Verifying", "waiting": "Waiting for"}
    parts = [f"{doing[progress.phase]} {share(progress.n_bytes_done, progress.n_bytes_total)}"]
    if progress.bytes_per_s:
        parts.append(f"{console.size(round(progress.bytes_per_s))}/s")
    if progress.trouble:
        parts.append(progress.trouble)
    elif progress.seconds_left:
        parts.append(f"{duration(progress.seconds_left)} left")
    parts.append(of_whole(progress.n_bytes_done, progress.n_bytes_total))
    shown = ", ".join(parts)
    room = max(MIN_NAME, COLUMNS - n_cells(shown) - 2)
    return f"{shown}: {name_ending(progress.file_name, room)}"


def name_ending(name: str, room: int) -> str:
    """The end of a name, which tells more of it: quant and shard."""
    if n_cells(name) <= room:
        return name
    start = next(n for n in range(len(name)) if n_cells(name[n:]) < room)
    return f"…{name[start:]}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
