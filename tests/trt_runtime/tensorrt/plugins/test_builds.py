"""Plugins in real TensorRT-RTX builds, which need no GPU.

What TensorRT leaves silent must be an error here: a missing creator, another version, an attribute that is not
advertised, an exception inside a plugin.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from refmodels.errors import LogitLockError
from tests.support.goldens import case_source
from trt_runtime.bundle import Precision
from trt_runtime.kernels.launch import AttentionShape

try:
    from trt_runtime.tensorrt.api import IS_RTX, LOGGER, errors_of, trt
except LogitLockError as error:
    pytest.skip(str(error), allow_module_level=True)

from tests.support.plugin_graphs import BATCH, CAPACITY, CASES, TOKENS, graph_of, nodes
from trt_runtime.tensorrt import plugins
from trt_runtime.tensorrt.plugins import base
from trt_runtime.tensorrt.plugins.rms_norm import FusedRmsNormPlugin

# Full TensorRT builds on a GPU only.  The other tests of this folder also run on its bindings without its libraries
# (tests/trt_runtime/tensorrt/test_api.py).
pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(not IS_RTX, reason="full TensorRT builds on a GPU only"),
]


def build(model: onnx.ModelProto, *, alias: bool = True) -> tuple[list[str], bytes, list[str]]:
    """Layer types of the network, the plan, and the lines of the builder's layer list.

    Raises:
        RuntimeError: with TensorRT's errors.
    """
    plugins.register_plugins()
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


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(a for a in node.attribute if a.name == name)


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


def test_the_caches_are_aliased() -> None:
    with pytest.raises(RuntimeError, match=r"Aliased I/O used by plugin blocks\.0\.attn"):
        build(graph_of("gpt_bigcode", "fp16"), alias=False)


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


def test_a_graph_as_exported_passes_and_registering_again_is_fine() -> None:
    plugins.register_plugins()
    plugins.register_plugins()
    creators = trt.get_plugin_registry().all_creators
    registered = [c.name for c in creators if c.plugin_namespace == plugins.PLUGIN_NAMESPACE]
    assert sorted(registered) == sorted(plugins.CREATORS)
    plugins.check_nodes(graph_of("qwen_ntk", "fp16"))


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


def test_a_missing_creator_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.register_plugins()
    creator = plugins.CREATORS["CachedAttention"]
    registry = trt.get_plugin_registry()
    assert registry.deregister_creator(creator)
    try:
        monkeypatch.setattr(plugins, "register_plugins", lambda: None)
        with pytest.raises(LogitLockError, match="needs the TensorRT plugin refmodels::CachedAttention version 1"):
            plugins.check_nodes(graph_of("gpt_bigcode", "fp16"))
        with pytest.raises(LogitLockError, match="the plan needs the TensorRT plugin refmodels::CachedAttention"):
            plugins.check_plugins({"CachedAttention": "1"})
    finally:
        monkeypatch.undo()
        plugins.register_plugins()
    plugins.check_plugins({"CachedAttention": "1", "FusedRmsNorm": "1"})
    with pytest.raises(LogitLockError, match=r"the plan needs .*FusedRmsNorm version 3"):
        plugins.check_plugins({"FusedRmsNorm": "3"})


def test_a_creator_of_ones_own_comes_first() -> None:
    plugins.register_plugins()
    registry, ours = trt.get_plugin_registry(), plugins.CREATORS["FusedRmsNorm"]
    theirs = base.PluginCreator(FusedRmsNormPlugin)
    assert registry.deregister_creator(ours)
    try:
        assert registry.register_creator(theirs, plugins.PLUGIN_NAMESPACE)
        plugins.register_plugins()
        assert registry.get_creator("FusedRmsNorm", "1", plugins.PLUGIN_NAMESPACE) is theirs
    finally:
        registry.deregister_creator(theirs)
        plugins.register_plugins()
    assert registry.get_creator("FusedRmsNorm", "1", plugins.PLUGIN_NAMESPACE) is ours
