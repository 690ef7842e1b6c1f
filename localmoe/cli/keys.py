"""The keyboard while nobody is asked for a line: what is typed ahead waits, unseen."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LFLAG, CC = 3, 6
"""Places in the list that termios.tcgetattr gives."""


@contextmanager
def unseen_keys() -> Iterator[None]:
    """Keys that are pressed meanwhile aren't printed into an answer; Ctrl-C is as ever.

    They are read at the next prompt, which finds the terminal like this and leaves it so.
    """
    try:
        import termios
    except ImportError:  # Windows prints nothing unasked
        yield
        return
    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (termios.error, OSError, ValueError):
        yield
        return
    quiet = termios.tcgetattr(sys.stdin.fileno())
    quiet[LFLAG] &= ~(termios.ECHO | termios.ICANON)
    quiet[CC][termios.VMIN], quiet[CC][termios.VTIME] = 1, 0
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error, OSError, ValueError):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
