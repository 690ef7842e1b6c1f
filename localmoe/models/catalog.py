"""models.yaml, and from what a person calls a model to the file that it is."""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import LocalMoeError, UsageError

PACKAGE = Path(__file__).resolve().parent.parent


class CatalogFile(BaseModel):
    """One quant of a model on the Hub. `sha256` is the file's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ModelSpec(BaseModel):
    """An entry of models.yaml: a file of the package, or files on the Hub by quant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    about: str
    license: str
    path: str | None = None
    repo: str | None = None
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    files: dict[str, CatalogFile] = {}


def catalog_path() -> Path:
    """models.yaml: beside the modules in an installed package, one level up in a checkout."""
    installed = PACKAGE / "models.yaml"
    return installed if installed.is_file() else PACKAGE.parent / "models.yaml"


def read_catalog(path: Path | None = None) -> dict[str, ModelSpec]:
    """The catalog by name. Raises LocalMoeError naming the entry and the field that is wrong."""
    path = path or catalog_path()
    try:
        entries = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise LocalMoeError(f"{path} can't be read: {error}.", "Reinstall localmoe.") from None
    try:
        return {name: ModelSpec.model_validate(entry) for name, entry in entries.items()}
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise LocalMoeError(f"{path}: {where}: {error.errors()[0]['msg']}.") from None


def resolve(name: str) -> Path:
    """The file that a name means: `demo`, or a path. Raises UsageError on any other name.

    What looks like a path is one; a catalog name comes before a file of the same name.
    """
    catalog = read_catalog()
    spec = catalog.get(name.split(":")[0].lower())
    if spec and spec.path:
        return PACKAGE / spec.path
    try:
        path = Path(name).expanduser()
        path.is_file()
    except (RuntimeError, OSError):
        raise UsageError(f"There is no file {name[:80]}.", "Check the path.") from None
    if path.is_file():
        return path.absolute()  # not resolved: links of the Hub's cache have the names of shards
    if path.is_dir():
        raise UsageError(f"{name} is a folder.", "Give the GGUF file in it; of shards, the first.")
    if spec:
        raise UsageError(*_not_here(name, spec))
    if name.lower().endswith(".gguf") or path.parent != Path():
        raise UsageError(f"There is no file {name}.", "Check the path; `demo` needs no file.")
    near = difflib.get_close_matches(name.lower(), catalog, n=1)
    hint = (
        f"Did you mean {near[0]}?"
        if near
        else "Try: localmoe run demo, or the path of a GGUF file."
    )
    raise UsageError(f"No model is called {name}.", hint)


def _not_here(name: str, spec: ModelSpec) -> tuple[str, str]:
    quant, file = next(iter(spec.files.items()))
    return (
        f"{spec.title} is not here, and this version doesn't download yet "
        f"({quant}: {file.bytes / 1e9:.1f} GB).",
        f"Fetch it with: hf download {spec.repo} {file.name} --revision {spec.revision} "
        f"--local-dir . then: localmoe run ./{file.name}",
    )
