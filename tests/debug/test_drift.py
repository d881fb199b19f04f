"""Drift: clean engines stay at the floor; a faulty cache shows against a reset one; flips carry their margin."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

import refmodels
from debug.capture.prompts import random_prompts
from debug.drift import DriftResult, measure_drift
from refmodels.cache import KVCache, StepInputs
from refmodels.recorder import Recorder
from tests.support.goldens import case_source
from tests.support.marks import quick_first
from trt_runtime.engine import Engine
from trt_runtime.torch_gpu.engine import TorchEngine

STEPS = 6


def run(engine: Engine, case: str = "qwen_ntk") -> DriftResult:
    truth = refmodels.load(case_source(case), dtype=torch.float64)
    rounded = refmodels.load(case_source(case), dtype=engine.dtype)
    return measure_drift(engine, truth, rounded, random_prompts(truth.spec.vocab_size, (20, 13), seed=0), steps=STEPS)


def reference(dtype: torch.dtype, case: str = "qwen_ntk") -> TorchEngine:
    return TorchEngine(refmodels.load(case_source(case), dtype=dtype))


@pytest.mark.parametrize("case", quick_first(["qwen_ntk", "baichuan_13b", "starcoder2_sliding"]))
def test_the_floor_itself(case: str) -> None:
    result = run(reference(torch.bfloat16, case), case)
    assert [s.step for s in result.steps] == list(range(STEPS + 1))
    for step in result.steps:
        assert step.kl == step.floor_kl > 0 and step.cache_error == step.floor_cache_error > 0
        assert step.reset_kl is not None and step.reset_kl < 20 * step.floor_kl
    assert all(d.explained for d in result.differences)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["schema"] == 1


def test_fp64_does_not_drift() -> None:
    result = run(reference(torch.float64))
    assert result.differences == [] and max(s.kl for s in result.steps) == 0.0
    assert all(s.top1 == 1.0 and s.cache_error == 0.0 for s in result.steps)


class StaleCache(TorchEngine):
    """Forgets the newest key of layer 1 after every decode step."""

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        logits = super().run(step, cache, recorder=recorder)
        if step.input_ids.shape[1] == 1:
            cache.key[1][:, :, int(cache.lengths.max()) - 1] = 0
        return logits


def test_a_faulty_cache_grows_and_resetting_heals_it() -> None:
    result = run(StaleCache(refmodels.load(case_source("qwen_ntk"), dtype=torch.float32)))
    first, last = result.steps[0], result.steps[-1]
    assert first.kl < 1e-6 and last.kl > 100 * first.kl
    assert last.cache_error > result.steps[1].cache_error > 100 * first.cache_error
    assert last.reset_kl is not None and last.reset_kl < 1e-6


class Biased(TorchEngine):
    """Prefers token 5 more and more."""

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        logits = super().run(step, cache, recorder=recorder).clone()
        logits[..., 5] += 100.0 if int(cache.lengths.max()) >= 23 else 0.0
        return logits


def test_the_first_difference() -> None:
    result = run(Biased(refmodels.load(case_source("qwen_ntk"), dtype=torch.float32)))
    assert {d.row for d in result.differences} == {0, 1}
    for difference in result.differences:
        assert (difference.step, difference.engine_token) == (3, 5) and difference.reference_token != 5
        assert not difference.explained and math.isclose(difference.error, 100.0, rel_tol=1e-3)
    assert [s.top1 for s in result.steps] == [1.0] * 3 + [0.0] * (STEPS - 2)
