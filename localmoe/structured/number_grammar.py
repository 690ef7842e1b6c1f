"""Numbers between bounds as GBNF: which digits may stand where.

Every function gives alternatives, each a sequence of GBNF; a rule joins them with ` | `.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext

N_DIGITS = 15
"""So many digits a double holds whatever they are; a number without bounds has no more."""
N_FRACTION = 6
FRACTION = f'"." [0-9]{{1,{N_FRACTION}}}'
ANY_INTEGER = f'"-"? int-part\nint-part ::= "0" | [1-9] [0-9]{{0,{N_DIGITS - 1}}}'
ANY_NUMBER = (
    f'"-"? int-part frac-part? exp-part?\nfrac-part ::= "." [0-9]{{1,{N_DIGITS}}}\n'
    "exp-part ::= [eE] [-+]? [0-9]{1,2}"
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The numbers of a schema; None is no bound. With `open`, the bound itself is not allowed."""

    low: Decimal | None = None
    high: Decimal | None = None
    low_open: bool = False
    high_open: bool = False

    def filled(self) -> tuple[Decimal, Decimal]:
        """Both bounds, those that aren't given so far off that they don't matter."""
        far = Decimal(10**N_DIGITS - 1)
        low = self.low if self.low is not None else min(-far, 10 * (self.high or -far))
        high = self.high if self.high is not None else max(far, 10 * low)
        return low, high


def integers(bounds: Bounds) -> list[str]:
    """The whole numbers within bounds; empty where there are none."""
    low, high = bounds.filled()
    first = int(low.to_integral_value(ROUND_CEILING))
    last = int(high.to_integral_value(ROUND_FLOOR))
    first += bounds.low_open and first == low
    last -= bounds.high_open and last == high
    negative = naturals(max(1, -last), -first)
    return [f'"-" {digits}' for digits in negative] + naturals(max(0, first), last)


def numbers(bounds: Bounds) -> list[str]:
    """The decimal numbers within bounds, without exponents; empty where there are none."""
    low, high = bounds.filled()
    zero = Decimal(0)
    found: list[str] = []
    if low < 0:
        mirrored = (
            max(zero, high.copy_negate()),
            low.copy_negate(),
            bounds.high_open and high <= 0,
            bounds.low_open,
        )
        found += [f'"-" {digits}' for digits in _decimals(*mirrored)]
    if high >= 0:
        found += _decimals(max(zero, low), high, bounds.low_open and low >= 0, bounds.high_open)
    return found


def _decimals(low: Decimal, high: Decimal, low_open: bool, high_open: bool) -> list[str]:
    """Those from `low` to `high`, neither below zero."""
    first, last = int(low), int(high)
    between = [f"{digits} ({FRACTION})?" for digits in naturals(first + 1, last - 1)]
    ends = [first] if first == last else [first, last]
    return between + [
        part for end in ends for part in _with_fraction(end, low, high, low_open, high_open)
    ]


def _with_fraction(
    whole: int, low: Decimal, high: Decimal, low_open: bool, high_open: bool
) -> list[str]:
    """The decimals that begin with `whole`, of each number of digits after the point."""
    found = []
    given = max(-_exponent(low), -_exponent(high))
    for n_digits in range(max(N_FRACTION, given) + 1):
        scale = Decimal(10) ** n_digits
        with localcontext() as context:
            context.prec = 400
            lowest, highest = (low - whole) * scale, (high - whole) * scale
        a = max(0, int(lowest.to_integral_value(ROUND_CEILING)))
        b = min(int(scale) - 1, int(highest.to_integral_value(ROUND_FLOOR)))
        a += low_open and a == lowest
        b -= high_open and b == highest
        if a <= b and n_digits:
            spans = _same_length(f"{a:0{n_digits}}", f"{b:0{n_digits}}")
            found += [f'"{whole}." {digits}' for digits in spans]
        elif a <= b:
            found.append(f'"{whole}"')
    return found


def _exponent(value: Decimal) -> int:
    exponent = value.as_tuple().exponent
    return exponent if isinstance(exponent, int) else 0


def naturals(first: int, last: int) -> list[str]:
    """Whole numbers of zero or more, without leading zeros."""
    if first > last:
        return []
    found: list[str] = []
    whole_lengths: list[int] = []  # of which every number is allowed
    for n_digits in range(len(str(first)), len(str(last)) + 1):
        lowest = 10 ** (n_digits - 1) if n_digits > 1 else 0
        a, b = max(first, lowest), min(last, 10**n_digits - 1)
        if n_digits > 1 and (a, b) == (lowest, 10**n_digits - 1):
            whole_lengths.append(n_digits)
        else:
            found += _same_length(str(a), str(b))
    if whole_lengths:
        found.append(f"[1-9] [0-9]{{{whole_lengths[0] - 1},{whole_lengths[-1] - 1}}}")
    return found


def _same_length(low: str, high: str) -> list[str]:
    """The digits from `low` to `high`, which are equally many."""
    if low == high:
        return [f'"{low}"']
    same = next(i for i in range(len(low)) if low[i] != high[i])
    prefix = f'"{low[:same]}" ' if same else ""
    n_free = len(low) - same - 1
    if n_free == 0:
        return [f"{prefix}[{low[same]}-{high[same]}]"]
    found = []
    start, end = int(low[same]), int(high[same])
    rest_low, rest_high = low[same + 1 :], high[same + 1 :]
    if rest_low.strip("0"):
        inner = _same_length(rest_low, "9" * n_free)
        found += [f'{prefix}"{start}" {digits}' for digits in inner]
        start += 1
    if rest_high.strip("9"):
        inner = _same_length("0" * n_free, rest_high)
        found += [f'{prefix}"{end}" {digits}' for digits in inner]
        end -= 1
    if start <= end:
        found.append(f"{prefix}[{start}-{end}] [0-9]{{{n_free}}}")
    return found
