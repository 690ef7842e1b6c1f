"""Which quant is chosen, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from localmoe.catalog.select_quant import check_bytes, choose_quant, free_bytes, in_order
from localmoe.errors import DoesNotFit, ModelFileError
from localmoe.hardware.machine import Gpu, Machine
from localmoe.hub.quants import LADDER, Quant
from localmoe.hub.types import RemoteFile
from localmoe.planner.request import PlanRequest

GIB = 1 << 30
# as Mixtral 8x7B would take them, in GiB
SIZES = {label: bits * 5.4 for label, bits in LADDER.items()}


def quant(label: str, gib: float | None = None) -> Quant:
    n_bytes = int((SIZES.get(label.removeprefix("i1-"), 20) if gib is None else gib) * GIB)
    return Quant(label, (RemoteFile("a/b", "0" * 40, f"m-{label}.gguf", n_bytes, None),), label)


def up_to(gib: float, *broken: str) -> Callable[[Quant], None]:
    """A machine with so much memory, for which some quants are broken files."""

    def check(quant: Quant) -> None:
        if quant.label in broken:
            raise ModelFileError(f"{quant.label}: damaged.", f"Mend {quant.label}.")
        check_bytes(quant.n_bytes, int(gib * GIB))

    return check


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ("Q8_0 Q6_K Q5_K_M Q4_K_M Q4_K_S IQ4_XS Q3_K_M IQ1_S",
         "Q4_K_M Q4_K_S IQ4_XS Q5_K_M Q6_K Q8_0 Q3_K_M IQ1_S"),
        ("Q8_0 Q5_K_M IQ1_S", "Q5_K_M Q8_0 IQ1_S"),
        ("Q8_0 Q4_0 Q2_K", "Q4_0 Q8_0 Q2_K"),
        ("IQ1_S Q2_K Q3_K_M", "Q3_K_M Q2_K IQ1_S"),
        ("model IQ1_S F16", "F16 IQ1_S model"),
        ("Q4_K_M i1-Q4_K_M", "Q4_K_M i1-Q4_K_M"),
        ("i1-Q4_K_M Q4_K_S", "i1-Q4_K_M Q4_K_S"),
    ],
)  # fmt: skip
def test_the_order_in_which_quants_are_wanted(there: str, wanted: str) -> None:
    ordered = in_order([quant(label) for label in there.split()])
    assert [q.label for q in ordered] == wanted.split()


@pytest.mark.parametrize(
    ("there", "gib", "chosen", "why"),
    [
        ("Q8_0 Q4_K_M Q2_K", 99, "Q4_K_M", "a larger one would gain little and cost speed"),
        ("Q8_0 i1-Q4_K_M", 99, "i1-Q4_K_M", "a larger one would gain little"),
        ("Q8_0 Q4_0", 99, "Q4_0", "the nearest below Q4_K_M, which is not there"),
        ("Q8_0 Q5_K_M IQ1_S", 99, "Q5_K_M", "the smallest that is not poor; there is no Q4_K_M"),
        ("Q2_K IQ1_S", 99, "Q2_K", "the best there is"),
        ("one two", 99, "one", "say no quant"),
        ("Q8_0 Q4_K_M Q4_K_S Q2_K", 20, "Q2_K",
         "is the best that fits; Q4_K_M does not fit: Its weights take 26.3 GiB; 20.0 GiB"),
    ],
)  # fmt: skip
def test_why_is_true(there: str, gib: float, chosen: str, why: str) -> None:
    choice = choose_quant([quant(label) for label in there.split()], up_to(gib), are_here=False)
    assert choice.quant.label == chosen
    assert why in choice.why


def test_a_quant_a_little_below_is_taken_where_it_is_much_faster() -> None:
    """As on 24 GiB, where IQ4_XS fits on the GPU whole and Q4_K_M doesn't."""
    there = [quant(label) for label in ("Q4_K_M", "Q4_K_S", "IQ4_XS", "Q2_K", "Q8_0")]

    def on_gpu(label: str) -> Callable[[Quant], float]:
        limit = SIZES[label] * GIB
        return lambda q: 190.0 if q.n_bytes <= limit + 1 else 50.0

    choice = choose_quant(there, up_to(99), are_here=False, speed=on_gpu("IQ4_XS"))
    assert choice.quant.label == "IQ4_XS"
    assert "190 tok/s where Q4_K_M gives 50" in choice.why
    assert (
        choose_quant(there, up_to(99), are_here=False, speed=on_gpu("Q4_K_S")).quant.label
        == "Q4_K_S"
    )
    # a poor one is not taken for speed, nor one that doesn't run, nor for a little speed
    assert (
        choose_quant(there, up_to(99), are_here=False, speed=on_gpu("Q2_K")).quant.label == "Q4_K_M"
    )
    broken = up_to(99, "IQ4_XS")
    assert (
        choose_quant(there, broken, are_here=False, speed=on_gpu("IQ4_XS")).quant.label == "Q4_K_M"
    )
    slightly = choose_quant(there, up_to(99), are_here=False, speed=lambda q: 1e12 / q.n_bytes)
    assert slightly.quant.label == "Q4_K_M"
    # what is here is not fetched again
    assert (
        choose_quant(there, up_to(99), are_here=True, speed=on_gpu("IQ4_XS")).quant.label == "Q8_0"
    )


