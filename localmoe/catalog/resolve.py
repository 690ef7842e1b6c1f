"""Resolving a name to files: parse, list, select a quant, read its header, fetch it.

A model that isn't here is known by its header, a few MiB: enough to choose a quant, to plan, and
to refuse what would not run before 28 GB were fetched for it. `ModelResolver.find` shows the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..callbacks import LoadCallbacks
from ..config.environment import config_folder, hub_access
from ..config.settings import Settings
from ..errors import (
    MESSAGE_CHARS,
    DoesNotFit,
    DownloadError,
    LocalMoeError,
    ModelFileError,
    gib,
    model_file_error,
)
from ..gguf.architectures import refuse_unknown
from ..gguf.model_meta import EARLY, ModelMeta, read_meta
from ..hub.cache_layout import COMMIT
from ..hub.client import Hub, file_of
from ..hub.download import check_disk_space, download, partial_bytes
from ..hub.installed import InstalledModel, InstalledModels
from ..hub.quants import (
    Quant,
    complete,
    find_quant,
    poor_quality,
    quant_of_file,
    quants_of,
)
from ..hub.remote_header import header_files
from ..hub.types import RemoteFile
from ..hub.verify import ExpectedHash
from ..planner.measuring import MeasuringEngine
from ..planner.planner import Planner, plan_request
from ..planner.search import Workload
from .candidates import (
    catalog_quants,
    check_hash,
    exact_name,
    filter_installed,
    filter_quants,
    newest_commits,
    quant_of_installed,
    repositories_of,
    sha256_of,
)
from .catalog import ModelSpec, better, read_catalog
from .model_name import ModelName, parse_name
from .select_quant import (
    QuantChoice,
    check_bytes,
    choose_quant,
    estimated_speed_for,
    free_bytes,
    in_order,
)

InstalledQuants = Mapping[Quant, InstalledModel]
"""The quants in the cache, each with its files; empty where a model is on the Hub alone."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """The model that a name means. Where it isn't here, `path` is a stand-in with its header alone.

    `quant` is None for a file of a person's own, `why` says how it was chosen ("" where it was
    named), `typed_name` what to type for exactly this model.
    """

    name: ModelName
    path: Path
    meta: ModelMeta
    quant: Quant | None = None
    is_here: bool = True
    why: str = ""
    typed_name: str = ""

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """What is to be fetched of it."""
        return () if self.is_here or not self.quant else self.quant.files

    @property
    def label(self) -> str:
        """The label of its quant; "" for a file of a person's own."""
        return self.quant.label if self.quant else ""

    @property
    def n_bytes(self) -> int:
        """Bytes of all its files."""
        return self.meta.file_bytes

    @property
    def spec(self) -> ModelSpec | None:
        """Its entry of the catalog, if it has one."""
        return self.name.spec

    @property
    def called(self) -> str:
        """What to call it in a sentence."""
        return self.typed_name or self.name.text


