"""Plugins in real TensorRT-RTX builds (no GPU needed), and each call that TensorRT makes to them, by hand.

What TensorRT leaves silent must be an error here: a missing creator, another version, an attribute that is not
advertised, an exception inside a plugin.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from export.graph.functions import ELEMENT_TYPES, attention_inputs
from export.graph.trace import build_graph
from refmodels.checkpoints.load import DTYPES, empty_decoder
from refmodels.errors import LogitLockError
from tests.support.goldens import case_source
from trt_runtime.bundle import Precision
from trt_runtime.kernels.launch import AttentionShape, NormShape

try:
    from trt_runtime.tensorrt.api import IS_RTX, LOGGER, errors_of, trt
except LogitLockError as error:
    pytest.skip(str(error), allow_module_level=True)

from trt_runtime.tensorrt import plugins
from trt_runtime.tensorrt.plugins import attention, base
from trt_runtime.tensorrt.plugins.attention import AttentionAttributes, CachedAttention
from trt_runtime.tensorrt.plugins.rms_norm import FusedRmsNorm, NormAttributes

# The other tests also run on full TensorRT's bindings without its libraries (test_tensorrt_api.py).
builds = pytest.mark.skipif(not IS_RTX, reason="full TensorRT builds on a GPU only")

CAPACITY = 32
BATCH, TOKENS = 4, 8
# NTK and logn; ALiBi; interleaved partial rope and grouped heads; sliding window; learned positions and one kv head.
CASES: tuple[tuple[str, Precision], ...] = (
    ("qwen_ntk", "fp16"),
    ("baichuan_13b", "fp32"),
    ("chatglm2", "bf16"),
    ("starcoder2_sliding", "fp16"),
    ("gpt_bigcode", "fp32"),
)
ATTENTION = AttentionAttributes(
    heads=4, kv_heads=2, scale=0.3, rotary_dim=8, rotary_interleaved=1, window=5, has_query_scale=1, has_alibi=1
)
NORM = NormAttributes(epsilon=1e-6, weight_in_float=1)


def graph_of(case: str, precision: Precision) -> onnx.ModelProto:
    """The whole model of a golden case with random weights and a fixed cache capacity."""
    spec = case_source(case).spec
    graph = build_graph(spec, precision=precision, max_positions=CAPACITY)
    shapes = {name: p.shape for name, p in empty_decoder(spec).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = dict(graph.tables)
    for name, layout in graph.parameters.items():
        weight = 0.02 * torch.randn(tuple(shapes[name]), generator=generator)
        tensors[name] = (weight.T if layout == "transposed" else weight).to(DTYPES[precision])
    types = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    for name, tensor in tensors.items():
        kind = ELEMENT_TYPES[types[tensor.dtype]]  # type: ignore[index]
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        initializer = TensorProto(name=name, data_type=kind, dims=tensor.shape, raw_data=raw)
        graph.model.graph.initializer.append(initializer)
    values = graph.model.graph
    for value in (*values.input, *values.output, *values.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == "capacity":
                axis.dim_value = CAPACITY
    return graph.model


def build(model: onnx.ModelProto, *, alias: bool = True) -> tuple[list[str], bytes, list[str]]:
    """Layer types of the network, the plan, and the lines of the builder's layer list.

    Raises:
        RuntimeError: with TensorRT's errors.
    """
    plugins.register()
    with LOGGER.collect() as messages:
        builder = trt.Builder(LOGGER)
        network, config = builder.create_network(0), builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, alias)
        parser = trt.OnnxParser(network, LOGGER)
        if not parser.parse(model.SerializeToString()):
            raise RuntimeError("; ".join(errors_of(messages)))
        for tokens in (TOKENS, 1):
            largest = {"batch": BATCH, "tokens": tokens, "slots": CAPACITY, "logit_tokens": tokens}
            profile = builder.create_optimization_profile()
            for value in model.graph.input:
                dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
                low = tuple(1 if isinstance(d, str) else d for d in dims)
                high = tuple(largest[d] if isinstance(d, str) else d for d in dims)
                profile.set_shape(value.name, low, high, high)
            assert config.add_optimization_profile(profile) >= 0
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError("; ".join(errors_of(messages)))
    layers = [line for _, text in messages if text.startswith("Layers:") for line in text.split("\n")[1:]]
    return [network.get_layer(i).type.name for i in range(network.num_layers)], bytes(plan), layers


def nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(a for a in node.attribute if a.name == name)


@pytest.fixture(autouse=True)
def _no_failure_left() -> Iterator[None]:
    plugins.raise_failure()
    yield
    base._failures.clear()


# Real builds


@builds
@pytest.mark.parametrize(("case", "precision"), CASES)
def test_every_node_becomes_a_plugin_layer_and_caches_are_written_in_place(case: str, precision: Precision) -> None:
    model = graph_of(case, precision)
    plugins.check_nodes(model)
    types, plan, layers = build(model)
    attentions, norms = nodes(model, "CachedAttention"), nodes(model, "FusedRmsNorm")
    assert types.count("PLUGIN_V3") == len(attentions) + len(norms) > 0
    for node in attentions:
        for suffix in ("", " [profile 1]"):
            (layer,) = [line for line in layers if line.startswith(f"Name: {node.name}{suffix}, LayerType: PluginV3")]
            inputs, outputs = (tensor_names(part) for part in layer.split("Outputs: "))
            # The caches go in and out as they are: no other layer touches them, so nothing copies them.
            assert inputs[2:4] == [f"{n}{suffix}" for n in node.input[1:3]]
            assert outputs[1:3] == [f"{n}{suffix}" for n in node.output[1:3]]
            for cache in (*node.input[1:3], *node.output[1:3]):
                touching = [line for line in layers if f"{{ Name: {cache}{suffix}," in line]
                assert touching == [layer]
    for node in norms:
        assert sum(f"[ONNX Layer: {node.name}]" in line and "custom_layer" in line for line in layers) == 2
    for node in (attentions[0], *norms[:1]):
        for a in node.attribute:
            if not a.name.startswith("plugin_"):
                assert helper.get_attribute_value(a) in stored_values(plan, a.name), a.name
    plugins.raise_failure()


def stored_values(plan: bytes, name: str) -> set[float]:
    """The values of a plugin field in a plan: length and name, then the type's name, a length and the data."""
    pattern = (
        re.escape(len(name).to_bytes(8, "little") + name.encode())
        + rb"\x07\x80.{8,40}?(INT32|FP32)\x01\x80\x03\x80\x01\x00(.{8})(.{4})"
    )
    found = re.findall(pattern, plan, re.DOTALL)
    assert found and all(int.from_bytes(size, "little") == 4 for _, size, _ in found), name
    return {struct.unpack("<i" if kind == b"INT32" else "<f", data)[0] for kind, _, data in found}


