"""From what a person calls a model to its files: those here, those on the Hub, and fetching them.

A model that isn't here is known by its header, a few MiB: enough to choose a quant, to plan, and
to refuse what would not run before 28 GB were fetched for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .choosing import Choice, check_bytes, choose
from .config import Settings, config_folder, hub_access
from .errors import DownloadError, ModelFileError, gib
from .models.architectures import refuse_unknown
from .models.catalog import ModelSpec, read_catalog
from .models.download import Progress, download
from .models.headers import header_files
from .models.hub import Hub, file_of
from .models.matching import (
    catalog_quants,
    check_hash,
    is_meant,
    places_of,
    quant_here,
    quant_is_meant,
    sha256_of,
)
from .models.meta import ModelMeta, read_meta
from .models.names import ModelName, parse_name
from .models.quants import Quant, find_quant, poor_quality, quant_of_file, quants_of
from .models.remote import RemoteFile
from .models.stamps import Expected
from .models.store import Installed, Store
from .planning import Planner


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told how it goes: a download, reading a file again (bytes done, bytes in all), loading
    (0 to 1), llama.cpp's log, remarks and warnings in sentences."""

    downloading: Callable[[Progress], None] | None = None
    verifying: Callable[[int, int], None] | None = None
    loading: Callable[[float], None] | None = None
    log: Callable[[str], None] | None = None
    note: Callable[[str], None] | None = None
    warning: Callable[[str], None] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The model that a name means. `files` are what is to be fetched of it: then `path` is a
    stand-in with its header alone. `why` says how the quant was chosen, "" where it was named.
    """

    name: ModelName
    path: Path
    meta: ModelMeta
    label: str = ""
    files: tuple[RemoteFile, ...] = ()
    why: str = ""

    @property
    def is_here(self) -> bool:
        return not self.files

    @property
    def n_bytes(self) -> int:
        return self.meta.file_bytes

    @property
    def spec(self) -> ModelSpec | None:
        return self.name.spec

    @property
    def called(self) -> str:
        """What to type for exactly this model."""
        known = self.name.key or self.name.repo
        return f"{known}:{self.label}" if known and self.label else self.name.text


class Finder:
    """Finds models by name, and fetches them. Close it, or use it as a context manager."""

    def __init__(self, settings: Settings, watch: Watch | None = None) -> None:
        self.watch = watch or Watch()
        self.hub = Hub(hub_access(settings.offline))
        self.store = Store(self.hub.access)
        self._settings = settings
        self._planner: Planner | None = None

    @property
    def planner(self) -> Planner:
        """Plans for this machine; its engine is started when it is first asked for."""
        if self._planner is None:
            self._planner = Planner(self._settings, self.watch.warning)
        return self._planner

    def find(self, text: str) -> Found:
        """The model that `text` means, at the quant that was named or suits this machine.

        Raises UsageError, DownloadError, ModelFileError, and DoesNotFit where no quant fits.
        """
        name = parse_name(text, read_catalog(config_folder()))
        if name.path is not None:
            return Found(name, name.path, read_meta(name.path))
        here = self._here(name)
        if here:
            return self._chosen(name, [quant_here(model) for model in here], here)
        return self._chosen(name, self._on_hub(name))

    def fetch(self, found: Found, *, check_fit: bool = True) -> Found:
        """A model that was found, here and verified. Raises DoesNotFit, DownloadError.

        What would not run is refused before it is fetched, and with `check_fit` what would not
        fit this machine.
        """
        if found.is_here:
            self._verify(found)
            return found
        check_runs(found.meta)
        if check_fit:
            self.planner.plan(found.meta.paths[0], found.meta)
        self._planner_done()  # its engine would lie idle beside a download of hours
        self._confirm(found.files)
        if self.watch.note:
            self.watch.note(f"{found.called} is not here yet: fetching {gib(found.n_bytes)}.")
        paths = download(self.hub, found.files, self.watch.downloading, self.watch.note)
        return Found(found.name, paths[0], read_meta(paths[0]), found.label, (), found.why)

    def close(self) -> None:
        self._planner_done()

    def __enter__(self) -> Finder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- which files ----

    def _here(self, name: ModelName) -> list[Installed]:
        """What is in the cache of the model, whole, best quant first."""
        return [model for model in self.store.installed() if is_meant(model, name)]

    def _on_hub(self, name: ModelName) -> list[Quant]:
        """The quants that the name leaves to choose from: one where it says which."""
        known = [quant for quant in catalog_quants(name.spec) if quant_is_meant(quant, name)]
        if known and (name.quant or name.file):
            return known[:1]
        try:
            quants = list(self._listed(name))
        except DownloadError:
            if known:
                return known
            raise
        if name.file:
            return [quant_of_file(quants, name.file)]
        if name.quant:
            return [find_quant(quants, name.quant)]
        labels = {quant.label for quant in known}
        return [*known, *(q for q in quants if q.label not in labels and not q.missing)]

    def _listed(self, name: ModelName) -> Iterator[Quant]:
        """What the repositories of a model have, held against what the catalog knows."""
        places = places_of(name)
        for repo, revision in places:
            for quant in quants_of(self.hub.repository(repo, revision)):
                check_hash(quant, name.spec)
                yield quant

    def _chosen(
        self, name: ModelName, quants: list[Quant], here: list[Installed] | None = None
    ) -> Found:
        if not quants:
            what = f"{name.repo} has no GGUF model."
            raise ModelFileError(what, "Look for a repository whose name ends in -GGUF.")
        if len(quants) == 1:
            choice = Choice(quants[0], "")
        else:
            choice = choose(quants, lambda quant: self._check(quant, here))
        path = self._header(choice.quant, here)
        meta = read_meta(path)
        warning = poor_quality(choice.quant.label, n_experts=meta.n_experts)
        if warning and self.watch.warning:
            self.watch.warning(warning)
        files = () if here else choice.quant.files
        return Found(name, path, meta, choice.quant.label, files, choice.why)

    def _check(self, quant: Quant, here: list[Installed] | None) -> None:
        """Raises DoesNotFit or ModelFileError where a quant would not run on this machine."""
        check_bytes(quant.n_bytes, self.planner.machine)
        meta = read_meta(self._header(quant, here))
        check_runs(meta)
        self.planner.plan(meta.paths[0], meta)

    def _header(self, quant: Quant, here: list[Installed] | None) -> Path:
        if here:
            return next(model.path for model in here if quant_here(model) == quant)
        return header_files(self.hub, quant.files)[0]

    # ---- whether they are right ----

    def _confirm(self, files: Sequence[RemoteFile]) -> None:
        """Ask the Hub once whether the catalog is right, before hours go into what is refused."""
        if self.hub.access.offline:
            return
        listed = self.hub.repository(files[0].repo, files[0].commit)
        for file in files:
            now = file_of(listed, file.name)
            if (now.n_bytes, now.sha256) != (file.n_bytes, file.sha256):
                what = f"{file.base_name} of {file.repo} is not the file that the catalog knows"
                raise DownloadError(f"{what}: its size or sha256 differs.", "Name another quant.")

    def _verify(self, found: Found) -> None:
        """Hash files of the cache that nobody has hashed yet. Raises DownloadError."""
        if found.name.path is not None:
            return
        wanted = {path: sha256_of(path, found.label, found.spec) for path in found.meta.paths}
        unknown = [p for p, sha256 in wanted.items() if not self.store.is_verified(p, sha256)]
        expected = {path: Expected(sha256) for path, sha256 in wanted.items() if sha256}
        for verdict in self.store.verify(unknown, expected, self.watch.verifying):
            if not verdict.is_ok and verdict.outcome != "unknown hash":
                hint = f"Try: localmoe verify {found.called} --repair"
                raise DownloadError(
                    f"{verdict.path.name} is not as it should be. {verdict.why}", hint
                )

    def _planner_done(self) -> None:
        if self._planner is not None:
            self._planner.close()
            self._planner = None


def check_runs(meta: ModelMeta) -> None:
    """Raises ModelFileError where llama.cpp can't run a model whose header is sound."""
    file = meta.paths[0].name if meta.paths else meta.name
    if error := meta.refusal or refuse_unknown(meta.architecture, file):
        raise error
