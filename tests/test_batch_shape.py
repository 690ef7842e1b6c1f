"""How many requests at once: on a CPU with room of their own, on a GPU with what they share."""

from __future__ import annotations

from localmoe.planner.request import BatchShape, PlanRequest, numbers

SHARING = BatchShape(numbers(20), 600, {16: 3000, 32: 5000})


def test_on_a_cpu_answers_do_not_depend_on_company() -> None:
    asked = list(SHARING.requests(PlanRequest(), has_gpu=False))
    assert [request.n_seq for request in asked] == [32, 16, 8, 4, 2, 1]
    assert [request.batch_invariant for request in asked] == [True] * 5 + [False]
    assert {(request.n_cells, request.n_ctx) for request in asked} == {(0, 600)}


def test_on_a_gpu_they_share_one_cache_where_that_helps() -> None:
    asked = list(SHARING.requests(PlanRequest(n_ctx=512), has_gpu=True))
    assert [(r.n_seq, r.n_cells) for r in asked][:3] == [(32, 5000), (16, 3000), (8, 0)]
    assert {(request.batch_invariant, request.n_ctx) for request in asked} == {(False, 512)}


def test_a_single_request_is_computed_as_if_in_company() -> None:
    """So that a file of one line gives the answer that a long file gives."""
    alone = BatchShape(numbers(1), 600)
    assert [(r.n_seq, r.batch_invariant) for r in alone.requests(PlanRequest(), has_gpu=False)] == [
        (2, True),
        (1, False),
    ]
    assert [r.n_seq for r in alone.requests(PlanRequest(), has_gpu=True)] == [1]


def test_the_number_of_a_person_is_kept() -> None:
    for n in (1, 5):
        batch_shape = BatchShape(numbers(20, n), 600, is_open=False)
        assert [r.n_seq for r in batch_shape.requests(PlanRequest(), has_gpu=False)] == [n]
