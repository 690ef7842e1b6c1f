"""From the bytes of tokens to text that can be shown: whole characters, no stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Takes bytes as they are sampled, gives text as soon as it is certain.

    A character split over tokens waits for its last byte; what may be the beginning of a stop
    string waits until it is one or isn't. With `skip_space`, one space at the very beginning is
    left out: a SentencePiece vocabulary spells the first word of a text with it.
    """

    def __init__(self, stop: Sequence[str] = (), *, skip_space: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = [text for text in stop if text]
        self._skip_space = skip_space
        self._held = ""
        self.stopped_by: str | None = None

    def feed(self, raw: bytes) -> str:
        """More bytes; gives the text that they make certain. Sets `stopped_by` at a stop string."""
        return self._take(self._decoder.decode(raw))

    @property
    def is_holding(self) -> bool:
        """Whether text that was fed hasn't come out yet."""
        return bool(self._held or self._decoder.getstate()[0])

    def finish(self) -> str:
        """No more bytes of this text come: what was still held back of it."""
        text = self._take(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _take(self, text: str) -> str:
        if self._skip_space and text:
            self._skip_space = False
            text = text.removeprefix(" ")
        if not self._stop or self.stopped_by is not None:
            return text if self.stopped_by is None else ""
        self._held += text
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found)
        else:
            at = len(self._held) - self._undecided()
        certain, self._held = self._held[:at], self._held[at:]
        return certain

    def _undecided(self) -> int:
        """How many characters at the end may begin a stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        for n in range(longest, 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stop):
                return n
        return 0