def tensor_names(text: str) -> list[str]:
    return re.findall(r"Name: (.*?)(?:, Location: \w+)?, (?:Dimensions|LayerType)", text)


@builds
def test_the_caches_are_aliased() -> None:
    with pytest.raises(RuntimeError, match=r"Aliased I/O used by plugin blocks\.0\.attn"):
        build(graph_of("gpt_bigcode", "fp16"), alias=False)


@builds
def test_the_workspace_is_asked_for_the_largest_shape_of_each_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    import trt_runtime.kernels.attention as kernels

    seen = []

    def workspace_bytes(shape: AttentionShape) -> int:
        seen.append(shape)
        return 1 << 20

    monkeypatch.setattr(kernels, "workspace_bytes", workspace_bytes)
    build(graph_of("qwen_ntk", "fp16"))
    spec = case_source("qwen_ntk").spec
    assert {shape.tokens for shape in seen} == {TOKENS, 1}
    for shape in seen:
        assert (shape.batch, shape.slots, shape.capacity) == (BATCH, CAPACITY, CAPACITY)
        assert (shape.heads, shape.kv_heads, shape.head_dim) == (
            spec.attention.heads,
            spec.attention.kv_heads,
            spec.attention.head_dim,
        )
        assert (shape.dtype, shape.table_dtype, shape.has_query_scale, shape.has_alibi) == ("fp16", "fp32", True, False)


def lengths_in_int32(model: onnx.ModelProto) -> None:
    cast = helper.make_node("Cast", ["cache_lengths"], ["narrow"], name="narrow", to=TensorProto.INT32)
    model.graph.node.insert(0, cast)
    nodes(model, "CachedAttention")[0].input[3] = "narrow"


