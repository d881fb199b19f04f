"""One diff against an earlier one of the same model: which taps became right, wrong, better or worse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        LogitLockError: the two are of different models, precisions or prompts, which cannot be compared.
    """
    for name, a, b in _settings(before, now):
        if a != b:
            raise LogitLockError(f"the baseline cannot be compared with this diff: its {name} is {a}, now it is {b}")
    old, new = _worst(before.taps), _worst(now.taps)
    found = []
    for tap in new:
        a, b = old[tap], new[tap]
        was, is_ = not a <= before.multiple, not b <= now.multiple
        kind: Literal["fixed", "broken", "better", "worse"]
        if was != is_:
            kind = "broken" if is_ else "fixed"
        elif max(a, b) > max(1.0, FACTOR * min(a, b)):
            kind = "worse" if b > a else "better"
        else:
            continue
        found.append(TapChange(tap=tap, kind=kind, before=a, now=b))
    return Changes(
        taps=found, verdict=(before.verdict, now.verdict), kl_mean=(before.logits.kl_mean, now.logits.kl_mean)
    )


def _settings(before: DiffResult, now: DiffResult) -> Iterator[tuple[str, object, object]]:
    """The settings that must be equal, with their values."""
    for name in ("model", "precision"):
        if name in before.context and name in now.context:
            yield name, before.context[name], now.context[name]
    yield "unit roundoff", before.unit_roundoff, now.unit_roundoff
    yield "number of decode steps", before.steps, now.steps
    yield "lengths of prompts", before.prompt_lengths, now.prompt_lengths
    a, b = (result.inputs.get("prompt_ids") for result in (before, now))
    if a is not None and b is not None and a != b:
        yield "prompts", "of other token ids", "of these"
    old, new = ({error.tap for error in result.taps} for result in (before, now))
    if old != new:
        yield "set of taps", f"without {min(new - old, default='none')}", f"without {min(old - new, default='none')}"


def _worst(taps: Iterable[TapError]) -> dict[str, float]:
    """The largest ratio of each tap; infinite if it has NaN or Inf."""
    worst: dict[str, float] = {}
    for error in taps:
        ratio = error.ratio if error.ratio == error.ratio and not error.nonfinite else float("inf")
        worst[error.tap] = max(ratio, worst.get(error.tap, 0.0))
    return worst
