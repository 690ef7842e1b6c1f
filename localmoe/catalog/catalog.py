"""The catalog of models that are known by name: the package's models.yaml and a person's own.

These files are written by hand, so a wrong entry is refused with its file and line: a hash that is
nearly right would only show after 28 GB. `CatalogReplacement` is what the catalog has in place of
an early Mixtral file that llama.cpp no longer loads.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
)

from ..config.environment import config_folder
from ..config.yaml_source import Place, YamlSource
from ..errors import LocalMoeError
from ..gguf.demo import PACKAGE
from ..gguf.model_meta import SHARD_NAME, ModelMeta
from ..hub.quants import LADDER, bits, near_labels, parse_label
from ..hub.types import REPO, is_file_name

SAME_SIZE = 0.02  # the catalog rounds the number of parameters


@dataclass(frozen=True, slots=True)
class CatalogReplacement:
    """The same model in the catalog. `label` is the early file's quant, "" where the catalog
    doesn't have that; `n_bytes` what it takes, where that is known."""

    key: str
    title: str
    label: str
    n_bytes: int | None

    @property
    def command(self) -> str:
        """The command that fetches it."""
        return f"localmoe pull {self.key}" + (f":{self.label}" if self.label else "")


def better(meta: ModelMeta, catalog: Mapping[str, ModelSpec]) -> CatalogReplacement | None:
    """The catalog's entry of the same model: what has its name and its size."""
    file = SHARD_NAME.sub("", meta.paths[0].name).removesuffix(".gguf") if meta.paths else ""
    # the header's name may have the maker's before it
    names = {plain_name(text) for text in (meta.name, meta.name.partition("_")[2], file)}
    for key, spec in catalog.items():
        ratio = meta.n_params / (spec.parameters or 1)
        if spec.repo and plain_name(spec.repo) in names and abs(ratio - 1) < SAME_SIZE:
            quant = spec.quants.get(meta.quant_label)
            label = meta.quant_label if quant else ""
            return CatalogReplacement(key, spec.title, label, quant.bytes if quant else None)
    return None


def plain_name(text: str) -> str:
    """A model's name without user, quant, case and marks, as files and repositories differ in."""
    name = re.sub(r"(?i)([-.]gguf|[-.](i?q\d\w*|b?f16|f32))$", "", text.rpartition("/")[2])
    return re.sub(r"[^a-z0-9]", "", name.lower())


FILE_NAME = "models.yaml"
MIN_MODEL_BYTES, MAX_MODEL_BYTES = 1 << 12, 1 << 43
SIZE_TOLERANCE = (0.6, 2.0)
"""How far a file may be from its quant's bits for each parameter. Unsloth's TQ1_0 and IQ1_M keep so
much at more bits that they come to 1.5; a digit too few or too many is far outside."""

PromptFamily = Literal[
    "mistral", "chatml", "harmony", "gemma4", "glm4", "lfm2", "granite", "tulu"
]  # fmt: skip
"""How a model wants its prompt. Only mistral's is built in (prompt/mistral.py); the others say
which template the file should hold."""

# What pydantic says in words of its own
SAID = {
    "missing": "is missing",
    "model_type": "has no fields",
    "dict_type": "has no fields",
    "tuple_type": "is not a list",
    "string_type": "is not text; put it in quotes",
    "bool_type": "is neither true nor false",
}


