"""Real engines, built without a GPU: for every family and mode, the builder's layer list matches the graph."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from export.bundle import export_model
from export.tensorrt.options import BuildOptions
from refmodels.checkpoints.load import ModelSource
from refmodels.errors import LogitLockError
from refmodels.spec import ModelSpec
from refmodels.taps import is_cache_tap, tap_names
from tests.support.goldens import TOYS, source_of
from tests.support.mutate import attribute, node
from trt_runtime.bundle import AttentionMode, Precision
from trt_runtime.plan_layers import Layer, PlanLayers

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

from export.tensorrt import build as tensorrt_build
from export.tensorrt.build import BuildResult, build_plan, capability_member, capability_name, check_warnings
from export.tensorrt.builder_log import node_taps, parse_log
from trt_runtime.tensorrt.api import LOGGER

MODES: tuple[AttentionMode, ...] = ("plugin", "native", "decomposed")
PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16", "fp32")
VARIANTS = (
    "chatglm2",
    "baichuan_7b",
    "baichuan_13b",
    "baichuan2_7b",
    "qwen_ntk_cross_b1",
    "qwen2_tied_b1",
    "gpt2",
    "gpt_bigcode",
    "starcoder2_sliding",
    "qwen3_yarn_b1",
)
OPTIONS = BuildOptions(max_batch=4, max_input=16, max_seq=64)
HELPERS = {"shape_call", "signal", "wait", "NoOp", "Constant", "cast", "reshape"}
"""Types of layers that compute no tensor of the model."""
PLUGIN_CALLS = {"custom_layer", "PluginV3"}
SPARE_BYTES = 1024
"""A plan has a few constants of its own."""

# Every variant in every mode; the precisions take turns, so that every mode is built in all three.
BUILDS = [(*pair, PRECISIONS[(i + i // 3) % 3]) for i, pair in enumerate(product((*VARIANTS, *TOYS), MODES))]


def build(
    source: ModelSource,
    directory: Path,
    *,
    attention: AttentionMode,
    precision: Precision,
    fault: Callable[[onnx.ModelProto], object] | None = None,
    **options: Any,
) -> tuple[onnx.ModelProto, BuildResult]:
    if not directory.exists():
        export_model(source, precision=precision, attention=attention, output=directory, max_seq=OPTIONS.max_seq)
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    if fault is not None:
        fault(model)
        onnx.save(model, directory / "model.onnx")
    return model, build_plan(directory, source.spec, **{"options": OPTIONS, **options})


def check_layers(plan: PlanLayers, model: onnx.ModelProto, spec: ModelSpec, attention: AttentionMode) -> None:
    """Everything that the list of layers can show of an engine."""
    assert {layer.profile for layer in plan.layers} == {0, 1} and len(plan.activation_bytes) == 2
    for profile in (0, 1):
        layers = [layer for layer in plan.layers if layer.profile == profile]
        check_plugins(layers, model)
        for name in filter(is_cache_tap, tap_names(spec)):
            check_cache(layers, name, attention)
        if attention == "native":
            check_native_attention(layers, spec, fused=plan.layers[0].profile != profile or half_precision(model))
        assert {tap for layer in layers for tap in layer.taps} == set(tap_names(spec)), "every tap has a layer"
    check_taps(plan.layers, model)
    sizes = [
        (i.dims, math.prod(i.dims) * helper.tensor_dtype_to_np_dtype(i.data_type).itemsize)
        for i in model.graph.initializer
    ]
    weights, vectors = sum(size for _, size in sizes), sum(size for dims, size in sizes if len(dims) == 1)
    # Both profiles share a matrix; a bias may be laid out for each.
    assert weights <= plan.weight_bytes <= weights + vectors + SPARE_BYTES, "weights are in the plan once, as they are"


def half_precision(model: onnx.ModelProto) -> bool:
    return model.graph.output[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT


def check_plugins(layers: list[Layer], model: onnx.ModelProto) -> None:
    nodes = Counter(n.name for n in model.graph.node if n.domain == "refmodels")
    calls = Counter(node for layer in layers if layer.type in PLUGIN_CALLS for node in layer.nodes)
    assert calls == nodes, "every plugin node is one call of a plugin"


def check_cache(layers: list[Layer], name: str, attention: AttentionMode) -> None:
    writers = [layer for layer in layers if name in {t.name for t in layer.outputs}]
    readers = [layer for layer in layers if {name, f"past.{name}"} & {t.name for t in layer.inputs}]
    assert len(writers) == 1, f"{name} is written once"
    if attention == "plugin":
        # Input and output alias in the plugin; a copy would be another layer.
        assert readers == writers and writers[0].type == "PluginV3", f"{name} belongs to the plugin alone"
    else:
        assert name in {t.name for t in writers[0].inputs}, f"{name} is updated in place"


def check_native_attention(layers: list[Layer], spec: ModelSpec, *, fused: bool) -> None:
    kernels = [layer for layer in layers if "mha" in layer.name]
    expected = [[f"blocks.{i}.attn.context"] for i in range(spec.layers)] if fused else []
    assert [layer.taps for layer in kernels] == expected, "one fused attention kernel a layer"


def check_taps(layers: list[Layer], model: onnx.ModelProto) -> None:
    names = {n.name for n in model.graph.node}
    kernels = [layer for layer in layers if layer.type not in HELPERS]
    mapped = [layer for layer in kernels if layer.refs and layer.taps]
    assert len(mapped) >= 0.95 * len(kernels), "layers map to taps by their own metadata"
    assert all(set(layer.nodes) <= names for layer in layers)
    assert all(layer.taps for layer in layers), "every layer maps to a tap, by itself or by who reads it"


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(("case", "attention", "precision"), BUILDS)
def test_an_engine_is_what_the_graph_says(
    case: str, attention: AttentionMode, precision: Precision, tmp_path: Path
) -> None:
    source = source_of(case)
    model, result = build(source, tmp_path / "bundle", attention=attention, precision=precision)
    assert result.warnings == []
    assert result.plan.stat().st_size > result.layers.weight_bytes
    assert result.plugins == {n.op_type: "1" for n in model.graph.node if n.domain == "refmodels"}
    check_layers(result.layers, model, source.spec, attention)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[AttentionMode], tuple[Path, Any, BuildResult]]:
    made: dict[AttentionMode, tuple[Path, Any, BuildResult]] = {}

    def get(attention: AttentionMode) -> tuple[Path, Any, BuildResult]:
        if attention not in made:
            directory = tmp_path_factory.mktemp("built") / attention
            made[attention] = (
                directory,
                *build(source_of("chatglm2"), directory, attention=attention, precision="fp16"),
            )
        return made[attention]

    return get


def without(kind: Callable[[Layer], bool]) -> Callable[[Layer], list[Layer]]:
    return lambda layer: [] if kind(layer) else [layer]


def is_cache(tensor: Any) -> bool:
    """A tensor of a plan: the builder puts words before and behind the tap's name."""
    return tensor.name.endswith((".key", ".value"))


