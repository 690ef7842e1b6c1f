"""`list`: what there is to run, what is here, what suits this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from . import render
from .options import json_option, settings_of
from .watching import finder, of_whole

if TYPE_CHECKING:
    from ..catalog.listing import CatalogRow, SuitableQuant
    from ..hub.installed import InstalledModel, PartialDownload

HEAD = ("NAME", "QUANT", "SIZE", "HERE", "THIS MACHINE", "ABOUT")


@click.command("list")
@click.option("--installed", "only_installed", is_flag=True, help="Only models that are here.")
@json_option
def list_models(only_installed: bool, as_json: bool) -> None:
    """The models that are known by name, and those that are here.

    QUANT and THIS MACHINE are for the memory that is free now; speeds are a first idea, by the
    size alone. `localmoe plan NAME` reads the header and says more.
    """
    from ..catalog import listing

    with finder(settings_of({})) as search:
        known, others = listing.catalog_rows(search)
        unfinished = search.store.unfinished()
    if only_installed:
        known = [entry for entry in known if entry.is_here]
    if as_json:
        render.document(document(known, others, unfinished))
        return
    rows = [HEAD, *map(catalog_row, known), *map(other_row, others)]
    render.table(rows)
    render.lines(footer(known, others, unfinished, only_installed))


def catalog_row(entry: CatalogRow) -> Sequence[str]:
    spec, suited = entry.spec, entry.best_quant
    if spec.path:
        found = ("yes", "fits") if entry.is_here else ("", f"missing: {spec.path}")
        return (entry.key, "", "", *found, spec.about)
    here = ", ".join(dict.fromkeys(model.label for model in entry.installed))
    if lost := [model for model in entry.installed if model.missing]:
        return (entry.key, *label_and_size(lost[0]), here, missing(lost[0]), spec.about)
    if suited:
        size = render.size(suited.n_bytes)
        return (entry.key, suited.label, size, here, verdict(suited), spec.about)
    if not entry.quants:
        return (entry.key, "", "", here, "" if here else "size unknown until pulled", spec.about)
    least = min(entry.quants, key=lambda quant: quant.n_bytes)
    return (entry.key, least.label, render.size(least.n_bytes), here, "too large", spec.about)


def verdict(suited: SuitableQuant) -> str:
    """`fits, ~12 tok/s, poor`"""
    speed = suited.generation_tps or 0.0
    shown = f"{speed:.2g}" if speed < 100 else f"{round(speed, -1):.0f}"
    parts = ("fits", f"~{shown} tok/s" if speed else "", "poor" if suited.is_poor else "")
    return ", ".join(part for part in parts if part)


def label_and_size(model: InstalledModel) -> tuple[str, str]:
    return model.label, render.size(model.n_bytes)


def missing(model: InstalledModel) -> str:
    n = len(model.missing)
    return f"{n} shard{'s' if n > 1 else ''} missing" if n else ""


def other_row(model: InstalledModel) -> Sequence[str]:
    return (model.repo, *label_and_size(model), "yes", missing(model), "")


def footer(
    known: Sequence[CatalogRow],
    others: Sequence[InstalledModel],
    unfinished: Sequence[PartialDownload],
    only_installed: bool,
) -> Iterator[str]:
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
    yield f"{n_models} downloaded, {render.size(sum(blobs.values()))} in all."
    if not only_installed:
        yield "Any GGUF model of the Hub runs too: localmoe run user/repo:Q4_K_M"


def document(
    known: Sequence[CatalogRow],
    others: Sequence[InstalledModel],
    unfinished: Sequence[PartialDownload],
) -> dict[str, Any]:
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
    return {
        "repo": model.repo,
        "revision": model.commit,
        "quant": model.label,
        "bytes": model.n_bytes,
        "files": [str(file.path) for file in model.files],
        "missing": list(model.missing),
        "verified": model.verified,
    }