class ModelResolver:
    """Finds models by name, and fetches them. Close it, or use it as a context manager."""

    def __init__(
        self, settings: Settings, callbacks: LoadCallbacks | None = None, workload: Workload = "run"
    ) -> None:
        self.callbacks = callbacks or LoadCallbacks()
        self.hub = Hub(hub_access(settings.offline))
        self.store = InstalledModels(self.hub.access)
        self.settings = settings
        self._workload: Workload = workload
        self._measuring: MeasuringEngine | None = None
        self._planner: Planner | None = None

    @property
    def planner(self) -> Planner:
        """Plans for this machine; its engine is started when it is first asked for."""
        if self._planner is None:
            self._measuring = MeasuringEngine(self.callbacks.warning, self.callbacks.log)
            self._planner = Planner(self.settings, self._workload, self._measuring)
        return self._planner

    def find(self, text: str, must_fit: bool = True) -> ResolvedModel:
        """The model that `text` means, at the quant that was named or suits this machine.

        Raises UsageError, DownloadError, ModelFileError, and DoesNotFit where no quant fits;
        without `must_fit`, the recommended quant is taken then.
        """
        name = parse_name(text, read_catalog(config_folder()))
        if name.path is not None:
            return ResolvedModel(name, name.path, read_meta(name.path))
        pinned = self._pin_revision(name)
        installed = self._installed(pinned)
        if installed:
            quants = named_alone(list(installed), name)
        else:
            quants = self._listed(pinned if is_part(name.revision, pinned.revision) else name)
        choice = self._select(name, quants, installed, must_fit)
        resolved = self._read_header(name, choice, quants, installed)
        self._say(resolved)
        return resolved

    def fetch(self, found: ResolvedModel, *, check_fit: bool = True) -> ResolvedModel:
        """A model that was found, here and verified. Raises DoesNotFit, DownloadError.

        What would not run is refused before it is fetched, and with `check_fit` what would not
        fit this machine.
        """
        if found.is_here:
            self._verify(found)
            return found
        check_runs(found.meta, is_here=False)
        if check_fit:
            self.planner.plan(found.meta.paths[0], found.meta)
        self._planner_done()  # its engine would lie idle beside a download of hours
        self._confirm(found.files)
        self._say_how_much(found)
        try:
            paths = download(self.hub, found.files, self.callbacks.downloading, self.callbacks.note)
        except KeyboardInterrupt:
            self._note(f"Stopped; what came is kept. Go on with: localmoe pull {found.called}")
            raise
        return replace(found, path=paths[0], meta=read_meta(paths[0]), is_here=True)

    def note_newer(self, found: ResolvedModel) -> None:
        """Remark where the branch main has other files than those that are here. Asks the Hub, but
        for what a name or the catalog pins to a commit."""
        quant = found.quant
        if not (quant and found.is_here) or found.name.revision or self.hub.access.offline:
            return
        now: tuple[RemoteFile, ...] = ()
        with suppress(LocalMoeError), self._asking(quant.repo):
            listed = self.hub.repository(quant.repo)
            now = tuple(file_of(listed, file.name) for file in quant.files)
        if {file.sha256 for file in now} - {file.sha256 for file in quant.files}:
            newer = Quant(quant.label, now, quant.stem)
            name = ModelName(newer.repo, repo=newer.repo, revision=now[0].commit)
            typed_name = exact_name(name, newer, [newer])
            self._note(f"A newer commit is on the Hub: localmoe pull {typed_name}")

    def release_engine(self) -> MeasuringEngine | None:
        """Hands over the engine that measured, if any did; whoever takes it closes it."""
        measuring, self._measuring = self._measuring, None
        self._planner = None
        return measuring

    def close(self) -> None:
        """Ends the planner and its engine."""
        self._planner_done()

    def __enter__(self) -> ModelResolver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- which files ----

    def _pin_revision(self, name: ModelName) -> ModelName:
        """Returns the name with the commit of its revision. Raises as Hub.commit_of does."""
        if not (name.repo and name.revision) or COMMIT.fullmatch(name.revision):
            return name
        with self._asking(name.repo):
            return replace(name, revision=self.hub.commit_of(name.repo, name.revision))

    def _installed(self, name: ModelName) -> InstalledQuants:
        """Returns what is whole in the cache of the model, each quant once.

        Raises DownloadError where shards are lost that can't be fetched.
        """
        installed = self.store.installed()
        whole = newest_commits(filter_installed(installed, name))
        broken = filter_installed(installed, name, whole=False)
        if broken and not whole and self.hub.access.offline:
            raise lost_shards(broken[0], name)
        return {quant_of_installed(model): model for model in whole}

    def _listed(self, name: ModelName) -> list[Quant]:
        """Returns the quants of the Hub that the name leaves open: one where it says which."""
        known = filter_quants(list(catalog_quants(name.spec)), name)
        if known and (name.quant or name.file):
            return known[:1]
        try:
            quants = list(self._ask_hub(name))
        except DownloadError:
            if known:
                return known
            raise
        if name.file:
            return [quant_of_file(quants, name.file)]
        if name.quant:
            return [find_quant(quants, name.quant)]
        labels = {quant.label for quant in known}
        whole = [quant for quant in quants if not quant.missing]
        if quants and not known and not whole:
            complete(quants[0])
        return [*known, *(quant for quant in whole if quant.label not in labels)]

    def _ask_hub(self, name: ModelName) -> Iterator[Quant]:
        """Yields what the repositories of a model have, checked by what the catalog knows."""
        for repo, revision in repositories_of(name):
            with self._asking(repo):
                listed = self.hub.repository(repo, revision)
            for quant in quants_of(listed):
                check_hash(quant, name.spec)
                yield quant

    def _select(
        self, name: ModelName, quants: list[Quant], installed: InstalledQuants, must_fit: bool
    ) -> QuantChoice:
        """Returns the quant to take, by what fits and by its speed. Raises DoesNotFit."""
        if not quants:
            what = f"{name.repo} has no GGUF model."
            raise ModelFileError(what, "Look for a repository whose name ends in -GGUF.")
        if len(quants) == 1:
            return QuantChoice(quants[0], "")

        def check(quant: Quant) -> None:
            """Raises DoesNotFit or ModelFileError where it would not run on this machine."""
            request = plan_request(self.settings)
            check_bytes(quant.n_bytes, free_bytes(self.planner.machine, request))
            meta = self._meta(quant, installed, exact_name(name, quant, quants))
            check_runs(meta, is_here=bool(installed))
            self.planner.plan(meta.paths[0], meta)

        wish = self.planner.machine, plan_request(self.settings)
        speed = partial(estimated_speed_for, name.spec, *wish)
        try:
            return choose_quant(quants, check, are_here=bool(installed), speed=speed)
        except (DoesNotFit, ModelFileError):
            if must_fit:
                raise
            first = in_order(quants)[0]
            return QuantChoice(
                first, f"{first.label} ({gib(first.n_bytes)}): no quant of it runs here."
            )

    def _read_header(
        self,
        name: ModelName,
        choice: QuantChoice,
        quants: list[Quant],
        installed: InstalledQuants,
    ) -> ResolvedModel:
        """Reads the header of the chosen quant, from the cache or from the Hub."""
        quant, is_here = choice.quant, bool(installed)
        typed_name = exact_name(name, quant, quants)
        meta = self._meta(quant, installed, typed_name)
        return ResolvedModel(name, meta.paths[0], meta, quant, is_here, choice.why, typed_name)

    def _meta(self, quant: Quant, installed: InstalledQuants, typed_name: str) -> ModelMeta:
        """Returns what a header says. Raises ModelFileError, with what mends it in the cache."""
        if not installed:
            with self._asking(quant.repo):
                return read_meta(header_files(self.hub, quant.files)[0])
        model = installed[quant]
        try:
            return read_meta(model.path)
        except ModelFileError as error:
            if model.verified:  # it is as its maker made it
                raise
            hint = f"Mend it with: localmoe verify {typed_name} --repair"
            raise ModelFileError(error.message, hint) from None

    # ---- what is said ----

    def _note(self, sentence: str) -> None:
        if self.callbacks.note:
            self.callbacks.note(sentence)

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        if self.callbacks.asking and not self.hub.access.offline:
            self.callbacks.asking(what)
        try:
            yield
        finally:
            if self.callbacks.asking:
                self.callbacks.asking("")

    def _say(self, found: ResolvedModel) -> None:
        """Why this quant, and what is known to be bad about it."""
        if found.why:
            self._note(found.why)
        warning = poor_quality(found.label, found.meta.n_experts)
        if warning and self.callbacks.warning:
            self.callbacks.warning(warning)

    def _say_how_much(self, found: ResolvedModel) -> None:
        """What is still to be fetched. Raises DownloadError where the disk has no room for it."""
        blobs = {file: self.hub.blob_path(file) for file in found.files}
        missing = [f.n_bytes - partial_bytes(b) for f, b in blobs.items() if not b.exists()]
        check_disk_space(self.hub.access.cache, missing, found.files[0].base_name)
        n_bytes = sum(missing)
        what = gib(n_bytes) if n_bytes == found.n_bytes else f"the {gib(n_bytes)} that are missing"
        self._note(f"{found.called} is not here yet: fetching {what}.")

    # ---- whether they are right ----

    def _confirm(self, files: Sequence[RemoteFile]) -> None:
        """Ask the Hub once whether the catalog is right, before hours go into what is refused."""
        if self.hub.access.offline:
            return
        with self._asking(files[0].repo):
            listed = self.hub.repository(files[0].repo, files[0].commit)
        for file in files:
            now = file_of(listed, file.name)
            if (now.n_bytes, now.sha256) != (file.n_bytes, file.sha256):
                what = f"{file.base_name} of {file.repo} is not the file that the catalog knows"
                raise DownloadError(f"{what}: its size or sha256 differs.", "Name another quant.")

    def _verify(self, found: ResolvedModel) -> None:
        """Hash files of the cache that nobody has hashed yet. Raises DownloadError."""
        if found.name.path is not None:
            return
        wanted = {path: sha256_of(path, found.label, found.spec) for path in found.meta.paths}
        unknown = [p for p, sha256 in wanted.items() if not self.store.is_verified(p, sha256)]
        expected = {path: ExpectedHash(sha256) for path, sha256 in wanted.items() if sha256}
        for verdict in self.store.verify(unknown, expected, self.callbacks.verifying):
            if verdict.outcome == "unknown hash" and verdict.sha256:
                self.store.stamp(verdict.path, verdict.sha256)  # so it is read only once
            elif not verdict.is_ok:
                hint = f"Try: localmoe verify {found.called} --repair"
                raise DownloadError(
                    f"{verdict.path.name} is not as it should be. {verdict.why}", hint
                )

    def _planner_done(self) -> None:
        measuring = self.release_engine()
        if measuring is not None:
            measuring.close()


