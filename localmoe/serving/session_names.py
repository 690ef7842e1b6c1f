"""The names of sessions: those that a person may give, and those that date and time give."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
AUTOMATIC = re.compile(r"\d{4}(-\d\d){2}-\d{4}(-\d+)?")
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""What Windows takes for a device, whatever comes after a dot."""


def is_name(text: str) -> bool:
    """Whether a session may have this name: no path, and a file name on every system."""
    is_odd = text.endswith(".") or DEVICES.fullmatch(text)
    return bool(NAME.fullmatch(text)) and not is_odd


def is_automatic(name: str) -> bool:
    """Whether it is one of `names_for`."""
    return bool(AUTOMATIC.fullmatch(name))


def names_for(now: datetime) -> Iterator[str]:
    """Names for a session that begins now, without end."""
    first = now.strftime("%Y-%m-%d-%H%M")
    yield first
    n = 2
    while True:
        yield f"{first}-{n}"
        n += 1
