"""95 % intervals of accuracies, and of the accuracy that one model loses against another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def accuracy(correct: int, count: int) -> Estimate:
    """A share of right answers with Wilson's score interval (JASA 22, 1927), all between 0 and 1.

    It keeps its coverage near 0 and 1, where the toys are and where value +- 1.96 standard errors has no width.
    """
    share, spread = correct / count, _Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return Estimate(value=share, low=max(0.0, middle - half), high=min(1.0, middle + half))


@dataclass(frozen=True, kw_only=True)
class _Paired:
    """A difference of two shares on the same examples: its value, and centre and variance of the adjusted interval."""

    value: float
    centre: float
    variance: float


def loss(theirs: Sequence[bool], ours: Sequence[bool]) -> Estimate:
    """The share of examples that `ours` loses against `theirs`, answers to the same examples in the same order.

    Negative if it wins.  Only examples on which the two differ are informative: the interval is that of Bonett and
    Price (British Journal of Mathematical and Statistical Psychology 65, 2012), which adds one to each kind of them, so
    that it has a width even if no example differs.
    """
    return mean_loss([(theirs, ours)])


def mean_loss(pairs: Sequence[tuple[Sequence[bool], Sequence[bool]]]) -> Estimate:
    """The mean of `loss` over several tasks, with equal weights; the tasks' errors are independent."""
    found = [_paired(*pair) for pair in pairs]
    value = sum(each.value for each in found) / len(found)
    centre = sum(each.centre for each in found) / len(found)
    half = _Z * math.sqrt(sum(each.variance for each in found)) / len(found)
    # The interval always holds the value itself.
    return Estimate(value=value, low=min(value, centre - half), high=max(value, centre + half))


def _paired(theirs: Sequence[bool], ours: Sequence[bool]) -> _Paired:
    lost = sum(a and not b for a, b in zip(theirs, ours, strict=True))
    won = sum(b and not a for a, b in zip(theirs, ours, strict=True))
    count = len(ours)
    p_lost, p_won = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    centre = p_lost - p_won
    return _Paired(value=(lost - won) / count, centre=centre, variance=(p_lost + p_won - centre**2) / (count + 2))
