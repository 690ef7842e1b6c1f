"""Which quants and installed files a model's name leaves open, as pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import (
    DownloadError,
)
from ..hub.cache_layout import COMMIT_BEGINNING, commit_here, commits_here, expected_sha256
from ..hub.installed import InstalledModel
from ..hub.quants import (
    Quant,
    parse_label,
    quants_called,
)
from ..hub.types import RemoteFile
from .catalog import ModelSpec
from .model_name import ModelName

# ---- the catalog -----------------------------------------------------------------------------


def sized_quants(spec: ModelSpec) -> Iterator[Quant]:
    """The quants of the catalog whose size it has; the commit is "" where it has none."""
    for label, known in spec.quants.items():
        repo = known.repo or spec.repo
        revision = known.revision if known.repo else known.revision or spec.revision
        if repo and known.bytes:
            file = RemoteFile(repo, revision or "", known.file, known.bytes, known.sha256)
            yield Quant(label, (file,), known.file.removesuffix(".gguf"))


def catalog_quants(spec: ModelSpec | None) -> Iterator[Quant]:
    """What the catalog knows to the byte: no question to the Hub is needed for these."""
    for quant in sized_quants(spec) if spec else ():
        if quant.files[0].commit and quant.files[0].sha256:
            yield quant


def check_hash(quant: Quant, spec: ModelSpec | None) -> None:
    """Raises DownloadError where the Hub has another file than the one that the catalog knows."""
    known = {q.file: q.sha256 for q in spec.quants.values() if q.sha256} if spec else {}
    for file in quant.files:
        if file.sha256 != known.get(file.name, file.sha256):
            what = f"{file.base_name} of {file.repo} is no longer the file that the catalog knows"
            raise DownloadError(f"{what}: its sha256 is another.", "Name another quant.")


def sha256_of(path: Path, label: str, spec: ModelSpec | None) -> str | None:
    """What a file of the cache should hash to: by the catalog, else by the name of its blob."""
    for quant in catalog_quants(spec):
        if quant.files[0].base_name == path.name and quant.label == label:
            return quant.files[0].sha256
    return expected_sha256(path)


# ---- what a name means -----------------------------------------------------------------------


def filter_quants(quants: Sequence[Quant], name: ModelName) -> list[Quant]:
    """Those of a model's quants that a name leaves to choose from."""
    if name.file:
        return [q for q in quants if any(f.name == name.file for f in q.files)]
    return quants_called(quants, name.quant) if name.quant else list(quants)


def filter_installed(
    models: Iterable[InstalledModel], name: ModelName, *, whole: bool = True, copies: bool = True
) -> list[InstalledModel]:
    """The models of the cache that a name means, those of the branch main and the newest first.

    They are of the revision that it names or, with `copies`, have the hash that the catalog has for
    it, wherever they lie. `whole` says that no shard may be missing.
    """
    spec = name.spec if copies else None
    known = {q.files[0].sha256 for q in catalog_quants(spec) if name.quant in (None, q.label)}
    found: list[InstalledModel] = []
    there: dict[Quant, InstalledModel] = {}
    for model in models:
        if whole and not model.is_complete:
            continue
        if any(expected_sha256(file.path) in known for file in model.files):
            found.append(model)
        elif is_of_place(model, name):
            there[quant_of_installed(model)] = model
    return sorted(found + [there[q] for q in filter_quants(list(there), name)], key=age)


def is_of_place(model: InstalledModel, name: ModelName) -> bool:
    """Whether it is of a repository, at a commit, that a name leaves open."""
    return any(
        model.repo == repo
        and (revision is None or commit_here(repo_folder(model), revision) == model.commit)
        for repo, revision in repositories_of(name)
    )


def repositories_of(name: ModelName) -> tuple[tuple[str, str | None], ...]:
    """The repositories that a name leaves open, with their revisions."""
    if name.spec and not name.file:
        return name.spec.repositories
    assert name.repo is not None
    return ((name.repo, name.revision),)


# ---- the cache -------------------------------------------------------------------------------


def quant_of_installed(model: InstalledModel) -> Quant:
    """A model of the cache in the form that the Hub's have."""
    files = tuple(
        RemoteFile(model.repo, model.commit, f.name, f.n_bytes, expected_sha256(f.path))
        for f in model.files
    )
    return Quant(model.label, files, files[0].name.removesuffix(".gguf"))


def newest_commits(models: Iterable[InstalledModel]) -> list[InstalledModel]:
    """Of a model at several commits the first alone, in the order of models_meant."""
    kept: dict[tuple[str, ...], InstalledModel] = {}
    for model in models:
        kept.setdefault((model.repo, *model.names), model)
    return list(kept.values())


def age(model: InstalledModel) -> int:
    """0 for what is of the branch main, else the more the longer its snapshot lies here."""
    commits = commits_here(repo_folder(model))
    return commits.index(model.commit) if model.commit in commits else len(commits)


def repo_folder(model: InstalledModel) -> Path:
    """models--org--name, where the snapshot of a model lies."""
    return model.path.parents[model.names[0].count("/") + 2]


# ---- what to type ----------------------------------------------------------------------------


def exact_name(name: ModelName, quant: Quant, others: Sequence[Quant]) -> str:
    """What means just this quant again: its label, or its file where others have that label too.

    `others` are those of which it was chosen.
    """
    file = quant.files[0]
    by_file = (name.file and not name.key) or (name.quant and not parse_label(name.quant))
    is_only = sum(other.label == quant.label for other in others) < 2
    if not by_file and is_only and parse_label(quant.label) == quant.label:
        return f"{name.key or at_revision(name, file)}:{quant.label}"
    return f"{at_revision(name, file)}/{file.name}"


def at_revision(name: ModelName, file: RemoteFile) -> str:
    """user/repo@revision where one was named; for a name of the catalog the file's commit."""
    revision = file.commit if name.key else name.revision
    if not revision:
        return file.repo
    # one with a slash can't be written so, and the beginning of a commit's is known here alone
    is_plain = "/" not in revision and not COMMIT_BEGINNING.fullmatch(revision)
    return f"{file.repo}@{revision if is_plain else file.commit}"
