"""Why a module is wrong: plant hypotheses in the reference module, and see which one reproduces the engine.

The module runs in fp64 on the engine's own inputs.  A hypothesis is a fault of the catalogue, whose numbers are fitted
to the engine, or two faults at once.  It explains the engine if, with it, the output is as near to the engine's as a
healthy module's is, wherever the module runs: in the prefill and in every decode step, in every row.  Where the engine
is right without it, the fault is said to be in the rest only ("in decode only").  Of several explanations the simplest
comes first: an exact fault before one number, one number before many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from debug.capture.capture import Forward
from debug.comparison.candidates import Candidate, candidates, changed
from debug.comparison.evidence import evidence_of
from debug.comparison.faults.catalogue import ESTIMATED, MANY
from debug.comparison.faults.generic import on_a_grid, rounded_sums, stored_as
from debug.comparison.faults.pairs import LARGEST, SMALL
from debug.comparison.intervals import described, interval, roundest
from debug.comparison.metrics import compare
from debug.comparison.modules import Module
from debug.comparison.regions import region
from debug.comparison.results import Diagnosis, Evidence
from debug.comparison.stage import Stage, by_token, stages_of
from refmodels.dtypes import torch_name
from refmodels.model import Decoder

_MOST = 5
"""Maximum number of diagnoses per tap: two faults may be equal on these inputs, but a long list does not help."""
_PAIRS = 4
"""If no single fault explains a module, the number of best faults that are tried in pairs; of a large weight one,
and of the largest none, as each hypothesis takes a product with all of it."""
_ALIKE = 1.5
"""Local errors within this factor do not tell two faults apart."""

_OVERFIT = 3.0
"""A fit with a number per row or column leaves less than the noise, as it fits some of it too: with 1.25 tokens per
number, the least that is fitted, 0.45 of it."""

_MORE = 2
"""If an explanation has this number of free numbers more than one that is equally good, it is left out."""


def diagnose(
    tap: str,
    forwards: Sequence[Forward],
    truth: Decoder,
    rounded: Decoder,
    *,
    bounds: Sequence[float],
    multiple: float,
    dtype: torch.dtype,
) -> tuple[list[Diagnosis], Evidence]:
    """The faults that explain the engine's output at `tap`, the best one first (none: unknown), and where the error is.

    Args:
        tap, forwards: the culprit and every forward of the capture.
        truth, rounded: the reference in fp64 and in the engine's dtype and numerics.
        bounds: lower bound of the tap's relative floor in each forward (`debug.comparison.bounds.lower_bound`).
        multiple: number of noise floors that a healthy module may be off.
        dtype: the engine's dtype.
    """
    try:
        stages = stages_of(tap, forwards, truth, rounded, bounds=bounds, multiple=multiple)
    except KeyError:
        # The executor does not record the module's inputs.
        return [], Evidence()
    search = _Search(stages, multiple, dtype)
    first = stages[0]
    before = compare(by_token(first.engine, first.module), by_token(first.expected, first.module), first.real, dtype)
    return search.result(), evidence_of(first.module, first.engine, first.expected, before, first.allowed)


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """A candidate, the first stage's module with and without its last fault, and what is left of the local error."""

    candidate: Candidate
    planted: Module
    base: Module
    after: float
    ratio: float
    where: str = ""
    numbers: int = 0


