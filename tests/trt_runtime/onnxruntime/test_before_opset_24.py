"""Bundles on ONNX Runtime without TensorScatter (Python 3.10 has none newer than 1.23): the same results, in place."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import refmodels
from export.bundle import export_model
from tests.support.goldens import GOLDENS
from trt_runtime.bundle import Precision
from trt_runtime.onnxruntime import engine as onnxruntime_engine
from trt_runtime.onnxruntime.before_opset_24 import without_tensor_scatter
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.onnxruntime.graph_edits import load_graph


def run(bundle: Path, *, emulate_rounding: bool = False) -> tuple[Tensor, OnnxRuntimeEngine]:
    engine = OnnxRuntimeEngine(bundle, emulate_rounding=emulate_rounding, threads=1)
    cache = engine.new_cache(batch=3, capacity=24)
    ids = torch.arange(60).reshape(3, 20)
    mask = (torch.arange(20) < torch.tensor([20, 9, 14])[:, None]).long()
    logits = [engine.prefill(ids, cache, mask, last_logits_only=True)]
    logits += [engine.decode(ids[:, t], cache) for t in range(4)]
    return torch.cat(logits, 1), engine


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", ["qwen_ntk", "starcoder2"])
def test_the_same_logits(case: str, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export_model(refmodels.resolve(GOLDENS / case), precision=precision, output=tmp_path / "bundle")
    for emulate in (False, True):
        expected, _ = run(bundle, emulate_rounding=emulate)
        with monkeypatch.context() as patched:
            patched.setattr(onnxruntime_engine, "has_tensor_scatter", lambda: False)
            got, engine = run(bundle, emulate_rounding=emulate)
        assert torch.equal(got, expected)
        model = without_tensor_scatter(load_graph(bundle / "model.onnx", files=engine.bundle.info.files))
        ops = [node.op_type for node in model.graph]
        assert "TensorScatter" not in ops and ops.count("ScatterElements") == 2 * engine.spec.layers
        assert not model.functions and model.opset_imports[""] == 23 and model.ir_version == 11


def test_a_step_does_not_copy_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_engine, "has_tensor_scatter", lambda: False)
    source = refmodels.resolve(GOLDENS / "qwen2")
    bundle = export_model(source, precision="fp32", output=tmp_path / "bundle", max_seq=1 << 16)
    engine = OnnxRuntimeEngine(bundle, threads=1)
    seconds = {}
    for capacity in (1 << 6, 1 << 16):
        cache = engine.new_cache(batch=1, capacity=capacity)
        engine.prefill(torch.arange(8)[None], cache)
        steps = []
        for token in range(40):
            start = time.perf_counter()
            engine.decode(torch.tensor([token]), cache)
            steps.append(time.perf_counter() - start)
        seconds[capacity] = min(steps)
    # A copy of these 2 x 2 x 16 MB would take ten times a step of this tiny model.
    assert seconds[1 << 16] < 3 * seconds[1 << 6]