def visible_as_numbers(model: onnx.ModelProto) -> None:
    nodes(model, "CachedAttention")[0].input[4] = "attention_mask"


def other_norm_weight(model: onnx.ModelProto) -> None:
    norm = nodes(model, "FusedRmsNorm")[0]
    cast = helper.make_node("Cast", [norm.input[1]], ["wide"], name="wide", to=TensorProto.FLOAT)
    model.graph.node.insert(0, cast)
    norm.input[1] = "wide"


def without_window(model: onnx.ModelProto) -> None:
    node = nodes(model, "CachedAttention")[0]
    node.attribute.remove(attribute(node, "window"))


def other_heads(model: onnx.ModelProto) -> None:
    attribute(nodes(model, "CachedAttention")[0], "heads").i = 3


def hidden_query_scale(model: onnx.ModelProto) -> None:
    attribute(nodes(model, "CachedAttention")[0], "has_query_scale").i = 0


def whole_scale(model: onnx.ModelProto) -> None:
    scale = attribute(nodes(model, "CachedAttention")[0], "scale")
    scale.CopyFrom(helper.make_attribute("scale", 1))


def list_of_windows(model: onnx.ModelProto) -> None:
    window = attribute(nodes(model, "CachedAttention")[0], "window")
    window.CopyFrom(helper.make_attribute("window", [8, 9]))


def flat_qkv(model: onnx.ModelProto) -> None:
    node = nodes(model, "CachedAttention")[0]
    shape = helper.make_node("Constant", [], ["flat_shape"], name="flat_shape", value_ints=[0, -1])
    flat = helper.make_node("Reshape", [node.input[0], "flat_shape"], ["flat"], name="flat")
    place = list(model.graph.node).index(node)
    model.graph.node.insert(place, flat)
    model.graph.node.insert(place, shape)
    nodes(model, "CachedAttention")[0].input[0] = "flat"


@builds
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lengths_in_int32,
            r"CachedAttention blocks\.0\.attn.*the input cache_lengths has type INT32; it must be INT64",
        ),
        (visible_as_numbers, r"the input visible has type INT64; it must be BOOL"),
        (other_norm_weight, r"FusedRmsNorm blocks\.0\.attn_norm.*the input weight has type FLOAT; it must be HALF"),
        (without_window, r"blocks\.0\.attn lacks the attribute window"),
        (other_heads, r"qkv is \d+ wide; the heads and the cache ask for \d+"),
        (hidden_query_scale, r"it has 8 inputs; its attributes ask for 7: qkv, .*, cos, sin"),
        (whole_scale, r"the attribute scale must be one float, it is 1 of type INT32"),
        (list_of_windows, r"the attribute window must be one int, it is 2 of type INT32"),
        (flat_qkv, r"the input qkv has 2 axes; it must have 3"),
    ],
)
def test_a_bad_node_says_what_is_wrong(change: Callable[[onnx.ModelProto], None], message: str) -> None:
    model = graph_of("qwen_ntk", "fp16")
    change(model)
    with pytest.raises(RuntimeError):
        build(model)
    with pytest.raises(LogitLockError, match=message):
        plugins.raise_failure()
    plugins.raise_failure()


# Nodes are checked before TensorRT sees them


@builds
def test_a_graph_as_exported_passes_and_registering_again_is_fine() -> None:
    plugins.register()
    plugins.register()
    registered = [c.name for c in trt.get_plugin_registry().all_creators if c.plugin_namespace == plugins.NAMESPACE]
    assert sorted(registered) == sorted(plugins.CREATORS)
    plugins.check_nodes(graph_of("qwen_ntk", "fp16"))


@builds
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("plugin_version", "2", r"CachedAttention version 2, which has no creator; registered: .*version 1"),
        ("plugin_namespace", "theirs", r"theirs::CachedAttention version 1, which has no creator"),
        ("softcap", 30.0, r"does not know the attribute softcap; it has has_alibi, .*window"),
    ],
)
def test_a_node_that_no_creator_serves_is_an_error(name: str, value: Any, message: str) -> None:
    model = graph_of("gpt_bigcode", "fp16")
    node = nodes(model, "CachedAttention")[1]
    for old in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(old)
    node.attribute.append(helper.make_attribute(name, value))
    with pytest.raises(LogitLockError, match=rf"the node blocks\.1\.attn.*{message}"):
        plugins.check_nodes(model)
    # What TensorRT itself does with it: it says nothing.
    types, _, _ = build(model)
    assert types.count("PLUGIN_V3") == len(nodes(model, "CachedAttention")) - (name != "softcap")


