"""The type of a fault, and the list of all faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from debug.comparison.modules import Kind, Module

ESTIMATED = "(estimated)"
"""Ends the detail of a variant whose number was fitted to the engine."""
MANY = 1000
"""`Fit.numbers` of a fit with a free number per row, per column or per group."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The detail of a variant that has numbers.

    words: the detail, with {} in place of the number, if it is one.  value: the number.  changes: the changed arguments
    for another value of the number, for its interval and for other forwards; None: they cannot be had.  numbers: how
    many free numbers were fitted to the engine; 0: the value is from a list.  key: what the same variant has in common
    in all forwards, if not the words (which may contain further numbers).  least, most: the range of the number.

    A fit is checked in all forwards: it should be yielded in each of them, also in those in which the engine is right.
    """

    words: str
    value: float = 0.0
    changes: Callable[[float], dict[str, Any]] | None = field(default=None, compare=False)
    numbers: int = 1
    key: str | None = None
    least: float = float("-inf")
    most: float = float("inf")

    def text(self, number: str | None = None) -> str:
        return self.words.replace("{}", f"{self.value:.5g}" if number is None else number)

    def __str__(self) -> str:
        return f"{self.text()} {ESTIMATED}" if self.numbers else self.text()


Detail = str | Fit
Variants = Iterator[tuple[Detail, dict[str, Any]]]
"""(detail, changed arguments); the detail completes the fault's name and may be empty.

A string is a simple fact.  A `Fit` has numbers; a string that ends with `ESTIMATED` counts as one with a single number.
"""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A named mistake.

    kind: kind of module this fault applies to.  variants: takes the right module and the engine's output.  small: the
    fault can be smaller than the rounding of half precision (see `debug.comparison.systematic`).  rare: of two faults
    that explain the engine equally well, the other one comes first.  first: it has hundreds of variants or long
    fits, and is only tried as the first of two faults.
    """

    name: str
    kind: Kind
    variants: Callable[[Module, Tensor], Variants]
    small: bool = False
    rare: bool = False
    first: bool = False

    def full_name(self, detail: Detail, number: str | None = None) -> str:
        text = detail.text(number) if isinstance(detail, Fit) and number is not None else str(detail)
        return f"{self.name}: {text}" if text else self.name


CATALOGUE: list[Fault] = []


_Function = Callable[[Module, Tensor], Variants]


def fault(
    name: str, *kinds: Kind, small: bool = False, rare: bool = False, first: bool = False
) -> Callable[[_Function], _Function]:
    """Add a function to the catalogue."""

    def register(variants: _Function) -> _Function:
        CATALOGUE.extend(
            Fault(name=name, kind=kind, variants=variants, small=small, rare=rare, first=first) for kind in kinds
        )
        return variants

    return register
