"""Regular expressions of the numbers between two bounds, in decimal notation without exponents."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import NamedTuple

from ..showing import shown

NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"


@shown
class Bounds(NamedTuple):
    """Bounds of numbers, each with whether the number itself is excluded."""

    low: Decimal | None = None
    high: Decimal | None = None
    above: bool = False
    below: bool = False

    def both(self, other: Bounds) -> Bounds:
        """What is within both."""
        lows = [(b.low, b.above) for b in (self, other) if b.low is not None]
        highs = [(-b.high, b.below) for b in (self, other) if b.high is not None]
        low, above = max(lows) if lows else (None, False)
        high, below = max(highs) if highs else (None, False)
        return Bounds(low, None if high is None else -high, above, below)

    def holds(self, number: Decimal) -> bool:
        """Whether a number is within."""
        return not self.both(Bounds(number, number)).empty()

    def empty(self) -> bool:
        """Whether no real number is between."""
        if self.low is None or self.high is None:
            return False
        return self.low > self.high or (self.low == self.high and (self.above or self.below))


def integers(bounds: Bounds) -> str | None:
    """Integers without fraction; None if there are none."""
    low, high = bounds.low, bounds.high
    least = None if low is None else math.ceil(low)
    if least is not None and bounds.above and least == low:
        least += 1
    most = None if high is None else math.floor(high)
    if most is not None and bounds.below and most == high:
        most -= 1
    found = []
    if most is None or most >= 0:
        found.append(_naturals(max(least or 0, 0), most))
    if least is None or least < 0:
        nearest = 0 if most is None or most >= 0 else -most
        negative = _naturals(nearest, None if least is None else -least)
        found.append(negative and f"-{negative}")
    return _any(found)


def numbers(bounds: Bounds) -> str | None:
    """Numbers; with exponents only where there is no bound."""
    low, high, above, below = bounds
    if low is None and high is None:
        return NUMBER
    found = []
    if high is None or high >= 0:
        started = low is not None and low >= 0
        least = low if low is not None and started else Decimal(0)
        found.append(_positive(least, high, above and started, below))
    if low is None or low < 0:
        ended = high is not None and high < 0
        nearest, strict = (-high, below) if ended and high is not None else (Decimal(0), True)
        negative = _positive(nearest, None if low is None else -low, strict, above)
        found.append(negative and f"-{negative}")
    return _any(found)


def _any(found: list[str | None]) -> str | None:
    """One of several expressions, of which None match nothing."""
    some = [one for one in found if one]
    return f"(?:{'|'.join(some)})" if some else None


def _naturals(least: int, most: int | None) -> str | None:
    if most is not None and least > most:
        return None
    found: list[str | None] = []
    top = len(str(least if most is None else most))
    for length in range(len(str(least)), top + 1):
        first = max(least, 10 ** (length - 1) if length > 1 else 0)
        last = 10**length - 1 if most is None else min(most, 10**length - 1)
        found.append(_between(str(first), str(last)))
    if most is None:
        found.append(f"[1-9][0-9]{{{top},}}")
    return _any(found)


def _between(low: str, high: str) -> str:
    """Digits of one length from `low` to `high`."""
    if not low:
        return ""
    if low[0] == high[0]:
        return low[0] + _between(low[1:], high[1:])
    rest = len(low) - 1
    if not low.strip("0") and not high.strip("9"):
        return f"[0-9]{{{len(low)}}}"
    found = [low[0] + _between(low[1:], "9" * rest)]
    if int(high[0]) - int(low[0]) > 1:
        found.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}]" + f"[0-9]{{{rest}}}" * (rest > 0))
    found.append(high[0] + _between("0" * rest, high[1:]))
    return f"(?:{'|'.join(found)})"


def _positive(low: Decimal, high: Decimal | None, above: bool, below: bool) -> str | None:
    """Numbers of at least 0, by their whole part."""
    least, after = _digits(low)
    most, before = (None, "") if high is None else _digits(high)
    if most is not None and least > most:
        return None
    found: list[str | None] = []
    if least == most:
        return _joined(least, _fraction(after, before, above, below))
    found.append(_joined(least, _fraction(after, None, above, False)))
    inner = _naturals(least + 1, None if most is None else most - 1)
    found.append(inner and inner + r"(?:\.[0-9]+)?")
    if most is not None:
        found.append(_joined(most, _fraction(None, before, False, below)))
    return _any(found)


def _joined(whole: int, fraction: str | None) -> str | None:
    return None if fraction is None else f"{whole}{fraction}"


def _digits(number: Decimal) -> tuple[int, str]:
    whole, _, fraction = f"{number:f}".partition(".")
    return int(whole), fraction.rstrip("0")


def _fraction(low: str | None, high: str | None, above: bool, below: bool) -> str | None:
    """A point and digits, or nothing, such that .low <= it <= .high."""
    digits = _tail(low, high, above, below)
    ends = _ends(low, high, above, below)
    if digits is None:
        return "" if ends else None
    return rf"(?:\.{digits})?" if ends else rf"\.{digits}"


def _ends(low: str | None, high: str | None, above: bool, below: bool) -> bool:
    """Whether no more digits, which stand for 0, are between."""
    return (low is None or (not low and not above)) and (high is None or bool(high) or not below)


def _tail(low: str | None, high: str | None, above: bool, below: bool) -> str | None:
    """At least one more digit; `low`, `high` are what is left of a bound's digits, None if the
    digits before decided it.
    """
    if low is None and high is None:
        return "[0-9]+"
    if not low and high is None:
        return "[0-9]*[1-9][0-9]*" if above else "[0-9]+"
    if high == "":
        return None if low or (low == "" and above) or below else "0+"
    first, last = int(low[0]) if low else 0, int(high[0]) if high else 9
    found: list[str | None] = []
    for digit in range(first, last + 1):
        inner = (
            low[1:] if low is not None and digit == first else None,
            high[1:] if high is not None and digit == last else None,
            above,
            below,
        )
        digits, ends = _tail(*inner), _ends(*inner)
        if digits is None:
            found.append(f"{digit}" if ends else None)
        else:
            found.append(f"{digit}(?:{digits})?" if ends else f"{digit}{digits}")
    return _any(found)
