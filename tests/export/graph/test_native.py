"""`--attention native`: the reference's results on the CPU, TensorRT's own operators and kernels in an engine.

fp32 tolerances are those of test_export.  In half precision native rounds the query and the probabilities as well, so
it is allowed four floors where the exact body is allowed three: a floor is what the reference loses in that dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

import refmodels
from export.bundle import export_model
from export.graph.trace import build_graph
from refmodels.cache import KVCache, StepInputs
from refmodels.dtypes import DTYPES
from refmodels.recorder import Recorder, recording
from refmodels.spec import ModelSpec
from refmodels.taps import tap_names
from tests.support.goldens import CASES, FEATURES, TOYS, needs_opset_24, prompt_of, slow_but_two, source_of
from tests.support.graph_runs import TOLERANCE, Evaluator, Runtime, worst_on_walk
from tests.support.marks import quick_first
from tests.support.mutate import mutated
from tests.support.native_plan import FUSED, check_plan
from trt_runtime.bundle import Precision
from trt_runtime.onnxruntime import engine as onnxruntime_engine
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.plan_layers import Layer

# A case with one row differs from the one with several in its prompt only.
MODELS = [case for case in CASES if case.removesuffix("_b1") == case or case.removesuffix("_b1") not in CASES]


@needs_opset_24
@pytest.mark.parametrize("case", slow_but_two([*MODELS, *TOYS]))
def test_every_runtime_agrees_with_the_reference(case: str, tmp_path: Path) -> None:
    source = source_of(case)
    bundle = export_model(source, precision="fp32", attention="native", output=tmp_path / "bundle")
    onnx.checker.check_model(str(bundle / "model.onnx"), full_check=True)
    for runner in (Runtime(bundle), Evaluator(bundle)):
        assert worst_on_walk(case, source, runner) <= 1


@needs_opset_24
@pytest.mark.parametrize("case", quick_first(FEATURES))
def test_taps_are_values_of_the_graph(case: str, tmp_path: Path) -> None:
    """Rows of padding too: a query that sees no key has context 0."""
    source = source_of(case)
    decoder = refmodels.load(source)
    ids, mask = prompt_of(case, source)
    bundle = export_model(source, precision="fp32", attention="native", output=tmp_path / "bundle")
    caches = [decoder.new_cache(batch=len(ids), capacity=ids.shape[1]) for _ in range(2)]
    step = caches[0].next_step(ids, mask)
    recorder = Recorder()
    with recording(recorder):
        decoder.run(step, caches[0])
    values = Evaluator(bundle).run(step, caches[1])
    for name in tap_names(source.spec):
        expected = recorder.tensors[name]
        scale = max(1.0, float(expected.abs().max()))
        assert float((values[name] - expected).abs().max()) <= 2 * TOLERANCE * scale, name
    attended = values["blocks.0.attn.attended"]
    assert bool(attended.any(-1).all() if attended.dtype == torch.bool else attended.isfinite().all())


class Engine:
    """The CPU engine with every node rounded, run like the evaluator."""

    def __init__(self, bundle: Path) -> None:
        self.engine = OnnxRuntimeEngine(bundle, emulate_rounding=True, threads=1)

    def run(self, step: StepInputs, cache: KVCache) -> dict[str, Tensor]:
        return {"logits": self.engine.run(step, cache)}


@pytest.mark.slow
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
                step = caches[0].next_step(chunk, chunk_mask)
                expected = half.run(step, caches[0])[step.new_mask].double()
                true = truth.run(caches[2].next_step(chunk, chunk_mask), caches[2])[step.new_mask]
                logits = runner.run(step, caches[1])["logits"]
                assert logits.dtype == dtype
                floor = float((expected - true).abs().max())
                assert float((logits[step.new_mask].double() - expected).abs().max()) <= 4 * floor


@pytest.mark.slow
@pytest.mark.parametrize("case", quick_first(["qwen_ntk", "baichuan_13b"]))
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


def plan_of(
    spec: ModelSpec, bundle: Path, fault: Callable[[onnx.ModelProto], None] | None = None
) -> tuple[Counter[str], list[Layer]]:
    """TensorRT's layers for a bundle: the network's by type, and the plan's."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from export.tensorrt.build import build_plan, fix_capacity
    from export.tensorrt.options import BuildOptions
    from trt_runtime.tensorrt.api import LOGGER, trt

    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    if fault is not None:
        fault(model)
        onnx.save(model, bundle / "model.onnx")
    options = BuildOptions(max_batch=2, max_input=64, max_seq=64, compute_capabilities=("8.9",))
    result = build_plan(bundle, spec, options=options)
    assert result.warnings == []
    fix_capacity(model, 64)
    builder = trt.Builder(LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOGGER)
    assert parser.parse(model.SerializeToString(), str(bundle / "model.onnx"))
    return Counter(network.get_layer(i).type.name for i in range(network.num_layers)), result.layers.layers


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "precision"),
    [*((case, "fp16") for case in (*FEATURES, *TOYS)), *((case, "bf16") for case in TOYS), ("baichuan_13b", "bf16")],
)
def test_tensorrt_fuses_attention_and_updates_caches_in_place(case: str, precision: Precision, tmp_path: Path) -> None:
    source = source_of(case)
    bundle = export_model(source, precision=precision, attention="native", output=tmp_path / "bundle")
    check_plan(source.spec, *plan_of(source.spec, bundle), kernels=FUSED)


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("case", ["toy:qwen", "baichuan_13b"])
def test_tensorrt_builds_fp32(case: str, tmp_path: Path) -> None:
    """Its prefill has no fused kernel in fp32."""
    source = source_of(case)
    bundle = export_model(source, precision="fp32", attention="native", output=tmp_path / "bundle")
    check_plan(source.spec, *plan_of(source.spec, bundle), kernels={1: "_gemv_mha"})