@builds
def test_a_node_of_our_domain_needs_a_creator_or_a_body() -> None:
    model = graph_of("gpt_bigcode", "fp16")
    node = nodes(model, "CachedAttention")[0]
    for name in ("plugin_namespace", "plugin_version"):
        node.attribute.remove(attribute(node, name))
    plugins.check_nodes(model)
    node.op_type = "Unknown"
    with pytest.raises(
        LogitLockError, match=r"refmodels::Unknown version 1, which has no creator; .* none of this name"
    ):
        plugins.check_nodes(model)


@builds
def test_a_missing_creator_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.register()
    creator = plugins.CREATORS["CachedAttention"]
    registry = trt.get_plugin_registry()
    assert registry.deregister_creator(creator)
    try:
        monkeypatch.setattr(plugins, "register", lambda: None)
        with pytest.raises(LogitLockError, match="needs the TensorRT plugin refmodels::CachedAttention version 1"):
            plugins.check_nodes(graph_of("gpt_bigcode", "fp16"))
        with pytest.raises(LogitLockError, match="the plan needs the TensorRT plugin refmodels::CachedAttention"):
            plugins.check_plugins({"CachedAttention": "1"})
    finally:
        monkeypatch.undo()
        plugins.register()
    plugins.check_plugins({"CachedAttention": "1", "FusedRmsNorm": "1"})
    with pytest.raises(LogitLockError, match=r"the plan needs .*FusedRmsNorm version 3"):
        plugins.check_plugins({"FusedRmsNorm": "3"})


@builds
def test_a_creator_of_ones_own_comes_first() -> None:
    plugins.register()
    registry, ours = trt.get_plugin_registry(), plugins.CREATORS["FusedRmsNorm"]
    theirs = base.Creator(FusedRmsNorm)
    assert registry.deregister_creator(ours)
    try:
        assert registry.register_creator(theirs, plugins.NAMESPACE)
        plugins.register()
        assert registry.get_creator("FusedRmsNorm", "1", plugins.NAMESPACE) is theirs
    finally:
        registry.deregister_creator(theirs)
        plugins.register()
    assert registry.get_creator("FusedRmsNorm", "1", plugins.NAMESPACE) is ours


# Fields


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        (FusedRmsNorm, NORM),
        (FusedRmsNorm, NormAttributes(epsilon=0.5, weight_in_float=0)),
        (CachedAttention, ATTENTION),
        (
            CachedAttention,
            AttentionAttributes(
                heads=40, kv_heads=40, scale=128**-0.5, rotary_dim=0, rotary_interleaved=0, window=0,
                has_query_scale=0, has_alibi=1,
            ),
        ),
    ],
)  # fmt: skip
def test_serialized_fields_make_the_same_plugin_again(kind: type[base.Plugin], attributes: Any) -> None:
    plugin = kind(attributes, layer="blocks.0")
    fields = plugin.get_fields_to_serialize()
    again = plugins.CREATORS[kind.NAME].create_plugin("", fields, trt.TensorRTPhase.RUNTIME)
    assert type(again) is kind
    for name, given in vars(attributes).items():
        expected = ctypes.c_float(given).value if isinstance(given, float) else given
        assert getattr(again.attributes, name) == expected
    assert (again.plugin_name, again.plugin_version, again.plugin_namespace) == (kind.NAME, "1", "refmodels")
    assert again.clone().attributes == again.attributes


def test_fields_of_another_version_are_an_error() -> None:
    plugin = FusedRmsNorm(NORM)
    fields = plugin.get_fields_to_serialize()
    fields.append(plugins.CREATORS["CachedAttention"].field_names[0])
    with pytest.raises(LogitLockError, match="has the unknown attribute heads"):
        plugins.CREATORS["FusedRmsNorm"].create_plugin("", fields, trt.TensorRTPhase.RUNTIME)
    assert [f.name for f in plugins.CREATORS["FusedRmsNorm"].field_names] == ["epsilon", "weight_in_float"]


