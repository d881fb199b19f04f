"""Exported graphs run by ONNX Runtime and by the ONNX reference evaluator, and their distance from the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

import refmodels
from refmodels.cache import KVCache, StepInputs
from tests.support.goldens import prompt_of

TOLERANCE = 1e-5


def to_numpy(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: Any) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.copy().view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


class Runtime:
    """An exported file run by ONNX Runtime: every call returns all outputs, the cache comes back as new tensors."""

    def __init__(self, bundle: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.outputs = [o.name for o in self.session.get_outputs()]

    def compute(self, feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))

    def run(self, step: StepInputs, cache: KVCache) -> dict[str, Tensor]:
        feeds = {name: value.numpy() for name, value in step.tensors().items()}
        for i, (key, value) in enumerate(zip(cache.key, cache.value, strict=True)):
            feeds |= {f"past.blocks.{i}.key": to_numpy(key), f"past.blocks.{i}.value": to_numpy(value)}
        results = {name: to_torch(value) for name, value in self.compute(feeds).items()}
        cache.key = [results[f"blocks.{i}.key"] for i in range(len(cache.key))]
        cache.value = [results[f"blocks.{i}.value"] for i in range(len(cache.value))]
        cache.advance(step)
        return results


class Evaluator(Runtime):
    """The same by the ONNX reference evaluator; returns inner values of the graph as well."""

    def __init__(self, bundle: Path) -> None:
        self.evaluator = ReferenceEvaluator(str(bundle / "model.onnx"))

    def compute(self, feeds: dict[str, Any]) -> dict[str, Any]:
        values = self.evaluator.run(None, feeds, intermediate=True)
        assert isinstance(values, dict)
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def worst_on_walk(case: str, source: refmodels.ModelSource, runner: Runtime) -> float:
    """Largest difference to the eager reference, in units of the tolerance, over logits and caches.

    A prefill, decode steps, a chunk of three tokens, a ragged chunk and a decode step after it, on one cache.
    """
    decoder = refmodels.load(source)
    ids, mask = prompt_of(case, source)
    batch, tokens = ids.shape
    cut = tokens // 2
    steps: list[tuple[Tensor, Tensor | None]] = [(ids[:, :cut], None if mask is None else mask[:, :cut])]
    if mask is not None and not bool(mask[:, :cut].any(1).all()):
        steps, cut = [], 0
    steps.append((ids[:, cut:], None if mask is None else mask[:, cut:]))
    ragged = torch.ones(batch, 3, dtype=torch.int64)
    ragged[0, 1:] = 0
    steps += [(ids[:, :1], None), (ids[:, 1:2], None), (ids[:, 2:5], None), (ids[:, 5:8], ragged), (ids[:, :1], None)]
    capacity = tokens + 12
    caches = [decoder.new_cache(batch=batch, capacity=capacity) for _ in range(2)]
    totals = torch.full((batch,), tokens) if mask is None else mask.sum(1)
    worst = 0.0
    for number, (chunk, chunk_mask) in enumerate(steps):
        step = caches[0].next_step(chunk, chunk_mask, prompt_lengths=totals, last_logits_only=number % 3 == 2)
        expected = decoder.run(step, caches[0])
        got = runner.run(step, caches[1])["logits"]
        real = step.new_mask.gather(1, step.logit_index)
        scale = max(1.0, float(expected[real].abs().max()))
        worst = max(worst, float((got - expected)[real].abs().max()) / scale / TOLERANCE)
    live = caches[0].mask[:, None, :, None]
    for mine, theirs in zip(caches[0].key + caches[0].value, caches[1].key + caches[1].value, strict=True):
        scale = max(1.0, float((mine * live).abs().max()))
        worst = max(worst, float(((mine - theirs) * live).abs().max()) / scale / TOLERANCE)
    return worst