def _text(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds a line break or a control character")
    return text


def _commit(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", text):
        raise ValueError("is not a commit (40 hex digits in lower case); a branch may change")
    return text


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(f"is not a sha256 (64 hex digits in lower case): {len(text)} characters")
    return text


def _repo(text: str) -> str:
    if not REPO.fullmatch(text) or ".." in text or "--" in text:
        raise ValueError("is not a repository's name, as user/repo")
    return text


def _file(text: str) -> str:
    if not is_file_name(text) or not text.endswith(".gguf"):
        raise ValueError("is not the name of a GGUF file within its repository")
    return text


def _model_bytes(n_bytes: int) -> int:
    if not MIN_MODEL_BYTES <= n_bytes <= MAX_MODEL_BYTES:
        raise ValueError(f"can't be a model's size: {n_bytes:,} bytes")
    return n_bytes


def _count(text: Any) -> Any:
    """46.7B, 400M, or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MB])", text) if isinstance(text, str) else None
    return round(float(match[1]) * {"M": 10**6, "B": 10**9}[match[2]]) if match else text


def _entry_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) or name.endswith(".gguf"):
        raise ValueError("is no name for a model: lower case letters, digits, dots and hyphens")
    return name


def _label(label: str) -> str:
    known = parse_label(label)
    if known is None:
        raise ValueError(f"is no quant that is known. {near_labels(label, LADDER)}".strip())
    if known != label:
        raise ValueError(f"is written {known}")
    return label


Text = Annotated[str, AfterValidator(_text)]
Commit = Annotated[str, AfterValidator(_commit)]
Repo = Annotated[str, AfterValidator(_repo)]
Count = Annotated[int, BeforeValidator(_count), Field(gt=0, le=10**14)]
EntryName = Annotated[str, AfterValidator(_entry_name)]
Label = Annotated[str, AfterValidator(_label)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class QuantSpec(_Entry):
    """A quant of a model on the Hub: the file, or the first of its shards.

    `bytes` and `sha256` are the file's own, and left out for shards, for which the Hub's hashes are
    taken. `repo` and `revision` where they are not those of the model.
    """

    file: Annotated[str, AfterValidator(_file)]
    bytes: Annotated[int, AfterValidator(_model_bytes)] | None = None
    sha256: Annotated[str, AfterValidator(_sha256)] | None = None
    repo: Repo | None = None
    revision: Commit | None = None


class SamplingDefaults(_Entry):
    """How the model's makers would sample. What a file's own header says comes before it."""

    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None


class ModelSpec(_Entry):
    """An entry of models.yaml: a file (`path`), or a repository on the Hub with its quants.

    `context` is in tokens. `parameters` and `active_parameters` are as the makers give them.
    `reasoning` says whether it thinks aloud unless told otherwise. None is not known.
    """

    title: Text = ""
    about: Text = ""
    license: Text = ""
    aliases: tuple[EntryName, ...] = ()
    path: Path | None = None
    repo: Repo | None = None
    revision: Commit | None = None
    context: Annotated[int, Field(ge=16, lt=2**31)] | None = None
    parameters: Count | None = None
    active_parameters: Count | None = None
    prompt: PromptFamily | None = None
    reasoning: StrictBool | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    notes: Text = ""
    quants: dict[Label, QuantSpec] = {}

    @property
    def repositories(self) -> tuple[tuple[str, str | None], ...]:
        """Where its quants lie, with the commits: its own repository first."""
        own = [(self.repo, self.revision)] if self.repo else []
        others = [(q.repo, q.revision) for q in self.quants.values() if q.repo]
        return tuple(dict.fromkeys(own + others))


def catalog_path() -> Path:
    """models.yaml: beside the modules in an installed package, one level up in a checkout."""
    installed = PACKAGE / FILE_NAME
    return installed if installed.is_file() else PACKAGE.parent / FILE_NAME


def read_catalog(user_folder: Path | None = None) -> dict[str, ModelSpec]:
    """The catalog by name, with the models.yaml of `user_folder` (if there is one) over it: an
    entry there replaces the one of the same name whole. Raises LocalMoeError with file and line.
    """
    shipped = read_models(catalog_path(), PACKAGE)
    path = user_folder / FILE_NAME if user_folder else None
    if path is None or not os.path.exists(path):  # unlike Path.exists, this never raises
        return shipped
    own = read_models(path, taken=shipped)
    claimed = {*own, *(alias for spec in own.values() for alias in spec.aliases)}
    for key, spec in shipped.items():
        kept = tuple(alias for alias in spec.aliases if alias not in claimed)
        shipped[key] = spec.model_copy(update={"aliases": kept})
    return {**shipped, **own}


def model_aliases() -> dict[str, str]:
    """The entry that each name of the person's catalog means, in lower case.

    Raises LocalMoeError with file and line.
    """
    catalog = read_catalog(config_folder())
    others = {alias: key for key, spec in catalog.items() for alias in spec.aliases}
    return {**others, **{key: key for key in catalog}}


def read_models(
    path: Path, package: Path | None = None, taken: Collection[str] = ()
) -> dict[str, ModelSpec]:
    """The entries of one file. Paths in it are those within `package`, or else absolute.

    An entry may be called as one of those `taken`, and then replaces it, but not in its aliases.
    """
    try:
        changed_ns = path.stat().st_mtime_ns
    except OSError:
        changed_ns = 0  # reading it says what is wrong
    return dict(_parse_models(path, package, frozenset(taken), changed_ns))


@lru_cache(maxsize=8)
def _parse_models(
    path: Path, package: Path | None, taken: frozenset[str], changed_ns: int
) -> dict[str, ModelSpec]:
    """Parses a file once for each time it was changed: several parts of a command ask for it."""
    source = YamlSource(path)
    models: dict[str, ModelSpec] = {}
    for key, entry in source.values.items():
        try:
            _entry_name(key)
            spec = ModelSpec.model_validate(entry)
        except ValidationError as error:
            raise _invalid(source, key, error) from None
        except ValueError as error:
            raise source.refuse((key,), f"{key[:80]} {error}") from None
        for place, reason in _faults(spec, package):
            raise source.refuse((key, *place), f"{key}: {reason}")
        location = spec.path and (package or Path()) / spec.path.expanduser()
        models[key] = spec.model_copy(update={"title": spec.title or key, "path": location})
    _refuse_twins(source, models, taken)
    return models


def _faults(spec: ModelSpec, package: Path | None) -> Iterator[tuple[Place, str]]:
    """What is wrong about fields that are right one by one."""
    if (spec.path is None) == (spec.repo is None):
        yield (), "give either repo or path"
    if spec.path and not package and not _expanded(spec.path).is_absolute():
        yield ("path",), "path is not absolute; begin it with / or ~"
    if spec.path and (spec.quants or spec.revision):
        yield ("path",), "quants and revision belong to a repo, not to a path"
    if (spec.active_parameters or 0) > (spec.parameters or float("inf")):
        yield ("active_parameters",), "more parameters are active than there are"
    for label, quant in spec.quants.items():
        is_shard = re.search(r"-\d{5}-of-\d{5}\.gguf$", quant.file)
        if is_shard and (quant.bytes or quant.sha256):
            yield ("quants", label), f"{label} is in shards: bytes and sha256 come from the Hub"
        if quant.bytes and spec.parameters:
            share = quant.bytes * 8 / spec.parameters / (bits(label) or 1)
            if not SIZE_TOLERANCE[0] <= share <= SIZE_TOLERANCE[1]:
                wanted = (bits(label) or 1) * spec.parameters / 8
                reason = f"{label} can't be {quant.bytes:,} bytes; about {wanted:,.0f} are likely"
                yield ("quants", label, "bytes"), reason


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # ~nobody
        return path


def _refuse_twins(
    source: YamlSource, models: Mapping[str, ModelSpec], taken: Collection[str]
) -> None:
    """Raises LocalMoeError where two entries answer to one name."""
    owners = {key: key for key in (*taken, *models)}
    for key, spec in models.items():
        for i, alias in enumerate(spec.aliases):
            if owners.setdefault(alias, key) != key:
                reason = f"{key}: {alias} is already a name of {owners[alias]}"
                raise source.refuse((key, "aliases", i), reason)


def _invalid(source: YamlSource, key: str, error: ValidationError) -> LocalMoeError:
    """The error for the first thing that pydantic found wrong in the entry `key`."""
    first = error.errors(include_url=False)[0]
    kind, said = first["type"], first["msg"].removeprefix("Value error, ")
    place = (key, *(part for part in first["loc"] if part != "[key]"))
    where = ".".join(str(part)[:80] for part in place)
    if kind == "extra_forbidden":
        return source.refuse(place, f"{where} is not known", _known_fields(place[1:]))
    if kind == "literal_error":
        hint = _nearest(str(first["input"]), get_args(PromptFamily))
        return source.refuse(place, f"{where} is none that is known", hint)
    joined = f"{where} {said}" if kind == "value_error" else f"{where}: {said}"
    return source.refuse(place, f"{where} {SAID[kind]}" if kind in SAID else joined)


def _known_fields(place: Place) -> str:
    """The fields that an entry may have at `place`, the nearest one first."""
    kinds: dict[object, type[BaseModel]] = {"quants": QuantSpec, "sampling": SamplingDefaults}
    kind = kinds.get(place[0], ModelSpec) if len(place) > 1 else ModelSpec
    return _nearest(str(place[-1]), kind.model_fields)


def _nearest(said: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(said[:80], list(known), n=1, cutoff=0.5)
    guess = f"Did you mean {near[0]}? " if near else ""
    return f"{guess}Known are: {', '.join(known)}."
