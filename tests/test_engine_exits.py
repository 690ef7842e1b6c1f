from __future__ import annotations

import signal
import sys

import pytest

from localmoe.engine.client import engine_died, native_cause

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="exit codes of POSIX")


def test_an_abort_says_what_llama_cpp_asserted() -> None:
    log = ["load_tensors: ok", "/tmp/x/ggml.c:12: GGML_ASSERT(n > 0) failed", ""]
    error = engine_died(-signal.SIGABRT, log)
    assert str(error).startswith("llama.cpp gave up: GGML_ASSERT(n > 0) failed. ")


def test_an_unknown_end_shows_the_last_line() -> None:
    error = engine_died(7, ["something odd"])
    assert "exit code 7" in str(error)
    assert "something odd" in str(error)


def test_a_real_time_signal_has_a_number() -> None:
    assert "signal 99" in str(engine_died(-99, []))


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("/a/b.cu:88: CUDA error: out of memory", "CUDA error: out of memory"),
        ("terminate called; what():  no such tensor", "what():  no such tensor"),
        ("  what():  std::bad_alloc", "memory ran out"),
        ("all is well", ""),
    ],
)
def test_the_cause_is_found_in_a_log(line: str, cause: str) -> None:
    assert native_cause(["before", line, "after"]) == cause
