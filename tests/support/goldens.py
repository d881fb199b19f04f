"""Golden cases of the upstream code as models, and what of them every engine must reproduce."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import refmodels
from refmodels.model import Decoder
from tests.support.paths import GOLDENS
from trt_runtime.onnxruntime.before_opset_24 import has_tensor_scatter

CASES = sorted(p.name for p in GOLDENS.iterdir() if (p / "config.json").is_file())


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


needs_opset_24 = pytest.mark.skipif(
    not has_tensor_scatter(), reason="this ONNX Runtime does not run opset 24; the engine rewrites bundles for it"
)
