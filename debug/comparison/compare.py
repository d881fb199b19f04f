"""`logitlock diff`: an engine against the reference, tap by tap, with the noise floor of its dtype.

The engine runs without taps, as it ships, and with taps, on a prompt and on its own greedy tokens.  The reference then
runs once over all of these tokens in a batch of two halves:

1. on the token ids: **accumulated** error;
2. with the engine's captured tensors in place of its own, so that every module runs on the engine's own inputs and its
   output is compared with the engine's: **local** error.  A healthy module after a broken one has accumulated but no
   local error.

It does so in fp64 with `exact` numerics (the truth) and in the engine's dtype and numerics (the noise floor of both).
One pass over all tokens computes the same as step by step, and reads each weight once.

The first tap whose local error exceeds `MULTIPLE` floors is the culprit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debug.capture.capture import Capture, capture_engine
from debug.capture.prompts import Prompts
from debug.capture.streaming import Reference, decoder_of, ready, ready_at
from debug.comparison.bounds import lower_bound, sigmoid_bound
from debug.comparison.code_flips import CodeFlips
from debug.comparison.diagnose import diagnose
from debug.comparison.faults.generic import stored_as
from debug.comparison.logits import LogitComparison
from debug.comparison.metrics import TokenErrors, row_errors, rows_of
from debug.comparison.results import (
    TRUTH_ARITHMETIC,
    Culprit,
    Diagnosis,
    DiffResult,
    Evidence,
    LogitError,
    Phase,
    TapError,
)
from debug.comparison.systematic import KINDS, systematic
from export.progress import Progress, silent
from refmodels.dtypes import torch_name, unit_roundoff
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder, recording
from refmodels.spec import ModelSpec
from refmodels.taps import cache_numbers, is_cache_tap
from trt_runtime.engine import Engine

MULTIPLE = 8.0
"""Number of noise floors of local error above which a tap is faulty.

The floor is the error of one particular order of rounding.  Another correct implementation may round its intermediate
results where the reference rounds once: r independent roundings give sqrt(r) floors.  The longest chain inside one
tapped module is attention with every step stored in the working dtype (scale, two products and a sum of the rotation,
logn, score, bias, maximum, exponential, sum, quotient, product with V: r = 12), so sqrt(12) = 3.5.  Both errors are
norms of n random roundings per token; for the narrowest tensors (n of a few dozen) and the worst of some 10^4 tokens,
the ratio of two such norms reaches about 2.  3.5 x 2 = 7, rounded up to the next power of two.

