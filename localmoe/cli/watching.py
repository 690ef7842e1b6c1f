"""How finding, fetching and loading a model is shown: one line that changes, and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import render

if TYPE_CHECKING:
    from ..config import Settings
    from ..models.progress import Progress
    from ..obtain import Finder, Watch


@contextmanager
def watching(name: str, quiet: bool = False, verbose: bool = False) -> Iterator[Watch]:
    """A Watch that shows what it is told on stderr; its line is gone at the end."""
    from ..obtain import Watch

    line = render.StatusLine(quiet)
    try:
        yield Watch(
            downloading=lambda progress: line.show(download_line(progress), takes_minutes=True),
            verifying=lambda done, whole: line.show(f"Verifying {name} {share(done, whole)}"),
            loading=lambda fraction: line.show(f"Loading {name} {fraction:4.0%}"),
            log=render.log_line if verbose else None,
            note=None if quiet else line.around(render.note),
            warning=None if quiet else line.around(render.warning),
        )
    finally:
        line.done()


@contextmanager
def finder(settings: Settings, name: str = "", quiet: bool = False) -> Iterator[Finder]:
    """Finds models, and says on stderr what it has to say."""
    from ..obtain import Finder

    with watching(name, quiet) as watch, Finder(settings, watch) as search:
        yield search


def share(done: int, whole: int) -> str:
    return f"{done / whole:4.0%}" if whole else "100%"


def download_line(progress: Progress) -> str:
    """`Downloading name: 1.21 of 26.50 GiB, 11.3 MiB/s, 38 min left`."""
    done, whole = render.size(progress.n_bytes_done), render.size(progress.n_bytes_total)
    doing = {"downloading": "Downloading", "verifying": "Verifying", "waiting": "Waiting for"}
    parts = [f"{doing[progress.phase]} {progress.file_name}: {done} of {whole}"]
    if progress.bytes_per_s:
        parts.append(f"{render.size(round(progress.bytes_per_s))}/s")
    if progress.trouble:
        parts.append(progress.trouble)
    elif progress.seconds_left:
        parts.append(f"{duration(progress.seconds_left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
