"""Bisect: contributions, the plan, and the export that keeps what the plan says."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch

import refmodels
from debug.bisect import BisectResult, _fewest, find_precision_plan
from debug.capture.prompts import random_prompts
from export.bundle import export_model
from export.precision_plan import PrecisionPlan, linear_taps, read_plan, write_plan
from refmodels.errors import LogitLockError
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS, case_source
from tests.support.marks import quick_first
from trt_runtime.bundle import read_bundle
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine


@pytest.fixture(scope="module")
def result() -> BisectResult:
    source = case_source("qwen2")
    prompts = random_prompts(source.spec.vocab_size, (20, 13), seed=0)
    free = find_precision_plan(source, precision="bf16", budget=1.0, prompts=prompts)
    assert free.plan.float32 == [] and free.kl == free.kl_low
    # Halfway between keeping nothing and keeping everything.
    return find_precision_plan(source, precision="bf16", budget=(free.kl_low + free.kl_high) / 2, prompts=prompts)


@pytest.mark.slow
def test_the_plan_keeps_within_the_budget(result: BisectResult) -> None:
    assert result.kl_high <= result.kl <= result.budget < result.kl_low
    assert 0 < len(result.plan.float32) < len(result.contributions)
    # The most expensive layers are the ones that are kept.
    ranked = list(result.contributions)
    assert set(result.plan.float32) == set(ranked[: len(result.plan.float32)])
    assert list(result.contributions.values()) == sorted(result.contributions.values(), reverse=True)
    # What was exported and run is what was simulated, up to the order of rounding.
    assert result.kl_engine == pytest.approx(result.kl, rel=0.5) and result.kl_engine < result.kl_low
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["plan"]["precision"] == "bf16"


def test_halving_finds_the_fewest() -> None:
    for most in (1, 2, 7, 26):
        for needed in range(most + 1):
            asked: list[int] = []

            def measured(count: int, needed: int = needed, asked: list[int] = asked) -> float:
                asked.append(count)
                return 0.5 if count >= needed else 2.0

            assert _fewest(measured, most, measured(0), 1.0) == needed
            assert len(asked) <= most.bit_length() + 2


@pytest.mark.parametrize("attention", quick_first(["plugin", "decomposed", "native"]))
def test_export_keeps_what_the_plan_says(attention: str, tmp_path: Path) -> None:
    source = case_source("qwen2")
    plan = PrecisionPlan(precision="fp16", float32=["blocks.0.attn.qkv", "blocks.1.mlp.out", "logits"])
    write_plan(plan, tmp_path / "plan.json")
    bundle = export_model(
        source,
        precision="fp16",
        attention=attention,
        precision_plan=tmp_path / "plan.json",
        output=tmp_path / "b",  # type: ignore[arg-type]
    )
    types = {i.name: i.data_type for i in onnx.load(bundle / "model.onnx", load_external_data=False).graph.initializer}
    wide = {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT and "rope" not in name}
    assert wide == {
        "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "blocks.1.mlp.out.weight", "head.weight",
    }  # fmt: skip
    assert read_bundle(bundle).info.float32 == plan.float32
    plain = export_model(source, precision="fp16", output=tmp_path / "plain")
    ids = torch.tensor([[5, 9, 11, 4, 8, 21, 17, 3]])
    truth = refmodels.load(source, dtype=torch.float64)
    with torch.inference_mode():
        expected = truth.step(ids, truth.new_cache(batch=1, capacity=8))
    errors = []
    for path in (bundle, plain):
        engine = OnnxRuntimeEngine(path, emulate_rounding=True, threads=1)
        logits = engine.prefill(ids, engine.new_cache(batch=1, capacity=8))
        assert logits.dtype == torch.float16
        errors.append(float((logits.double() - expected).norm()))
    assert errors[0] < errors[1]


@pytest.mark.tensorrt
def test_a_plan_builds_in_tensorrt(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    write_plan(PrecisionPlan(precision="bf16", float32=["blocks.0.mlp.up", "logits"]), tmp_path / "plan.json")
    bundle = export_model(
        case_source("qwen2"), precision="bf16", backend="tensorrt", compute_capabilities=("8.9",), max_seq=64,
        precision_plan=tmp_path / "plan.json", output=tmp_path / "b",
    )  # fmt: skip
    assert (bundle / "engine.plan").stat().st_size > 0


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    model = GOLDENS / "qwen2"
    done = logitlock("bisect", "--model", model, "--precision", "bf16", "--budget-kl", 1.0, "--out", out)
    assert done.code == 0 and "0 of " in done.out, done.err
    assert json.loads(out.read_text()) == {"schema": 1, "precision": "bf16", "float32": []}
    exported = logitlock(
        "export", "--model", model, "--precision", "bf16", "--precision-plan", out, "--output", tmp_path / "b",
        "--backend", "onnxruntime",
    )  # fmt: skip
    assert exported.code == 0, exported.err


def test_bad_input(tmp_path: Path) -> None:
    source = case_source("qwen2")
    model = GOLDENS / "qwen2"
    logitlock("bisect", "--model", model, "--budget-kl", 0).assert_bad_input("must be positive")
    logitlock("bisect", "--model", model, "--budget-kl", 1e-15).assert_bad_input("no plan keeps within 1e-15 nats")
    logitlock("bisect", "--model", model, "--precision", "fp32").assert_bad_input("--precision")
    with pytest.raises(LogitLockError, match="nothing to keep in fp32"):
        find_precision_plan(source, precision="fp32", budget=1.0, prompts=random_prompts(100, (9,), seed=0))
    path = tmp_path / "plan.json"
    for content, message in (
        ('{"schema": 2, "precision": "fp16"}', "schema 2"),
        ('{"schema": 1, "precision": "bf16"}', "but --precision is fp16"),
        ('{"schema": 1, "precision": "fp16", "float32": ["blocks.9.mlp.up"]}', "no linear layer"),
        ('{"schema": 1, "precision": "fp16", "keep": []}', "keep"),
        ("[", "plan.json"),
    ):
        path.write_text(content)
        with pytest.raises(LogitLockError, match=message):
            read_plan(path, source.spec, "fp16")
    path.write_text('{"schema": 1, "precision": "fp16", "float32": ["logits"]}')
    with pytest.raises(LogitLockError, match="not for --random-weights"):
        export_model(source, precision="fp16", precision_plan=path, random_weights=True, output=tmp_path / "b")
    assert "logits" not in linear_taps(case_source("gpt2").spec)
    with pytest.raises(LogitLockError, match="cannot be written"):
        write_plan(PrecisionPlan(precision="fp16"), tmp_path / "no" / "plan.json")
