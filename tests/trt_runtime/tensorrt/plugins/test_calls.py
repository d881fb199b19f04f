"""Each call that TensorRT makes to a plugin, by hand: fields, formats, shapes and launches."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onnx import helper

from refmodels.attention import node_inputs
from refmodels.errors import LogitLockError
from tests.support.goldens import case_source
from tests.support.marks import quick_first
from trt_runtime.bundle import Precision
from trt_runtime.kernels.launch import AttentionShape, NormShape

try:
    from trt_runtime.tensorrt.api import trt
except LogitLockError as error:
    pytest.skip(str(error), allow_module_level=True)

from tests.support.plugin_graphs import CASES, graph_of, nodes
from trt_runtime.tensorrt import plugins
from trt_runtime.tensorrt.plugins import attention, base
from trt_runtime.tensorrt.plugins.attention import AttentionAttributes, CachedAttentionPlugin
from trt_runtime.tensorrt.plugins.rms_norm import FusedRmsNormPlugin, NormAttributes

ATTENTION = AttentionAttributes(
    heads=4, kv_heads=2, scale=0.3, rotary_dim=8, rotary_interleaved=1, window=5, has_query_scale=1, has_alibi=1
)
NORM = NormAttributes(epsilon=1e-6, weight_in_float=1)


# Fields


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        (FusedRmsNormPlugin, NORM),
        (FusedRmsNormPlugin, NormAttributes(epsilon=0.5, weight_in_float=0)),
        (CachedAttentionPlugin, ATTENTION),
        (
            CachedAttentionPlugin,
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
    plugin = FusedRmsNormPlugin(NORM)
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
    plugin = loaded(CachedAttentionPlugin, ATTENTION, kernels)
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
    plugin = loaded(CachedAttentionPlugin, plain, kernels)
    input_descs, output_descs = attention_descs()
    input_descs = [*input_descs[:5], input_descs[8]]
    plugin.enqueue(input_descs, output_descs, list(range(10, 16)), [100, 11, 12], 7, 5)
    ((_, shape, given),) = kernels.calls
    assert (given["cos"], given["sin"], given["query_scale"], given["alibi_slopes"]) == (None, None, None, 15)
    assert (shape.rotary_dim, shape.has_query_scale, shape.has_alibi) == (0, False, True)


@pytest.mark.parametrize("case", ["qwen_ntk", "baichuan_13b", "chatglm2", "gpt_bigcode", "qwen2", "starcoder2_sliding"])
def test_inputs_are_those_of_the_exported_nodes(case: str) -> None:
    """The plugin reads them from a node's attributes, the exporter from the spec."""
    model = graph_of(case, "fp16")
    for node in nodes(model, "CachedAttention"):
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.name.startswith("plugin_")}
        plugin = CachedAttentionPlugin(AttentionAttributes(**values))
        assert plugin.inputs() == node_inputs(case_source(case).spec)
        assert len(plugin.inputs()) == len(node.input)


def test_input_ranks_are_checked() -> None:
    plugin = CachedAttentionPlugin(ATTENTION)
    descs, _ = attention_descs()
    sizes = [[1] * len(d.dims) for d in descs]
    for index, name in enumerate(plugin.inputs()):
        wrong = [[*size, 1] if i == index else size for i, size in enumerate(sizes)]
        with pytest.raises(LogitLockError, match=f"the input {name} has {len(sizes[index]) + 1} axes; it must have"):
            plugin.get_output_shapes(wrong, [], None)


@pytest.mark.usefixtures("on_a_device")
def test_norm_launches_with_its_addresses() -> None:
    kernels = FakeKernels()
    plugin = loaded(FusedRmsNormPlugin, NORM, kernels)
    x = desc(trt.bfloat16, 2, 3, 64)
    plugin.enqueue([x, desc(trt.bfloat16, 64)], [x], [10, 11], [12], 0, 5)
    shape = NormShape(rows=6, width=64, eps=ctypes.c_float(1e-6).value, weight_in_float=True, dtype="bf16")
    assert kernels.calls == [("rms_norm", shape, {"x": 10, "weight": 11, "y": 12, "stream": 5})]


@pytest.mark.usefixtures("on_a_device")
def test_counters_belong_to_one_context_and_never_move(monkeypatch: pytest.MonkeyPatch) -> None:
    import trt_runtime.kernels.attention as kernels

    monkeypatch.setattr(kernels, "counter_count", lambda shape: 10 * shape.batch)
    plugin = loaded(CachedAttentionPlugin, ATTENTION, FakeKernels())
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
        loaded(CachedAttentionPlugin, ATTENTION, FakeKernels()).enqueue(
            input_descs, output_descs, addresses, [100, 11, 13], 7, 5
        )
    with pytest.raises(LogitLockError, match="enqueue: the cache past_value is not updated in place"):
        plugins.raise_failure()
    x = desc(trt.float16, 2, 64)
    with pytest.raises(LogitLockError):
        FusedRmsNormPlugin(NORM).enqueue([x, desc(trt.float16, 64)], [x], [10, 11], [12], 0, 5)
    with pytest.raises(LogitLockError, match="no kernels were given"):
        plugins.raise_failure()

    class Failing(FakeKernels):
        def launcher(self, capability: int) -> Any:
            raise RuntimeError("no image for sm_89")

    with pytest.raises(LogitLockError):
        loaded(FusedRmsNormPlugin, NORM, Failing()).enqueue([x, desc(trt.float16, 64)], [x], [10, 11], [12], 0, 5)
    with pytest.raises(LogitLockError, match="FusedRmsNorm, enqueue: no image for sm_89"):
        plugins.raise_failure()


@pytest.mark.usefixtures("on_a_device")
def test_layers_share_one_launcher_and_kernels_are_those_of_their_plan() -> None:
    first, second = FakeKernels(), FakeKernels()
    plugin = FusedRmsNormPlugin(NORM)
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
    plugin = CachedAttentionPlugin(ATTENTION)
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
    plugin = CachedAttentionPlugin(ATTENTION)
    assert [plugin.get_aliased_input(i) for i in range(3)] == [-1, 1, 2]
    assert plugin.inputs()[1:3] == ("past_key", "past_value")
    assert attention._ALIASES == {1: 1, 2: 2}


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize(("case", "precision"), quick_first(CASES))
@pytest.mark.parametrize("capability", quick_first([80, 90, 120]))
def test_kernels_for_every_shape_are_among_those_compiled(case: str, precision: Precision, capability: int) -> None:
    """Attributes lose bits on their way through a plan (fp32); what serves them was compiled from the spec."""
    from trt_runtime.kernels import attention as attention_kernels
    from trt_runtime.kernels import rms_norm
    from trt_runtime.kernels.compiled import kernel_key, needed_launches

    spec = case_source(case).spec
    compiled = {kernel_key(launch) for launch in needed_launches(spec, precision, capability)}
    model = graph_of(case, precision)
    widths = {weight.name: weight.dims[0] for weight in model.graph.initializer}
    kernels = FakeKernels()
    half = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}[precision]
    for kind in (CachedAttentionPlugin, FusedRmsNormPlugin):
        for node in nodes(model, kind.NAME):
            values = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.name.startswith("plugin_")}
            plugin = loaded(kind, kind.Attributes(**values), kernels)
            a = spec.attention
            for batch, tokens in ((1, 1), (3, 1), (1, 2), (2, 70), (1, 300)):
                if kind is FusedRmsNormPlugin:
                    width = widths[node.input[1]]
                    x = desc(half, batch, tokens, width)
                    plugin.enqueue([x, desc(half, width)], [x], [16, 16], [16], 0, 0)
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
