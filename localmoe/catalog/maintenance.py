"""Keeping house: which files of the cache a name means, whether they are right, repair, removal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..callbacks import LoadCallbacks
from ..config.environment import config_folder
from ..errors import DownloadError, LocalMoeError, UsageError, printable
from ..gguf.demo import PACKAGE
from ..hub.cache_layout import expected_sha256, shard_names
from ..hub.client import Hub, file_of
from ..hub.download import download, repair
from ..hub.installed import InstalledModel, PartialDownload
from ..hub.quants import quants_of
from ..hub.types import RemoteFile, RemoteRepo
from ..hub.verify import ExpectedHash, Verdict
from .candidates import catalog_quants, filter_installed, filter_quants, repositories_of
from .catalog import read_catalog
from .model_name import ModelName, parse_name
from .resolve import ModelResolver

# ---- verify ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VerifiableFile:
    """A file that should be right: of a repository at a commit, or of a person's own (`repo` "").

    `called` is what to show of it: repository and name, or its path.
    """

    path: Path
    called: str
    expected: ExpectedHash | None
    repo: str = ""
    commit: str = ""
    name: str = ""


def kept_files(finder: ModelResolver, names: Sequence[str]) -> list[VerifiableFile]:
    """Every file of these models (of all, without names), those among them that are lost.

    What several names lead to comes once. Raises UsageError for what isn't here.
    """
    known = {(f.repo, f.commit, f.name): wanted(f) for f in catalog_files()}
    by_name = catalog_names(known)
    found: list[VerifiableFile] = []
    models = [] if names else here(finder)
    for name in map(parsed, names):
        models += (of_name := matching(finder, name))
        if name.path is not None and not of_name:
            found += own_files(finder, name.path, by_name)
        elif not of_name:
            raise not_here(name)
    for model in models:
        for n in dict.fromkeys((*model.names, *model.missing)):
            path = model.snapshot / n
            expected = known.get((model.repo, model.commit, n)) or finder.store.expected(path)
            called = printable(f"{model.repo}/{n}")
            found.append(VerifiableFile(path, called, expected, model.repo, model.commit, n))
    return told_apart(found)


def own_files(
    finder: ModelResolver, path: Path, by_name: Mapping[str, ExpectedHash]
) -> Iterator[VerifiableFile]:
    """A file that is no model of the cache, with its other shards. Outside the cache it is known
    by its name alone."""
    for name in shard_names(path.name):
        shard = path.with_name(name)
        by_its_name = None if in_cache(finder, path) else by_name.get(name)
        yield VerifiableFile(
            shard, printable(str(shard)), finder.store.expected(shard) or by_its_name
        )


def told_apart(files: Sequence[VerifiableFile]) -> list[VerifiableFile]:
    """Each content once, with the commit where the same name stands for several."""
    once: dict[tuple[str, str], VerifiableFile] = {}
    for file in files:
        sha256 = file.expected.sha256 if file.expected else ""
        once.setdefault((os.path.realpath(file.path), sha256), file)
    count = Counter(file.called for file in once.values())
    return [
        replace(file, called=printable(f"{file.repo}@{file.commit[:7]}/{file.name}"))
        if file.repo and count[file.called] > 1
        else file
        for file in once.values()
    ]


def check(
    finder: ModelResolver, file: VerifiableFile, callbacks: LoadCallbacks, mend: bool = False
) -> Verdict:
    """A file read again; with `mend`, what is damaged or lost of the cache is fetched again.

    Where that can't be done, the verdict says why.
    """
    expected = {file.path: file.expected} if file.expected else None
    (verdict,) = finder.store.verify([file.path], expected, callbacks.verifying)
    if not (mend and file.repo and is_wrong(verdict)):
        return verdict
    try:
        return mended(finder, file, verdict, callbacks)
    except LocalMoeError as error:
        reason = error.message
    except OSError as error:
        reason = f"{error.strerror or error}."
    return replace(verdict, why=f"{verdict.why} It can't be mended: {reason}")


def is_wrong(verdict: Verdict) -> bool:
    """Whether a file failed its check; one without a known hash did not."""
    return not verdict.is_ok and verdict.outcome != "unknown hash"


def mended(
    finder: ModelResolver, file: VerifiableFile, verdict: Verdict, callbacks: LoadCallbacks
) -> Verdict:
    """What is wrong of a file of the cache, fetched again. Raises LocalMoeError, OSError."""
    hub, path = finder.hub, file.path
    remote = file_of(hub.repository(file.repo, file.commit), file.name)
    if file.expected and file.expected.sha256 != remote.sha256:
        raise DownloadError("The Hub has another file under this name.")
    if verdict.outcome == "missing":
        download(hub, [remote], callbacks.downloading, callbacks.note)
    elif expected_sha256(path) == remote.sha256:  # else what was read is not what is replaced
        repair(hub, remote, callbacks.downloading, callbacks.note, verdict=verdict)
    else:
        repair(hub, remote, callbacks.downloading, callbacks.note)
        link_anew(hub, remote, path)
    return finder.store.verify([path], {path: wanted(remote)}, callbacks.verifying)[0]


def link_anew(hub: Hub, file: RemoteFile, path: Path) -> None:
    """A name in a snapshot that was a copy, or led elsewhere, leads to the blob."""
    old = path.with_name(path.name + ".old")
    path.replace(old)
    try:
        hub.link(file)
    except BaseException:
        old.replace(path)
        raise
    old.unlink()


def wanted(file: RemoteFile) -> ExpectedHash:
    """Returns the hash and size that a file of the Hub must have."""
    assert file.sha256 is not None
    return ExpectedHash(file.sha256, file.n_bytes)


def catalog_files() -> Iterator[RemoteFile]:
    """Yields every file that the catalog knows by its hash."""
    for spec in read_catalog(config_folder()).values():
        for quant in catalog_quants(spec):
            yield from quant.files


def catalog_names(known: Mapping[tuple[str, str, str], ExpectedHash]) -> dict[str, ExpectedHash]:
    """What the catalog has under each bare name, where that is one file alone."""
    found: dict[str, set[ExpectedHash]] = {}
    for (_, _, name), expected in known.items():
        found.setdefault(name.rpartition("/")[2], set()).add(expected)
    return {name: expected.pop() for name, expected in found.items() if len(expected) == 1}


# ---- what a name means -----------------------------------------------------------------------


def here(finder: ModelResolver) -> list[InstalledModel]:
    """The models of the cache, and those of which only links are left."""
    return [*finder.store.installed(), *finder.store.lost()]


def matching(finder: ModelResolver, name: ModelName) -> list[InstalledModel]:
    """The models of the cache that a name or a path means, broken ones too."""
    if name.path is None:
        return filter_installed(here(finder), name, whole=False)
    place = real(name.path)
    return [m for m in here(finder) if place in {real(m.snapshot / n) for n in m.names}]


def removable(
    finder: ModelResolver, names: Sequence[str]
) -> tuple[tuple[InstalledModel, ...], tuple[PartialDownload, ...]]:
    """The models and the broken-off downloads that these names mean, for `Store.plan_removal`.

    Of a name of the catalog only what is of its own repositories: a copy elsewhere is another
    tool's. Raises UsageError for a name that means neither, and for files that aren't the cache's.
    """
    models: dict[InstalledModel, None] = {}
    unfinished: dict[PartialDownload, None] = {}
    for name in map(parsed, names):
        found = matching(finder, name)
        own = [model for model in found if name.path or model.repo in repositories(name)]
        begun = begun_of(finder, name)
        if not own and not begun:
            raise only_elsewhere(name, found[0]) if found else not_here(name)
        models.update(dict.fromkeys(own))
        unfinished.update(dict.fromkeys(begun))
    return tuple(models), tuple(unfinished)


def begun_of(finder: ModelResolver, name: ModelName) -> list[PartialDownload]:
    """The broken-off downloads that a name means. Their commit isn't known, so that none is of a
    revision which a person names; what lost its name is of the repository alone."""
    if name.path or (not name.key and name.revision not in (None, "main")):
        return []
    return [
        broken_off
        for broken_off in finder.store.unfinished()
        if broken_off.repo in repositories(name) and is_begun(broken_off, name)
    ]


def is_begun(broken_off: PartialDownload, name: ModelName) -> bool:
    """Whether a download that was broken off is one that a name means."""
    left = broken_off.left
    file = RemoteFile(broken_off.repo, "", left.name, left.n_bytes, left.blob.name)
    quants = quants_of(RemoteRepo(broken_off.repo, "", (file,)))
    return bool(filter_quants(quants, name)) or not (name.quant or name.file)


def repositories(name: ModelName) -> set[str]:
    """Returns the repositories that a name leaves open."""
    return {repo for repo, _ in repositories_of(name)}


def parsed(text: str) -> ModelName:
    """Returns what a text means by the person's catalog. Raises UsageError."""
    return parse_name(text, read_catalog(config_folder()))


def in_cache(finder: ModelResolver, path: Path) -> bool:
    """Whether a path is that of a name in a snapshot, or of a blob."""
    return real(path).is_relative_to(os.path.realpath(finder.store.access.cache))


def real(path: Path) -> Path:
    """A name in the folder where it really lies, itself a link or not."""
    return Path(os.path.realpath(path.parent), path.name)


# ---- refusals --------------------------------------------------------------------------------


def not_here(name: ModelName) -> UsageError:
    """The error for a name of which the cache has nothing."""
    text = printable(name.text)
    if name.key and name.path and name.path.is_relative_to(PACKAGE):
        return UsageError(f"{text} ships with localmoe and can't be removed by itself.")
    if name.path:
        what = f"{text} is not in the cache: it is a file of yours."
        return UsageError(what, "Delete it yourself.")
    return UsageError(f"{text} is not in the cache.", "See: localmoe list --installed")


def only_elsewhere(name: ModelName, copy: InstalledModel) -> UsageError:
    """The error for a name of which the cache has a copy of another repository."""
    what = f"Of {printable(name.text)} the cache has only the copy of another repository."
    return UsageError(what, printable(f"To remove that one: localmoe rm {copy.repo}:{copy.label}"))
