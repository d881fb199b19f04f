"""How an engine drifts from the reference while it decodes.

There are two runs of N greedy steps after a prompt.  **Teacher-forced**: both are fed the reference's tokens, so that
each step shows the error accumulated in the cache.  **Free-running**: each is fed its own tokens; they diverge at the
first token that differs, and the margin there says whether rounding could have decided it.  In addition, every
teacher-forced step is repeated with a **reset** cache (the whole prefix prefilled anew): an error that only the carried
cache has is a fault of the cache, not of the modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from debug.capture.prompts import Prompts
from debug.comparison.metrics import kl_divergence, top_margin
from debug.comparison.results import TRUTH_ARITHMETIC, data_frame, to_plain
from debug.executors.golden import GoldenEngine
from export.progress import Progress, silent
from refmodels.cache import KVCache
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from trt_runtime.engine import Engine
from trt_runtime.torch_gpu.engine import TorchEngine

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class DriftStep:
    """One teacher-forced step; step 0 is the prefill's last token.  Values are those of the worst row unless said
    otherwise.

    kl: nats, reference against engine; kl_mean over the rows.  floor_kl: the reference in the engine's dtype.  top1:
    share of rows with the reference's greedy token.  cache_error: relative L2 of all live keys and values, over all
    layers (of a golden case: over those recorded); floor_cache_error: the same of the reference in the engine's dtype.
    reset_kl: as kl, of the engine with a new cache.
    """

    step: int
    kl: float
    kl_mean: float
    floor_kl: float
    top1: float
    cache_error: float
    floor_cache_error: float
    reset_kl: float | None


@dataclass(frozen=True, kw_only=True)
class FirstDifference:
    """The point where a free-running engine leaves the reference: a row's first generated token (0-based) that differs.

    margin: the reference's lead of its token over the runner-up, in logits.  error: the engine's largest logit error at
    that step.  explained: the lead is within twice the error of the reference in the engine's dtype, so rounding could
    have decided it.
    """

    row: int
    step: int
    reference_token: int
    engine_token: int
    margin: float
    error: float
    floor_error: float
    explained: bool


@dataclass(frozen=True, kw_only=True)
class DriftResult:
    """`steps` of the teacher-forced run, and the first difference of each row, if it has one."""

    steps: list[DriftStep]
    differences: list[FirstDifference]
    rows: int
    engine: str
    reference: str
    prompts: str

    @property
    def nonfinite(self) -> int | None:
        """The first step in which the engine has NaN or infinity, or None."""
        return next((step.step for step in self.steps if not _finite(step)), None)

    @property
    def explained(self) -> bool:
        """Whether all numbers are finite and rounding can have decided every difference."""
        return self.nonfinite is None and all(difference.explained for difference in self.differences)

    def to_frame(self) -> pd.DataFrame:
        """One row per teacher-forced step, with the columns of `DriftStep`; errors as `DiffResult.to_frame`."""
        return data_frame([asdict(step) for step in self.steps])

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "steps": to_plain(self.steps),
            "differences": to_plain(self.differences),
            "settings": {
                "rows": self.rows,
                "engine": self.engine,
                "reference": self.reference,
                "prompts": self.prompts,
            },
        }


def measure_drift(
    engine: Engine,
    truth: Decoder,
    rounded: Decoder,
    prompts: Prompts,
    *,
    steps: int,
    reset: bool = True,
    progress: Progress = silent,
) -> DriftResult:
    """Decode `steps` tokens with the engine and the reference.

    Args:
        engine: the engine to test.
        truth, rounded: the reference in fp64 `exact`, and in the engine's dtype and numerics.
        prompts: the input.
        steps: number of decode steps.
        reset: also repeat each step with a new cache (costs one prefill per step).
        progress: told of each decode step.
    Raises:
        LogitLockError: prompts and steps exceed the engine's cache, the engine has no cache to compare, or the
            reference's own logits are not finite.
    """
    layers = _cached_layers(engine, steps)
    with torch.inference_mode():
        runs = _decodings(engine, truth, rounded)
        logits = {name: run.begin(prompts, steps) for name, run in runs.items()}
        found: list[DriftStep] = []
        ids, mask = prompts.ids, prompts.mask
        for step in range(steps + 1):
            progress("decode", step, steps + 1)
            again = None
            if reset:
                cache = engine.new_cache(batch=len(ids), capacity=ids.shape[1])
                # Dynamic NTK is chosen by the prompt, not by the generated tokens.
                inputs = cache.next_step(ids, mask, prompt_lengths=prompts.mask.sum(1), last_logits_only=True)
                again = _last(engine.run(inputs, cache))
            found.append(_step(step, runs, logits, again, layers))
            if step < steps:
                token = logits["truth"].argmax(-1)
                logits = {name: run.feed(token) for name, run in runs.items()}
                ids = torch.cat([ids, token[:, None]], 1)
                mask = torch.cat([mask, torch.ones_like(token)[:, None]], 1)
        differences = _differences(engine, truth, rounded, prompts, steps)
    return DriftResult(
        steps=found,
        differences=differences,
        rows=len(prompts.ids),
        engine=engine.arithmetic,
        reference=TRUTH_ARITHMETIC,
        prompts=prompts.origin,
    )


def _finite(step: DriftStep) -> bool:
    return all(math.isfinite(value) for value in (step.kl, step.kl_mean, step.cache_error, step.reset_kl or 0.0))


class _Decoding:
    """An executor decoding."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache: KVCache

    def begin(self, prompts: Prompts, steps: int) -> Tensor:
        """Prefill; logits of the last token [batch, vocab] in fp64 on the CPU."""
        self.cache = self.engine.new_cache(batch=len(prompts.ids), capacity=prompts.ids.shape[1] + steps)
        return _last(self.engine.prefill(prompts.ids, self.cache, prompts.mask, last_logits_only=True))

    def feed(self, token: Tensor) -> Tensor:
        return _last(self.engine.decode(token, self.cache))


