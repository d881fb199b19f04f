"""The plugins' enqueue on a real GPU, called as TensorRT calls it: descs, addresses, a stream, workspace; and under a
CUDA graph.  What is left out is TensorRT's own call.

It runs where TensorRT's Python bindings can be imported, with or without its libraries.  On a machine that has neither
(and no network), prepare the bindings elsewhere for its Python and bring them:

    python -m tests.support.full_tensorrt .bindings 3.12
    LOGITLOCK_TENSORRT=tensorrt LD_LIBRARY_PATH=.bindings PYTHONPATH=.bindings:. pytest -m gpu
    tests/trt_runtime/tensorrt/test_plugins_gpu.py

Tolerances: plugin and op round the same fp32 values to the tensor's dtype, so they may differ by one unit in the last
place where those values are next to a rounding boundary; in fp32 sums are made in another order, 1e-5 of the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from onnx import helper
from torch import Tensor

from export.graph.trace import build_graph
from refmodels.attention import AttentionFacts, AttentionInputs, inputs_of
from refmodels.dtypes import DTYPES
from refmodels.errors import LogitLockError
from refmodels.ops import cached_attention, fused_rms_norm
from refmodels.positions import build_tables
from refmodels.spec import ModelSpec
from tests.support.goldens import case_source
from trt_runtime.bundle import Precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]
try:
    from trt_runtime.kernels.compiled import CompiledKernels, compile_kernels
    from trt_runtime.tensorrt import plugins
    from trt_runtime.tensorrt.api import trt
except (LogitLockError, ImportError) as error:
    pytest.skip(str(error), allow_module_level=True)

CAPACITY, LIVE = 160, 128
CASES: tuple[tuple[str, Precision], ...] = (
    ("qwen_ntk", "fp16"),
    ("baichuan_13b", "fp32"),
    ("baichuan_13b", "bf16"),
    ("chatglm2", "bf16"),
    ("chatglm2", "fp32"),
    ("starcoder2_sliding", "fp16"),
    ("gpt_bigcode", "bf16"),
)
TYPES = {
    torch.float32: trt.float32,
    torch.float16: trt.float16,
    torch.bfloat16: trt.bfloat16,
    torch.int64: trt.int64,
    torch.bool: trt.bool,
}


def desc(tensor: Tensor) -> Any:
    made = trt.PluginTensorDesc()
    made.dims, made.type, made.format = tuple(tensor.shape), TYPES[tensor.dtype], trt.TensorFormat.LINEAR
    return made


def dynamic(tensor: Tensor) -> Any:
    made = trt.DynamicPluginTensorDesc()
    made.desc, made.max = desc(tensor), tuple(tensor.shape)
    return made


def plugin_of(spec: ModelSpec, precision: Precision, op: str) -> Any:
    """The plugin of an exported node, as loading a plan makes it: from serialized fields, with compiled kernels."""
    model = build_graph(spec, precision=precision).model
    node = next(node for node in model.graph.node if node.op_type == op)
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.name.startswith("plugin_")}
    creator = plugins.CREATORS[op]
    source = creator.plugin(creator.plugin.Attributes(**given))
    fields = source.get_fields_to_serialize()
    major, minor = torch.cuda.get_device_capability()
    kernels = CompiledKernels.load(compile_kernels(spec, precision, capabilities=[10 * major + minor]))
    with plugins.use_compiled(kernels):
        plugin = creator.create_plugin("", fields, trt.TensorRTPhase.RUNTIME)
    return plugin.attach_to_context(None)


class Caller:
    """TensorRT's part: addresses and descs of tensors, a workspace, a stream that is not torch's own."""

    def __init__(self, plugin: Any) -> None:
        self.plugin = plugin
        self.stream = torch.cuda.Stream()
        self.workspace = torch.empty(0, dtype=torch.uint8, device="cuda")

    def prepare(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """What comes before a step of new shapes."""
        size = self.plugin.get_workspace_size([dynamic(t) for t in inputs], [dynamic(t) for t in outputs])
        # Contents of the workspace must not matter: NaN in every element type.
        self.workspace = torch.full((max(16, size),), 0xFF, dtype=torch.uint8, device="cuda")
        self.plugin.on_shape_change([desc(t) for t in inputs], [desc(t) for t in outputs])
        torch.cuda.synchronize()

    def enqueue(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.plugin.enqueue(
            [desc(t) for t in inputs],
            [desc(t) for t in outputs],
            [t.data_ptr() for t in inputs],
            [t.data_ptr() for t in outputs],
            self.workspace.data_ptr(),
            self.stream.cuda_stream,
        )

    def run(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.prepare(inputs, outputs)
        with torch.cuda.stream(self.stream):
            self.enqueue(inputs, outputs)
        torch.cuda.synchronize()

    def capture(self, inputs: list[Tensor], outputs: list[Tensor]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.enqueue(inputs, outputs)
        return graph.replay


class Attention:
    """Inputs of a step of one spec on random data, and what the op makes of them."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, *, batch: int) -> None:
        self.spec, self.dtype, self.batch = spec, dtype, batch
        self.generator = torch.Generator(device="cuda").manual_seed(0)
        a = spec.attention
        self.caches = [self.random(batch, a.kv_heads, CAPACITY, a.head_dim) for _ in range(2)]
        tables = build_tables(spec, positions=CAPACITY, numerics="exact", dtype=dtype, device="cuda")
        self.tables = tables

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cuda").to(self.dtype)

    def inputs(self, tokens: int, lengths: list[int], pads: list[int]) -> dict[str, Tensor]:
        """`lengths`: slots in use; `pads`: hidden slots at the beginning of each row."""
        starts = torch.tensor(lengths, device="cuda")
        slots = starts[:, None] + torch.arange(tokens, device="cuda")
        visible = torch.arange(LIVE, device="cuda") >= torch.tensor(pads, device="cuda")[:, None]
        given = {
            "qkv": self.random(self.batch, tokens, self.spec.qkv_width),
            "past_key": self.caches[0],
            "past_value": self.caches[1],
            "cache_lengths": starts,
            "visible": visible,
        }
        if self.tables.rope_cos is not None and self.tables.rope_sin is not None:
            given |= {"cos": self.tables.rope_cos[slots].contiguous(), "sin": self.tables.rope_sin[slots].contiguous()}
        if self.tables.logn is not None:
            given["query_scale"] = 1 + self.tables.logn[slots]
        if self.tables.alibi_slopes is not None:
            given["alibi_slopes"] = self.tables.alibi_slopes
        return given

    def expected(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The op's own body, on copies of the caches."""
        a = self.spec.attention
        caches = {"past_key": given["past_key"].clone(), "past_value": given["past_value"].clone()}
        inputs = given | caches
        return cached_attention(
            AttentionInputs(**{row.name: inputs[row.node] for row in inputs_of(self.spec)}),
            AttentionFacts(
                heads=a.heads,
                kv_heads=a.kv_heads,
                scale=self.spec.scale(0),
                rotary_interleaved=self.spec.rope is not None and self.spec.rope.interleaved,
                window=self.spec.window(0),
            ),
        )

    def check(self, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], before: list[Tensor]) -> None:
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)
        for ours, theirs, old in zip(found[1:], expected[1:], before, strict=True):
            untouched = (theirs == old).all(-1)
            assert torch.equal(ours[untouched], old[untouched]), "slots of other tokens were written"


