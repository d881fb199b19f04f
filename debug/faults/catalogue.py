"""What a fault is, and the list of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from debug.modules import Kind, Module

Variants = Iterator[tuple[str, dict[str, Any]]]
"""(detail, changed arguments); the detail completes the fault's name and may be empty."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A mistake by name.

    kind: of the modules that it can befall.  variants: from the module as it should be and the engine's output.
    """

    name: str
    kind: Kind
    variants: Callable[[Module, Tensor], Variants]


CATALOGUE: list[Fault] = []


def fault(name: str, *kinds: Kind) -> Callable[[Callable[[Module, Tensor], Variants]], Callable[..., Variants]]:
    def register(variants: Callable[[Module, Tensor], Variants]) -> Callable[[Module, Tensor], Variants]:
        CATALOGUE.extend(Fault(name=name, kind=kind, variants=variants) for kind in kinds)
        return variants

    return register
