"""An answer that outlives its engine: asked again, by itself, in the one that takes its place."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing

from ..errors import EngineError, RequestError
from .protocol import Delta

N_AGAIN = 2
"""How often a question is asked again. What kills three engines running is no accident."""


def retry_on_crash(
    ask: Callable[[], Generator[Delta, None, None]],
    come_back: Callable[[EngineError, bool], None],
) -> Generator[Delta, None, None]:
    """The deltas of an answer; where its engine dies, it begins anew, at most N_AGAIN times.

    `come_back` is given the error, and whether anything of the answer came before it; it brings an
    engine back that `ask` then uses, or raises. A delta with `anew` says that what came is void.
    A request that is refused is no death.
    """
    for n_left in range(N_AGAIN, -1, -1):
        has_begun = False
        try:
            with closing(ask()) as deltas:
                for delta in deltas:
                    has_begun = has_begun or bool(delta.tokens)
                    yield delta
            return
        except RequestError:
            raise
        except EngineError as error:
            if not n_left:
                raise
            come_back(error, has_begun)
        if has_begun:
            yield Delta(0, anew=True)
