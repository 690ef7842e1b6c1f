"""Counts the engine processes that this process starts, by the interpreter's own audit events."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

ENGINE = "localmoe.engine.worker.server"

_counters: list[list[int]] = []


def _on_event(event: str, args: tuple[object, ...]) -> None:
    if event == "subprocess.Popen" and ENGINE in str(args[1]):
        for counter in _counters:
            counter[0] += 1


sys.addaudithook(_on_event)  # a hook stays until the interpreter ends


@contextmanager
def count_engine_starts() -> Iterator[list[int]]:
    """Gives a list of one number: how many engine processes have started in the block so far."""
    counter = [0]
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)
