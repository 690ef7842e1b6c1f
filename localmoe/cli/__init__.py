"""The `localmoe` command: its group, and the one place where an error becomes a line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from .. import __version__
from ..errors import LocalMoeError
from . import render
from .batch import batch
from .convert import convert
from .doctor import doctor
from .house import pull, rm, verify
from .listing import list_models
from .look import prompt, show
from .plan import plan
from .talk import chat, run

EXIT_INTERRUPTED = 130


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="localmoe")
@click.option("--debug", is_flag=True, help="Show the trace of an error.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Run Mixture-of-Experts models on the hardware you own."""
    if context.invoked_subcommand is None:
        render.greeting()


COMMANDS = (run, chat, batch, list_models, pull, plan, show, verify, rm, convert, prompt, doctor)

for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """The entry point. Exits with 0 done, 1 failed, 2 usage, 3 does not fit, 4 not fetched or
    not verified, 5 a batch with errors, 130 interrupted."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this; what is written goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run a command line; gives its exit code. Every error ends as one line on stderr."""
    try:
        code = cli.main(list(arguments), prog_name="localmoe", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # who read has what they wanted; Python must not try to flush the rest at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except click.ClickException as error:
        render.error(error.format_message(), f"See: {usage_of(error)} --help")
        return error.exit_code
    except LocalMoeError as error:
        if "--debug" in arguments:
            raise
        render.error(error.message, error.hint)
        return error.exit_code
    except Exception as error:
        if "--debug" in arguments:
            raise
        render.error(
            f"Something unforeseen went wrong: {type(error).__name__}: {error}.",
            "Run it as `localmoe --debug ...` and report what it prints.",
        )
        return 1


def usage_of(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "localmoe"
