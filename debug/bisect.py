"""`logitlock bisect`: the smallest set of linear layers that must stay in fp32 to keep the logits within a budget.

First, each layer's contribution is measured: the KL of an fp32 model in which only that layer has weights and output in
the engine's dtype.  Rounding errors of different layers are independent and small, so contributions add, and the layers
to keep are those that contribute most.  Their number is found by bisection, each time with a real run of the whole
mixed model; the resulting plan is checked by exporting and running it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debug.capture.prompts import Prompts
from debug.comparison.metrics import kl_divergence
from debug.comparison.results import to_plain
from export.bundle import export_model
from export.precision_plan import PrecisionPlan, linear_taps, write_plan
from export.progress import Progress, silent
from refmodels.checkpoints.load import ModelSource, load
from refmodels.dtypes import DTYPES
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from trt_runtime.bundle import Precision
from trt_runtime.engine import Engine
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.torch_gpu.engine import TorchEngine

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class BisectResult:
    """The smallest precision plan that was found within a budget.

    Every KL is in nats, against the fp64 reference, and is the mean over all prompt tokens that are not padding.

    Attributes:
        plan: the linear layers to keep in fp32.
        budget: the largest KL that was allowed.
        contributions: KL with one linear layer alone in the lower precision, by layer, the largest first.
        kl_low: KL with no layer kept in fp32.
        kl_high: KL with every linear layer kept in fp32.
        kl: KL of the plan, simulated in PyTorch.
        kl_engine: KL of the exported plan.
        runs: number of precision plans that were simulated.
    """

    plan: PrecisionPlan
    budget: float
    contributions: dict[str, float]
    kl_low: float
    kl_high: float
    kl: float
    kl_engine: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **to_plain(asdict(self))}


class _MixedLinear(nn.Module):
    """A linear layer with weights and output rounded to `low`, or with both in fp32 between inputs and outputs of the
    surrounding dtype."""

    def __init__(self, linear: nn.Linear, low: torch.dtype | None) -> None:
        super().__init__()
        self.weight, self.bias, self.low = linear.weight, linear.bias, low

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.low is not None:
            weight = weight.to(self.low).to(weight.dtype)
            bias = None if bias is None else bias.to(self.low).to(bias.dtype)
            x = x.to(self.low).to(x.dtype)
        y = F.linear(x.to(weight.dtype), weight, bias)
        return y.to(x.dtype) if self.low is None else y.to(self.low).to(x.dtype)


@contextmanager
def _replaced(decoder: Decoder, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Replace linear layers by other modules, by tap."""
    places = {tap: decoder.spec.taps[tap].module for tap in layers}
    before = {tap: decoder.get_submodule(path) for tap, path in places.items()}
    for tap, path in places.items():
        _set(decoder, path, layers[tap])
    try:
        yield
    finally:
        for tap, path in places.items():
            _set(decoder, path, before[tap])


def _set(decoder: Decoder, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(decoder.get_submodule(owner), leaf, module)


def find_precision_plan(
    source: ModelSource,
    *,
    precision: Precision,
    budget: float,
    prompts: Prompts,
    progress: Progress | None = None,
) -> BisectResult:
    """Find the precision plan.

    Args:
        source: the model.
        precision: fp16 or bf16.
        budget: largest allowed mean KL of the engine, in nats.
        prompts: the prompts to measure on.
        progress: called with the name of the current part, and how much of it is done and in all.
    Raises:
        LogitLockError: the precision is fp32, the budget is not positive or is missed even with every linear layer in
            fp32, or the model's own logits are not finite.
    """
    if source.spec.quantization is not None:
        raise LogitLockError(
            f"{source.name} is quantized; bisect finds layers of a half-precision engine, `logitlock quantize` reports "
            "the error of every layer"
        )
    if precision == "fp32":
        raise LogitLockError("--precision fp32 has nothing to keep in fp32; use fp16 or bf16")
    if not budget > 0:
        raise LogitLockError(f"--budget-kl is {budget:g}; it must be positive (nats)")
    report = progress or silent
    with torch.inference_mode():
        truth = _logits(TorchEngine(load(source, dtype=torch.float64)), prompts)
        if not bool(truth.isfinite().all()):
            raise LogitLockError(f"the logits of {source.name} hold NaN or infinity in fp64: there is no KL to them")
        high = load(source, dtype=torch.float32)
        low = load(source, dtype=DTYPES[precision])
        taps = linear_taps(source.spec)
        wide = {tap: _linear(high, tap) for tap in taps}
        contributions = {}
        for done, tap in enumerate(taps):
            with _replaced(high, {tap: _MixedLinear(wide[tap], DTYPES[precision])}):
                contributions[tap] = _kl(truth, _logits(TorchEngine(high), prompts))
            report("contributions", done + 1, len(taps))
        # If rounding a layer overflows, its cost is infinite.
        ranked = sorted(taps, key=lambda tap: -contributions[tap] if math.isfinite(contributions[tap]) else -math.inf)
        runs = 0

        @cache
        def measured(count: int) -> float:
            nonlocal runs
            runs += 1
            report("halving", runs, 2 + len(taps).bit_length())
            with _replaced(low, {tap: _MixedLinear(wide[tap], None) for tap in ranked[:count]}):
                return _kl(truth, _logits(TorchEngine(low), prompts))

        kl_low, kl_high = measured(0), measured(len(ranked))
        if not kl_high <= budget:
            raise LogitLockError(
                f"no plan keeps within {budget:g} nats: with every linear layer in fp32 the mean KL is {kl_high:.3g}, "
                f"because residuals, norms and attention are rounded to {precision} too; allow more, or use another "
                "precision"
            )
        count = _fewest(measured, len(ranked), kl_low, budget)
        kept = set(ranked[:count])
        plan = PrecisionPlan(precision=precision, float32=[tap for tap in taps if tap in kept])
        kl_engine = _run_engine(source, plan, truth, prompts)
    return BisectResult(
        plan=plan,
        budget=budget,
        contributions={tap: contributions[tap] for tap in ranked},
        kl_low=kl_low,
        kl_high=kl_high,
        kl=measured(count),
        kl_engine=kl_engine,
        runs=runs,
    )


def _fewest(measured: Callable[[int], float], most: int, kl_low: float, budget: float) -> int:
    """The smallest number of kept layers within the budget; `most` is known to be within it."""
    if kl_low <= budget:
        return 0
    below, within = 0, most
    while within - below > 1:
        middle = (below + within) // 2
        if measured(middle) <= budget:
            within = middle
        else:
            below = middle
    return within


def _linear(decoder: Decoder, tap: str) -> nn.Linear:
    module = decoder.get_submodule(decoder.spec.taps[tap].module)
    assert isinstance(module, nn.Linear)
    return module


def _logits(engine: Engine, prompts: Prompts) -> Tensor:
    """Logits of the real tokens, fp64 [tokens, vocab]."""
    room = engine.new_cache(batch=len(prompts.ids), capacity=prompts.ids.shape[1])
    return engine.prefill(prompts.ids, room, prompts.mask)[prompts.mask != 0].double()


def _kl(truth: Tensor, logits: Tensor) -> float:
    return float(kl_divergence(truth, logits).mean())


def _run_engine(source: ModelSource, plan: PrecisionPlan, truth: Tensor, prompts: Prompts) -> float:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "plan.json"
        write_plan(plan, file)
        bundle = export_model(
            source, precision=plan.precision, precision_plan=file, output=Path(directory) / "bundle"
        )  # fmt: skip
        return _kl(truth, _logits(OnnxRuntimeEngine(bundle, emulate_rounding=True), prompts))
