"""How many threads compute beside other programs, by what they are seen to take."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from localmoe.engine.worker.model import (
    MOST_PATIENCE_S,
    PATIENCE_S,
    WINDOW_S,
    ThreadGovernor,
    waited_s,
)


class Machine:
    """A clock, and programs that each take half of a core from a thread, while all are used."""

    def __init__(self, n_most: int) -> None:
        self.now, self.waited, self.n_programs = 100.0, 0.0, 0
        self.threads = ThreadGovernor(n_most, lambda: self.waited, lambda: self.now)
        self.n_cores = n_most

    def compute(self, seconds: float) -> set[int]:
        """Steps of 50 ms; gives the numbers of threads that they had."""
        seen, until = set(), self.now + seconds
        while self.now < until:
            n = self.threads.n
            seen.add(n)
            self.now += 0.05
            self.waited += 0.05 * 0.5 * max(0, n + self.n_programs - self.n_cores)
            self.threads.stepped(0.05)
        return seen


def test_an_idle_machine_gives_all_threads() -> None:
    assert Machine(16).compute(100) == {16}


def test_a_core_is_left_to_a_busy_program_and_taken_back() -> None:
    machine = Machine(16)
    machine.n_programs = 1
    machine.compute(1)
    assert machine.threads.n == 15
    machine.n_programs = 0
    machine.compute(PATIENCE_S + WINDOW_S)
    assert machine.threads.n == 16


def test_several_programs_get_several_cores_and_never_more_than_half() -> None:
    machine = Machine(16)
    machine.n_programs = 3
    machine.compute(1)
    assert machine.threads.n == 13
    machine.n_programs = 30
    machine.compute(1)
    assert machine.threads.n == 8


def test_all_threads_are_tried_again_less_and_less_often() -> None:
    machine = Machine(2)
    machine.n_programs = 1
    machine.compute(300)
    tried = 0
    for _ in range(round(300 / WINDOW_S)):
        tried += 2 in machine.compute(WINDOW_S)
    assert tried * WINDOW_S < 0.02 * 300  # the price of not knowing that nobody wants it any more
    machine.n_programs = 0
    machine.compute(MOST_PATIENCE_S + 1)
    assert machine.threads.n == 2


def test_one_thread_stays_one() -> None:
    machine = Machine(1)
    machine.n_programs = 5
    assert machine.compute(10) == {1}


def test_time_without_steps_is_nobodys() -> None:
    """A second of waiting in an hour of idling is a second of the steps that were in it."""
    machine = Machine(4)
    machine.now += 3600
    machine.n_programs = 1
    machine.compute(2 * WINDOW_S)
    assert machine.threads.n == 3


@contextmanager
def busy_programs(n: int) -> Iterator[None]:
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not tell")
def test_the_kernel_tells_of_cores_that_others_have() -> None:
    with busy_programs(2 * (os.cpu_count() or 1)):
        before, until = waited_s(), time.monotonic() + 30
        while waited_s() - before < 0.1:
            assert time.monotonic() < until


def test_a_system_that_does_not_tell_is_an_idle_one(tmp_path: Path) -> None:
    assert waited_s(tmp_path / "none") == 0


def test_a_thread_that_ends_takes_nothing_of_the_others_along(tmp_path: Path) -> None:
    """It would look as if all of their waiting had been in the next window."""
    for name, text in (("1", "0 2000000000 5"), ("2", "nonsense"), ("3", "7 1000000000 9")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "4").mkdir()
    assert waited_s(tmp_path) == 3
