"""`--attention native`: the reference's results on the CPU, TensorRT's own operators and kernels in an engine.

fp32 tolerances are those of test_export.  In half precision native rounds the query and the probabilities as well, so
it is allowed four floors where the exact body is allowed three: a floor is what the reference loses in that dtype.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from conftest import CASES, needs_opset_24
from test_export import FEATURES, TOLERANCE, TOYS, Evaluator, Runtime, prompt_of, source_of, worst_on_walk
from torch import Tensor

import refmodels
from export.compile import export_model
from export.graph import build_graph
from refmodels.cache import KVCache, StepInputs
from refmodels.checkpoint import DTYPES
from refmodels.taps import Recorder, recording, tap_names
from trt_runtime import onnxruntime_engine
from trt_runtime.bundle import Precision
from trt_runtime.onnxruntime_engine import OnnxRuntimeEngine

# A case with one row differs from the one with several in its prompt only.
MODELS = [case for case in CASES if case.removesuffix("_b1") == case or case.removesuffix("_b1") not in CASES]


@needs_opset_24
@pytest.mark.parametrize("case", [*MODELS, *TOYS])
def test_every_runtime_agrees_with_the_reference(case: str, tmp_path: Path) -> None:
    source = source_of(case)
    bundle = export_model(source, precision="fp32", attention="native", output=tmp_path / "bundle")
    onnx.checker.check_model(str(bundle / "model.onnx"), full_check=True)
    for runner in (Runtime(bundle), Evaluator(bundle)):
        assert worst_on_walk(case, source, runner) <= 1


@needs_opset_24
@pytest.mark.parametrize("case", FEATURES)
def test_taps_are_values_of_the_graph(case: str, tmp_path: Path) -> None:
    """Rows of padding too: a query that sees no key has context 0."""
    source = source_of(case)
    decoder = refmodels.load(source)
    ids, mask = prompt_of(case, source)
    bundle = export_model(source, precision="fp32", attention="native", output=tmp_path / "bundle")
    caches = [decoder.new_cache(batch=len(ids), capacity=ids.shape[1]) for _ in range(2)]
    plan = caches[0].plan(ids, mask)
    recorder = Recorder()
    with recording(recorder):
        decoder.run(plan, caches[0])
    values = Evaluator(bundle).run(plan, caches[1])
    for name in tap_names(source.spec):
        expected = recorder.tensors[name]
        scale = max(1.0, float(expected.abs().max()))
        assert float((values[name] - expected).abs().max()) <= 2 * TOLERANCE * scale, name


class Engine:
    """The CPU engine with every node rounded, run like the evaluator."""

    def __init__(self, bundle: Path) -> None:
        self.engine = OnnxRuntimeEngine(bundle, emulate_rounding=True, threads=1)

    def run(self, plan: StepInputs, cache: KVCache) -> dict[str, Tensor]:
        return {"logits": self.engine.run(plan, cache)}


@needs_opset_24
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("case", FEATURES)
def test_half_precision(case: str, precision: Precision, tmp_path: Path) -> None:
    source, dtype = source_of(case), DTYPES[precision]
    truth = refmodels.load(source, dtype=torch.float64)
    ids, mask = prompt_of(case, source)
    for numerics in ("exact", "upstream"):
        half = refmodels.load(source, dtype=dtype, numerics=numerics)
        bundle = export_model(
            source, precision=precision, numerics=numerics, attention="native", output=tmp_path / numerics
        )
        for runner in (Evaluator(bundle), Engine(bundle)):
            caches = [d.new_cache(batch=len(ids), capacity=ids.shape[1] + 1) for d in (half, half, truth)]
            for chunk, chunk_mask in ((ids, mask), (ids[:, :1], None)):
                plan = caches[0].plan(chunk, chunk_mask)
                expected = half.run(plan, caches[0])[plan.new_mask].double()
                true = truth.run(caches[2].plan(chunk, chunk_mask), caches[2])[plan.new_mask]
                logits = runner.run(plan, caches[1])["logits"]
                assert logits.dtype == dtype
                floor = float((expected - true).abs().max())
                assert float((logits[plan.new_mask].double() - expected).abs().max()) <= 4 * floor


@pytest.mark.parametrize("case", ["qwen_ntk", "baichuan_13b"])
def test_older_onnxruntime(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export_model(source_of(case), precision="fp16", attention="native", output=tmp_path / "bundle")
    results = []
    for _ in range(2):
        engine = OnnxRuntimeEngine(bundle, emulate_rounding=True, threads=1)
        cache = engine.new_cache(batch=1, capacity=16)
        logits = engine.prefill(torch.arange(12)[None], cache)
        results.append(torch.cat((logits, engine.decode(torch.tensor([3]), cache)), 1))
        monkeypatch.setattr(onnxruntime_engine, "has_tensor_scatter", lambda: False)
    assert torch.equal(*results)


def test_the_graph_calls_the_operators_of_tensorrt() -> None:
    spec = source_of("starcoder2_sliding").spec
    model = build_graph(spec, precision="fp16", attention="native").model
    counts = Counter(node.op_type for node in model.graph.node if node.domain == "trt")
    assert counts == {"TRT_KVCacheUpdate": 2 * spec.layers, "TRT_Attention": spec.layers}
    assert {(f.domain, f.name) for f in model.functions} == {("trt", op) for op in counts}
    assert {node.domain for node in model.graph.node} == {"", "trt"}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all(names)
