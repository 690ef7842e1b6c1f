"""A model that is loaded in a thread while a person types already."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..callbacks import LoadCallbacks
    from ..catalog.resolve import ResolvedModel
    from ..config.settings import Settings
    from ..loading import OpenModel

WAKE_SECONDS = 0.2
"""A wait without an end can't be interrupted by Ctrl-C on Windows."""


class Loading:
    """Loads a model that was found; `then` is done with it where it was loaded. What there is to
    say meanwhile is kept for `say`."""

    def __init__(
        self,
        found: ResolvedModel,
        settings: Settings,
        watch: LoadCallbacks,
        then: Callable[[OpenModel], None],
    ) -> None:
        self.fraction = 0.0
        self._said: list[tuple[Callable[[str], None], str]] = []
        self._loaded: OpenModel | None = None
        self._error: BaseException | None = None
        self._on_error: Callable[[BaseException], None] | None = None
        self._watch = watch
        self.watch = self._quietly(watch)
        self._job = (found, settings)
        self._then = then
        self._thread = threading.Thread(target=self._load, args=[self.watch], daemon=True)

    def start(self, on_error: Callable[[BaseException], None]) -> None:
        """Load in a thread, unless that was done; `on_error` is told there that it failed."""
        if not self.is_over:
            self._on_error = on_error
            self._thread.start()

    def run(self) -> None:
        """Load here and now, and say what there is to say."""
        self._load(self._watch)

    @property
    def is_over(self) -> bool:
        return self._loaded is not None or self._error is not None

    @property
    def has_loaded(self) -> bool:
        return self._loaded is not None

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def wait(self, seconds: float) -> bool:
        """Wait for the end of it; True where that has come."""
        if not self.is_over:
            self._thread.join(seconds)
        return self.is_over

    def result(self) -> OpenModel:
        """The model, when it is there. Raises LocalMoeError."""
        while not self.wait(WAKE_SECONDS):
            pass
        if self._error is not None:
            raise self._error
        assert self._loaded is not None
        return self._loaded

    def say(self) -> None:
        """Say what was kept back."""
        said, self._said = self._said, []
        for say, text in said:
            say(text)

    def _load(self, watch: LoadCallbacks) -> None:
        try:
            from ..loading import load_to_talk

            loaded = load_to_talk(*self._job, watch)
            self._then(loaded)
            self._loaded = loaded
        except BaseException as error:
            self._error = error
            if self._on_error:
                self._on_error(error)

    def _quietly(self, watch: LoadCallbacks) -> LoadCallbacks:
        def keep(say: Callable[[str], None] | None) -> Callable[[str], None] | None:
            return (lambda text: self._said.append((say, text))) if say else None

        def at(fraction: float) -> None:
            self.fraction = fraction

        return replace(
            watch, loading=at, log=None, note=keep(watch.note), warning=keep(watch.warning)
        )
