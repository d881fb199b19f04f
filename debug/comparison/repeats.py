"""One fault in several layers, said once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refmodels.taps import split_name

if TYPE_CHECKING:
    from debug.comparison.results import Culprit, Diagnosis


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """The same first diagnosis at the same tap of several layers.

    part: the tap within its block; "" for the block's output.  fault: as in the first of these layers.  taps: the
    culprits.  layers: where the fault is; without: the layers where it is not.
    """

    part: str
    fault: str
    taps: list[str]
    layers: list[int]
    without: list[int]

    @property
    def text(self) -> str:
        """In words: 'in all 24 layers, mlp_norm: wrong epsilon ...'."""
        where = f"all {len(self.layers)} layers" if not self.without else f"layers {_ranges(self.layers)}"
        rest = f" (not in {_ranges(self.without)})" if self.without else ""
        return f"in {where}{rest}, {self.part or 'the output of the block'}: {self.fault}"

    def to_json(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "fault": self.fault,
            "taps": self.taps,
            "layers": self.layers,
            "without": self.without,
        }


def repeats_of(culprits: Sequence[Culprit], taps: Sequence[str]) -> list[Repeat]:
    """The faults that two or more layers share; `taps`: all taps that were compared."""
    groups: dict[tuple[str, str], list[Culprit]] = {}
    for culprit in culprits:
        layer, part = split_name(culprit.tap)
        if layer is not None and culprit.diagnosis:
            first = culprit.diagnosis[0]
            groups.setdefault((part, first.words or first.fault), []).append(culprit)
    found = []
    for (part, _), members in groups.items():
        first = members[0].diagnosis[0]
        same = [c for c in members if _agree(c.diagnosis[0], first)]
        if len(same) < 2:
            continue
        layers = sorted(_layer(c.tap) for c in same)
        everywhere = {layer for t in taps for layer, own in [split_name(t)] if layer is not None and own == part}
        found.append(
            Repeat(
                part=part,
                fault=first.fault,
                taps=[c.tap for c in same],
                layers=layers,
                without=sorted(everywhere - set(layers)),
            )
        )
    return found


def _layer(tap: str) -> int:
    layer, _ = split_name(tap)
    assert layer is not None
    return layer


def _agree(one: Diagnosis, two: Diagnosis) -> bool:
    """Whether some number is in the intervals of both."""
    if one.low is None or one.high is None or two.low is None or two.high is None:
        return one.fault == two.fault
    return one.low <= two.high and two.low <= one.high


def _ranges(numbers: Sequence[int]) -> str:
    """'0 to 3, 5'."""
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [n for _, n in run]
        runs.append(f"{found[0]} to {found[-1]}" if len(found) > 2 else ", ".join(map(str, found)))
    return ", ".join(runs)
