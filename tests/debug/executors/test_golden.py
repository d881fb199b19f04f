"""Recorded golden cases as executors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import refmodels
from debug.executors.golden import GoldenEngine
from refmodels.errors import LogitLockError
from tests.support.executors import (
    diff,
    disagreements,
    first_wrong,
    prompts_of,
    reference,
)
from tests.support.goldens import GOLDENS, case_source
from tests.support.marks import quick_first
from trt_runtime.torch_gpu.engine import TorchEngine


@pytest.mark.parametrize("case", quick_first(["chatglm2", "baichuan_13b", "qwen_ntk", "gpt2", "starcoder2_sliding"]))
def test_a_golden_case_replays(case: str) -> None:
    engine = GoldenEngine(GOLDENS / case)
    assert {"embed", "blocks.0", "blocks.1", "final_norm", "logits"} <= set(engine.tap_names)
    assert ("blocks.0.key" in engine.tap_names) == (case != "starcoder2_sliding")
    upstream = TorchEngine(refmodels.load(case_source(case), numerics="upstream"))
    assert not disagreements(engine, upstream, engine.prompts, steps=0)
    assert first_wrong(diff(engine, case, engine.prompts, steps=0)) is None
    decoding = GoldenEngine(GOLDENS / case, decode=True)
    assert decoding.tap_names == ("logits",) and decoding.steps == 12
    assert not disagreements(decoding, upstream, engine.prompts, steps=12)


def test_a_golden_case_in_half_precision() -> None:
    engine = GoldenEngine(GOLDENS / "qwen2", "bf16")
    assert engine.dtype == torch.bfloat16 and "bf16" in engine.arithmetic
    assert first_wrong(diff(engine, "qwen2", engine.prompts, steps=0)) is None


def test_a_wrong_golden_case_is_found(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "qwen2", tmp_path / "case")
    tensors = load_file(tmp_path / "case" / "io.safetensors")
    tensors["hidden_states.1"][0, 5] *= 1.01
    save_file(tensors, tmp_path / "case" / "io.safetensors")
    engine = GoldenEngine(tmp_path / "case")
    result = diff(engine, "qwen2", engine.prompts, steps=0)
    assert first_wrong(result) == "blocks.0" and result.culprits[0].worst == (0, 5)


def test_a_golden_case_runs_nothing_else() -> None:
    engine = GoldenEngine(GOLDENS / "qwen2")
    with pytest.raises(LogitLockError, match="only replay its own tokens"):
        disagreements(engine, reference("qwen2"), prompts_of("qwen2"))
    with pytest.raises(LogitLockError, match="has 12 recorded decode steps, not 13"):
        disagreements(GoldenEngine(GOLDENS / "qwen2", decode=True), reference("qwen2"), engine.prompts, steps=13)