# Calls at run time


class FakeKernels:
    """Stands for CompiledKernels: notes what is launched."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []

    def launcher(self, capability: int) -> Any:
        self.capability = capability
        return SimpleNamespace(
            rms_norm=lambda shape, **given: self.calls.append(("rms_norm", shape, given)),
            attention=lambda shape, **given: self.calls.append(("attention", shape, given)),
        )


def desc(kind: Any, *dims: int) -> Any:
    found = trt.PluginTensorDesc()
    found.dims, found.type, found.format = dims, kind, trt.TensorFormat.LINEAR
    return found


def attention_descs(*, batch: int = 2, tokens: int = 3, slots: int = 16, head_dim: int = 16) -> tuple[list[Any], Any]:
    a = ATTENTION
    cache = (batch, a.kv_heads, 64, head_dim)
    inputs = [
        desc(trt.float16, batch, tokens, (a.heads + 2 * a.kv_heads) * head_dim),
        desc(trt.float16, *cache),
        desc(trt.float16, *cache),
        desc(trt.int64, batch),
        desc(trt.bool, batch, slots),
        desc(trt.float32, batch, tokens, a.rotary_dim // 2),
        desc(trt.float32, batch, tokens, a.rotary_dim // 2),
        desc(trt.float32, batch, tokens),
        desc(trt.float32, a.heads),
    ]
    return inputs, [desc(trt.float16, batch, tokens, a.heads * head_dim), inputs[1], inputs[2]]


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters on the CPU, and a compute capability: what a run asks torch for."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))


def loaded(kind: type[base.Plugin], attributes: Any, compiled: Any) -> Any:
    """A plugin as a plan's loading makes it."""
    source = kind(attributes)
    fields = source.get_fields_to_serialize()
    with plugins.use_compiled(compiled):
        plugin = plugins.CREATORS[kind.NAME].create_plugin("", fields, trt.TensorRTPhase.RUNTIME)
    return plugin.attach_to_context(None)


@pytest.mark.usefixtures("on_a_device")
def test_attention_launches_with_its_addresses() -> None:
    kernels = FakeKernels()
    plugin = loaded(CachedAttention, ATTENTION, kernels)
    input_descs, output_descs = attention_descs()
    plugin.on_shape_change(input_descs, output_descs)
    plugin.enqueue(input_descs, output_descs, list(range(10, 19)), [100, 11, 12], 7, 5)
    ((kind, shape, given),) = kernels.calls
    assert kind == "attention" and kernels.capability == 89
    assert shape == AttentionShape(
        batch=2, tokens=3, slots=16, capacity=64, heads=4, kv_heads=2, head_dim=16, scale=ctypes.c_float(0.3).value,
        dtype="fp16", rotary_dim=8, rotary_interleaved=True, window=5, has_query_scale=True, has_alibi=True,
        table_dtype="fp32",
    )  # fmt: skip
    counters = given.pop("counters")
    assert counters == plugin._counters[-1].data_ptr()
    assert given == {
        "qkv": 10, "key_cache": 11, "value_cache": 12, "cache_lengths": 13, "visible": 14, "cos": 15, "sin": 16,
        "query_scale": 17, "alibi_slopes": 18, "context": 100, "workspace": 7, "stream": 5,
    }  # fmt: skip


@pytest.mark.usefixtures("on_a_device")
def test_optional_inputs_that_are_absent_are_none() -> None:
    kernels = FakeKernels()
    plain = AttentionAttributes(
        heads=4, kv_heads=2, scale=0.3, rotary_dim=0, rotary_interleaved=0, window=0, has_query_scale=0, has_alibi=1
    )
    plugin = loaded(CachedAttention, plain, kernels)
    input_descs, output_descs = attention_descs()
    input_descs = [*input_descs[:5], input_descs[8]]
    plugin.enqueue(input_descs, output_descs, list(range(10, 16)), [100, 11, 12], 7, 5)
    ((_, shape, given),) = kernels.calls
    assert (given["cos"], given["sin"], given["query_scale"], given["alibi_slopes"]) == (None, None, None, 15)
    assert (shape.rotary_dim, shape.has_query_scale, shape.has_alibi) == (0, False, True)


