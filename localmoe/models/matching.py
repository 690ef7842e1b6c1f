"""Which quants on the Hub, and which models of the cache, a name means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import DownloadError
from .cache_layout import expected_sha256
from .catalog import ModelSpec, QuantSpec
from .names import ModelName
from .quants import Quant, base_label
from .remote import RemoteFile
from .store import Installed

COMMIT_DIGITS = 40


def catalog_quants(spec: ModelSpec | None) -> Iterator[Quant]:
    """What the catalog knows to the byte: no question to the Hub is needed for these."""
    for label, known in spec.quants.items() if spec else ():
        file = remote_file(spec, known) if spec else None
        if file:
            yield Quant(label, (file,), file.name.removesuffix(".gguf"))


def remote_file(spec: ModelSpec, known: QuantSpec) -> RemoteFile | None:
    repo = known.repo or spec.repo
    revision = known.revision if known.repo else known.revision or spec.revision
    if not (repo and revision and known.bytes and known.sha256):
        return None
    return RemoteFile(repo, revision, known.file, known.bytes, known.sha256)


def quant_is_meant(quant: Quant, name: ModelName) -> bool:
    if name.file:
        return any(f.name == name.file and f.repo == name.repo for f in quant.files)
    return name.quant is None or name.quant in (quant.label, base_label(quant.label))


def quant_here(model: Installed) -> Quant:
    """A model of the cache in the form that the Hub's have."""
    files = tuple(
        RemoteFile(model.repo, model.commit, f.name, f.n_bytes, expected_sha256(f.path))
        for f in model.files
    )
    return Quant(model.label, files, files[0].name)


def is_meant(model: Installed, name: ModelName, *, whole: bool = True) -> bool:
    """Whether a model of the cache is the one that a name means: of the commit that it names, or
    with the hash that the catalog has for it; `whole` says that no shard may be missing."""
    if (whole and not model.is_complete) or not quant_is_meant(quant_here(model), name):
        return False
    known = {file.sha256 for quant in catalog_quants(name.spec) for file in quant.files}
    if known & {expected_sha256(file.path) for file in model.files}:
        return True
    return any(
        model.repo == repo and (not is_commit(revision) or model.commit == revision)
        for repo, revision in places_of(name)
    )


def places_of(name: ModelName) -> tuple[tuple[str, str | None], ...]:
    """The repositories that a name leaves open, with their revisions."""
    if name.spec and not name.file:
        return name.spec.repositories
    assert name.repo is not None
    return ((name.repo, name.revision),)


def check_hash(quant: Quant, spec: ModelSpec | None) -> None:
    """Raises DownloadError where the Hub has another file than the one that the catalog knows."""
    known = {q.file: q.sha256 for q in spec.quants.values() if q.sha256} if spec else {}
    for file in quant.files:
        if file.sha256 != known.get(file.name, file.sha256):
            what = f"{file.base_name} of {file.repo} is no longer the file that the catalog knows"
            raise DownloadError(f"{what}: its sha256 is another.", "Name another quant.")


def is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == COMMIT_DIGITS


def sha256_of(path: Path, label: str, spec: ModelSpec | None) -> str | None:
    """What a file of the cache should hash to: by the catalog, else by the name of its blob."""
    for quant in catalog_quants(spec):
        if quant.files[0].base_name == path.name and quant.label == label:
            return quant.files[0].sha256
    return expected_sha256(path)