A fault below this changes a token less than rounding may.  `debug.comparison.systematic` finds some of these faults
from all tokens together; the others show in a diff of the same model's fp32 bundle, whose floor is four orders of
magnitude lower.
"""


def diff_engine(
    engine: Engine,
    truth: Reference,
    rounded: Reference,
    prompts: Prompts,
    *,
    steps: int = 8,
    multiple: float = MULTIPLE,
) -> DiffResult:
    """Compare an engine with the reference over one prefill and `steps` decode steps.

    Args:
        engine: the engine to test.
        truth: the reference in fp64, `exact`.
        rounded: the reference in the engine's dtype and numerics; it gives the noise floor.
        prompts: at least 8 real tokens per row, so that position and mask faults show.
        steps: number of decode steps; the engine and the reference are fed the engine's greedy tokens.
        multiple: number of floors of local error above which a tap is faulty.
    Raises:
        LogitLockError: engine and reference have different specs, or the prompts are longer than the engine's cache.
    """
    specs = [decoder_of(r).spec for r in (truth, rounded)]
    if engine.spec != specs[0] or specs[0] != specs[1]:
        differing = spec_difference(specs[0], engine.spec)
        raise LogitLockError(f"the engine and the reference are not the same model: they differ in {differing}")
    if not bool((prompts.mask != 0).any(1).all()):
        raise LogitLockError("a prompt is empty: it has no tokens")
    return diff_capture(capture_engine(engine, prompts, steps=steps), truth, rounded, multiple=multiple)


def diff_capture(
    capture: Capture,
    truth: Reference,
    rounded: Reference,
    *,
    multiple: float = MULTIPLE,
    progress: Progress = silent,
) -> DiffResult:
    """Compare the capture of an executor with the reference; arguments as `diff_engine`, and `progress` is told of each
    tap of the two references."""
    with torch.inference_mode():
        return _Diff(capture, truth, rounded, multiple, progress).result()


def spec_difference(model: ModelSpec, engine: ModelSpec) -> str:
    ours, theirs = _flat(model.to_dict()), _flat(engine.to_dict())
    differing = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
    named = [f"{k} (model {ours.get(k)!r}, engine {theirs.get(k)!r})" for k in differing[:3]]
    return ", ".join(named) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class _Pair(Recorder):
    """Two runs in one batch: the first half of the rows on the token ids, the second on the engine's own tensors.

    `sink` receives (name, first half, second half) of every tap; after it, the second half continues with the engine's
    tensor, so that every module of that half runs on the engine's own inputs.
    """

    def __init__(self, engine: Mapping[str, Tensor], sink: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._engine, self._pair_sink = engine, sink

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        kept = cache_numbers(tensor[:, :, : self.live_slots]) if is_cache_tap(name) else tensor
        self._pair_sink(name, *kept.chunk(2))
        if name not in self._engine:
            return tensor
        own = self._engine[name].to(device=tensor.device, dtype=tensor.dtype)
        return torch.cat([tensor[: len(own)], own])


class _Diff:
    def __init__(
        self, capture: Capture, truth: Reference, rounded: Reference, multiple: float, progress: Progress
    ) -> None:
        self.capture, self.truth, self.rounded, self.multiple = capture, truth, rounded, multiple
        self.progress = progress
        self.unit = unit_roundoff(capture.dtype)
        self.whole = capture.whole()
        self.floors: dict[str, tuple[Tensor, Tensor]] = {}
        self.errors: dict[str, list[_Errors]] = {}
        self.flips = CodeFlips(decoder_of(truth))
        self.narrow: dict[str, str] = {}
        self.taps: list[TapError] = []
        self.logits = LogitComparison()

    def result(self) -> DiffResult:
        self._run("noise floor", self.rounded, self._keep_floor)
        self._run("fp64 reference", self.truth, self._compare)
        for step in range(self.capture.steps + 1):
            for tap in self.capture.tap_names:
                self.taps.append(self._tap_error(tap, step))
        logits = self.logits.result()
        culprits = self._culprits(logits)
        spoiled = logits.nonfinite or any(t.nonfinite for t in self.taps)
        name = torch_name(self.capture.dtype)
        return DiffResult(
            verdict="nonfinite" if spoiled else "diverged" if culprits else "aligned",
            culprits=culprits,
            taps=self.taps,
            logits=logits,
            observer_effect=self.logits.observer_effect(),
            reference=TRUTH_ARITHMETIC,
            floor=f"PyTorch reference in {name}, {decoder_of(self.rounded).numerics} numerics, on the same inputs",
            engine=self.capture.arithmetic,
            multiple=self.multiple,
            unit_roundoff=self.unit,
            prompts=self.capture.prompts.origin,
            prompt_lengths=self.capture.prompts.mask.sum(1).tolist(),
            steps=self.capture.steps,
            logit_tokens=self.logits.tokens(self.whole.inputs, self.capture.prompts.ids.shape[1]),
        )

    def _run(self, what: str, reference: Reference, sink: Callable[[str, Tensor, Tensor], None]) -> None:
        done = itertools.count(1)

        def counted(name: str, accumulated: Tensor, local: Tensor) -> None:
            sink(name, accumulated, local)
            self.progress(what, next(done), len(self.capture.tap_names))

        inputs = self.whole.inputs
        twice = dataclasses.replace(
            inputs,
            **{
                f.name: torch.cat([v, v])
                for f in dataclasses.fields(inputs)
                if (v := getattr(inputs, f.name)) is not None
            },
        )
        with ready(reference) as decoder, recording(_Pair(self.whole.tensors, counted)):
            batch, slots = twice.attention_mask.shape
            decoder.run(twice, decoder.new_cache(batch=batch, capacity=slots))

    def _keep_floor(self, name: str, accumulated: Tensor, local: Tensor) -> None:
        if name in self.capture.tap_names:
            # Cache tensors are views of buffers, whose slots later tokens do not overwrite.
            self.floors[name] = accumulated, local

    def _compare(self, name: str, accumulated: Tensor, local: Tensor) -> None:
        """Compare engine and floor with each tensor of the fp64 run when it is computed, so that none has to be
        kept."""
        if name not in self.capture.tap_names:
            return
        floors = self.floors.pop(name)
        if is_cache_tap(name):
            seen = self.whole.inputs.attention_mask != 0
            last = self.capture.forwards[-1].tensors[name].transpose(1, 2)
            self._look_at_storage(name, last[seen], floors[1].transpose(1, 2)[seen])
            self.errors[name] = [
                _Errors.of(
                    engine, slots, (accumulated, local), floors, self.capture.dtype, self.flips.of_cache(name, engine)
                )
                for engine, slots in self._written(name)
            ]
            return
        real = self.whole.inputs.new_mask
        engine = self.whole.tensors[name]
        self._look_at_storage(name, engine[real], floors[1][real])
        least = self.flips.of(name, self.whole.tensors)
        if least is None:
            least = sigmoid_bound(self.capture.spec, name, self.whole.tensors, self.capture.dtype)
        both = _Errors.of(engine, real, (accumulated, local), floors, self.capture.dtype, least)
        # The tokens of step n are the columns from bounds[n] to bounds[n + 1].
        column = both.local.token_of[:, 1]
        length = self.capture.prompts.ids.shape[1]
        bounds = [0, *range(length, length + self.capture.steps + 1)]
        self.errors[name] = [
            both.only((column >= start) & (column < stop), first=start) for start, stop in itertools.pairwise(bounds)
        ]
        if name == "logits":
            untapped = torch.cat(list(self.capture.untapped), 1)
            self.logits.add(accumulated[real], floors[0][real], untapped[real], engine[real])

    def _look_at_storage(self, name: str, engine: Tensor, floor: Tensor) -> None:
        """If all numbers fit a narrower dtype, they were rounded to it, unless the reference's own numbers fit it
        too."""
        narrow = stored_as(engine, self.capture.dtype)
        if narrow is not None and stored_as(floor, self.capture.dtype) is None:
            self.narrow[name] = torch_name(narrow)

    def _written(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step, the engine's cache and the slots [batch, slots] that it has written in this step.

        These are the slots of the new tokens, and old slots that have changed: if a cache is only appended to, each
        slot has to be judged once.
        """
        for forward in self.capture.forwards:
            now, before = forward.tensors[name], forward.before[name]
            visible = forward.inputs.attention_mask != 0
            old = before.shape[2]
            written = torch.ones_like(visible)
            written[:, :old] = (now[:, :, :old] != before).any(3).any(1)
            yield now, written & visible

    def _tap_error(self, tap: str, step: int) -> TapError:
        errors = self.errors[tap][step]
        bound = lower_bound(self.capture.spec, tap, self.capture.dtype, slots=self.whole.inputs.attention_mask.shape[1])
        accumulated, accumulated_floor = errors.accumulated.stats(), errors.accumulated_floor.stats()
        local, local_floor = errors.local.stats(), errors.local_floor.stats()
        # For a token whose floor happens to be small, the floor of the whole tensor counts.  If the dtype overflows in
        # the floor's run but not in the engine, only the bound is known.
        whole = local_floor.rel_l2 if math.isfinite(local_floor.rel_l2) else 0.0
        least = errors.least.clamp(min=max(whole, bound))
        floor = torch.maximum(local_floor.token_rel.nan_to_num(nan=0.0, posinf=0.0), least)
        bound = max(bound, float(errors.least.mean()) if len(errors.least) else 0.0)
        ratios = local.token_rel / floor
        worst = int(ratios.nan_to_num(nan=float("inf")).argmax())
        phase: Phase = "decode" if step else "prefill"
        row, position = local.token_of[worst].tolist()
        return TapError(
            tap=tap,
            phase=phase,
            step=step,
            accumulated=accumulated.rel_l2,
            max_abs=accumulated.max_abs,
            cosine=accumulated.cosine,
            ulp=accumulated.ulp,
            snr_db=accumulated.snr_db,
            accumulated_floor=accumulated_floor.rel_l2,
            local=local.rel_l2,
            local_max_abs=local.max_abs,
            floor=local_floor.rel_l2,
            floor_spread=float(local_floor.token_rel.max()) / local_floor.rel_l2 if local_floor.rel_l2 else 1.0,
            floor_bound=bound,
            ratio=float(ratios[worst]),
            accumulated_ratio=accumulated.rel_l2 / max(accumulated_floor.rel_l2, bound),
            worst=(row, position),
            nonfinite=accumulated.nonfinite,
            floor_nonfinite=accumulated_floor.nonfinite,
        )

    def _culprits(self, logits: LogitError) -> list[Culprit]:
        """Faulty taps, each at its first occurrence, in the order of execution."""
        found: dict[str, list[TapError]] = {}
        for error in self.taps:
            # Not greater-or-equal: a NaN from NaN inputs is a consequence; the first NaN has nonfinite set.
            if error.ratio > self.multiple:
                found.setdefault(error.tap, []).append(error)
        spoiled = next((error for error in self.taps if error.nonfinite), None)
        if spoiled is not None:
            found.setdefault(spoiled.tap, []).append(spoiled)
        culprits = [self._culprit(errors) for errors in found.values()]
        culprits += self._systematic({c.tap for c in culprits})
        if not culprits:
            # Modules that are each within R of their own floors pass on about R accumulated floors.
            explained = max(1.0, *(e.local / max(e.floor, self.unit) for e in self.taps))
            limit = self.multiple * explained
            # One flipped code anywhere has an effect on the logits, but the floor may have no flip.
            least = max(self.unit, self.flips.largest)
            if logits.rel_l2 > limit * max(logits.floor_rel_l2, least) or logits.nonfinite:
                beyond = (e for e in self.taps if e.accumulated_ratio > limit)
                first = next(beyond, next(e for e in self.taps if e.tap == "logits"))
                culprits.append(self._culprit([first], accumulated=True))
        order = {tap: i for i, tap in enumerate(self.capture.tap_names)}
        return sorted(culprits, key=lambda c: (c.step, order[c.tap]))

    def _culprit(self, errors: list[TapError], *, accumulated: bool = False) -> Culprit:
        first = errors[0]
        diagnosis, evidence = ([], Evidence()) if accumulated or first.nonfinite else self._diagnose(first)
        return Culprit(
            tap=first.tap,
            phase=first.phase,
            step=first.step,
            kind="accumulated" if accumulated else "nonfinite" if first.nonfinite else "local",
            local=first.local,
            floor=first.floor,
            ratio=first.accumulated_ratio if accumulated else first.ratio,
            worst=first.worst,
            occurrences=len(errors),
            diagnosis=diagnosis,
            evidence=evidence,
        )

    def _systematic(self, known: set[str]) -> list[Culprit]:
        """Taps below the alarm that deviate, over all tokens, exactly as a known fault would make them deviate."""
        found = []
        for error in self.taps[: len(self.capture.tap_names)]:
            if error.tap in known or error.nonfinite:
                continue
            if error.tap in self.narrow:
                name = f"output rounded to {self.narrow[error.tap]}"
                rounding = Diagnosis(fault=name, local_before=error.local, local_after=error.floor, ratio_after=0.0)
                found.append(self._below_the_alarm(error, rounding))
                continue
            if self.capture.spec.taps[error.tap].kind not in KINDS:
                # Before its weights are loaded: those of a streamed reference are most of the model.
                continue
            weights = (ready_at(reference, error.tap, alone=True) for reference in (self.truth, self.rounded))
            with next(weights) as truth, next(weights) as rounded:
                diagnosis = systematic(error.tap, self.whole, truth, rounded, self.whole.inputs.new_mask)
            if diagnosis is not None:
                found.append(self._below_the_alarm(error, diagnosis))
        return found

    def _below_the_alarm(self, error: TapError, diagnosis: Diagnosis) -> Culprit:
        return Culprit(
            tap=error.tap,
            phase=error.phase,
            step=error.step,
            kind="systematic",
            local=error.local,
            floor=error.floor,
            ratio=error.ratio,
            worst=error.worst,
            occurrences=self.capture.steps + 1,
            diagnosis=[diagnosis],
        )

    def _diagnose(self, error: TapError) -> tuple[list[Diagnosis], Evidence]:
        with ready_at(self.truth, error.tap) as truth, ready_at(self.rounded, error.tap) as rounded:
            return diagnose(
                error.tap,
                self.capture.forwards,
                truth,
                rounded,
                bounds=[e.floor_bound for e in self.taps if e.tap == error.tap],
                multiple=self.multiple,
                dtype=self.capture.dtype,
            )