class _Search:
    def __init__(self, stages: Sequence[Stage], multiple: float, dtype: torch.dtype) -> None:
        self.stages, self.multiple, self.dtype = stages, multiple, dtype
        self.before = self._left(stages[0], stages[0].expected)[0]

    def result(self) -> list[Diagnosis]:
        first = self.stages[0]
        single = list(self._tried(first.module))
        found = self._explaining(single)
        if not found:
            rounding = self._of_rounding()
            if rounding:
                return rounding
            # Two faults in one module: plant every fault on top of each of the best ones.
            # A number per row and another fault would explain anything.
            single = [t for t in single if t.candidate.numbers < MANY]
            helping = sorted((t for t in single if t.after < self.before), key=lambda t: t.after)
            size = first.module["weight"].numel() if first.module.kind == "linear" else 0
            pairs = _PAIRS if size <= SMALL else int(size <= LARGEST)
            helping = helping[:pairs]
            for t in helping:
                both = self._tried(t.planted, t.candidate)
                found += self._explaining([b for b in both if b.candidate.numbers < MANY])
        best = _best(found)
        # Faults that explain it equally well: the simplest first, then in the order of the catalogue.
        found.sort(key=lambda t: (max(t.after, _ALIKE * best), t.numbers))
        return self._diagnoses(_simplest(found, _ALIKE * best), _ALIKE * best)

    def _tried(self, module: Module, before: Candidate | None = None) -> list[_Tried]:
        first, found = self.stages[0], []
        for candidate, planted in candidates(module, first.engine, before):
            after, ratio = self._left(first, planted().double())
            found.append(_Tried(candidate=candidate, planted=planted, base=module, after=after, ratio=ratio))
        return found

    def _left(self, stage: Stage, output: Tensor) -> tuple[float, float]:
        """Relative error of the engine against an output, and the largest of a token in noise floors."""
        off, allowed, size = stage.errors(output)
        ratio = float((off / allowed).nan_to_num(nan=float("inf")).max())
        after = float(off.norm() / size.norm().clamp(min=1e-300))
        return after if after == after else float("inf"), ratio

    def _explains(self, stage: Stage, output: Tensor) -> tuple[Tensor, bool]:
        """[tokens] the tokens that it does not explain, and whether it explains the others as a healthy module would.

        A worst token may be off by the multiple, which has a factor of 2 for its being the worst (see
        `debug.comparison.compare.MULTIPLE`); all tokens together may not.
        """
        off, allowed, _ = stage.errors(output)
        ratio = (off / allowed).nan_to_num(nan=float("inf"))
        bad = ratio > self.multiple
        kept = ~bad & (stage.before > self.multiple)
        whole = float(off[kept].norm() / allowed[kept].norm()) if bool(kept.any()) else 0.0
        return bad, whole <= self.multiple / 2

    def _explaining(self, tried: Sequence[_Tried]) -> list[_Tried]:
        """Those that explain the engine in all forwards, with the region in which they do."""
        found = []
        for t in tried:
            if t.after >= self.before and t.ratio > self.multiple:
                continue
            place = self._region(t)
            if place is not None:
                where, numbers = place
                found.append(replace(t, where=where, numbers=t.candidate.numbers + numbers))
        return found

    def _region(self, t: _Tried) -> tuple[str, int] | None:
        bad, needed, places = [], [], []
        for i, stage in enumerate(self.stages):
            module = t.candidate.on(stage.module, stage.engine) if i else t.planted
            output = module().double()
            unexplained, good = self._explains(stage, output)
            wrong = stage.before > self.multiple
            if not good or bool((unexplained & wrong).any()):
                return None
            bad.append(unexplained.cpu())
            needed.append(wrong.cpu())
            places.append(stage.place)
        if not any(bool(n.any()) for n in needed):
            return None
        return region(torch.cat(places), torch.cat(needed), torch.cat(bad))

    def _diagnoses(self, found: Sequence[_Tried], alike: float) -> list[Diagnosis]:
        half = self.dtype in (torch.float16, torch.bfloat16)
        diagnoses: list[Diagnosis] = []
        for t in found:
            if len(diagnoses) == _MOST:
                break
            fit, ends, name, value = t.candidate.fit, None, t.candidate.name(), None
            if fit is not None and fit is t.candidate.faults[-1].detail:
                ends = self._interval(t)
                value = roundest(fit.value, *ends)
                number = described(fit.value, *ends, half=half)
                name = t.candidate.name(number) + (f" {ESTIMATED}" if fit.numbers else "")
                # Another value of the same number that the interval holds already is no other diagnosis.
                words = t.candidate.words() + (f", {t.where}" if t.where else "")
                if any(d.words == words and _within(fit.value, d) for d in diagnoses):
                    continue
            where = f", {t.where}" if t.where else ""
            if any(d.fault == name + where for d in diagnoses):
                continue
            diagnoses.append(
                Diagnosis(
                    fault=name + where,
                    local_before=self.before,
                    local_after=t.after,
                    ratio_after=t.ratio,
                    words=t.candidate.words() + where,
                    value=value,
                    low=ends[0] if ends else None,
                    high=ends[1] if ends else None,
                    note=self._tie(t, found[0]) if diagnoses and t.after <= alike else "",
                )
            )
        return diagnoses

    def _interval(self, t: _Tried) -> tuple[float, float]:
        fit, stage = t.candidate.fit, self.stages[0]
        assert fit is not None and fit.changes is not None

        def explains(value: float) -> bool:
            assert fit is not None and fit.changes is not None
            bad, good = self._explains(stage, changed(t.base, fit.changes(value))().double())
            return good and not bool((bad & (stage.before > self.multiple)).any())

        return interval(explains, fit.value, fit.least, fit.most)

    def _tie(self, t: _Tried, best: _Tried) -> str:
        """The inputs or the precision that would tell apart two explanations that are equally good here."""
        stage = self.stages[0]
        one, two = (stage.rows(c.planted().double()) for c in (t, best))
        if float((one - two).norm()) <= 1e-9 * float(two.norm()):
            return (
                "the same as the first on these inputs; other prompts (longer, or of unequal lengths) tell them apart"
            )
        return "within the noise of the first; the fp32 bundle, whose noise is smaller, tells them apart"

    def _of_rounding(self) -> list[Diagnosis]:
        """Faults of rounding, which no exact output explains, recognized from the pattern of the error."""
        first = self.stages[0]
        shown, right = first.rows(first.engine), first.rows(first.expected)
        narrow = stored_as(shown, self.dtype)
        if narrow is not None:
            name, after = f"output rounded to {torch_name(narrow)}", right.to(narrow).double()
        elif (grid := on_a_grid(shown, right, self.dtype)) is not None:
            name, after = grid
            if float((shown - after).norm()) > 0.5 * float((shown - right).norm()):
                # The values lie on a grid, but not because the right ones were rounded to it.
                return []
        elif rounded_sums(first.module, shown - right, right, self.dtype):
            name, after = f"wrong dtype accumulate: sums rounded in {torch_name(self.dtype)}", right
        else:
            return []
        left = float((shown - after).norm() / right.norm())
        return [Diagnosis(fault=name, local_before=self.before, local_after=left, ratio_after=0.0, words=name)]


def _best(found: Sequence[_Tried]) -> float:
    """The local error that the best explanation leaves, of those that cannot have fitted the noise if there are any."""
    least = min((t.numbers // MANY for t in found), default=0)
    few = min((t.after for t in found if t.numbers // MANY == least), default=0.0)
    many = min((t.after for t in found if t.numbers // MANY > least), default=float("inf"))
    return min(few, _OVERFIT * many)


def _simplest(found: Sequence[_Tried], alike: float) -> list[_Tried]:
    """Without those that need far more numbers than another, or more numbers of the same fault."""
    kept: list[_Tried] = []
    for t in found:
        simpler = [k for k in kept if k.after <= alike and k.numbers < t.numbers]
        same = any([p.fault for p in k.candidate.faults] == [p.fault for p in t.candidate.faults] for k in simpler)
        far = any(k.numbers <= t.numbers - _MORE for k in simpler)
        if not same and not far:
            kept.append(t)
    return kept


def _within(value: float, diagnosis: Diagnosis) -> bool:
    low, high = diagnosis.low, diagnosis.high
    return low is not None and high is not None and low <= value <= high