def close(found: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(found).all(), "something was not written, or not finite"
    unit = 1e-5 if expected.dtype == torch.float32 else torch.finfo(expected.dtype).eps
    error = (found.double() - expected.double()).abs().max()
    assert error <= unit * expected.double().abs().max(), float(error)


@pytest.mark.parametrize(("case", "precision"), CASES)
def test_attention_prefills_and_decodes_as_the_op_does(case: str, precision: Precision) -> None:
    spec = case_source(case).spec
    caller = Caller(plugin_of(spec, precision, "CachedAttention"))
    attention = Attention(spec, DTYPES[precision], batch=3)
    # A ragged prefill with left padding, a second chunk, and decode steps; rows at slots of their own.
    for tokens, lengths, pads in (
        (37, [0, 0, 0], [0, 9, 20]),
        (20, [37, 30, 33], [0, 9, 20]),
        (1, [57, 50, 53], [0, 9, 20]),
        (1, [58, 51, 127], [0, 9, 20]),
    ):
        given = attention.inputs(tokens, lengths, pads)
        assert tuple(given) == caller.plugin.inputs()
        expected, before = attention.expected(given), [cache.clone() for cache in attention.caches]
        context = torch.full_like(expected[0], float("nan"))
        caller.run(list(given.values()), [context, *attention.caches])
        attention.check((context, *attention.caches), expected, before)
        assert not caller.plugin._counters[-1].any(), "counters are not left zero"


@pytest.mark.parametrize(("case", "precision"), CASES[:3])
@pytest.mark.parametrize("tokens", [1, 24])
def test_attention_in_a_cuda_graph(case: str, precision: Precision, tokens: int) -> None:
    spec = case_source(case).spec
    caller = Caller(plugin_of(spec, precision, "CachedAttention"))
    attention = Attention(spec, DTYPES[precision], batch=2)
    given = attention.inputs(tokens, [40, 60], [0, 5])
    context = torch.full_like(attention.expected(given)[0], float("nan"))
    inputs, outputs = list(given.values()), [context, *attention.caches]
    caller.run(inputs, outputs)
    replay = caller.capture(inputs, outputs)
    for lengths in ([40, 60], [80, 61], [12, 100]):
        for name, tensor in attention.inputs(tokens, lengths, [3, 0]).items():
            if not name.startswith("past"):
                given[name].copy_(tensor)
        expected, before = attention.expected(given), [cache.clone() for cache in attention.caches]
        context.fill_(float("nan"))
        torch.cuda.synchronize()
        replay()
        torch.cuda.synchronize()
        attention.check((context, *attention.caches), expected, before)


@pytest.mark.parametrize(("case", "precision"), [("qwen_ntk", "fp16"), ("chatglm2", "bf16"), ("baichuan_13b", "fp32")])
def test_norm_is_the_ops(case: str, precision: Precision) -> None:
    spec = case_source(case).spec
    caller = Caller(plugin_of(spec, precision, "FusedRmsNorm"))
    generator = torch.Generator(device="cuda").manual_seed(0)
    weight = torch.randn(spec.hidden_size, generator=generator, device="cuda").to(DTYPES[precision])
    for batch, tokens in ((1, 1), (3, 37)):
        x = torch.randn(batch, tokens, spec.hidden_size, generator=generator, device="cuda").to(DTYPES[precision])
        y = torch.full_like(x, float("nan"))
        caller.run([x, weight], [y])
        close(y, fused_rms_norm(x, weight, eps=spec.norm.eps, weight_in_float=spec.norm.weight_in_float))


def test_counters_that_must_grow_under_a_graph_are_an_error() -> None:
    spec = case_source("qwen_ntk").spec
    caller = Caller(plugin_of(spec, "fp16", "CachedAttention"))
    attention = Attention(spec, torch.float16, batch=2)
    given = attention.inputs(1, [40, 60], [0, 5])
    context = torch.empty_like(attention.expected(given)[0])
    with pytest.raises(LogitLockError, match="run the step once before"):
        caller.capture(list(given.values()), [context, *attention.caches])
    with pytest.raises(LogitLockError, match="run the step once before"):
        plugins.raise_failure()