@pytest.mark.parametrize("case", ["qwen_ntk", "baichuan_13b", "chatglm2", "gpt_bigcode", "qwen2", "starcoder2_sliding"])
def test_inputs_are_those_of_the_exported_nodes(case: str) -> None:
    model = graph_of(case, "fp16")
    for node in nodes(model, "CachedAttention"):
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.name.startswith("plugin_")}
        plugin = CachedAttention(AttentionAttributes(**values))
        assert plugin.inputs() == attention_inputs(case_source(case).spec)
        assert len(plugin.inputs()) == len(node.input)


@pytest.mark.usefixtures("on_a_device")
def test_norm_launches_with_its_addresses() -> None:
    kernels = FakeKernels()
    plugin = loaded(FusedRmsNorm, NORM, kernels)
    x = desc(trt.bfloat16, 2, 3, 64)
    plugin.enqueue([x, desc(trt.bfloat16, 64)], [x], [10, 11], [12], 0, 5)
    shape = NormShape(rows=6, width=64, eps=ctypes.c_float(1e-6).value, weight_in_float=True, dtype="bf16")
    assert kernels.calls == [("rms_norm", shape, {"x": 10, "weight": 11, "y": 12, "stream": 5})]


@pytest.mark.usefixtures("on_a_device")
def test_counters_belong_to_one_context_and_never_move(monkeypatch: pytest.MonkeyPatch) -> None:
    import trt_runtime.kernels.attention as kernels

    monkeypatch.setattr(kernels, "counter_count", lambda shape: 10 * shape.batch)
    plugin = loaded(CachedAttention, ATTENTION, FakeKernels())
    small, large = attention_descs(batch=1), attention_descs(batch=4)
    plugin.on_shape_change(*small)
    first = plugin._counters[-1]
    assert first.numel() == 10 and not first.any()
    plugin.on_shape_change(*large)
    plugin.on_shape_change(*small)
    assert [c.numel() for c in plugin._counters] == [10, 40] and plugin._counters[0] is first
    assert plugin.attach_to_context(None)._counters == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plugin.enqueue(*large, list(range(10, 19)), [100, 11, 12], 7, 5)
    with pytest.raises(LogitLockError, match="run the step once before"):
        plugin.enqueue(*attention_descs(batch=5), list(range(10, 19)), [100, 11, 12], 7, 5)


@pytest.mark.usefixtures("on_a_device")
def test_run_time_errors_are_kept() -> None:
    input_descs, output_descs = attention_descs()
    addresses = list(range(10, 19))
    with pytest.raises(LogitLockError):
        loaded(CachedAttention, ATTENTION, FakeKernels()).enqueue(
            input_descs, output_descs, addresses, [100, 11, 13], 7, 5
        )
    with pytest.raises(LogitLockError, match="enqueue: the cache past_value is not updated in place"):
        plugins.raise_failure()
    x = desc(trt.float16, 2, 64)
    with pytest.raises(LogitLockError):
        FusedRmsNorm(NORM).enqueue([x, desc(trt.float16, 64)], [x], [10, 11], [12], 0, 5)
    with pytest.raises(LogitLockError, match="no kernels were given"):
        plugins.raise_failure()

    class Failing(FakeKernels):
        def launcher(self, capability: int) -> Any:
            raise RuntimeError("no image for sm_89")

    with pytest.raises(LogitLockError):
        loaded(FusedRmsNorm, NORM, Failing()).enqueue([x, desc(trt.float16, 64)], [x], [10, 11], [12], 0, 5)
    with pytest.raises(LogitLockError, match="FusedRmsNorm, enqueue: no image for sm_89"):
        plugins.raise_failure()


@pytest.mark.usefixtures("on_a_device")
def test_layers_share_one_launcher_and_kernels_are_those_of_their_plan() -> None:
    first, second = FakeKernels(), FakeKernels()
    plugin = FusedRmsNorm(NORM)
    fields = plugin.get_fields_to_serialize()
    creator = plugins.CREATORS["FusedRmsNorm"]
    with plugins.use_compiled(first):
        one, two = (creator.create_plugin("", fields, trt.TensorRTPhase.RUNTIME) for _ in range(2))
        with plugins.use_compiled(second):
            other = creator.create_plugin("", fields, trt.TensorRTPhase.RUNTIME)
    none = creator.create_plugin("", fields, trt.TensorRTPhase.RUNTIME)
    assert one.clone().launcher() is two.launcher()
    assert other.launcher() is not one.launcher()
    assert none.kernels is None


