"""Hypotheses about a wrong module: faults of the catalogue, one or two of them, and how to plant them in any forward.

A candidate is found in one forward, but it is a statement about the module: it has to be planted in every other forward
too.  There the catalogue yields the same variant again, recognized by its words, and a fitted number keeps the value
that it had in the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from debug.comparison.faults import CATALOGUE, Fault
from debug.comparison.faults.catalogue import ESTIMATED, Detail, Fit
from debug.comparison.faults.generic import transformed
from debug.comparison.modules import Module

_NUMBER = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One fault: its detail says which of the fault's variants; fault None: a change of the module's output."""

    fault: Fault | None
    detail: Detail

    @property
    def key(self) -> str:
        """The detail without fitted numbers."""
        if isinstance(self.detail, Fit):
            return self.detail.key or self.detail.words
        return _NUMBER.sub("#", self.detail) if self.detail.endswith(ESTIMATED) else self.detail

    @property
    def numbers(self) -> int:
        return self.detail.numbers if isinstance(self.detail, Fit) else int(self.detail.endswith(ESTIMATED))

    def name(self, number: str | None = None) -> str:
        if self.fault is not None:
            return self.fault.full_name(self.detail, number)
        return self.detail.text(number) if isinstance(self.detail, Fit) and number else str(self.detail)

    def same(self, module: Module, engine: Tensor, value: float | None = None) -> Module | None:
        """The module with this fault in another forward; None: the fault does not exist there.

        value: another value of the fitted number.
        """
        mine = self.detail.value if isinstance(self.detail, Fit) else 0.0
        for other, changes in variants(module, engine, self.fault):
            planted = Planted(fault=self.fault, detail=other)
            if planted.key != self.key:
                continue
            if isinstance(other, Fit) and other.changes is not None:
                changes = other.changes(mine if value is None else value)
            return changed(module, changes)
        return None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Faults that act one after the other."""

    faults: tuple[Planted, ...]

    @property
    def numbers(self) -> int:
        """The description length: free numbers, and one for each further fault."""
        return sum(p.numbers for p in self.faults) + 2 * (len(self.faults) - 1)

    @property
    def fit(self) -> Fit | None:
        """The only number of the candidate, if it has one that can be varied."""
        found = [p.detail for p in self.faults if isinstance(p.detail, Fit) and p.detail.changes is not None]
        return found[0] if len(found) == 1 and "{}" in found[0].words else None

    def name(self, number: str | None = None) -> str:
        return "; ".join(p.name(number if p.detail is self.fit else None) for p in self.faults)

    def words(self) -> str:
        """The name without the number."""
        return self.name("{}") if self.fit is not None else self.name()

    def on(self, module: Module, engine: Tensor, value: float | None = None) -> Module:
        """The module with these faults."""
        for planted in self.faults:
            module = planted.same(module, engine, value if planted.detail is self.fit else None) or module
        return module


def variants(module: Module, engine: Tensor, fault: Fault | None) -> Iterator[tuple[Detail, dict[str, Any]]]:
    if fault is not None:
        try:
            yield from fault.variants(module, engine)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # These inputs do not determine what the fault would fit.
            return
        return
    for detail, output in transformed(module, module().double(), engine):
        yield detail, {"output": output}


def changed(module: Module, changes: dict[str, Any]) -> Module:
    """The module with other arguments; "output" stands for a constant output."""
    if "output" in changes:
        output = changes["output"]
        return replace(module, function=lambda **_: output)
    return replace(module, arguments={**module.arguments, **changes})


def candidates(module: Module, engine: Tensor, before: Candidate | None = None) -> Iterator[tuple[Candidate, Module]]:
    """Every fault of the module's kind, planted.  `before`: a candidate that `module` already has."""
    faults = before.faults if before is not None else ()
    known = sorted((f for f in CATALOGUE if f.kind == module.kind), key=lambda f: f.rare)
    for fault in (*known, None):
        if any(p.fault is fault for p in faults) or (faults and fault is not None and fault.first):
            # The same mistake twice is another variant of it.
            continue
        for detail, changes in variants(module, engine, fault):
            yield Candidate(faults=(*faults, Planted(fault=fault, detail=detail))), changed(module, changes)
