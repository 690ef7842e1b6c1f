"""`config`: what is set, where it was set, and the file to set it in."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from ..catalog.catalog import model_aliases
from ..config.environment import config_path
from ..config.settings import Settings, settings_of, settings_said
from ..config.settings import settings_of as checked
from ..config.sources import file_key, read_config
from ..errors import LocalMoeError, UsageError
from ..files import read_regular, write_atomically
from ..terminal import console
from .options import (
    chat_options,
    json_option,
    load_options,
    option_name,
    sampling_options,
    think_option,
)

TEMPLATE = """\
# What localmoe does where neither a variable (LOCALMOE_TEMP=0.7) nor an option says otherwise.
# Names are those of the long options:
#
# temp: 0.7
# threads: 8
# models:
#   mixtral: {ctx_size: 8192, system: You answer in one sentence.}
"""
SIZES = ("vram", "ram")


@click.group()
def config() -> None:
    """Settings for good: in a file, for all models and for single ones.

    What an option says comes first, then variables like LOCALMOE_CTX_SIZE, then what the file says
    of the model, then what it says in general.
    """


@config.command()
@click.argument("model", required=False)
@load_options
@sampling_options
@think_option
@chat_options
@json_option
def show(model: str | None, as_json: bool, **options: Any) -> None:
    """Every setting, its value, and where that comes from; of MODEL, if one is named."""
    said = settings_said(options, model=model, aliases=model_aliases)
    values = checked(said, option_name).model_dump(mode="json")
    rows = [
        (file_key(name), values[name], said[name].where or "the command line")
        if name in said
        else (file_key(name), values[name], "default")
        for name in Settings.model_fields
    ]
    if as_json:
        console.document([{"name": n, "value": v, "from": where} for n, v, where in rows])
        return
    console.table(
        [("SETTING", "VALUE", "FROM")] + [(n, table_value(n, v), where) for n, v, where in rows]
    )


def table_value(name: str, value: Any) -> str:
    """A value in a table: short, and as a person would write it."""
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ", ".join(table_value(name, part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = console.size(value) if name in SIZES else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:39]}…"


@config.command()
def path() -> None:
    """Where the file is, or would be."""
    console.lines([str(config_path())])


@config.command()
def edit() -> None:
    """Open the file in an editor (VISUAL, EDITOR), and keep what was written if it can be read."""
    file = config_path()
    draft = file.with_name(f"{file.name}.draft")
    try:
        before = read_regular(file) if file.exists() else TEMPLATE.encode()
        prepare(draft, before, file)
        edit_until_right(draft, before)
        if read_regular(draft) == before:
            draft.unlink()
            console.note("Nothing was changed.")
            return
        # where the file is a link, what it points at
        write_atomically(Path(os.path.realpath(file)), read_regular(draft), durable=True)
        draft.unlink()
    except OSError as error:
        raise UsageError(f"{error.filename or file}: {error.strerror}.") from None
    console.note(f"Saved: {file}")


def prepare(draft: Path, before: bytes, file: Path) -> None:
    """Have the file as it is to be edited, or what was written last time and not saved."""
    draft.parent.mkdir(parents=True, exist_ok=True)
    if draft.exists() and read_regular(draft) != before:
        console.note(f"This is what you wrote last time; to begin from {file}, delete {draft}.")
    else:
        draft.write_bytes(before)


def edit_until_right(draft: Path, before: bytes) -> None:
    """Raises UsageError where there is no editor, or what was written can't stay so."""
    while True:
        open_editor(draft, before)
        try:
            check(draft)
        except LocalMoeError as error:
            if not (sys.stdin.isatty() and wants_again(error)):
                hint = f"It is kept in {draft}; localmoe config edit goes on with it."
                if read_regular(draft) == before:
                    draft.unlink()
                    hint = "Nothing was changed."
                raise UsageError(error.message, hint) from None
        else:
            return


def open_editor(draft: Path, before: bytes) -> None:
    """Opens the draft in an editor. Raises UsageError where there is none."""
    try:
        click.edit(filename=str(draft))
    except (click.ClickException, ValueError) as error:  # ValueError: quotes that don't end
        if read_regular(draft) == before:
            draft.unlink()
        cause = error.__cause__
        why = f": {cause.strerror}" if isinstance(cause, OSError) else ""
        name = f" {cause.filename}" if isinstance(cause, OSError) and cause.filename else ""
        file = draft.with_suffix("")
        hint = f"Set EDITOR, or write {file} yourself."
        raise UsageError(f"The editor{name} failed{why}.", hint) from None


def check(file: Path) -> None:
    """Raises LocalMoeError where a file can't be read or a value in it makes no sense."""
    found = read_config(file, Settings.model_fields, model_aliases)
    for names in ((), *((name,) for name in found.models)):
        settings_of(found.said(names))


def wants_again(error: LocalMoeError) -> bool:
    """Shows what is wrong, and asks whether to edit it again."""
    console.error(error.message, error.hint)
    return click.confirm("Edit it again?", default=True, err=True)
