"""Random JSON schemas, the same for the same seed: what people ask for, nested up to a depth.

Strings and lists are bounded, so that an answer can end: a small model may go on in an open string
for as long as it is let.
"""

from __future__ import annotations

import random
from typing import Any

WORDS = ("name", "age", "city", "tags", "is_open", "price", "note", "kind", "größe", 'a "b"', "id")
VALUES = ("red", "green", "blue", 'say "hi"', "back\\slash", "naïve", "😀", 1, 2.5, None, True, -3)
PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(yes|no)$", "^\\w{1,6}$", "^[^\\s]{2,5}$")


def random_schema(seed: int) -> dict[str, Any]:
    """A schema of a depth of up to 4."""
    rng = random.Random(seed)
    return _object(rng, 3) if rng.random() < 0.7 else _schema(rng, 4)


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    makers = [_string, _integer, _number, _enum, _plain]
    if depth > 1:
        makers += [_object, _array, _either]
    return rng.choice(makers)(rng, depth)


def _plain(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}])


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 3)
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(1, 30)},
            {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 12)},
            {"type": "string", "format": rng.choice(["date", "time", "date-time", "uuid", "ipv4"])},
            {"type": "string", "pattern": rng.choice(PATTERNS)},
        ]
    )


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-2000, 2000)
    return {"type": "integer", **_bounds(rng, low, low + rng.randint(0, 5000))}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = round(rng.uniform(-50, 50), rng.randint(0, 3))
    return {"type": "number", **_bounds(rng, low, round(low + rng.uniform(0.01, 400), 3))}


def _bounds(rng: random.Random, low: float, high: float) -> dict[str, Any]:
    lows = [{"minimum": low}, {"exclusiveMinimum": low - 1}, {}]
    highs = [{"maximum": high}, {"exclusiveMaximum": high + 1}, {}]
    return {**rng.choice(lows), **rng.choice(highs)}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    values = rng.sample(VALUES, rng.randint(1, 6))
    return {"enum": values} if rng.random() < 0.8 else {"const": values[0]}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 4))
    found: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    if rng.random() < 0.7:
        found["additionalProperties"] = False
    return found


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    most = least + rng.randint(0, 2)
    return {
        "type": "array", "items": _schema(rng, depth - 1), "minItems": least, "maxItems": most,
    }  # fmt: skip


def _either(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randint(2, 3))]}
