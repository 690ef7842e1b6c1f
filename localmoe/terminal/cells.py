"""How many cells of a terminal a text takes: a Chinese character takes two."""

from __future__ import annotations

from functools import lru_cache

TAB_CELLS = 8


def n_cells(text: str) -> int:
    """Returns how many cells of a terminal a text takes; rather one too many."""
    if text.isascii() and "\t" not in text:
        return len(text)
    n = 0
    for char in text:
        n += TAB_CELLS - n % TAB_CELLS if char == "\t" else char_cells(char)
    return n


@lru_cache(maxsize=4096)
def char_cells(char: str) -> int:
    """Returns how many cells of a terminal a character takes."""
    from rich.cells import cell_len  # start-up, 27 ms

    return 1 if char == "\ufe0f" else cell_len(char)  # it makes many a sign before it wider


def cropped(text: str, room: int) -> str:
    """Returns the beginning of a text that has room in so many cells."""
    if n_cells(text) <= room:
        return text
    return text[: next(n for n in range(len(text), -1, -1) if n_cells(text[:n]) <= room)]