@dataclass(frozen=True)
class _Errors:
    """Engine and floor against the fp64 reference, on the token ids and on the engine's own inputs."""

    accumulated: TokenErrors
    accumulated_floor: TokenErrors
    local: TokenErrors
    local_floor: TokenErrors
    least: Tensor
    """[tokens] float64: lower bound of the floor, of one flipped code (debug.comparison.code_flips) or of a sigmoid
    (debug.comparison.bounds), or 0."""

    @staticmethod
    def of(
        engine: Tensor,
        real: Tensor,
        truth: tuple[Tensor, Tensor],
        floors: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        least: Tensor | None,
    ) -> _Errors:
        """`truth`, `floors`: accumulated and local.  A cache tensor is compared by slot, for the slots that the engine
        has.

        least: [batch, tokens or slots].
        """
        tensors = [engine, *truth, *floors]
        if engine.ndim == 4:
            tensors = [t[:, :, : engine.shape[2]].transpose(1, 2) for t in tensors]
        own, *others = (rows_of(t, real) for t in tensors)
        token_of = real.nonzero()
        accumulated, accumulated_floor, local, local_floor = (
            row_errors(actual, expected, token_of, dtype)
            for expected, floor in zip(others[:2], others[2:], strict=True)
            for actual in (own, floor)
        )
        bounds = own.new_zeros(len(own)) if least is None else least[real].to(own)
        return _Errors(accumulated, accumulated_floor, local, local_floor, bounds)

    def only(self, keep: Tensor, *, first: int) -> _Errors:
        """A selection of the tokens, with positions counted from `first`."""
        parts = (self.accumulated, self.accumulated_floor, self.local, self.local_floor)
        accumulated, accumulated_floor, local, local_floor = (part.only(keep, first=first) for part in parts)
        return _Errors(accumulated, accumulated_floor, local, local_floor, self.least[keep])
