"""The interval of a fitted number: the values with which the fault still explains the engine."""

from __future__ import annotations

import math
from collections.abc import Callable

_LEAST = 1e-6
"""Smallest relative distance that is tried: below it, a number has more digits than anybody writes."""
_GROWTH = 8.0
_HALVINGS = 5
_WIDE = 1.5
"""Above this ratio of its ends, an interval has no middle that is worth saying."""


def interval(explains: Callable[[float], bool], value: float, least: float, most: float) -> tuple[float, float]:
    """The ends of the interval around `value`, within [least, most]."""
    return _end(explains, value, -1, least), _end(explains, value, 1, most)


def _end(explains: Callable[[float], bool], value: float, sign: int, limit: float) -> float:
    """The last value in this direction for which it holds, to within a fraction of the distance."""
    step = max(abs(value), 1e-12) * _LEAST
    good, bad = value, None
    while step < 1e4 * max(abs(value), 1e-12):
        tried = value + sign * step
        if sign * (tried - limit) >= 0:
            tried = limit
        if not explains(tried):
            bad = tried
            break
        good = tried
        if tried == limit:
            return limit
        step *= _GROWTH
    if bad is None:
        return good
    for _ in range(_HALVINGS):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if explains(middle) else (good, middle)
    return good


def roundest(value: float, low: float, high: float) -> float:
    """The number within [low, high] with the fewest digits; of those, the nearest to `value`."""
    for digits in range(1, 17):
        rounded = float(f"{value:.{digits - 1}e}")
        if low <= rounded <= high:
            return rounded
    return value


def described(value: float, low: float, high: float, *, half: bool) -> str:
    """The number with its interval, in words."""
    if (low > 0 and high / low > _WIDE) or low < 0 < high:
        return f"between {low:.3g} and {high:.3g}"
    best = roundest(value, low, high)
    # As many digits as differ between the ends, and two more.
    width = (high - low) / max(abs(best), 1e-300)
    digits = min(12, max(3, 2 - math.floor(math.log10(width)) if width > 0 else 12))
    text = f"{best:.{digits}g}"
    if half or width > 1e-3:
        return f"{text} ({low:.{digits}g} to {high:.{digits}g})"
    return text
