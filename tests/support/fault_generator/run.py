"""Draw faults for one model, run the diff on each, and judge what it says."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import numpy_helper

import refmodels
from debug.capture.capture import Capture, capture_engine
from debug.capture.prompts import random_prompts
from debug.comparison.compare import MULTIPLE, diff_capture
from debug.comparison.results import DiffResult
from export.bundle import export_model
from refmodels.dtypes import DTYPES
from refmodels.errors import LogitLockError
from refmodels.taps import is_cache_tap
from tests.support.fault_generator import SITES
from tests.support.fault_generator.kinds import KINDS, Draw, Kind, Planted, judge
from tests.support.goldens import GOLDENS, case_source
from tests.support.mutants import TappedEngine
from tests.support.mutate import LoadedBundle
from trt_runtime.bundle import Bundle

assert SITES
Outcome = Literal["right", "partly", "unknown", "wrong", "wrong tap", "missed", "below the floor", "crashed"]
LEAST = {"tap": 0.99, "right": 0.8}
MOST = {"wrong": 0.02}
"""Of mutants above the floor, the least shares with the right first tap and the right name, and the largest with a
wrong name, that the test asserts; of clean engines none may raise an alarm."""
_TRIES = 20
_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Result:
    """One mutant and what the diff said.  change: the local change at the planted tap, in noise floors."""

    model: str
    precision: str
    kind: str
    site: str
    layer: int
    numbers: str
    planted: str
    change: float
    first_tap: str | None
    diagnosis: str | None
    outcome: Outcome


@dataclass(frozen=True)
class Clean:
    """An engine without a fault: its taps, and their floors."""

    capture: Capture
    floors: dict[str, float]
    aligned: bool


class Model:
    """One model in one precision, exported once.  `name`: a golden case or a family name (its toy)."""

    def __init__(self, name: str, precision: str, directory: Path) -> None:
        self.name, self.precision = name, precision
        source = case_source(name) if (GOLDENS / name).is_dir() else refmodels.resolve(name)
        self.spec = source.spec
        self.truth = refmodels.load(source, dtype=torch.float64)
        self.rounded = refmodels.load(source, dtype=DTYPES[precision])  # type: ignore[index]
        lengths = (20, 13, 9) if self.spec.attention.logn_seq_length is None else (90, 13, 9)
        self.prompts = random_prompts(self.spec.vocab_size, lengths, seed=1)
        target = directory / f"{name} {precision}"
        export_model(source, precision=precision, attention="decomposed", output=target)  # type: ignore[arg-type]
        self.loaded = LoadedBundle(target)
        self.directory = directory / f"{name} {precision} mutant"
        self.weights = {i.name: _float64(i) for i in self.loaded.model.graph.initializer}
        self.clean = self._clean()

    def _clean(self) -> Clean:
        capture = self.capture(self.loaded.bundle)
        result = diff_capture(capture, self.truth, self.rounded)
        floors: dict[str, float] = {}
        for tap in result.taps:
            # The worst token of a healthy engine, which is what the diff divides by at most.
            floor = max(tap.floor * tap.floor_spread, tap.floor_bound)
            floors[tap.tap] = max(floor, floors.get(tap.tap, 0.0))
        return Clean(capture, floors, result.aligned)

    def capture(self, bundle: Bundle, tokens: torch.Tensor | None = None) -> Capture:
        return capture_engine(TappedEngine(bundle, emulate_rounding=True, threads=1), self.prompts, steps=_STEPS,
                              tokens=tokens)  # fmt: skip

    def draw(self, kind: Kind, chance: random.Random) -> tuple[Planted, int] | None:
        layer = chance.randrange(self.spec.layers)
        length = self.prompts.ids.shape[1]
        for where in (layer, *(n for n in range(self.spec.layers) if n != layer)):
            planted = kind.make(Draw(self.spec, where, chance, self.weights, length))
            if planted is not None:
                return planted, where
        return None

    def run(self, kind: Kind, seed: object) -> Result | None:
        """One mutant of a kind; None where the model has no such module.  Draws that change nothing are drawn again."""
        chance = random.Random(f"{kind.name} {self.name} {self.precision} {seed}")
        for _ in range(_TRIES):
            drawn = self.draw(kind, chance)
            if drawn is None:
                return None
            planted, layer = drawn
            mutant = self.loaded.mutant(planted.apply, self.directory)
            try:
                capture = self.capture(mutant, self.clean.capture.tokens)
            except LogitLockError as error:
                raise AssertionError(f"{self.name} {self.precision}: {kind.name} does not run: {error}") from error
            change = change_at(self.clean, capture, planted.tap)
            if change == 0.0 and not _differs(self.clean.capture, capture):
                continue
            try:
                result = diff_capture(capture, self.truth, self.rounded)
            except Exception as error:  # whatever the diff raises is a result of it
                result = None
                outcome, first, text = "crashed", None, f"{type(error).__name__}: {error}"
            if result is not None:
                outcome, first, text = _outcome(result, planted, change)
            return Result(
                model=self.name, precision=self.precision, kind=kind.name, site=kind.site, layer=layer,
                numbers=planted.numbers, planted=planted.tap, change=change, first_tap=first, diagnosis=text,
                outcome=outcome,  # type: ignore[arg-type]
            )  # fmt: skip
        raise AssertionError(f"{self.name}: {_TRIES} draws of {kind.name} changed nothing")


def _outcome(result: DiffResult, planted: Planted, change: float) -> tuple[str, str | None, str | None]:
    first = result.culprits[0] if result.culprits else None
    text = first.diagnosis[0].fault if first is not None and first.diagnosis else None
    if first is not None and first.tap == planted.tap:
        return judge(text, planted.names), first.tap, text
    order = [tap.tap for tap in result.taps]
    earlier = first is not None and order.index(first.tap) < order.index(planted.tap)
    if change <= MULTIPLE and not earlier:
        # What shows further down is then a consequence that adds up, or nothing.
        return "below the floor", first.tap if first else None, text
    return ("missed" if first is None else "wrong tap"), first.tap if first else None, text


def _float64(initializer: onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(initializer).astype(np.float64)


def _steps(clean: Capture, mutant: Capture, tap: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A tap of the clean and of the broken engine, [tokens, width] of real tokens, forward by forward."""
    for right, wrong in zip(clean.forwards, mutant.forwards, strict=True):
        a, b = right.tensors[tap].double(), wrong.tensors[tap].double()
        if is_cache_tap(tap):
            a, b = (t.transpose(1, 2).flatten(2) for t in (a, b))
            real = right.inputs.attention_mask != 0
        else:
            real = right.inputs.new_mask
        yield a[real], b[real]


