"""Keeping house: which models of the cache a name means, whether they are right, and repair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .config import config_folder
from .errors import UsageError
from .models.catalog import read_catalog
from .models.download import repair
from .models.hub import file_of
from .models.matching import catalog_quants, is_meant
from .models.names import ModelName, parse_name
from .models.remote import RemoteFile
from .models.stamps import Expected, Verdict
from .models.store import Installed
from .obtain import Finder


def verify(finder: Finder, names: Sequence[str], mend: bool) -> tuple[Verdict, ...]:
    """Every file of these models (of all, without names) read again; with `mend`, what is damaged
    is fetched again. Raises UsageError for what isn't here, DownloadError."""
    paths: list[Path] = []
    models = [] if names else list(finder.store.installed())
    for name in map(parsed, names):
        if name.path is not None:
            paths.append(name.path)
        else:
            models += meant(finder, name)
    paths += [file.path for model in models for file in model.files]
    by_name = {file.base_name: wanted(file) for file in catalog_files()}
    expected = {path: by_name[path.name] for path in paths if path.name in by_name}
    verdicts = finder.store.verify(paths, expected, finder.watch.verifying)
    if not mend:
        return verdicts
    remote = {file.path: (model, file.name) for model in models for file in model.files}
    return tuple(
        mended(finder, verdict, *remote[verdict.path])
        if is_wrong(verdict) and verdict.path in remote
        else verdict
        for verdict in verdicts
    )


def is_wrong(verdict: Verdict) -> bool:
    return not verdict.is_ok and verdict.outcome != "unknown hash"


def mended(finder: Finder, verdict: Verdict, model: Installed, name: str) -> Verdict:
    """What is wrong of a file of the cache, fetched again."""
    file = file_of(finder.hub.repository(model.repo, model.commit), name)
    watch = finder.watch
    path = repair(finder.hub, file, watch.downloading, watch.note, verdict=verdict)
    return finder.store.verify([path], {path: wanted(file)} if file.sha256 else None)[0]


def wanted(file: RemoteFile) -> Expected:
    assert file.sha256 is not None
    return Expected(file.sha256, file.n_bytes)


def meant(finder: Finder, name: ModelName) -> list[Installed]:
    """The models of the cache that a name means, broken ones too. Raises UsageError for none."""
    found = [model for model in finder.store.installed() if is_meant(model, name, whole=False)]
    if not found:
        raise UsageError(f"{name.text} is not in the cache.", "See: localmoe list --installed")
    return found


def parsed(text: str) -> ModelName:
    return parse_name(text, read_catalog(config_folder()))


def catalog_files() -> Iterator[RemoteFile]:
    for spec in read_catalog(config_folder()).values():
        for quant in catalog_quants(spec):
            yield from quant.files
