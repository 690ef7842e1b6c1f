"""`list`: what there is to run, what is here, what suits this machine.

`pull`, `verify` and `rm`: models that come, are held against their hashes, and go.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..catalog import listing, maintenance
from ..errors import UsageError, printable
from ..terminal import console
from ..terminal.progress import load_callbacks, model_resolver, of_whole
from .options import json_option, offline_option, settings_of

if TYPE_CHECKING:
    from ..catalog.listing import CatalogRow, SuitableQuant
    from ..catalog.maintenance import VerifiableFile
    from ..catalog.resolve import ModelResolver
    from ..hub.installed import InstalledModel, PartialDownload
    from ..hub.removal import Removal
    from ..hub.verify import Verdict


HEAD = ("NAME", "QUANT", "SIZE", "HERE", "THIS MACHINE", "ABOUT")


@click.command("list")
@click.option("--installed", "only_installed", is_flag=True, help="Only models that are here.")
@json_option
def list_models(only_installed: bool, as_json: bool) -> None:
    """The models that are known by name, and those that are here.

    QUANT and THIS MACHINE are for the memory that is free now; speeds are a first idea, by the
    size alone. `localmoe plan NAME` reads the header and says more.
    """
    with model_resolver(settings_of({})) as search:
        known, others = listing.catalog_rows(search)
        unfinished = search.store.unfinished()
    if only_installed:
        known = [entry for entry in known if entry.is_here]
    if as_json:
        console.document(list_document(known, others, unfinished))
        return
    rows = [HEAD, *map(catalog_row, known), *map(other_row, others)]
    console.table(rows)
    console.lines(footer(known, others, unfinished, only_installed))


def catalog_row(entry: CatalogRow) -> Sequence[str]:
    """A model of the catalog as a row of the table."""
    spec, suited = entry.spec, entry.best_quant
    if spec.path:
        found = ("yes", "fits") if entry.is_here else ("", f"missing: {spec.path}")
        return (entry.key, "", "", *found, spec.about)
    here = ", ".join(dict.fromkeys(model.label for model in entry.installed))
    if lost := [model for model in entry.installed if model.missing]:
        return (entry.key, *label_and_size(lost[0]), here, missing(lost[0]), spec.about)
    if suited:
        size = console.size(suited.n_bytes)
        return (entry.key, suited.label, size, here, verdict(suited), spec.about)
    if not entry.quants:
        return (entry.key, "", "", here, "" if here else "size unknown until pulled", spec.about)
    least = min(entry.quants, key=lambda quant: quant.n_bytes)
    return (entry.key, least.label, console.size(least.n_bytes), here, "too large", spec.about)


def verdict(suited: SuitableQuant) -> str:
    """`fits, ~12 tok/s, poor`"""
    speed = suited.generation_tps or 0.0
    shown = f"{speed:.2g}" if speed < 100 else f"{round(speed, -1):.0f}"
    parts = ("fits", f"~{shown} tok/s" if speed else "", "poor" if suited.is_poor else "")
    return ", ".join(part for part in parts if part)


def label_and_size(model: InstalledModel) -> tuple[str, str]:
    """Two cells of a row."""
    return model.label, console.size(model.n_bytes)


def missing(model: InstalledModel) -> str:
    """Says how many shards are missing; "" where none is."""
    n = len(model.missing)
    return f"{n} shard{'s' if n > 1 else ''} missing" if n else ""


def other_row(model: InstalledModel) -> Sequence[str]:
    """A model that is not in the catalog as a row of the table."""
    return (model.repo, *label_and_size(model), "yes", missing(model), "")


def footer(
    known: Sequence[CatalogRow],
    others: Sequence[InstalledModel],
    unfinished: Sequence[PartialDownload],
    only_installed: bool,
) -> Iterator[str]:
    """Yields the lines below the table: what it takes of the disk, and what to type."""
    here = [model for entry in known for model in entry.installed] + list(others)
    # one model may be of several names, and one file of several commits
    blobs = {file.blob: file.n_bytes for model in here for file in model.files}
    n_models = len({model.files[0].blob for model in here})
    yield ""
    for broken in unfinished:
        left = broken.left
        yield (
            f"Broken off: {left.name} of {broken.repo}, "
            f"{of_whole(left.n_bytes_here, left.n_bytes)}. "
            f"Go on with: localmoe pull {broken.repo}/{left.name}"
        )
    yield f"{n_models} downloaded, {console.size(sum(blobs.values()))} in all."
    if not only_installed:
        yield "Any GGUF model of the Hub runs too: localmoe run user/repo:Q4_K_M"


def list_document(
    known: Sequence[CatalogRow],
    others: Sequence[InstalledModel],
    unfinished: Sequence[PartialDownload],
) -> dict[str, Any]:
    """All models as --json promises them."""
    return {
        "catalog": [entry_document(entry) for entry in known],
        "others": [installed_document(model) for model in others],
        "unfinished": [
            {"repo": b.repo, "file": b.left.name, "bytes_here": b.left.n_bytes_here,
             "bytes": b.left.n_bytes}
            for b in unfinished
        ],
    }  # fmt: skip


def entry_document(entry: CatalogRow) -> dict[str, Any]:
    """A model of the catalog as --json promises it."""
    spec, suited = entry.spec, entry.best_quant
    return {
        "name": entry.key,
        **spec.model_dump(
            include={"title", "about", "license", "aliases", "repo", "revision", "context",
                     "parameters", "active_parameters", "reasoning"}
        ),
        "quants": {quant.label: quant.n_bytes for quant in entry.quants},
        "suited": suited and {
            "quant": suited.label, "bytes": suited.n_bytes,
            "generation_tps": suited.generation_tps, "basis": "formula", "poor": suited.is_poor,
        },
        "installed": [installed_document(model) for model in entry.installed],
        "is_here": entry.is_here,
    }  # fmt: skip


def installed_document(model: InstalledModel) -> dict[str, Any]:
    """An installed model as --json promises it."""
    return {
        "repo": model.repo,
        "revision": model.commit,
        "quant": model.label,
        "bytes": model.n_bytes,
        "files": [str(file.path) for file in model.files],
        "missing": list(model.missing),
        "verified": model.verified,
    }


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
    with model_resolver(
        settings_of({"offline": offline}, model), model, quiet or as_json
    ) as search:
        found = search.find(model, must_fit=not force)
        search.note_newer(found)
        found = search.fetch(found, check_fit=not force)
    paths = [str(path) for path in found.meta.paths]
    if as_json:
        console.document({"model": found.called, "files": paths, "bytes": found.n_bytes})
    elif not quiet:
        # a file of a person's own was not hashed: there is nothing to hold it against
        verified = all(search.store.is_verified(path) for path in found.meta.paths)
        state = "is here and verified" if verified else "is here"
        console.lines([f"{found.called} {state}, {console.size(found.n_bytes)}: {paths[0]}"])


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
    with model_resolver(settings_of({"offline": offline}), "", quiet or as_json) as search:
        if repair and search.hub.access.offline:
            what = "What is damaged can't be fetched offline."
            raise UsageError(what, "Leave out --repair, or --offline and HF_HUB_OFFLINE.")
        files = maintenance.kept_files(search, models)
        verdicts = []
        for file, verdict in checked(search, files, repair, quiet or as_json):
            verdicts.append(verdict)
            if not as_json and (not quiet or maintenance.is_wrong(verdict)):
                console.lines([f"{file.called}: {verdict.why}"])
    if as_json:
        console.document([verdict_document(verdict) for verdict in verdicts])
    wrong = [maintenance.is_wrong(verdict) for verdict in verdicts]
    if not repair and not as_json and any(w and f.repo for w, f in zip(wrong, files, strict=True)):
        console.note(f"Mend it with: {' '.join(['localmoe verify', *models, '--repair'])}")
    return EXIT_NOT_VERIFIED if any(wrong) else 0


def checked(
    search: ModelResolver, files: Sequence[VerifiableFile], repair: bool, quiet: bool
) -> Iterator[tuple[VerifiableFile, Verdict]]:
    """One after the other, each with its name in the line that says how far it is."""
    for file in files:
        with load_callbacks(printable(file.path.name), quiet) as callbacks:
            verdict = maintenance.check(search, file, callbacks, repair)
        yield file, verdict


def verdict_document(verdict: Verdict) -> dict[str, Any]:
    """A file's check as --json promises it."""
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
    with model_resolver(settings_of({}), "", quiet or as_json) as search:
        installed, unfinished = maintenance.removable(search, models)
        removal = search.store.plan_removal(installed, unfinished)
        if not yes or not (quiet or as_json):
            say = console.note if as_json else lambda line: console.lines([line])
            say_what_goes(installed, unfinished, removal, say)
        if not yes:
            confirm()
        freed = search.store.remove(removal)
    if as_json:
        gone = [*map(model_document, installed), *map(unfinished_document, unfinished)]
        console.document({"removed": gone, "bytes_freed": freed})
    elif not quiet:
        console.lines([f"{console.size(freed)} are free again."])


def say_what_goes(
    installed: Sequence[InstalledModel],
    unfinished: Sequence[PartialDownload],
    removal: Removal,
    say: Callable[[str], None],
) -> None:
    """Says which models will be deleted and what that frees."""
    models = (f"{model.repo}:{model.label}" for model in installed)
    begun = (f"{broken_off.repo}/{broken_off.left.name}" for broken_off in unfinished)
    names = printable(", ".join(dict.fromkeys((*models, *begun))))
    for line in (f"{names}: {console.size(removal.n_bytes_freed)}", *removal.shared):
        say(line)


def model_document(model: InstalledModel) -> dict[str, Any]:
    """A model that was deleted as --json promises it."""
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
        raise UsageError("Nothing was deleted: there is no terminal to ask on.", "Say --yes.")
    try:
        if click.confirm("Delete?", err=True):
            return
    except click.Abort:  # Ctrl-C leaves the line unfinished
        console.note("")
    console.note("Nothing was deleted.")
    raise click.Abort