def without_plugins(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        kept = [a for a in node.attribute if not a.name.startswith("plugin_")]
        del node.attribute[:]
        node.attribute.extend(kept)


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen_ntk_cross_b1", "baichuan_13b", "starcoder2_sliding"])
def test_tensorrt_builds_the_bodies_of_plugin_nodes(case: str, tmp_path: Path) -> None:
    source = source_of(case)
    bundle = export_model(source, precision="fp16", attention="plugin", output=tmp_path / "bundle")
    kinds, layers = plan_of(source.spec, bundle, without_plugins)
    assert kinds["KV_CACHE_UPDATE"] == 2 * source.spec.layers and not kinds["PLUGIN_V3"]
    assert all(layer.taps for layer in layers)


def unmasked(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "TRT_Attention":
            del node.input[3]


def by_its_body(model: onnx.ModelProto) -> None:
    """Under another name TensorRT does not know the operator and takes its body."""
    for named in (*model.graph.node, *model.functions):
        field = "op_type" if isinstance(named, onnx.NodeProto) else "name"
        if getattr(named, field) == "TRT_Attention":
            setattr(named, field, "MyAttention")


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(("fault", "message"), [(unmasked, "query, key, value and mask"), (by_its_body, "0 == 2")])
def test_the_check_of_a_plan_sees(fault: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path) -> None:
    source = source_of("chatglm2")
    bundle = export_model(source, precision="fp16", attention="native", output=tmp_path / "bundle")
    plan = plan_of(source.spec, bundle, fault)
    with pytest.raises(AssertionError, match=message):
        check_plan(source.spec, *plan, kernels=FUSED)


def hides_too_little(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.name.endswith(".seen"):
            node.op_type = "Or"


def does_not_scale(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.name.endswith(".scale_number"):
            node.attribute[0].f = 1.0


@needs_opset_24
@pytest.mark.parametrize("fault", [hides_too_little, does_not_scale])
def test_the_walk_sees(fault: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    source = source_of("chatglm2")
    bundle = export_model(source, precision="fp32", attention="native", output=tmp_path / "bundle")
    assert worst_on_walk("chatglm2", source, Runtime(mutated(bundle, tmp_path / "mutated", fault))) > 100
