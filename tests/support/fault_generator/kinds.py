"""What a drawn fault is: its kind, its place, its numbers, and how its right name is recognized."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from refmodels.spec import ModelSpec
from tests.support.mutate import Fault

Judgement = Literal["right", "partly", "unknown", "wrong"]
"""partly: the family is right and its number is not said, one of two faults is named, one too many is
named, or what is said is true but says less than there is to say."""
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\s*(?:to|and|\.\.|–|,)\s*({_NUMBER})", re.IGNORECASE)
_AROUND = re.compile(rf"({_NUMBER})\s*(?:±|\+/-|\+-)\s*({_NUMBER})", re.IGNORECASE)
_TITLE = re.compile(r"\b\w+ or \w+(?=[^:]*:)")
"""In "residual missing or doubled: branch scaled by 2" only what follows the title says something."""
_UNNAMED = re.compile(r"^\s*(?:$|unknown|unnamed|not (?:identified|named|known))", re.IGNORECASE)


@dataclass(frozen=True)
class Name:
    """How a right diagnosis may read.

    words: a pattern of the family's words.  values: the numbers of which the text must say one: within `tolerance`
    (relative), or inside an interval that it gives; empty: no number is asked for.  said: words for that number.
    vague: words that are true of the fault, and fewer than there are to say.
    """

    words: str
    values: tuple[float, ...] = ()
    tolerance: float = 0.02
    said: str | None = None
    vague: str | None = None

    def judge(self, text: str) -> Judgement:
        if _UNNAMED.search(text):
            return "unknown"
        text = _TITLE.sub("", text)
        if not re.search(self.words, text, re.IGNORECASE):
            return "partly" if self.vague is not None and re.search(self.vague, text, re.IGNORECASE) else "wrong"
        said = [float(n) for n in re.findall(rf"(?<![\w.]){_NUMBER}", text, re.IGNORECASE)]
        if self.said is not None and re.search(self.said, text, re.IGNORECASE):
            return "right"
        if not self.values or any(self._says(text, said, value) for value in self.values):
            return "right"
        return "wrong" if said else "partly"

    def _says(self, text: str, said: list[float], value: float) -> bool:
        if any(abs(n - value) <= self.tolerance * abs(value) + 1e-12 for n in said):
            return True
        between = [(float(a), float(b)) for a, b in _RANGE.findall(text)]
        around = [(float(a), float(b)) for a, b in _AROUND.findall(text)]
        return any(min(p) <= value <= max(p) for p in between) or any(abs(value - a) <= b for a, b in around)


def judge(text: str | None, names: tuple[Name, ...]) -> Judgement:
    """Judge the first diagnosis of the first culprit; several names are those of several faults in one module."""
    if text is None:
        return "unknown"
    if len([part for part in text.split(";") if ":" in part]) > len(names):
        # A fault more than there are.
        return "partly" if any(name.judge(text) != "wrong" for name in names) else "wrong"
    found = {name.judge(text) for name in names}
    if len(found) == 1:
        return found.pop()
    return "partly" if found & {"right", "partly"} else "wrong"


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One fault in one model.

    tap: where it shows first.  numbers: what was drawn, for reports.  apply: the edit of the graph.
    """

    tap: str
    apply: Fault
    names: tuple[Name, ...]
    numbers: str = ""


@dataclass(frozen=True)
class Draw:
    """What a kind draws from: the model, a layer, its weights as float64 (linear ones [in, out]), and chance."""

    spec: ModelSpec
    layer: int
    chance: random.Random
    weights: Mapping[str, np.ndarray]
    prompt_length: int
    generator: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", np.random.default_rng(self.chance.randrange(2**32)))

    @property
    def path(self) -> str:
        return f"blocks.{self.layer}"

    def other_layer(self) -> int:
        return (self.layer + self.chance.randrange(1, self.spec.layers)) % self.spec.layers

    def between(self, low: float, high: float) -> float:
        return self.chance.uniform(low, high)

    def log_between(self, low: float, high: float) -> float:
        return float(np.exp(self.chance.uniform(np.log(low), np.log(high))))

    def factor(self) -> float:
        """A wrong factor: 0.4 to 0.9 or 1.1 to 2.5."""
        return self.log_between(*self.chance.choice([(0.4, 0.9), (1.1, 2.5)]))

    def order(self, n: int) -> np.ndarray:
        """A permutation that is not the identity."""
        while True:
            order = self.generator.permutation(n)
            if (order != np.arange(n)).any():
                return order


Make = Callable[[Draw], Planted | None]


@dataclass(frozen=True)
class Kind:
    """A module site and an operator; `make` draws its parameters, or None where the model has no such module."""

    site: str
    operator: str
    make: Make

    @property
    def name(self) -> str:
        return f"{self.site}: {self.operator}"


KINDS: dict[str, Kind] = {}


def kind(site: str, operator: str) -> Callable[[Make], Make]:
    """Register a kind of fault."""

    def register(make: Make) -> Make:
        made = Kind(site, operator, make)
        assert made.name not in KINDS, made.name
        KINDS[made.name] = made
        return make

    return register


def hidden_kinds(seed: int) -> frozenset[str]:
    """Half of the kinds of each site, chosen by the seed: their results are reported as counts only."""
    hidden: set[str] = set()
    odd = 0
    for site in sorted({k.site for k in KINDS.values()}):
        names = sorted(k.name for k in KINDS.values() if k.site == site)
        random.Random(f"{site} {seed}").shuffle(names)
        half = (len(names) + odd % 2) // 2
        odd += len(names) % 2
        hidden |= set(names[:half])
    return frozenset(hidden)
