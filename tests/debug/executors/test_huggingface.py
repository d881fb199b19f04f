"""Models of transformers, and of code in other layouts, as executors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import refmodels
from debug.capture.prompts import left_padded
from debug.executors.huggingface import HuggingFaceEngine
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder
from refmodels.taps import tap_names
from tests.support import foreign
from tests.support.executors import (
    diff,
    disagreements,
    first_wrong,
    prompts_of,
    proposed,
    reference,
    right_padded,
)
from tests.support.goldens import GOLDENS, case_source
from tests.support.marks import quick_first

pytest.importorskip("transformers")


NATIVE = ["gpt2", "gpt_bigcode", "gpt_bigcode_mha_b1", "starcoder2_sliding", "qwen2"]


@pytest.mark.parametrize("case", quick_first(NATIVE))
@pytest.mark.slow
def test_huggingface_shows_what_the_reference_computes(case: str) -> None:
    source = case_source(case)
    engine = HuggingFaceEngine(source.directory, source.spec)
    assert engine.tap_names == tap_names(source.spec)
    assert not disagreements(engine, reference(case, numerics="upstream"), prompts_of(case))
    assert "transformers" in engine.arithmetic and "float32, eager" in engine.arithmetic
    assert "shows no" not in engine.arithmetic


def test_huggingface_in_half_precision() -> None:
    engine = HuggingFaceEngine(GOLDENS / "qwen2", case_source("qwen2").spec, "bf16")
    upstream = reference("qwen2", dtype=torch.bfloat16, numerics="upstream")
    assert engine.dtype == torch.bfloat16 and not disagreements(engine, upstream, prompts_of("qwen2"), steps=2)


def test_huggingface_takes_the_cache_of_the_caller() -> None:
    def forget(*caches: refmodels.KVCache) -> None:
        for cache in caches:
            cache.key[0][:, :, 15] = 0.0
            cache.value[1][0, :, 17] *= -1.0

    engine = HuggingFaceEngine(foreign.huggingface("qwen2"), case_source("qwen2").spec)
    assert not disagreements(engine, reference("qwen2", numerics="upstream"), prompts_of("qwen2"), between=forget)


def test_huggingface_with_rows_of_different_lengths() -> None:
    engine = HuggingFaceEngine(foreign.huggingface("qwen2"), case_source("qwen2").spec)
    assert not disagreements(engine, reference("qwen2", numerics="upstream"), right_padded("qwen2"))
    case = "starcoder2_sliding"
    engine = HuggingFaceEngine(foreign.huggingface(case), case_source(case).spec)
    with pytest.raises(LogitLockError, match="pad the prompts on the left"):
        disagreements(engine, reference(case, numerics="upstream"), right_padded(case))


@pytest.mark.slow
def test_logits_of_the_last_token_only(exported: Callable[..., Path]) -> None:
    """The final norm is then of that token too, which is another one in each row."""
    prompts, upstream = right_padded("qwen2"), reference("qwen2", numerics="upstream")
    size = {"batch": 3, "capacity": 20}
    expected = Recorder()
    last = {"last_logits_only": True}
    upstream.prefill(prompts.ids, upstream.new_cache(**size), prompts.mask, recorder=expected, **last)
    onnx_file = proposed(exported("qwen2"), "qwen2")[1]
    for engine in (HuggingFaceEngine(foreign.huggingface("qwen2"), upstream.spec), onnx_file):
        found = Recorder()
        logits = engine.prefill(prompts.ids, engine.new_cache(**size), prompts.mask, recorder=found, **last)
        assert logits.shape == (3, 1, upstream.spec.vocab_size)
        for tap in ("final_norm", "logits"):
            torch.testing.assert_close(found.tensors[tap], expected.tensors[tap], rtol=1e-4, atol=1e-4)


def test_sequence_first_and_a_cache_of_tuples() -> None:
    """Code in the layout of ChatGLM2's own: fused qkv, fused gate and up, [tokens, batch, width]."""
    spec = case_source("chatglm2").spec
    model = foreign.ChatGlm(spec, load_file(GOLDENS / "chatglm2" / "model.safetensors"))
    engine = HuggingFaceEngine(model, spec)
    assert engine.tap_names == tap_names(spec)
    assert not disagreements(engine, reference("chatglm2"), prompts_of("chatglm2"))


def test_taps_that_upstream_does_not_have_are_absent() -> None:
    class Renamed(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x)
            return result

    def rename(model: Any) -> None:
        model.model.layers[1].mlp = Renamed(model.model.layers[1].mlp)

    spec = case_source("qwen2").spec
    engine = HuggingFaceEngine(foreign.huggingface("qwen2", rename), spec)
    absent = [f"blocks.1.mlp.{part}" for part in ("gate", "up", "act", "out")]
    assert set(tap_names(spec)) - set(engine.tap_names) == set(absent)
    assert f"shows no {', '.join(absent)}" in engine.arithmetic
    assert not disagreements(engine, reference("qwen2", numerics="upstream"), prompts_of("qwen2"), steps=1)


@pytest.mark.slow
def test_a_fault_in_transformers_is_found_at_its_tap() -> None:
    def fault(model: Any) -> None:
        model.transformer.h[1].attn.c_attn.bias[70] += 0.5

    def other(model: Any) -> None:
        model.model.layers[0].mlp.down_proj.weight.mul_(1.01)

    engine = HuggingFaceEngine(foreign.huggingface("gpt2", fault), case_source("gpt2").spec)
    assert first_wrong(diff(engine, "gpt2")) == "blocks.1.attn.qkv"
    engine = HuggingFaceEngine(foreign.huggingface("qwen2", other), case_source("qwen2").spec)
    assert first_wrong(diff(engine, "qwen2")) == "blocks.0.mlp.out"


def test_huggingface_refuses() -> None:
    spec = case_source("qwen2").spec
    with pytest.raises(LogitLockError, match=r"has no modules model\.layers\.N"):
        HuggingFaceEngine(foreign.huggingface("gpt2"), spec)
    with pytest.raises(LogitLockError, match=r"no config\.json"):
        HuggingFaceEngine(GOLDENS / "_tables", spec)
    with pytest.raises(LogitLockError, match="--trust-remote-code"):
        HuggingFaceEngine(GOLDENS / "chatglm2", case_source("chatglm2").spec)
    engine = HuggingFaceEngine(foreign.huggingface("qwen2"), spec)
    cache = engine.new_cache(batch=1, capacity=3)
    swap = Recorder(substitutes={"embed": torch.zeros(1, 3, spec.hidden_size)})
    with pytest.raises(LogitLockError, match="substitutes embed"):
        engine.run(cache.next_step(torch.ones(1, 3, dtype=torch.int64)), cache, recorder=swap)


def test_prompts_of_one_row() -> None:
    """A batch of one with nothing padded: shapes that a batch of three hides."""
    engine = HuggingFaceEngine(GOLDENS / "gpt2", case_source("gpt2").spec)
    prompts = left_padded([list(range(5, 15))], "")
    assert not disagreements(engine, reference("gpt2", numerics="upstream"), prompts)
