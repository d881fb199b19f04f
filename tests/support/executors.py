"""Executors of models that are not ours beside the reference, and the diff of one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import refmodels
from debug.capture.prompts import Prompts, random_prompts
from debug.comparison.compare import diff_engine
from debug.comparison.results import DiffResult
from debug.executors.onnx_file import OnnxFileEngine
from debug.executors.open import numerics_of
from debug.executors.propose import Proposal, propose_map
from refmodels.recorder import Recorder
from refmodels.taps import is_cache_tap, tap_names
from tests.support.goldens import case_source
from trt_runtime.engine import Engine
from trt_runtime.torch_gpu.engine import TorchEngine

CULPRIT_OF_A_MODULE = ("local", "nonfinite")


def reference(case: str, **options: Any) -> TorchEngine:
    return TorchEngine(refmodels.load(case_source(case), **options))


def tolerance(spec: refmodels.ModelSpec, tap: str) -> float:
    """Relative L2 that two fp32 runs of one model may differ by.

    Each module sums at most K terms in an order of its own (a random walk of K roundings), and n of them follow each
    other.
    """
    longest = max(spec.hidden_size, spec.mlp.width, spec.attention.heads * spec.attention.head_dim)
    return 2**-24 * math.sqrt(longest * (tap_names(spec).index(tap) + 1))


def disagreements(
    engine: Engine, other: Engine, prompts: Prompts, *, steps: int = 4, between: Callable[..., None] | None = None
) -> list[str]:
    """Taps of `engine` that are not those of `other`, over a prefill and teacher-forced steps; shapes must be equal."""
    found = []
    size = {"batch": len(prompts.ids), "capacity": prompts.ids.shape[1] + steps}
    ours, theirs = engine.new_cache(**size), other.new_cache(**size)
    ids, mask = prompts.ids, prompts.mask
    for step in range(steps + 1):
        inputs = theirs.next_step(ids, mask)
        a, b = Recorder(), Recorder()
        logits = engine.run(inputs, ours, recorder=a)
        expected = other.run(inputs, theirs, recorder=b)
        assert set(a.tensors) == set(engine.tap_names) and torch.equal(a.tensors["logits"], logits)
        assert torch.equal(ours.lengths, theirs.lengths) and torch.equal(ours.mask, theirs.mask)
        for tap, tensor in a.tensors.items():
            cache = is_cache_tap(tap)
            pair = [t.transpose(1, 2) if cache else t for t in (tensor, b.tensors[tap])]
            assert pair[0].shape == pair[1].shape, tap
            real = inputs.attention_mask != 0 if cache else inputs.new_mask
            actual, right = (t[real].double() for t in pair)
            if not float((actual - right).norm()) <= tolerance(engine.spec, tap) * float(right.norm()):
                found.append(f"{step} {tap}")
        last = (prompts.mask.sum(1) - 1)[:, None] if step == 0 and not bool(mask[:, -1].all()) else None
        best = expected.argmax(-1)
        ids = best[:, -1:] if last is None else best.gather(1, last)
        mask = torch.ones_like(ids)
        if between is not None:
            between(ours, theirs)
    return found


def prompts_of(case: str) -> Prompts:
    """Three rows, padded on the left."""
    return random_prompts(case_source(case).spec.vocab_size, (20, 13, 9), seed=0)


def right_padded(case: str) -> Prompts:
    prompts = prompts_of(case)
    shift = [int(n) for n in prompts.mask.sum(1)]
    ids, mask = (torch.stack([t.roll(n) for t, n in zip(x, shift, strict=True)]) for x in (prompts.ids, prompts.mask))
    return Prompts(ids=ids, mask=mask, origin="")


def diff(engine: Engine, case: str, prompts: Prompts | None = None, *, steps: int = 1) -> DiffResult:
    truth = refmodels.load(case_source(case), dtype=torch.float64)
    rounded = refmodels.load(case_source(case), dtype=engine.dtype, numerics=numerics_of(engine))
    return diff_engine(engine, truth, rounded, prompts or prompts_of(case), steps=steps)


def first_wrong(result: DiffResult) -> str | None:
    return next((c.tap for c in result.culprits if c.kind in CULPRIT_OF_A_MODULE), None)


def proposed(path: Path, case: str) -> tuple[Proposal, OnnxFileEngine]:
    proposal = propose_map(path, refmodels.load(case_source(case)))
    return proposal, OnnxFileEngine(path, case_source(case).spec, proposal.names)
