"""Looking things up in a header's metadata: the right type, or a sentence saying what is wrong."""

from __future__ import annotations

import math
from array import array

from ..errors import ModelFileError, model_file_error
from .reader import Header, KvValue, StringArray

UINT32_MAX = 2**32 - 1  # llama.cpp keeps sizes in 32 bits
GENERAL = ("general.", "tokenizer.", "split.")


class Metadata:
    """The metadata of one header. Names without a general prefix are the architecture's own."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.architecture = self.text("general.architecture")

    def refuse(self, reason: str) -> ModelFileError:
        """The error for this file, with a reason."""
        return model_file_error(self.header.name, reason)

    def _full(self, key: str) -> str:
        return key if key.startswith(GENERAL) else f"{self.architecture}.{key}"

    def __contains__(self, key: str) -> bool:
        return self._full(key) in self.header.kv

    def get(self, key: str) -> KvValue | None:
        """Returns the value of a key; None where there is none."""
        return self.header.kv.get(self._full(key))

    def text(self, key: str) -> str:
        """A string, or "" where it is missing or something else."""
        value = self.header.kv.get(key)
        return value if isinstance(value, str) else ""

    def size(self, key: str, default: int | None = None) -> int:
        """A number of something; without a default the key must be there."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.refuse(f"damaged: no {self._full(key)[:60]} in its header")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= UINT32_MAX:
            raise self.refuse(f"damaged: {self._full(key)[:60]} is not a size")
        return value

    def optional_size(self, key: str) -> int | None:
        """Returns a size; None where the key is missing."""
        return self.size(key) if key in self else None

    def flag(self, key: str) -> bool | None:
        """Returns a bool; None where the key is missing or has another type."""
        value = self.get(key)
        return value if isinstance(value, bool) else None

    def is_scalar(self, key: str) -> bool:
        """Whether a key has one number, not an array."""
        return isinstance(self.get(key), int)

    def each_layer(self, key: str, n_layers: int) -> tuple[int, ...]:
        """A number for each layer from an array or from one scalar for all; () where missing."""
        value = self.get(key)
        if value is None:
            return ()
        if isinstance(value, bool):
            return (int(value),) * n_layers
        if isinstance(value, array) and value.typecode in "BbHhIiQq":
            if not 0 < len(value) <= n_layers or not 0 <= min(value) <= max(value) <= UINT32_MAX:
                full = self._full(key)[:60]
                raise self.refuse(f"damaged: {full} has {len(value):,} items for {n_layers} layers")
            return tuple(value) + (0,) * (n_layers - len(value))
        return (self.size(key),) * n_layers

    def strings(self, key: str) -> StringArray | None:
        """Returns an array of strings; None where the key has none."""
        value = self.get(key)
        return value if isinstance(value, StringArray) else None

    def numbers(self, key: str, typecodes: str) -> array[int] | array[float] | None:
        """An array whose items have one of these array typecodes."""
        value = self.get(key)
        return value if isinstance(value, array) and value.typecode in typecodes else None

    def below(self, prefix: str) -> dict[str, float | int | str]:
        """All finite scalars whose names begin with `prefix`, by the rest of the name."""
        found: dict[str, float | int | str] = {}
        for key, value in self.header.kv.items():
            usable = isinstance(value, (int, str)) or (
                isinstance(value, float) and math.isfinite(value)
            )
            if key.startswith(prefix) and usable and isinstance(value, (int, float, str)):
                found[key[len(prefix) :]] = value
        return found

    def refuse_odd_floats(self) -> None:
        """NaN and infinity spread: a NaN epsilon makes llama.cpp abort while it computes."""
        for key, value in self.header.kv.items():
            if not isinstance(value, float) or not key.startswith(f"{self.architecture}."):
                continue
            if not math.isfinite(value) or (key.endswith("_epsilon") and value < 0):
                raise self.refuse(f"damaged: {key[:60]} is {value}")
