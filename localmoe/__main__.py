"""`python -m localmoe` is `localmoe`: Ctrl-C is handled before anything else is imported."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # typing itself takes some of the milliseconds that this module is to win
if TYPE_CHECKING:
    from typing import NoReturn

EXIT_INTERRUPTED = 130


def main() -> NoReturn:
    """The entry point. Exits with 0 done, 1 failed, 2 usage, 3 does not fit, 4 not fetched or
    not verified, 5 a batch with errors, 130 interrupted."""
    was_python = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if was_python:  # else it is ignored, as in the background of a shell
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    from .cli import main as run  # start-up, 50 ms in which Ctrl-C is handled already

    code = run(takes_interrupts=was_python)
    if was_python:  # while Python ends there is nothing left to interrupt
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    sys.exit(code)


if __name__ == "__main__":
    main()