def change_at(clean: Clean, mutant: Capture, tap: str) -> float:
    """The largest change of a token at a tap, relative to the token, in noise floors of the healthy engine.

    Only the first forward that changes is looked at: everything before the tap is there the same in both engines.
    """
    for right, wrong in _steps(clean.capture, mutant, tap):
        difference = (wrong - right).norm(dim=-1)
        if not bool((difference == 0).all()):
            size = right.norm(dim=-1)
            relative = torch.where(difference == 0, 0.0, difference / size.clamp(min=1e-300))
            largest = float(relative.nan_to_num(nan=float("inf")).max())
            return largest / clean.floors[tap] if clean.floors[tap] else float("inf")
    return 0.0


def _differs(clean: Capture, mutant: Capture) -> bool:
    return any(not torch.equal(a, b) for tap in clean.tap_names for a, b in _steps(clean, mutant, tap))


def results(
    models: Sequence[str],
    precisions: Sequence[str],
    kinds: Sequence[str],
    *,
    draws: int,
    seed: int,
    clean: Callable[[str, str, bool], None],
) -> Iterator[Result]:
    """`draws` mutants of every kind in every model that has its module; `clean` is told of each healthy engine."""
    for name in models:
        for precision in precisions:
            with tempfile.TemporaryDirectory() as directory:
                model = Model(name, precision, Path(directory))
                clean(name, precision, model.clean.aligned)
                for kind in kinds:
                    for number in range(draws):
                        found = model.run(KINDS[kind], f"{seed} {number}")
                        if found is None:
                            break
                        yield found


COUNTED = ("right", "partly", "unknown", "wrong")


def rates(found: Sequence[Result]) -> dict[str, float]:
    """tap: share with the right first tap; right, partly, unknown, wrong: of all above the floor.

    A mutant that is found at another tap, missed, or crashes has a wrong tap and no name.
    """
    counted = [r for r in found if r.outcome != "below the floor"]
    total = max(len(counted), 1)
    shares = {name: sum(r.outcome == name for r in counted) / total for name in COUNTED}
    return {"mutants": len(counted), "tap": sum(r.outcome in COUNTED for r in counted) / total, **shares,
            "below": len(found) - len(counted)}  # fmt: skip


def sample(
    models: Sequence[str], precisions: Sequence[str], count: int, *, seed: int
) -> tuple[list[Result], list[bool]]:
    """A fixed sample: `count` kinds, one draw each, dealt in turn to the models and precisions; and which clean engines
    are aligned."""
    kinds = sorted(KINDS)
    random.Random(seed).shuffle(kinds)
    found: list[Result] = []
    with tempfile.TemporaryDirectory() as directory:
        engines = [Model(name, precision, Path(directory)) for name in models for precision in precisions]
        for number, name in enumerate(kinds):
            turn = number % len(engines)
            tried = (model.run(KINDS[name], seed) for model in (*engines[turn:], *engines[:turn]))
            result = next((r for r in tried if r is not None), None)
            if result is not None and len(found) < count:
                found.append(result)
            if len(found) == count:
                break
        return found, [model.clean.aligned for model in engines]