def test_of_those_that_are_here_the_best_that_fits_is_taken() -> None:
    here = [quant("Q2_K"), quant("Q6_K"), quant("Q4_K_M"), quant("model", 1)]
    assert choose_quant(here, up_to(99), are_here=True).quant.label == "Q6_K"
    choice = choose_quant(here, up_to(30), are_here=True)
    assert choice.quant.label == "Q4_K_M"
    assert "Q6_K does not fit" in choice.why


def test_a_broken_one_is_named_as_such_and_passed_over() -> None:
    quants = [quant("Q4_K_M"), quant("Q5_K_M"), quant("Q2_K")]
    choice = choose_quant(quants, up_to(99, "Q4_K_M"), are_here=False)
    assert choice.quant.label == "Q5_K_M"
    assert "Q4_K_M does not run: Q4_K_M: damaged." in choice.why


def test_what_is_no_smaller_than_one_that_does_not_fit_is_not_looked_at() -> None:
    looked: list[str] = []

    def check(quant: Quant) -> None:
        looked.append(quant.label)
        up_to(20)(quant)

    choose_quant([quant(x) for x in ("Q4_K_M", "Q8_0", "F16", "Q2_K")], check, are_here=False)
    assert looked == ["Q4_K_M", "Q2_K"]


def test_where_none_fits_the_smallest_is_named() -> None:
    quants = [quant("IQ2_M", 9), quant("IQ1_S", 12), quant("Q4_K_M")]
    with pytest.raises(DoesNotFit, match=r"of the smallest, IQ2_M: Its weights take 9\.0 GiB"):
        choose_quant(quants, up_to(4), are_here=False)


def test_where_none_runs_the_first_error_stands_as_it_is() -> None:
    quants = [quant("Q2_K"), quant("Q4_K_M")]
    with pytest.raises(ModelFileError) as refused:
        choose_quant(quants, up_to(99, "Q2_K", "Q4_K_M"), are_here=False)
    assert str(refused.value) == "Q4_K_M: damaged. Mend Q4_K_M."


def test_memory_that_is_shared_counts_once_and_budgets_hold() -> None:
    own = Gpu("CUDA0", "a card", 8 * GIB, 7 * GIB)
    shared = Gpu("Metal", "Apple", 16 * GIB, 12 * GIB, unified=True)
    assert free_bytes(Machine(32 * GIB, 24 * GIB, 8, (own,)), PlanRequest()) == 31 * GIB
    assert free_bytes(Machine(16 * GIB, 12 * GIB, 8, (shared,)), PlanRequest()) == 12 * GIB
    asked = PlanRequest(ram_bytes=4 * GIB, vram_bytes=(2 * GIB,))
    assert free_bytes(Machine(32 * GIB, 24 * GIB, 8, (own,)), asked) == 6 * GIB