def named_alone(quants: list[Quant], name: ModelName) -> list[Quant]:
    """Of quants that are here the one that was named. Raises UsageError for several that a label
    means; copies of a file of the catalog are all the same."""
    if name.file:
        return quants[:1]
    return [find_quant(quants, name.quant)] if name.quant else quants


def lost_shards(model: InstalledModel, name: ModelName) -> DownloadError:
    """The error for a model of the cache that is not whole."""
    lost, n_shards = model.missing, len(model.files) + len(model.missing)
    what = f"{model.repo} lacks {len(lost)} of {n_shards} shards of {model.label} in the cache"
    hint = f"Fetch what is missing without --offline: localmoe pull {name.text}"
    return DownloadError(f"{what}: {', '.join(lost[:3])}.", hint)


def is_part(revision: str | None, commit: str | None) -> bool:
    """Whether a revision was the beginning of a commit, and no branch that moves."""
    return bool(revision and commit and commit.startswith(revision))


def check_runs(meta: ModelMeta, is_here: bool = True) -> None:
    """Raises ModelFileError where llama.cpp can't run a model whose header is sound."""
    if error := why_not(meta, is_here):
        raise error


def why_not(meta: ModelMeta, is_here: bool = True) -> ModelFileError | None:
    """Why llama.cpp can't run a model whose header is sound, and what to do, or None."""
    file = meta.paths[0].name if meta.paths else meta.name
    early = meta.refusal
    if early is None:
        return refuse_unknown(meta.architecture, file)
    if meta.no_generation:
        return early
    newer = better(meta, read_catalog(config_folder()))
    command = newer.command if newer else "localmoe list"
    if not is_here:
        return model_file_error(file, EARLY, f"Take a newer one: {command}")
    both = ModelFileError(early.message, f"{early.hint}, or take a newer one: {command}")
    return both if len(str(both)) <= MESSAGE_CHARS else early
