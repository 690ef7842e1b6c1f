"""config.yaml: a person's own defaults, in general and for single models.

    temp: 0.7
    models:
      mixtral: {ctx_size: 8192}

Names are those of the long options, with - or _.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LocalMoeError, UsageError
from ..files import is_there
from .yaml_source import YamlSource

FILE_NAME = "config.yaml"
MEND = "Mend it: localmoe config edit"
MODELS = "models"
OTHER_NAMES = {"temp": "temperature"}
"""Options whose long name is not the setting's."""
ONE_COMMAND = ("json_schema", "grammar")
"""What is said of one answer, not of all."""
FLAGS = ("offline", "save", "plain", "tune", "think")

ModelAliases = Callable[[], Mapping[str, str]]
"""Gives the catalog's entry for each name that means one, in lower case. It is called only where
a file names models, because the catalog takes a while to read."""


@dataclass(frozen=True, slots=True)
class Said:
    """A value, and where it was said: a file and line, a variable, the command line."""

    value: Any
    where: str


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What a config.yaml says: of every model, and of single ones by what they are called there."""

    general: Mapping[str, Said] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Said]] = field(default_factory=dict)

    def said(self, names: Iterable[str]) -> dict[str, Said]:
        """What holds for a model that is called by these names, the most exact one last."""
        found = dict(self.general)
        for name in names:
            found.update(self.models.get(name, {}))
        return found


def read_config(
    path: Path, settings: Collection[str], aliases: ModelAliases | None = None
) -> ConfigFile:
    """Reads the file, or gives an empty one where there is none.

    Names of models are checked where `aliases` are given. Raises UsageError with file and line.
    """
    try:
        if not is_there(path):
            return ConfigFile()
        source = YamlSource(path)
        general = dict(source.values)
        models = general.pop(MODELS, None) or {}
        if not isinstance(models, dict):
            raise source.refuse((MODELS,), "models is not a list of names with settings below them")
        _check_names(source, models, aliases)
        return ConfigFile(
            _section(source, (), general, settings),
            {
                name: _section(source, (MODELS, name), part, settings)
                for name, part in models.items()
            },
        )
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}.") from None
    except LocalMoeError as error:
        raise UsageError(error.message, error.hint or MEND) from None


def _check_names(
    source: YamlSource, models: Mapping[str, Any], aliases: ModelAliases | None
) -> None:
    """Refuses what can't be a model: a slip there would be obeyed by none."""
    if not models or aliases is None:
        return
    known = aliases()
    for name in models:
        called = name.partition(":")[0]
        if called.lower() in known or re.search(r"[/\\]|\.gguf$", name):
            continue
        near = difflib.get_close_matches(called[:40], known, n=1)
        hint = f"Did you mean {near[0]}?" if near else "See: localmoe list"
        raise source.refuse((MODELS, name), f"no model is called {name[:60]}", hint)


def _section(
    source: YamlSource, place: tuple[str, ...], part: Any, settings: Collection[str]
) -> dict[str, Said]:
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise source.refuse(place, f"{place[-1]} has no settings below it, like ctx_size: 8192")
    found: dict[str, Said] = {}
    for key, value in part.items():
        inside = (*place, key)
        name = setting_name(key)
        if name not in settings or name in ONE_COMMAND:
            raise source.refuse(inside, *_unknown(key, name, settings))
        if name in found:
            raise source.refuse(inside, f"{key} is said twice")
        if isinstance(value, dict) or (isinstance(value, bool) and name not in FLAGS):
            raise source.refuse(inside, f"{key}: this is no value for it")
        if value is not None:
            line = source.lines[inside]
            value = tuple(value) if isinstance(value, list) else value
            found[name] = Said(value, f"{source.path}:{line}")
    return found


def setting_name(key: str) -> str:
    """The setting that a key of the file means."""
    name = key.strip().lstrip("-").replace("-", "_")
    return OTHER_NAMES.get(name, name)


def file_key(name: str) -> str:
    """What a setting is called in the file."""
    return next((key for key, setting in OTHER_NAMES.items() if setting == name), name)


def _unknown(key: str, name: str, settings: Collection[str]) -> tuple[str, str]:
    if name in ONE_COMMAND:
        return f"{key} belongs on the command line", f"Say --{name.replace('_', '-')} there."
    known = [*(file_key(setting) for setting in settings if setting not in ONE_COMMAND), MODELS]
    near = difflib.get_close_matches(name[:40], known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."
    return f"there is no setting {key[:40]}", hint


def names_of(model: str, aliases: Mapping[str, str]) -> tuple[str, ...]:
    """What a model may be called in the file: by the catalog, with and without its quant, and as
    it was typed."""
    called, colon, quant = model.partition(":")
    key = aliases.get(called.lower())
    by_catalog = (key, f"{key}:{quant}") if key and colon else (key,) if key else ()
    return (*by_catalog, *(() if key else (called,)), model)
