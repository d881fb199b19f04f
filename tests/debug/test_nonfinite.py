"""NaN and infinity are findings in every verb, and a damaged tokenizer is an error in every verb."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import refmodels
from debug.capture.prompts import random_prompts
from debug.drift import measure_drift
from refmodels.errors import LogitLockError, NoTokenizerError
from refmodels.text.tokenizer import read_tokenizer
from tests.support.checkpoints import read_case, write_model
from tests.support.command import logitlock
from tests.support.goldens import case_source
from tests.support.paths import ROOT
from trt_runtime.torch_gpu.engine import TorchEngine


def model(folder: Path, edit: Callable[[dict[str, Tensor]], object], case: str = "qwen2_b1") -> Path:
    config, tensors, _ = read_case(case)
    edit(tensors)
    return write_model(folder, config, tensors)


def overflowing(tensors: dict[str, Tensor]) -> None:
    """The logits are finite in fp64 only."""
    for name, tensor in tensors.items():
        if "norm" not in name:
            tensors[name] = torch.full_like(tensor, 3e38)


def test_drift_of_an_engine_without_numbers(tmp_path: Path) -> None:
    found = logitlock("drift", "reference:fp32", "--model", model(tmp_path / "m", overflowing), "--steps", "1")
    assert found.code == 1 and "NaN or infinity in the engine from step 0 on" in found.out


@pytest.mark.slow
def test_bisect_of_an_engine_without_numbers(tmp_path: Path) -> None:
    bad = model(tmp_path / "m", overflowing)
    found = logitlock("bisect", "--model", bad, "--precision", "bf16", "--out", tmp_path / "plan.json")
    found.assert_bad_input("the mean KL is nan")
    assert not (tmp_path / "plan.json").exists()


def test_a_reference_without_numbers_is_compared_with_nothing() -> None:
    source = case_source("qwen2_b1")
    truth, engine = (refmodels.load(source, dtype=dtype) for dtype in (torch.float64, torch.float32))
    truth.final_norm.weight.data[3] = float("nan")
    prompts = random_prompts(truth.spec.vocab_size, (9,), seed=0)
    with pytest.raises(LogitLockError, match="the reference's own logits hold NaN or infinity at step 0"):
        measure_drift(TorchEngine(engine), truth, engine, prompts, steps=1)


def large_in_half(tensors: dict[str, Tensor]) -> None:
    """Finite in fp32, infinite in fp16: the most common way in which a half-precision engine fails."""
    for part in ("gate", "up", "down"):
        weight = tensors[f"model.layers.1.mlp.{part}_proj.weight"]
        weight *= 6e4 / weight.abs().max()


def test_an_engine_that_overflows_drifts(tmp_path: Path) -> None:
    found = logitlock("drift", "reference:fp16", "--model", model(tmp_path / "m", large_in_half), "--steps", "2")
    assert found.code == 1 and "NaN or infinity in the engine from step 0 on" in found.out


def test_an_engine_that_overflows_is_shown_by_diff(tmp_path: Path) -> None:
    found = logitlock("diff", "reference:fp16", "--model", model(tmp_path / "m", large_in_half), "--steps", "1")
    assert found.code == 1 and "NaN/Inf" in found.out and not found.err.count("Traceback")


@pytest.mark.slow
def test_a_trace_with_one_infinity_is_a_finding(tmp_path: Path) -> None:
    bad, trace = model(tmp_path / "m", lambda tensors: None), tmp_path / "t.safetensors"
    assert logitlock("trace", "reference:fp32", "--model", bad, "--steps", "1", "--out", trace).code == 0
    from safetensors import safe_open

    with safe_open(trace, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(trace)
    tensors["0.blocks.1.mlp.out"][0, 3, 5] = float("inf")
    save_file(tensors, trace, metadata=metadata)
    found = logitlock("diff", trace, "--model", bad)
    assert found.code == 1 and "blocks.1.mlp.out" in found.out and "Traceback" not in found.err


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_quantize_refuses_a_tensor_that_it_would_copy(tmp_path: Path, name: str) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = float("nan")

    bad, output = model(tmp_path / "m", edit), tmp_path / "q"
    found = logitlock(
        "quantize", "--model", bad, "--precision", "int8", "--samples", "1", "--tokens", "8", "--output", output
    )
    found.assert_bad_input("NaN")
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("diff", "reference:fp32", "--steps", "1"),
        ("drift", "reference:fp32", "--steps", "1"),
        ("trace", "reference:fp32", "--steps", "1", "--out", "t.safetensors"),
        ("bisect", "--precision", "bf16", "--out", "plan.json"),
        ("quantize", "--precision", "int8", "--samples", "1", "--tokens", "8", "--output", "q"),
        ("eval", "reference:fp32"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_damaged_tokenizer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    toy = tmp_path / "toy"
    shutil.copytree(ROOT / "refmodels" / "toys" / "qwen", toy)
    data = (toy / "tokenizer.json").read_bytes()
    (toy / "tokenizer.json").write_bytes(data[:20_000])
    logitlock(*arguments, "--model", toy).assert_bad_input("tokenizer.json")


def test_no_tokenizer_is_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(NoTokenizerError, match="has no tokenizer"):
        read_tokenizer(tmp_path, family="qwen")