def test_formats() -> None:
    plugin = CachedAttention(ATTENTION)
    input_descs, output_descs = attention_descs()

    def supported(position: int, *, kind: Any = None, layout: Any = None) -> bool:
        tensors = []
        for index, each in enumerate((*input_descs, *output_descs)):
            dynamic = trt.DynamicPluginTensorDesc()
            dynamic.desc = desc(each.type, *each.dims)
            if index == position:
                copy = desc(kind or each.type, *each.dims)
                copy.format = layout or trt.TensorFormat.LINEAR
                dynamic.desc = copy
            tensors.append(dynamic)
        return bool(plugin.supports_format_combination(position, tensors, len(input_descs)))

    for position in range(12):
        assert supported(position), position
        assert not supported(position, layout=trt.TensorFormat.CHW2)
    wrong = {1: trt.float32, 2: trt.bfloat16, 3: trt.int32, 4: trt.int32, 6: trt.float16, 7: trt.float16}
    wrong |= {8: trt.float16, 9: trt.float32, 10: trt.float32, 11: trt.bfloat16}
    for position, kind in wrong.items():
        assert not supported(position, kind=kind), position
    assert supported(0, kind=trt.bfloat16) and supported(5, kind=trt.float16)


def test_aliases() -> None:
    plugin = CachedAttention(ATTENTION)
    assert [plugin.get_aliased_input(i) for i in range(3)] == [-1, 1, 2]
    assert plugin.inputs()[1:3] == ("past_key", "past_value")
    assert attention._ALIASES == {1: 1, 2: 2}


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize(("case", "precision"), CASES)
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_kernels_for_every_shape_are_among_those_compiled(case: str, precision: Precision, capability: int) -> None:
    """Attributes lose bits on their way through a plan (fp32); what serves them was compiled from the spec."""
    from trt_runtime.kernels import attention as attention_kernels
    from trt_runtime.kernels import rms_norm
    from trt_runtime.kernels.compiled import kernel_key, needed_launches

    spec = case_source(case).spec
    compiled = {kernel_key(launch) for launch in needed_launches(spec, precision, capability)}
    model = graph_of(case, precision)
    kernels = FakeKernels()
    half = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}[precision]
    for kind in (CachedAttention, FusedRmsNorm):
        for node in nodes(model, kind.NAME):
            values = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.name.startswith("plugin_")}
            plugin = loaded(kind, kind.Attributes(**values), kernels)
            a = spec.attention
            for batch, tokens in ((1, 1), (3, 1), (1, 2), (2, 70), (1, 300)):
                if kind is FusedRmsNorm:
                    x = desc(half, batch, tokens, spec.hidden_size)
                    plugin.enqueue([x, desc(half, spec.hidden_size)], [x], [16, 16], [16], 0, 0)
                    continue
                cache = desc(half, batch, a.kv_heads, 512, a.head_dim)
                descs = {
                    "qkv": desc(half, batch, tokens, spec.qkv_width),
                    "past_key": cache,
                    "past_value": cache,
                    "cache_lengths": desc(trt.int64, batch),
                    "visible": desc(trt.bool, batch, 512),
                    "cos": desc(trt.float32, batch, tokens, 1),
                    "sin": desc(trt.float32, batch, tokens, 1),
                    "query_scale": desc(trt.float32, batch, tokens),
                    "alibi_slopes": desc(trt.float32, a.heads),
                }
                inputs = [descs[name] for name in plugin.inputs()]
                context = desc(half, batch, tokens, a.heads * a.head_dim)
                plugin.enqueue(inputs, [context, cache, cache], [16] * len(inputs), [16] * 3, 16, 0)
    assert len(kernels.calls) == 5 * sum(len(nodes(model, op)) for op in ("CachedAttention", "FusedRmsNorm"))
    for name, shape, given in kernels.calls:
        given.pop("stream")
        if name == "rms_norm":
            launches = rms_norm.launches(shape, **given)
        else:
            launches = attention_kernels.launches(shape, **given, capability=capability)
        assert {kernel_key(launch.on(capability)) for launch in launches} <= compiled
