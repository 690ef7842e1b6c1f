"""What the end of an engine process means, as a sentence and what to do about it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from ..errors import EngineError

# NTSTATUS values that Windows gives as exit codes, as the signals they correspond to
WINDOWS_STATUS = {
    0xC0000005: "SIGSEGV",
    0xC000001D: "SIGILL",
    0xC0000006: "SIGBUS",
    0xC0000409: "SIGABRT",
    3: "SIGABRT",
}

SENTENCES = {
    "SIGABRT": (
        "llama.cpp gave up",
        "The model file may be damaged, or memory ran out: try another quant or a smaller -c.",
    ),
    "SIGSEGV": (
        "llama.cpp crashed (invalid memory access)",
        "The model file may be damaged: check it against its sha256, or try another file.",
    ),
    "SIGBUS": (
        "llama.cpp could not read the model file any more",
        "The file was cut short or its disk failed while it was in use: check the file.",
    ),
    "SIGILL": (
        "llama.cpp was built for a processor with more features than this one",
        "Rebuild it here: pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python"
        " llama-cpp-python",
    ),
    "SIGKILL": (
        "The engine was killed, most likely because memory ran out",
        "Try a smaller quant, a smaller -c, or close other programs.",
    ),
    "SIGTERM": ("The engine was asked to stop from outside", "Run the command again."),
}

# Lines of a native log that name a cause, the best first
CAUSES = (
    "GGML_ASSERT",
    "CUDA error",
    "out of memory",
    "what():",
    "Assertion",
    "Fatal Python error",
)
BAD_ALLOC = "std::bad_alloc"
"""How C++ says that no memory could be had."""


def engine_died(returncode: int | None, log: Sequence[str]) -> EngineError:
    """The error for an engine that ended with this code; `log` is the end of what it printed."""
    name = signal_name(returncode)
    cause = native_cause(log)
    if name in SENTENCES:
        message, hint = SENTENCES[name]
    else:
        message = f"The engine stopped unexpectedly ({name or f'exit code {returncode}'})"
        hint = "Run again with -v to see llama.cpp's log."
        cause = cause or (log[-1].strip() if log else "")
    return EngineError(f"{message}{f': {cause}' if cause else ''}.", hint)


def signal_name(returncode: int | None) -> str:
    """The signal that ended a process, as its POSIX name; empty where none did."""
    if returncode is None:
        return ""
    if sys.platform == "win32":
        return WINDOWS_STATUS.get(returncode & 0xFFFFFFFF, "")
    if returncode >= 0:
        return ""
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def native_cause(log: Sequence[str]) -> str:
    """The line of a native log that says why, without the path of its source file."""
    for mark in CAUSES:
        for line in reversed(log):
            if mark in line:
                cause = line[line.index(mark) :].strip().rstrip(".")[:160]
                return "memory ran out" if BAD_ALLOC in cause else cause
    return ""
