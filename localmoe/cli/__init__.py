"""The `localmoe` command: its group, and the one place where an error becomes a line."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import takewhile
from typing import Any

import click

from .. import __version__
from ..errors import LocalMoeError
from ..terminal import console

EXIT_INTERRUPTED = 130
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""Why stdout can't be written: there is no room, or it is closed."""


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


# name -> (module, attribute, what `localmoe --help` says of it)
COMMANDS = {
    "batch": ("batch", "batch", "Answer a file of requests, one a line."),
    "chat": ("chat", "chat", "A conversation."),
    "completion": (
        "completion", "completion",
        "Print the script that completes localmoe's commands, options and models.",
    ),
    "config": (
        "config", "config",
        "Settings for good: in a file, for all models and for single ones.",
    ),
    "convert": (
        "convert", "convert",
        "Make a Mixtral file of before April 2024 run: its experts are merged, nothing is lost.",
    ),
    "doctor": ("doctor", "doctor", "What this machine has, what is wrong, how to mend it."),
    "list": (
        "models", "list_models", "The models that are known by name, and those that are here.",
    ),
    "plan": ("inspect", "plan", "What would go where."),
    "prompt": (
        "inspect", "prompt", "The exact text and token ids that a conversation becomes.",
    ),
    "pull": (
        "models", "pull",
        "Fetch a model, verified, into the Hugging Face cache, which other tools share.",
    ),
    "rm": (
        "models", "rm", "Delete models from the cache, and downloads that were broken off.",
    ),
    "run": ("run", "run", "One answer: the answer alone on stdout, all else on stderr."),
    "sessions": ("sessions", "sessions", "The chats that are kept."),
    "show": (
        "inspect", "show",
        "What is in a model file: its shape, its experts, what its bytes are spent on.",
    ),
    "verify": (
        "models", "verify", "Read models again, and hold every byte against its hash.",
    ),
}  # fmt: skip


class LazyGroup(click.Group):
    """The group of all commands, whose modules are imported when they are called.

    Errors of a command end in `run_command`.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, in order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports a command, with completion for its models and sessions."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f".{module}", __name__), attribute)
        types: dict[str, Any] = import_module(".completion", __name__).TYPES
        for part in (command, *getattr(command, "commands", {}).values()):
            for parameter in part.params:
                if parameter.name in types:
                    parameter.type = types[parameter.name]()
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds a command by its name. Raises UsageError with one that is near."""
        name = args[0]
        if name in COMMANDS or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise click.UsageError(f"No such command '{name}'.{hint}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands as click.Group does, from the table, without an import."""
        limit = formatter.width - 6 - max(len(name) for name in COMMANDS)
        shown = [click.Command(name, help=COMMANDS[name][2]) for name in sorted(COMMANDS)]
        with formatter.section("Commands"):
            formatter.write_dl([(c.name or "", c.get_short_help_str(limit)) for c in shown])

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        """Parses a command line; aborts end as `run_command` wants them."""
        with intercept_aborts():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command; aborts end as `run_command` wants them."""
        with intercept_aborts():
            return super().invoke(ctx)


@click.group(
    cls=LazyGroup,
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


def main(takes_interrupts: bool = True) -> int:
    """Run this program's command line; gives its exit code (see localmoe/__main__.py).

    With `takes_interrupts`, Ctrl-C is a KeyboardInterrupt from here on.
    """
    replace_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    return run_command(sys.argv[1:], takes_interrupts)


def replace_closed_streams() -> None:
    """Put something in place of streams that were closed by who started this program.

    What is read from stdin, or written to stdout, fails as it would with a closed one; their
    numbers are taken, so that no file of ours gets them. Errors that nobody can see go nowhere.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_WRONLY), "r", encoding="utf-8")
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


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
        # behind the command, it may be the value of an option
        if "--debug" in takewhile(lambda word: word.startswith("-"), arguments) and not isinstance(
            error, click.ClickException
        ):
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
    elif isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename is None:
        # what writes files says so itself, with the file's name
        reason = "stdout is closed" if error.errno == errno.EBADF else error.strerror
        message = f"The output can't be written: {reason}."
        discard_stdout()
    elif isinstance(error, OSError) and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        message = f"{name} can't be used: {error.strerror or type(error).__name__}."
        hint = "See where: localmoe --debug ..."
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
    """The command that an error is about, as it is typed."""
    context = getattr(error, "ctx", None)
    return context.command_path if context else "localmoe"
