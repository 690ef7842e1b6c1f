"""What an output was made from: input, model and settings, in a file beside it.

A run that goes on with an output must ask the same of the same model, or say that it knows better.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from ..errors import LocalMoeError, UsageError
from ..files import read_regular, remove_temporaries, write_atomically

FORM = "localmoe batch 1"
MAX_SHOWN = 24
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input by its content. `path` is for people: the same content elsewhere is the same."""

    path: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that decides over answers. `model` and `settings` are plain JSON values by name."""

    input: InputFile
    model: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    form: str = FORM


_form: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def input_file(path: str, stream: BinaryIO) -> InputFile:
    """What a stream holds; it is rewound."""
    hashed, n_bytes = sha256(), 0
    while piece := stream.read(PIECE_BYTES):
        hashed.update(piece)
        n_bytes += len(piece)
    stream.seek(0)
    return InputFile(path, n_bytes, hashed.hexdigest())


def manifest_path(output: Path) -> Path:
    """Returns where the manifest of an output lies."""
    return output.with_name(f"{output.name}.manifest.json")


def read_manifest(output: Path) -> Manifest | None:
    """The manifest of an output; None where it has none. Raises UsageError on another file."""
    path = manifest_path(output)
    try:
        return _form.validate_json(read_regular(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}.") from None
    except ValidationError:
        raise UsageError(
            f"{path} is not a manifest of a batch.", "Choose another -o, or take it away."
        ) from None


def write_manifest(output: Path, manifest: Manifest) -> None:
    """Put a manifest beside an output: whole and on disk, or not at all."""
    path = manifest_path(output)
    data = json.dumps(asdict(manifest), indent=1).encode() + b"\n"
    try:
        remove_temporaries(path)
        write_atomically(path, data, durable=True)
    except OSError as error:
        raise LocalMoeError(f"{path} can't be written: {error.strerror}.") from None


def differences(before: Manifest, now: Manifest) -> list[str]:
    """What changed, each as `name before -> now`."""
    changes = []
    if (before.input.sha256, before.input.n_bytes) != (now.input.sha256, now.input.n_bytes):
        changes.append(
            f"input {os.path.basename(before.input.path)} {_input(before)} -> {_input(now)}"
        )
    for said, says in ((before.model, now.model), (before.settings, now.settings)):
        for name in dict.fromkeys([*said, *says]):
            if said.get(name) != says.get(name):
                changes.append(f"{name} {_shown(said.get(name))} -> {_shown(says.get(name))}")
    return changes


def _input(manifest: Manifest) -> str:
    return f"({manifest.input.n_bytes:,} bytes, sha256 {manifest.input.sha256[:12]})"


def _shown(value: object) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
