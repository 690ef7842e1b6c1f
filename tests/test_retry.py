"""Questions that are asked again where their engine died, and the limits of that."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import pytest

from localmoe.batch.dispatch import MAX_IN_FLIGHT_BY_ATTEMPT
from localmoe.engine.protocol import Delta
from localmoe.engine.retry import (
    ANSWER_TRIES,
    REQUEST_TRIES,
    CrashCounter,
    retry_on_crash,
    stream_with_retry,
)
from localmoe.errors import EngineError, RequestError

DEATH = EngineError("It died.")


def dying(n_deaths: int, error: EngineError = DEATH) -> Callable[[], str]:
    """A question that so many engines die of."""
    deaths = iter([error] * n_deaths)

    def ask() -> str:
        for death in deaths:
            raise death
        return "yes"

    return ask


def dying_streams(*before: int) -> Callable[[], Generator[Delta, None, None]]:
    """A stream that dies after so many tokens, once for each number, and then answers whole."""
    counts: Iterator[int | None] = iter([*before, None])

    def ask() -> Generator[Delta, None, None]:
        n_tokens = next(counts)
        for n in range(2 if n_tokens is None else n_tokens):
            yield Delta(1, str(n), (n,))
        if n_tokens is not None:
            raise DEATH

    return ask


@pytest.mark.parametrize("n_deaths", [0, 1, 2])
def test_a_question_is_asked_again_in_the_next_engine(n_deaths: int) -> None:
    revived: list[EngineError] = []
    assert retry_on_crash(dying(n_deaths), revived.append, n_tries=3) == "yes"
    assert revived == [DEATH] * n_deaths


def test_after_the_last_try_no_engine_is_started() -> None:
    revived: list[EngineError] = []
    with pytest.raises(EngineError, match="It died"):
        retry_on_crash(dying(3), revived.append, n_tries=3)
    assert len(revived) == 2


def test_a_refused_request_is_not_asked_again() -> None:
    revived: list[EngineError] = []
    with pytest.raises(RequestError, match="Too long"):
        retry_on_crash(dying(1, RequestError("Too long.")), revived.append, n_tries=3)
    assert revived == []


def test_an_answer_begins_anew_only_where_it_had_begun() -> None:
    told: list[bool] = []
    deltas = stream_with_retry(
        dying_streams(0, 1), lambda _, has_begun: told.append(has_begun), n_tries=3
    )
    assert [(delta.text, delta.anew) for delta in deltas] == [
        ("0", False),
        ("", True),
        ("0", False),
        ("1", False),
    ]
    assert told == [False, True]


def test_an_answer_that_always_kills_its_engine_ends() -> None:
    told: list[bool] = []
    deltas = stream_with_retry(
        dying_streams(*[1] * ANSWER_TRIES), lambda _, has_begun: told.append(has_begun)
    )
    with pytest.raises(EngineError, match="It died"):
        list(deltas)
    assert len(told) == ANSWER_TRIES - 1


def test_an_answer_between_two_crashes_resets_the_count() -> None:
    crashes = CrashCounter(1)
    crashes.add(DEATH)
    crashes.reset()
    crashes.add(DEATH)
    with pytest.raises(EngineError, match="It died"):
        crashes.add(DEATH)


def test_each_try_of_a_request_has_its_number_of_neighbours() -> None:
    assert len(MAX_IN_FLIGHT_BY_ATTEMPT) == REQUEST_TRIES
    assert MAX_IN_FLIGHT_BY_ATTEMPT[-1] == 1