def copied(layer: Layer) -> list[Layer]:
    """A cache that goes through a copy."""
    copies = [
        Layer(
            name="copy", type="NoOp", profile=layer.profile, inputs=[t], outputs=[replace(t, name="copy")], taps=["x"]
        )
        for t in layer.inputs
        if is_cache(t)
    ]
    return [*copies, layer]


def out_of_place(layer: Layer) -> list[Layer]:
    return [replace(layer, inputs=[t for t in layer.inputs if not is_cache(t)])]


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "change", "message"),
    [
        ("plugin", without(lambda layer: layer.type == "PluginV3"), "one call of a plugin"),
        ("plugin", lambda layer: [layer] * (1 + (layer.type == "custom_layer")), "one call of a plugin"),
        ("plugin", copied, "belongs to the plugin alone"),
        ("native", out_of_place, "updated in place"),
        ("native", lambda layer: [replace(layer, name=layer.name.replace("mha", ""))], "fused attention kernel"),
        ("decomposed", lambda layer: [replace(layer, taps=layer.taps * bool(layer.refs))], "by itself or by who"),
        ("decomposed", lambda layer: [replace(layer, refs=[]) if layer.type == "gemm" else layer], "own metadata"),
        ("decomposed", without(lambda layer: "blocks.1.mlp.act" in layer.taps), "every tap has a layer"),
    ],
)
def test_the_checks_see_a_wrong_engine(
    attention: AttentionMode, change: Callable[[Layer], list[Layer]], message: str, built: Any
) -> None:
    _, model, result = built(attention)
    spec = source_of("chatglm2").spec
    layers = [new for layer in result.layers.layers for new in change(layer)]
    with pytest.raises(AssertionError, match=message):
        check_layers(replace(result.layers, layers=layers), model, spec, attention)
    with pytest.raises(AssertionError, match="weights are in the plan once"):
        check_layers(replace(result.layers, weight_bytes=2 * result.layers.weight_bytes), model, spec, attention)


