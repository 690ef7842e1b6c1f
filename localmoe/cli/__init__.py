"""The `localmoe` command: its group, and the one place where an error becomes a line."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from .. import __version__
from ..errors import LocalMoeError
from ..terminal import console
from .batch import batch
from .chat import chat
from .completion import TYPES, completion
from .config import config
from .convert import convert
from .doctor import doctor
from .inspect import plan, prompt, show
from .models import list_models, pull, rm, verify
from .run import run
from .sessions import sessions

EXIT_INTERRUPTED = 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class PipeClosed(Exception):
    """Who read what is written has closed the pipe."""


@contextlib.contextmanager
def intercept_aborts() -> Iterator[None]:
    """Keep from click what it would end in its own way: a closed pipe with exit code 1, Ctrl-C
    with an empty line."""
    try:
        yield
    except BrokenPipeError:
        raise PipeClosed from None
    except KeyboardInterrupt:
        raise click.Abort from None


class CommandGroup(click.Group):
    """The group whose ends are `run_command`'s."""

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        with intercept_aborts():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with intercept_aborts():
            return super().invoke(ctx)


@click.group(
    cls=CommandGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="localmoe")
@click.option("--debug", is_flag=True, help="Show the trace of an error.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Run Mixture-of-Experts models on the hardware you own."""
    if context.invoked_subcommand is None:
        console.greeting()


COMMANDS = (
    run, chat, batch, list_models, pull, plan, show, verify, rm, convert, prompt, doctor, config,
    completion, sessions,
)  # fmt: skip

for command in COMMANDS:
    cli.add_command(command)
    for part in (command, *getattr(command, "commands", {}).values()):
        for parameter in part.params:
            if parameter.name in TYPES:
                parameter.type = TYPES[parameter.name]()


def main(takes_interrupts: bool = True) -> int:
    """Run this program's command line; gives its exit code (see localmoe/__main__.py).

    With `takes_interrupts`, Ctrl-C is a KeyboardInterrupt from here on.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this; what is written goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    return run_command(sys.argv[1:], takes_interrupts)


def run_command(arguments: Sequence[str], takes_interrupts: bool = False) -> int:
    """Run a command line; gives its exit code. Every error ends as one line on stderr."""
    try:
        if takes_interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = cli.main(list(arguments), prog_name="localmoe", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except (PipeClosed, BrokenPipeError):
        # who read has what they wanted; Python must not try to flush the rest at exit
        discard_stdout()
        return 0
    except Exception as error:
        if "--debug" in arguments and not isinstance(error, click.ClickException):
            raise
        return report_error(error)


def report_error(error: Exception) -> int:
    """Say in one line what went wrong; gives the exit code."""
    code, message, hint = 1, "", ""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        console.log_line(error.format_message())
        return error.exit_code
    if isinstance(error, click.ClickException):
        code, message = error.exit_code, error.format_message()
        hint = f"See: {usage_of(error)} --help"
    elif isinstance(error, LocalMoeError):
        code, message, hint = error.exit_code, error.message, error.hint
    elif isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
        # what writes files says so itself, with the file's name
        message = f"The output can't be written: {error.strerror}."
        discard_stdout()
    else:
        message = f"Something unforeseen went wrong: {type(error).__name__}: {error}."
        hint = "Run it as `localmoe --debug ...` and report what it prints."
    with contextlib.suppress(OSError):  # of a stderr that is full too
        console.error(message, hint)
    return code


def discard_stdout() -> None:
    """Let all that stdout holds, and still gets, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage_of(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "localmoe"
