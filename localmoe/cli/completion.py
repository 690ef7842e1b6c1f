"""`completion`: what a shell needs to complete command lines, names of models among them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from ..errors import LocalMoeError
from ..files import read_regular
from ..terminal import console

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_LOCALMOE_COMPLETE"
# a name of a catalog stands at the beginning of its line
ENTRY = re.compile(r"^([a-z0-9][\w.-]*):", re.MULTILINE)
REPO_FOLDER = "models--"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes localmoe's commands, options and models.

    \b
    bash: localmoe completion bash > ~/.local/share/bash-completion/completions/localmoe
    zsh:  localmoe completion zsh > ~/.zfunc/_localmoe     (with ~/.zfunc in fpath)
    fish: localmoe completion fish > ~/.config/fish/completions/localmoe.fish
    """
    program = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind
    script = kind(program, {}, "localmoe", VARIABLE)
    console.lines((script.source_template % script.source_vars()).splitlines())


class ModelType(click.types.StringParamType):
    """The name of a model, or a path. Completed from files alone, without the network."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Completes names of models, or else paths."""
        found = [name for name in model_names() if name.startswith(incomplete)]
        if found:
            return [CompletionItem(name) for name in found]
        return [CompletionItem(incomplete, type="file")]


class SessionType(click.types.StringParamType):
    """The name of a chat that is kept."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Completes names of sessions."""
        from ..chat.session import kept_sessions  # start-up, 100 ms before each command

        try:
            names = kept_sessions().names()
        except LocalMoeError:
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


TYPES = {"model": ModelType, "models": ModelType, "session_name": SessionType}
"""By the names of parameters, whichever command they are of."""


def model_names() -> list[str]:
    """The names of the catalogs, and the repositories that have a model here."""
    # start-up, 180 ms before each command
    from ..catalog.catalog import FILE_NAME, catalog_path
    from ..config.environment import config_folder, hub_access

    names = [*catalog_names(catalog_path()), *catalog_names(config_folder() / FILE_NAME)]
    return list(dict.fromkeys([*names, *sorted(repositories(hub_access().cache))]))


def catalog_names(path: Path) -> list[str]:
    """Returns the names of a catalog without parsing it whole."""
    try:
        return ENTRY.findall(read_regular(path).decode("utf-8"))
    except (OSError, UnicodeDecodeError):
        return []


def repositories(cache: Path) -> Iterator[str]:
    """Those of the Hugging Face cache that hold a GGUF file."""
    try:
        for folder in cache.iterdir():
            if folder.name.startswith(REPO_FOLDER) and any(folder.glob("snapshots/*/**/*.gguf")):
                yield folder.name.removeprefix(REPO_FOLDER).replace("--", "/", 1)
    except OSError:
        return
