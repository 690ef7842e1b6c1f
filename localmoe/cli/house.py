"""`pull`, `verify` and `rm`: models that come, are held against their hashes, and go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError, printable
from . import render
from .options import json_option, offline_option, settings_of
from .watching import finder, watching

if TYPE_CHECKING:
    from ..catalog.maintenance import VerifiableFile
    from ..catalog.resolve import ModelResolver
    from ..hub.installed import InstalledModel, PartialDownload
    from ..hub.removal import Removal
    from ..hub.verify import Verdict

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
    with finder(settings_of({"offline": offline}, model), model, quiet or as_json) as search:
        found = search.find(model, must_fit=not force)
        search.note_newer(found)
        found = search.fetch(found, check_fit=not force)
    paths = [str(path) for path in found.meta.paths]
    if as_json:
        render.document({"model": found.called, "files": paths, "bytes": found.n_bytes})
    elif not quiet:
        # a file of a person's own was not hashed: there is nothing to hold it against
        verified = all(search.store.is_verified(path) for path in found.meta.paths)
        state = "is here and verified" if verified else "is here"
        render.lines([f"{found.called} {state}, {render.size(found.n_bytes)}: {paths[0]}"])


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--repair", is_flag=True, help="Fetch again what is damaged or lost, and only that.")
@offline_option
@json_option
@quiet_option
def verify(
    models: tuple[str, ...], repair: bool, offline: bool | None, as_json: bool, quiet: bool
) -> int:
    """Read models again, and hold every byte against its hash. Without MODEL, all that are here.

    Exits with 4 where something is wrong.
    """
    from ..catalog import maintenance

    with finder(settings_of({"offline": offline}), "", quiet or as_json) as search:
        if repair and search.hub.access.offline:
            what = "What is damaged can't be fetched offline."
            raise UsageError(what, "Leave out --repair, or --offline and HF_HUB_OFFLINE.")
        files = maintenance.kept_files(search, models)
        verdicts = []
        for file, verdict in checked(search, files, repair, quiet or as_json):
            verdicts.append(verdict)
            if not as_json and (not quiet or maintenance.is_wrong(verdict)):
                render.lines([f"{file.called}: {verdict.why}"])
    if as_json:
        render.document([verdict_document(verdict) for verdict in verdicts])
    wrong = [maintenance.is_wrong(verdict) for verdict in verdicts]
    if not repair and not as_json and any(w and f.repo for w, f in zip(wrong, files, strict=True)):
        render.note(f"Mend it with: {' '.join(['localmoe verify', *models, '--repair'])}")
    return EXIT_NOT_VERIFIED if any(wrong) else 0


def checked(
    search: ModelResolver, files: Sequence[VerifiableFile], repair: bool, quiet: bool
) -> Iterator[tuple[VerifiableFile, Verdict]]:
    """One after the other, each with its name in the line that says how far it is."""
    from ..catalog import maintenance

    for file in files:
        with watching(printable(file.path.name), quiet) as watch:
            verdict = maintenance.check(search, file, watch, repair)
        yield file, verdict


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
@json_option
@quiet_option
def rm(models: tuple[str, ...], yes: bool, as_json: bool, quiet: bool) -> None:
    """Delete models from the cache, and downloads that were broken off.

    What other tools lose with them is said first.
    """
    from ..catalog import maintenance

    with finder(settings_of({}), "", quiet or as_json) as search:
        installed, unfinished = maintenance.removable(search, models)
        removal = search.store.plan_removal(installed, unfinished)
        if not yes or not (quiet or as_json):
            say = render.note if as_json else lambda line: render.lines([line])
            say_what_goes(installed, unfinished, removal, say)
        if not yes:
            confirm()
        freed = search.store.remove(removal)
    if as_json:
        gone = [*map(model_document, installed), *map(unfinished_document, unfinished)]
        render.document({"removed": gone, "bytes_freed": freed})
    elif not quiet:
        render.lines([f"{render.size(freed)} are free again."])


def say_what_goes(
    installed: Sequence[InstalledModel],
    unfinished: Sequence[PartialDownload],
    removal: Removal,
    say: Callable[[str], None],
) -> None:
    models = (f"{model.repo}:{model.label}" for model in installed)
    begun = (f"{broken_off.repo}/{broken_off.left.name}" for broken_off in unfinished)
    names = printable(", ".join(dict.fromkeys((*models, *begun))))
    for line in (f"{names}: {render.size(removal.n_bytes_freed)}", *removal.shared):
        say(line)


def model_document(model: InstalledModel) -> dict[str, Any]:
    return {
        "repo": model.repo,
        "revision": model.commit,
        "quant": model.label,
        "files": list(model.names),
    }


def unfinished_document(broken_off: PartialDownload) -> dict[str, Any]:
    """Its revision and quant are not known before it is whole."""
    files = [broken_off.left.name]
    return {"repo": broken_off.repo, "revision": None, "quant": None, "files": files}


def confirm() -> None:
    """Ask at a terminal; without one nobody can say yes. Raises click.Abort for a no."""
    if not sys.stdin.isatty():
        raise UsageError("Nothing was deleted: there is nobody to ask.", "Say --yes.")
    try:
        if click.confirm("Delete?", err=True):
            return
    except click.Abort:  # Ctrl-C leaves the line unfinished
        render.note("")
    render.note("Nothing was deleted.")
    raise click.Abort
