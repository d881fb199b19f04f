"""Shared fixtures: golden cases, one thread (2-core machines share it with other test processes)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

import refmodels
from debug.verify import add_up_as_recorded
from refmodels.model import Decoder
from trt_runtime.older_onnxruntime import has_tensor_scatter

add_up_as_recorded()
GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(p.name for p in GOLDENS.iterdir() if (p / "config.json").is_file()) if GOLDENS.is_dir() else []


def case_source(case: str) -> refmodels.ModelSource:
    """A golden case as a model; meta.json says what no config key does."""
    meta = json.loads((GOLDENS / case / "meta.json").read_text())
    return refmodels.resolve(GOLDENS / case, variant=meta.get("variant"))


def assert_reproduces_golden(model: Decoder, case: str) -> None:
    """In fp32: upstream's logits of the prefill and of every greedy step, and its tokens."""
    golden = load_file(GOLDENS / case / "io.safetensors")
    ids, mask, decode = golden["input_ids"], golden["attention_mask"], golden["decode_ids"]
    cache = model.new_cache(batch=len(ids), capacity=ids.shape[1] + decode.shape[1])
    logits = model.step(ids, cache, mask).cpu()
    assert (logits - golden["logits"])[mask.bool()].abs().max() <= 1e-4
    chosen = [logits[:, -1].argmax(-1)]
    for t in range(decode.shape[1]):
        logits = model.step(chosen[-1][:, None], cache).cpu()
        assert (logits[:, 0] - golden["decode_logits"][:, t]).abs().max() <= 1e-4
        chosen.append(logits[:, 0].argmax(-1))
    assert torch.equal(torch.stack(chosen[:-1], 1), decode)


# A loaded machine must not fail a test by being slow, and CI must try the same examples every time.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

needs_opset_24 = pytest.mark.skipif(
    not has_tensor_scatter(), reason="this ONNX Runtime does not run opset 24; the engine rewrites bundles for it"
)


@pytest.fixture(autouse=True)
def _no_grad_one_thread() -> object:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
