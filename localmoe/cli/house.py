"""`pull`, `verify` and `rm`: models that come, are held against their hashes, and go."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from . import render
from .options import json_option, offline_option, settings_of
from .watching import finder

if TYPE_CHECKING:
    from ..models.stamps import Verdict

EXIT_NOT_VERIFIED = 4

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Nothing but errors.")


@click.command()
@click.argument("model")
@offline_option
@click.option("--force", is_flag=True, help="Fetch it though it does not fit this machine.")
@json_option
@quiet_option
def pull(model: str, offline: bool | None, force: bool, as_json: bool, quiet: bool) -> None:
    """Fetch a model, verified, into the Hugging Face cache, which other tools share.

    MODEL is a name of `localmoe list`, with a quant like mixtral:Q5_K_M, or user/repo,
    user/repo:Q4_K_M, user/repo/file.gguf, or a link to huggingface.co. Broken off, the same
    command goes on where it was.
    """
    with finder(settings_of({"offline": offline}), model, quiet or as_json) as search:
        found = search.find(model)
        if found.why and search.watch.note:
            search.watch.note(found.why)
        try:
            found = search.fetch(found, check_fit=not force)
        except KeyboardInterrupt:
            render.error("Stopped; what came is kept.", f"Go on with: localmoe pull {found.called}")
            raise
    paths = [str(path) for path in found.meta.paths]
    if as_json:
        render.document({"model": found.called, "files": paths, "bytes": found.n_bytes})
    elif not quiet:
        size = render.size(found.n_bytes)
        render.lines([f"{found.called} is here and verified, {size}: {paths[0]}"])


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--repair", is_flag=True, help="Fetch again what is damaged, and only that.")
@json_option
@quiet_option
def verify(models: tuple[str, ...], repair: bool, as_json: bool, quiet: bool) -> int:
    """Read models again, and hold every byte against its hash. Without MODEL, all that are here.

    Exits with 4 where something is wrong.
    """
    from .. import keeping

    with finder(settings_of({}), "", quiet or as_json) as search:
        verdicts = keeping.verify(search, models, repair)
    wrong = [verdict for verdict in verdicts if keeping.is_wrong(verdict)]
    if as_json:
        render.document([verdict_document(verdict) for verdict in verdicts])
    else:
        render.lines(f"{v.path.name}: {v.why}" for v in (wrong if quiet else verdicts))
    if wrong and not repair and not as_json:
        render.note("Mend it with: localmoe verify --repair")
    return EXIT_NOT_VERIFIED if wrong else 0


def verdict_document(verdict: Verdict) -> dict[str, Any]:
    return {
        "file": str(verdict.path),
        "outcome": verdict.outcome,
        "why": verdict.why,
        "bytes": verdict.n_bytes,
        "sha256": verdict.sha256,
        "expected_sha256": verdict.expected and verdict.expected.sha256,
        "damaged": [list(span) for span in verdict.damaged],
    }


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
@quiet_option
def rm(models: tuple[str, ...], yes: bool, quiet: bool) -> None:
    """Delete models from the cache. What other tools lose with them is said first."""
    from .. import keeping

    with finder(settings_of({}), "", quiet) as search:
        found = [m for name in models for m in keeping.meant(search, deletable(name))]
        removal = search.store.plan_removal(*found)
        if not quiet or not yes:
            names = ", ".join(dict.fromkeys(f"{m.repo}:{m.label}" for m in found))
            render.lines([f"{names}: {render.size(removal.n_bytes_freed)}", *removal.shared])
        if not yes:
            confirm()
        freed = search.store.remove(removal)
    if not quiet:
        render.lines([f"{render.size(freed)} are free again."])


def deletable(name: str) -> Any:
    """A name that means something in the cache. Raises UsageError for a file of a person's own."""
    from .. import keeping

    parsed = keeping.parsed(name)
    if parsed.path is not None:
        raise UsageError(
            f"{name} is not in the cache: it is a file of yours.", "Delete it yourself."
        )
    return parsed


def confirm() -> None:
    """Ask at a terminal; without one nobody can say yes."""
    if not sys.stdin.isatty():
        raise UsageError("Nothing was deleted: there is nobody to ask.", "Say --yes.")
    click.confirm("Delete?", abort=True, err=True)
