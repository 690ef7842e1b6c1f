"""Bounds of numbers as llguidance takes them: doubles that fit into 64 bits as integers.

It reads every bound as a double and writes digits by 64-bit integers. A bound beyond that is drawn
in, which allows less; a range that lies beyond altogether is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from .keywords import Path, schema_error

FARTHEST = 2**63 - 1024
"""The largest double below 2^63."""
MAX_STEP = 2**32 - 1
MAX_STEP_DIGITS = 9


def within_integers(schema: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns `minimum` and `maximum` for the integers that a schema allows.

    Raises UsageError where there are none, or none that can be held.
    """
    lows = [-FARTHEST, *(math.ceil(schema[name]) for name in ("minimum",) if name in schema)]
    highs = [FARTHEST, *(math.floor(schema[name]) for name in ("maximum",) if name in schema)]
    if "exclusiveMinimum" in schema:
        lows.append(math.floor(schema["exclusiveMinimum"]) + 1)
    if "exclusiveMaximum" in schema:
        highs.append(math.ceil(schema["exclusiveMaximum"]) - 1)
    low, high = max(lows), min(highs)
    if low > high:
        is_beyond = max(lows[1:], default=-math.inf) <= min(highs[1:], default=math.inf)
        raise _too_far(path) if is_beyond else schema_error(path, "allows no integer at all")
    low, high = _double_from(low), _double_to(high)
    if low > high:
        raise _too_far(path)
    return {"minimum": low, "maximum": high}


def within_numbers(schema: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the bounds of a schema's numbers; those without any may have exponents.

    Raises UsageError where no number is within them, or none that can be held.
    """
    names = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    given = {name: schema[name] for name in names if name in schema}
    if not given:
        return {}
    low, high = given.get("minimum", -math.inf), given.get("maximum", math.inf)
    open_low = given.get("exclusiveMinimum", -math.inf)
    open_high = given.get("exclusiveMaximum", math.inf)
    if max(low, open_low) > min(high, open_high) or (
        max(low, open_low) == min(high, open_high) and (open_low >= low or open_high <= high)
    ):
        raise schema_error(path, "allows no number at all")
    if low == high:
        return {"minimum": low, "maximum": high}
    if max(low, open_low) >= FARTHEST or min(high, open_high) <= -FARTHEST:
        raise _too_far(path)
    found: dict[str, Any] = {}
    if open_low >= low and open_low > -FARTHEST:
        found["exclusiveMinimum"] = _double_from(open_low)
    else:
        found["minimum"] = _double_from(max(low, -FARTHEST))
    if open_high <= high and open_high < FARTHEST:
        found["exclusiveMaximum"] = _double_to(open_high)
    else:
        found["maximum"] = _double_to(min(high, FARTHEST))
    return found


def _too_far(path: Path) -> Exception:
    return schema_error(path, "allows only numbers that are too large to be held (beyond 2^63)")


def _double_from(value: float) -> float:
    """The least double that is not below a number; whole ones stay integers."""
    near = float(value)
    if near < value:
        near = math.nextafter(near, math.inf)
    return int(near) if isinstance(value, int) else near


def _double_to(value: float) -> float:
    """The greatest double that is not above a number."""
    near = float(value)
    if near > value:
        near = math.nextafter(near, -math.inf)
    return int(near) if isinstance(value, int) else near


def multiple_for(step: float, path: Path) -> float:
    """Returns a double that llguidance reads as `step` exactly.

    It multiplies by ten until nothing is left behind the point (parser/src/json/numeric.rs), which
    misses 0.07; a double beside it may not. Raises UsageError where none does.
    """
    wanted = Decimal(repr(step)).normalize()
    exponent = max(0, -int(wanted.as_tuple().exponent))
    coefficient = int(wanted.scaleb(exponent))
    below = above = float(step)
    if coefficient <= MAX_STEP and exponent <= MAX_STEP_DIGITS:
        for _ in range(16):
            for candidate in (below, above):
                if _as_read(candidate) == (coefficient, exponent):
                    return int(candidate) if exponent == 0 else candidate
            below, above = math.nextafter(below, 0), math.nextafter(above, math.inf)
    raise schema_error((*path, "multipleOf"), "is a number that can't be held")


def _as_read(value: float) -> tuple[int, int]:
    exponent = 0
    while value != int(value) and exponent <= MAX_STEP_DIGITS + 1:
        value *= 10
        exponent += 1
    return int(value), exponent


def is_exact(value: float) -> bool:
    """Returns whether llguidance writes a constant as this very number.

    It reads it as a double, and writes that by a 64-bit integer or by its shortest decimals.
    """
    if isinstance(value, int) and abs(value) >= 2**53:
        if value == 2**63 - 1:
            return True  # where the double above it ends up
        if abs(value) > 2**1000:
            return False
        near = float(value)
        return int(near) == value if abs(value) < FARTHEST else Decimal(repr(near)) == value
    return True


def is_multiple(value: float, step: float) -> bool:
    """Returns whether a number is a multiple of another, both as their decimals say."""
    return (Fraction(repr(value)) / Fraction(repr(step))).denominator == 1
