"""One diff against an earlier one of the same model: which taps became right, wrong, better or worse."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from debug.comparison.results import DiffResult, TapError, to_plain
from refmodels.errors import LogitLockError

FACTOR = 2.0
"""Smallest change of a ratio that counts: one bit of the engine's rounding doubles an error.  Smaller changes are the
noise of other summation orders."""


@dataclass(frozen=True, kw_only=True)
class TapChange:
    """One tap, at its worst forward pass: its local errors in noise floors, before and now.

    kind: "fixed" and "broken" pass the alarm, "better" and "worse" change by more than `FACTOR` on one side of it.
    """

    tap: str
    kind: Literal["fixed", "broken", "better", "worse"]
    before: float
    now: float


@dataclass(frozen=True, kw_only=True)
class Changes:
    """taps: those that changed, in the order of execution.  verdict, kl_mean: (before, now)."""

    taps: list[TapChange]
    verdict: tuple[str, str]
    kl_mean: tuple[float, float]

    def of(self, kind: str) -> list[TapChange]:
        return [change for change in self.taps if change.kind == kind]

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


def changes(before: DiffResult, now: DiffResult) -> Changes:
    """The changes between two diffs.

    Args:
        before: an earlier result, for example `DiffResult.from_json`.
        now: the result to judge.
    Raises:
        LogitLockError: the two have no tap in common, so they are of different models.
    """
    old, new = _worst(before.taps), _worst(now.taps)
    common = [tap for tap in new if tap in old]
    if not common:
        raise LogitLockError(f"the baseline has none of this diff's taps, such as {next(iter(new))}")
    found = []
    for tap in common:
        a, b = old[tap], new[tap]
        was, is_ = not a <= before.multiple, not b <= now.multiple
        kind: Literal["fixed", "broken", "better", "worse"]
        if was != is_:
            kind = "broken" if is_ else "fixed"
        elif max(a, b) > 1 and not 1 / FACTOR <= b / a <= FACTOR:
            kind = "worse" if b > a else "better"
        else:
            continue
        found.append(TapChange(tap=tap, kind=kind, before=a, now=b))
    return Changes(
        taps=found, verdict=(before.verdict, now.verdict), kl_mean=(before.logits.kl_mean, now.logits.kl_mean)
    )


def _worst(taps: Iterable[TapError]) -> dict[str, float]:
    """The largest ratio of each tap; infinite if it has NaN or Inf."""
    worst: dict[str, float] = {}
    for error in taps:
        ratio = error.ratio if error.ratio == error.ratio and not error.nonfinite else float("inf")
        worst[error.tap] = max(ratio, worst.get(error.tap, 0.0))
    return worst