def rename(name: str, op_type: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: setattr(node(model, name), "op_type", op_type)


def give(op_type: str, name: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def fault(model: onnx.ModelProto) -> None:
        for n in model.graph.node:
            if n.op_type == op_type:
                for a in [a for a in n.attribute if a.name == name]:
                    n.attribute.remove(a)
                n.attribute.append(helper.make_attribute(name, value))

    return fault


def unused_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("extra", onnx.TensorProto.INT64, ["batch"]))


def another_shape(model: onnx.ModelProto) -> None:
    attribute(node(model, "blocks.0.attn.context"), "perm").ints[:] = [0, 1, 2, 3]


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("attention", "fault", "message"),
    [
        ("plugin", unused_input, "would drop a part of the graph: Unused Input: extra"),
        ("plugin", give("CachedAttention", "plugin_version", "2"), "CachedAttention version 2, which has no creator"),
        ("plugin", give("FusedRmsNorm", "plugin_namespace", "mine"), "mine::FusedRmsNorm version 1, which has no"),
        ("plugin", give("CachedAttention", "softcap", 1.0), "CachedAttention does not know the attribute softcap"),
        ("plugin", give("CachedAttention", "heads", 7), "CachedAttention blocks.0.attn.*qkv is 128 wide"),
        ("native", give("TRT_Attention", "scale", 0.5), "TRT_Attention drops the attribute scale"),
        (
            "decomposed",
            rename("logits", "NoSuchOp"),
            r"cannot read the graph: node 'logits' \(NoSuchOp\): .*Plugin",
        ),
        ("decomposed", rename("logits", "Concat"), r"node 'logits' \(Concat\): "),
    ],
)
def test_what_tensorrt_cannot_take_is_one_clear_error(
    attention: AttentionMode, fault: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(LogitLockError, match=message) as caught:
        build(source_of("chatglm2"), tmp_path / "b", attention=attention, precision="fp16", fault=fault)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert not (tmp_path / "b" / "engine.plan").exists()


@pytest.mark.tensorrt
def test_what_the_builder_refuses_is_one_clear_error(tmp_path: Path) -> None:
    """Prefill in fp32 has no fused kernel, and without leave to decompose it there is none."""
    fault = give("TRT_Attention", "TRT_decomposable", 0)
    with pytest.raises(LogitLockError, match=r"cannot build the engine: .*not supported by a dedicated kernel"):
        build(source_of("gpt2"), tmp_path / "b", attention="native", precision="fp32", fault=fault)
    assert not (tmp_path / "b" / "engine.plan").exists()


@pytest.mark.tensorrt
def test_a_plugin_node_that_becomes_no_plugin_is_an_error(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _, _ = built("plugin")
    monkeypatch.setattr(tensorrt_build.trt.LayerType, "PLUGIN_V3", tensorrt_build.trt.LayerType.PLUGIN_V2)
    with pytest.raises(LogitLockError, match="the graph has 7 plugin nodes, TensorRT made plugins of 0 of them"):
        build_plan(directory, source_of("chatglm2").spec, options=OPTIONS)


@pytest.mark.tensorrt
def test_another_logger_would_hide_warnings(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _, _ = built("decomposed")
    monkeypatch.setattr(type(LOGGER), "log", lambda self, severity, message: None)
    with pytest.raises(LogitLockError, match="another TensorRT logger is in use in this process"):
        build_plan(directory, source_of("chatglm2").spec, options=OPTIONS)


@pytest.mark.tensorrt
def test_a_plan_that_cannot_be_written(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _, _ = built("decomposed")

    class Full:
        name = "engine.plan"

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    make = tensorrt_build._PlanWriter
    monkeypatch.setattr(tensorrt_build, "_PlanWriter", lambda stream: make(Full()))
    with pytest.raises(LogitLockError, match=r"cannot write engine\.plan: No space left on device"):
        build_plan(directory, source_of("chatglm2").spec, options=OPTIONS)
    assert not (directory / "engine.plan").exists()


def test_warnings() -> None:
    harmless = [
        "ModelImporter.cpp:1071: Make sure input input_ids has Int64 binding.",
        "ImporterContext.hpp:501: A node named node_of_y already exists, the output tensors of this new instance ...",
    ]
    assert check_warnings([*harmless, "something new"]) == ["something new"]
    for fatal in (
        "Unused Input: nonpad",
        "Attribute axis not found in plugin node! Ensure that the plugin creator has a default value",
        "TensorRT currently ignores the seed field",
        "setBroadcastAcrossBatch has no effect",
    ):
        with pytest.raises(LogitLockError, match="would drop a part of the graph"):
            check_warnings([*harmless, fatal])


def test_compute_capabilities() -> None:
    assert len({capability_member(spelling) for spelling in ("8.9", "89", "SM89", "sm_89")}) == 1
    assert [capability_name(c) for c in ("8.9", "SM120", "sm_80")] == ["8.9", "12.0", "8.0"]
    for wrong in ("9.0", "sm_90", "8.4", "current", "", "8.9.0"):
        with pytest.raises(LogitLockError, match=r"builds for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"):
            capability_member(wrong)


@pytest.mark.tensorrt
def test_limits_and_options_reach_the_builder(tmp_path: Path) -> None:
    options = BuildOptions(
        max_batch=3, max_input=5, max_seq=24, workspace=64, optimization_level=2, compute_capabilities=("8.9", "12.0")
    )
    with LOGGER.collect() as messages:
        build(source_of("gpt2"), tmp_path / "b", attention="plugin", precision="fp16", options=options)
    listed = next(text for _, text in messages if text.startswith("Layers:")).partition("I/O Tensors:")[2]
    lines = {line.split(",")[0].removeprefix(" Name: "): line for line in listed.splitlines()}
    for name, first, second in (
        ("input_ids", ([1, 1], [3, 5]), ([1, 1], [3, 1])),
        ("attention_mask", ([1, 1], [3, 24]), ([1, 1], [3, 24])),
        ("logit_index", ([1, 1], [3, 5]), ([1, 1], [3, 1])),
        ("past.blocks.0.key", ([1, 4, 24, 16], [3, 4, 24, 16]), ([1, 4, 24, 16], [3, 4, 24, 16])),
    ):
        shapes = [f"MinShape: {low}, OptShape: .*MaxShape: {high}" for low, high in (first, second)]
        for shape in shapes:
            pattern = shape.replace(" ", "").replace("[", r"\[").replace("]", r"\]")
            assert re.search(pattern, lines[name].replace(" ", "")), (name, lines[name])
    seen: dict[str, Any] = {}

    class Config:
        num_compute_capabilities = 0

        def __setattr__(self, name: str, value: Any) -> None:
            seen[name] = value

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: seen.setdefault(name, []).append(arguments) or True

    class Builder:
        create_builder_config = Config

        def create_optimization_profile(self) -> Any:
            return Config()

    tensorrt_build._configure(Builder(), [], options, None)
    trt = tensorrt_build.trt
    assert seen["builder_optimization_level"] == 2 and seen["num_compute_capabilities"] == 2
    assert seen["set_memory_pool_limit"] == [(trt.MemoryPoolType.WORKSPACE, 64 << 20)]
    assert seen["set_compute_capability"] == [(trt.ComputeCapability.SM89, 0), (trt.ComputeCapability.SM120, 1)]
    assert seen["clear_flag"] == [(trt.BuilderFlag.TF32,)]


def test_the_layer_list_is_read_from_the_log() -> None:
    tensor = "{{ Name: {}, Dimensions: [-1,8], Strides: [8,1], StrideOrder: [1,0], Datatype: {}, Format: (Linear) x }}"
    placed = "{{ Name: {}, Location: Device, Dimensions: [-1,4,24,16], Datatype: Half, Format: x }}"
    lines = [
        "Name: __mye1_0_myl1_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , "
        "Metadata: ",
        f"Name: norm_U1_myl1_1, LayerType: kgen, "
        f"Inputs: [ {tensor.format('x', 'Half')}, {tensor.format('i', 'Int64')}], "
        f"Constants: [ {tensor.format('w', 'BFloat16')}], Outputs: [ {tensor.format('y_myl1', 'Float')}], "
        "TacticName: t, StreamId: 0, "
        "Metadata: [ONNX Layer: node_of_a | a.norm (FusedRmsNorm)]\x1f[ONNX Layer: a.qkv.product]",
        f"Name: a.attn [profile 1], LayerType: PluginV3, Inputs: [ {placed.format('past.k [profile 1]')}], "
        f"Outputs: [ {placed.format('k [profile 1]')}], PluginType: P, TacticValue: 0x0, "
        "Metadata: [ONNX Layer: a.attn]",
        "Name: __mye2_0_myl3_0, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , Metadata: ",
        f"Name: gemm_myl3_1, LayerType: gemm, Inputs: [ {tensor.format('k [profile 1]', 'Half')}], Constants: [], "
        f"Outputs: [ {tensor.format('z', 'Half')}], TacticName: , StreamId: 0, Metadata: [ONNX Layer: a.out]",
    ]
    messages = ["noise", "Total Activation Memory: 7 bytes", "Total Activation Memory: 5 bytes"]
    messages += ["Total Weights Memory: 99 bytes", "\n".join(["Layers:", *lines, "", "I/O Tensors:", " Name: x, y"])]
    taps = {"a.norm": ("norm",), "a.qkv.product": ("qkv",), "a.attn": ("k", "context"), "a.out": ("out",)}
    plan = parse_log(messages, plan="engine.plan", taps=taps)
    assert (plan.weight_bytes, plan.activation_bytes) == (99, [7, 5])
    assert [(layer.name, layer.profile, layer.taps) for layer in plan.layers] == [
        ("__mye1_0_myl1_0", 0, ["norm", "qkv"]),
        ("norm_U1_myl1_1", 0, ["norm", "qkv"]),
        ("a.attn", 1, ["k", "context"]),
        ("__mye2_0_myl3_0", 1, ["out"]),
        ("gemm_myl3_1", 1, ["out"]),
    ]
    norm, attn = plan.layers[1], plan.layers[2]
    assert [(t.name, t.dtype, t.shape) for t in norm.inputs] == [("x", "float16", [-1, 8]), ("i", "int64", [-1, 8])]
    assert [(t.name, t.dtype) for t in norm.constants] == [("w", "bfloat16")]
    assert norm.refs == ["node_of_a | a.norm (FusedRmsNorm)", "a.qkv.product"]
    assert [t.name for t in (*attn.inputs, *attn.outputs)] == ["past.k", "k"] and attn.inputs[0].shape == [
        -1,
        4,
        24,
        16,
    ]
    assert plan.summary()["layers"] == [2, 3] and plan.summary()["with_taps"] == 5


def test_a_node_belongs_to_the_next_taps() -> None:
    nodes = [("shared", "x", "s"), ("a.pre", "s", "p"), ("a", "p", "a"), ("b.pre", "a s", "q"), ("b", "q", "b")]
    graph = helper.make_graph(
        [helper.make_node("Sum", reads.split(), [writes], name=name) for name, reads, writes in nodes], "g", [], []
    )
    expected = {"shared": ("a", "b"), "a.pre": ("a",), "a": ("a",), "b.pre": ("b",), "b": ("b",)}
    assert node_taps(helper.make_model(graph), ("a", "b")) == expected
