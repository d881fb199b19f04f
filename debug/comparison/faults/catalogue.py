"""The type of a fault, and the list of all faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from debug.comparison.modules import Kind, Module

Variants = Iterator[tuple[str, dict[str, Any]]]
"""(detail, changed arguments); the detail completes the fault's name and may be empty."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A named mistake.

    kind: kind of module this fault applies to.  variants: takes the right module and the engine's output.  small: the
    fault can be smaller than the rounding of half precision (see `debug.comparison.systematic`).
    """

    name: str
    kind: Kind
    variants: Callable[[Module, Tensor], Variants]
    small: bool = False

    def full_name(self, detail: str) -> str:
        return f"{self.name}: {detail}" if detail else self.name


CATALOGUE: list[Fault] = []
ESTIMATED = "(estimated)"
"""Ends the detail of a variant whose number was fitted to the engine."""


_Function = Callable[[Module, Tensor], Variants]


def fault(name: str, *kinds: Kind, small: bool = False) -> Callable[[_Function], _Function]:
    """Add a function to the catalogue."""

    def register(variants: _Function) -> _Function:
        CATALOGUE.extend(Fault(name=name, kind=kind, variants=variants, small=small) for kind in kinds)
        return variants

    return register