def _decodings(engine: Engine, truth: Decoder, rounded: Decoder) -> dict[str, _Decoding]:
    return {
        "truth": _Decoding(TorchEngine(truth)),
        "rounded": _Decoding(TorchEngine(rounded)),
        "engine": _Decoding(engine),
    }


def _last(logits: Tensor) -> Tensor:
    return logits[:, -1].to("cpu", torch.float64)


def _step(
    step: int, runs: dict[str, _Decoding], logits: dict[str, Tensor], again: Tensor | None, layers: Sequence[int]
) -> DriftStep:
    truth = logits["truth"]
    if not bool(truth.isfinite().all()):
        raise LogitLockError(
            f"the reference's own logits hold NaN or infinity at step {step}, in fp64; nothing can be "
            "compared with them"
        )
    kl = kl_divergence(truth, logits["engine"])
    return DriftStep(
        step=step,
        kl=float(kl.max()),
        kl_mean=float(kl.mean()),
        floor_kl=float(kl_divergence(truth, logits["rounded"]).max()),
        top1=float((logits["engine"].argmax(-1) == truth.argmax(-1)).double().mean()),
        cache_error=_cache_error(runs["engine"].cache, runs["truth"].cache, layers),
        floor_cache_error=_cache_error(runs["rounded"].cache, runs["truth"].cache, layers),
        reset_kl=None if again is None else float(kl_divergence(truth, again).max()),
    )


def _cached_layers(engine: Engine, steps: int) -> Sequence[int]:
    """The layers whose cache can be compared: all, except of a golden case, which has what was recorded."""
    every = range(engine.spec.layers)
    if not isinstance(engine, GoldenEngine):
        return every
    missing = {tap.layer for tap in engine.spec.cache_taps if tap.name not in engine.tap_names}
    layers = [i for i in every if i not in missing]
    if not layers or steps:
        raise LogitLockError(
            f"{engine.case.directory} records "
            + ("the cache of the prefill only" if layers else "no whole cache of any layer")
            + ", so its drift cannot be measured; diff compares its logits"
        )
    return layers


def _cache_error(ours: KVCache, truth: KVCache, layers: Sequence[int]) -> float:
    live = int(truth.lengths.max())
    real = truth.mask[:, :live]
    off = size = 0.0
    for mine, other in ((ours.key, truth.key), (ours.value, truth.value)):
        for a, b in ((mine[i], other[i]) for i in layers):
            actual, expected = (t[:, :, :live].to("cpu", torch.float64).transpose(1, 2)[real] for t in (a, b))
            off += float((actual - expected).square().sum())
            size += float(expected.square().sum())
    return float((off / size) ** 0.5) if size else float(off**0.5)


def _differences(
    engine: Engine, truth: Decoder, rounded: Decoder, prompts: Prompts, steps: int
) -> list[FirstDifference]:
    """Free-running decoding; the reference in the engine's dtype follows the truth, to measure its own error."""
    runs = _decodings(engine, truth, rounded)
    logits = {name: run.begin(prompts, steps) for name, run in runs.items()}
    parted = torch.zeros(len(prompts.ids), dtype=torch.bool)
    found = []
    for step in range(steps + 1):
        right, ours = logits["truth"].argmax(-1), logits["engine"].argmax(-1)
        for row in ((right != ours) & ~parted).nonzero().flatten().tolist():
            expected = logits["truth"][row]
            margin = float(top_margin(expected))
            floor = float((logits["rounded"][row] - expected).abs().max())
            found.append(
                FirstDifference(
                    row=row,
                    step=step,
                    reference_token=int(right[row]),
                    engine_token=int(ours[row]),
                    margin=margin,
                    error=float((logits["engine"][row] - expected).abs().max()),
                    floor_error=floor,
                    explained=math.isfinite(floor) and margin <= 2 * floor,
                )
            )
        parted |= right != ours
        if step < steps:
            logits = {name: run.feed(ours if name == "engine" else right) for name, run in runs.items()}
    return found
