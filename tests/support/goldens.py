"""Golden cases of the upstream code as models, and what of them every engine must reproduce."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import refmodels
from refmodels.model import Decoder
from tests.support.paths import GOLDENS
from trt_runtime.onnxruntime.before_opset_24 import has_tensor_scatter

CASES = sorted(p.name for p in GOLDENS.iterdir() if (p / "config.json").is_file())
FEATURES = ("qwen_ntk_cross_b1", "baichuan_13b", "chatglm2", "starcoder2_sliding", "gpt_bigcode", "gpt2")
"""One case for each feature: dynamic NTK and logn over the crossing; ALiBi; interleaved partial rope with few kv heads;
sliding window with grouped heads; learned positions with one kv head; learned positions with a tied head."""
TOYS = ("toy:chatglm2", "toy:baichuan", "toy:qwen", "toy:gpt")


def slow_but_two(cases: Iterable[str]) -> list[Any]:
    """Parameters of a test that takes long over all cases: the quick tests take a case of rope and one without."""
    quick = ("chatglm2", "gpt2")
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def case_source(case: str) -> refmodels.ModelSource:
    """A golden case as a model; meta.json says what no config key does."""
    meta = json.loads((GOLDENS / case / "meta.json").read_text())
    return refmodels.resolve(GOLDENS / case, variant=meta.get("variant"))


def source_of(case: str) -> refmodels.ModelSource:
    """A golden case or one of `TOYS`."""
    if case in TOYS:
        return refmodels.resolve(case.removeprefix("toy:"))
    return case_source(case)


def prompt_of(case: str, source: refmodels.ModelSource) -> tuple[Tensor, Tensor | None]:
    """Token ids and mask of a golden prompt; for a toy a random left-padded one."""
    if (GOLDENS / case / "io.safetensors").is_file():
        tensors = load_file(GOLDENS / case / "io.safetensors")
        return tensors["input_ids"], tensors.get("attention_mask")
    ids = torch.randint(0, source.spec.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


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
