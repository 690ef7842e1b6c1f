"""`list`: what there is to run, what is here, what suits this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from . import render
from .options import json_option, settings_of
from .watching import finder

if TYPE_CHECKING:
    from ..models.store import BrokenOff, Installed
    from ..shelf import Entry

HEAD = ("NAME", "QUANT", "SIZE", "HERE", "THIS MACHINE", "ABOUT")


@click.command("list")
@click.option("--installed", "only_installed", is_flag=True, help="Only models that are here.")
@json_option
def list_models(only_installed: bool, as_json: bool) -> None:
    """The models that are known by name, and those that are here.

    QUANT and THIS MACHINE are for the memory that is free now; speeds are a first idea, by the
    size alone. `localmoe plan NAME` reads the header and says more.
    """
    from .. import shelf

    with finder(settings_of({})) as search:
        known, others = shelf.entries(search)
        unfinished = search.store.unfinished()
    if only_installed:
        known = [entry for entry in known if entry.is_here]
    if as_json:
        render.document(document(known, others, unfinished))
        return
    rows = [HEAD, *map(catalog_row, known), *map(other_row, others)]
    render.table(rows)
    render.lines(footer(known, others, unfinished, only_installed))


def catalog_row(entry: Entry) -> Sequence[str]:
    spec, suited = entry.spec, entry.suited
    here = ", ".join(model.label for model in entry.installed) or ("yes" if spec.path else "")
    if spec.path:
        return (entry.key, "", "", here, "fits", spec.about)
    if suited is None:
        sizes = [quant.n_bytes for quant in entry.quants]
        least = min(entry.quants, key=lambda quant: quant.n_bytes).label if sizes else ""
        size = render.size(min(sizes)) if sizes else ""
        return (entry.key, least, size, here, "too large" if sizes else "", spec.about)
    speed = suited.generation_tps
    fits = f"fits, ~{speed:.2g} tok/s" if speed and speed < 100 else "fits"
    if speed and speed >= 100:
        fits = f"fits, ~{round(speed, -1):.0f} tok/s"
    return (entry.key, suited.label, render.size(suited.n_bytes), here, fits, spec.about)


def other_row(model: Installed) -> Sequence[str]:
    missing = f"{len(model.missing)} shards missing" if model.missing else ""
    return (model.repo, model.label, render.size(model.n_bytes), "yes", missing, "")


def footer(
    known: Sequence[Entry],
    others: Sequence[Installed],
    unfinished: Sequence[BrokenOff],
    only_installed: bool,
) -> Iterator[str]:
    here = [model for entry in known for model in entry.installed] + list(others)
    total = sum(model.n_bytes for model in here)
    yield ""
    for broken in unfinished:
        left = broken.left
        yield (
            f"Broken off: {left.name} of {broken.repo}, {render.size(left.n_bytes_here)} of "
            f"{render.size(left.n_bytes)}. Go on with: localmoe pull {broken.repo}/{left.name}"
        )
    yield f"{len(here)} downloaded, {render.size(total)} in all."
    if not only_installed:
        yield "Any GGUF model of the Hub runs too: localmoe run user/repo:Q4_K_M"


def document(
    known: Sequence[Entry], others: Sequence[Installed], unfinished: Sequence[BrokenOff]
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


def entry_document(entry: Entry) -> dict[str, Any]:
    spec, suited = entry.spec, entry.suited
    return {
        "name": entry.key,
        **spec.model_dump(
            include={"title", "about", "license", "aliases", "repo", "revision", "context",
                     "parameters", "active_parameters", "reasoning"}
        ),
        "quants": {quant.label: quant.n_bytes for quant in entry.quants},
        "suited": suited and {
            "quant": suited.label, "bytes": suited.n_bytes,
            "generation_tps": suited.generation_tps, "basis": "formula",
        },
        "installed": [installed_document(model) for model in entry.installed],
        "is_here": entry.is_here,
    }  # fmt: skip


def installed_document(model: Installed) -> dict[str, Any]:
    return {
        "repo": model.repo,
        "revision": model.commit,
        "quant": model.label,
        "bytes": model.n_bytes,
        "files": [str(file.path) for file in model.files],
        "missing": list(model.missing),
        "verified": model.verified,
    }
