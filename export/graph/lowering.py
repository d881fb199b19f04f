"""From `Decoder.forward` to an ONNX graph: a `torch.fx` trace, lowered node by node through one table.

The trace runs on a decoder without memory (device "meta"), so a graph costs milliseconds and no weights.  Values are
named after taps, nodes after the value they make, initializers after parameters.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

import refmodels.model
from export.graph import quantized_rules as quantized
from export.graph.external_data import Layout
from export.graph.function_text import CODE_ELEMENTS, DOMAIN, OPSET
from export.graph.functions import CACHE_SCALES, ELEMENT_TYPES, attention_inputs, inline, make_functions
from refmodels.checkpoints.load import DTYPES, empty_decoder
from refmodels.errors import LogitLockError
from refmodels.model import gelu_new
from refmodels.ops import cached_attention, fused_rms_norm, rope_rows, select_tokens
from refmodels.positions import build_tables
from refmodels.quantization.formats import LIMITS
from refmodels.quantization.linear import QuantizedLinear
from refmodels.recorder import tap
from refmodels.spec import ModelSpec, Numerics
from refmodels.taps import is_cache_tap, tap_names, tap_shape
from trt_runtime.bundle import AttentionMode, Precision

_TABLES = ("rope_cos", "rope_sin", "logn", "alibi_slopes")
_LEAF_FUNCTIONS = (tap, cached_attention, fused_rms_norm, rope_rows, select_tokens, gelu_new)
_POSITION_INPUTS = ("cos", "sin", "query_scale", "alibi_slopes")
_INPUT_SHAPES: Mapping[str, tuple[str, ...]] = {
    "input_ids": ("batch", "tokens"),
    "position_ids": ("batch", "tokens"),
    "cache_lengths": ("batch",),
    "attention_mask": ("batch", "slots"),
    "ntk_table": ("batch",),
    "logit_index": ("batch", "logit_tokens"),
}


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An ONNX model that still lacks its initializers, and what they must be.

    model: complete but for `graph.initializer`.  parameters: names of `Decoder` parameters, and how they are stored.
    tables: position tables, stored as they are.
    """

    model: onnx.ModelProto
    parameters: dict[str, Layout]
    tables: dict[str, Tensor]


def build_graph(
    spec: ModelSpec,
    *,
    precision: Precision,
    numerics: Numerics = "exact",
    attention: AttentionMode = "plugin",
    max_positions: int | None = None,
    float32: Collection[str] = (),
) -> Graph:
    """Trace the decoder of `spec` and lower it.

    Args:
        precision: dtype of weights, activations and cache.
        numerics: "exact" (fp32 tables and reductions) or "upstream" (Hugging Face's tables and rounding).
        attention: "plugin" keeps `refmodels::*` nodes with their function bodies, "decomposed" puts the bodies in
            their place, "native" bodies that use TensorRT's own operators for attention.
        max_positions: the longest cache that the position tables serve; None: what the model allows.
        float32: taps of linear layers that compute in fp32, with weights (or their scales) in fp32 (see
            `export.precision_plan`).
    Raises:
        LogitLockError: attention "native" for a quantised cache, which TensorRT's operators do not have.
    """
    if attention == "native" and spec.cache_code is not None:
        raise LogitLockError(f"--attention native has no {spec.cache_code} cache; use --attention plugin or decomposed")
    decoder = empty_decoder(spec, numerics=numerics)
    positions = max_positions or spec.max_positions
    built = build_tables(spec, positions=positions, numerics=numerics, dtype=DTYPES[precision])
    decoder.use_tables(built)
    for name in _TABLES:
        table = getattr(decoder, name)
        if table is not None:
            # As a buffer the table becomes a node of the trace instead of a constant in it.
            delattr(decoder, name)
            decoder.register_buffer(name, table, persistent=False)
    lowering = Lowering(decoder, spec, precision, numerics, attention, frozenset(float32))
    return lowering.run(_Tracer(autowrap_functions=_LEAF_FUNCTIONS).trace(decoder))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm, QuantizedLinear))


@dataclass
class Lowering:
    """The trace on its way to a graph; rules add nodes to it.

    coded: for values that a norm has quantised as well, the names of their codes and scales.
    """

    decoder: refmodels.model.Decoder
    spec: ModelSpec
    precision: Precision
    numerics: Numerics
    mode: AttentionMode
    float32: frozenset[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    parameters: dict[str, Layout] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    values: dict[fx.Node, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    coded: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtype = ELEMENT_TYPES[self.precision]
        code = self.spec.cache_code
        self.cache_dtype = self.dtype if code is None else CODE_ELEMENTS[code]
        self.functions = make_functions(
            self.spec, precision=self.precision, numerics=self.numerics, attention=self.mode
        )
        self.owners = {id(p): name for name, p in self.decoder.named_parameters()}
        self.taken |= set(tap_names(self.spec))

    def run(self, trace: fx.Graph) -> Graph:
        outputs: list[str] = []
        for node in trace.nodes:
            if node.op == "output":
                logits, keys, values = node.args[0]
                outputs.append(self.values[logits])
                for key, value in zip(keys, values, strict=True):
                    outputs += [self.values[key], self.values[value]]
            else:
                self.lower(node)
        shapes = {name: tap_shape(self.spec, name) for name in tap_names(self.spec)}
        infos = {
            n: helper.make_tensor_value_info(n, self.cache_dtype if is_cache_tap(n) else self.dtype, shape)
            for n, shape in shapes.items()
        }
        order = [*_INPUT_SHAPES, *sorted(self.inputs, key=_natural)]
        graph = helper.make_graph(
            self.nodes,
            self.spec.variant,
            [self.inputs[n] for n in dict.fromkeys(order) if n in self.inputs],
            [infos[n] for n in outputs],
            value_info=[info for n, info in infos.items() if n not in outputs],
        )
        called = {(node.domain, node.op_type) for node in self.nodes}
        functions = [f for f in self.functions.values() if (f.domain, f.name) in called]
        opsets = [helper.make_opsetid("", OPSET)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted({f.domain for f in functions})]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            functions=functions,
            ir_version=helper.find_min_ir_version_for(opsets[:1]),
            producer_name="logitlock",
        )
        return Graph(model=model, parameters=self.parameters, tables=self.tables)

    # One fx node

    def lower(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.placeholder(node)
        elif node.op == "get_attr":
            name = str(node.target)
            table = getattr(self.decoder, name, None) if name in _TABLES else None
            if table is None:
                self.parameters[name] = "plain"
            else:
                self.tables[name] = table
            self.values[node] = name
        else:
            kind = type(self.decoder.get_submodule(str(node.target))) if node.op == "call_module" else node.target
            try:
                rule = _RULES[kind]
            except KeyError:
                raise TypeError(f"the exporter has no rule for {kind} (at {node.format_node()})") from None
            rule(self, node)

    def placeholder(self, node: fx.Node) -> None:
        name = str(node.target)
        if name in _INPUT_SHAPES and node.users:
            self.add_input(name, TensorProto.INT64, _INPUT_SHAPES[name])
        self.values[node] = name

    def add_input(self, name: str, dtype: int, shape: Iterable[int | str]) -> None:
        self.inputs[name] = helper.make_tensor_value_info(name, dtype, list(shape))

    # Names and nodes

    def arg(self, node: fx.Node, index: int, keyword: str) -> str:
        """The ONNX value of a tensor argument."""
        argument = node.args[index] if index < len(node.args) else node.kwargs[keyword]
        assert isinstance(argument, fx.Node), f"{keyword} of {node.format_node()} is not a tensor"
        return self.values[argument]

    def define(self, node: fx.Node, label: str) -> str:
        """Name the value of `node`: its tap, or `label` under the module that computes it."""
        name = _tap_of(node)
        if name is None:
            stack = node.meta.get("nn_module_stack") or {}
            path = next(reversed(stack), "") if stack else ""
            name = base = f"{path}.{label}" if path else label
            number = 1
            while name in self.taken:
                number += 1
                name = f"{base}.{number}"
        self.taken.add(name)
        self.values[node] = name
        return name

    def emit(self, op: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: int | list[int]) -> str:
        return self.emit("Constant", [], name, **{"value_ints" if isinstance(value, list) else "value_int": value})

    def call(self, op: str, inputs: Iterable[str], outputs: list[str], *, name: str, **attributes: Any) -> None:
        """A call of one of our functions, or the body in its place."""
        node = helper.make_node(
            op,
            list(inputs),
            outputs,
            name=name,
            domain=DOMAIN,
            plugin_namespace=DOMAIN,
            plugin_version="1",
            **attributes,
        )
        self.nodes += [node] if self.mode == "plugin" else inline(self.functions[op], node)

    def wide(self, op: Callable[[str, str], object], x: str, output: str) -> None:
        """Compute `output` from `x` in fp32 and round once, as torch's pointwise kernels do in half precision."""
        if self.precision == "fp32":
            op(x, output)
            return
        source = self.emit("Cast", [x], f"{output}.wide_input", to=TensorProto.FLOAT)
        op(source, f"{output}.wide")
        self.emit("Cast", [f"{output}.wide"], output, to=self.dtype)

    # Rules

    def embedding_module(self, node: fx.Node) -> None:
        name = f"{node.target}.weight"
        self.parameters[name] = "plain"
        self.emit("Gather", [name, self.arg(node, 0, "input")], self.define(node, "rows"), axis=0)

    def linear(self, node: fx.Node) -> None:
        module = self.decoder.get_submodule(str(node.target))
        assert isinstance(module, nn.Linear)
        weight = f"{node.target}.weight"
        owner = self.owners[id(module.weight)]
        if owner == weight:
            self.parameters[weight] = "transposed"
        else:
            self.emit("Transpose", [owner], weight, perm=[1, 0])
        output = self.define(node, "linear")
        bias = None if module.bias is None else f"{node.target}.bias"
        if bias is not None:
            self.parameters[bias] = "plain"

        def product(x: str, y: str) -> None:
            self.emit("MatMul", [x, weight], y if bias is None else f"{y}.product")
            if bias is not None:
                self.emit("Add", [f"{y}.product", bias], y)

        apply = self.wide if output in self.float32 else lambda op, x, y: op(x, y)
        apply(product, self.arg(node, 0, "input"), output)

    def layer_norm(self, node: fx.Node) -> None:
        module = self.decoder.get_submodule(str(node.target))
        assert isinstance(module, nn.LayerNorm)
        inputs = [self.arg(node, 0, "input"), f"{node.target}.weight", f"{node.target}.bias"]
        self.parameters |= dict.fromkeys(inputs[1:], "plain")
        self.emit("LayerNormalization", inputs, self.define(node, "norm"), axis=-1, epsilon=module.eps, stash_type=1)

    def rms_norm(self, node: fx.Node) -> None:
        output = self.define(node, "norm")
        inputs, outputs = [self.arg(node, 0, "x"), self.arg(node, 1, "weight")], [output]
        attributes: dict[str, Any] = {
            "epsilon": node.kwargs["eps"],
            "weight_in_float": int(bool(node.kwargs["weight_in_float"])),
        }
        code = quantized.norm_code(self.decoder, node)
        if code is not None:
            self.coded[output] = f"{output}.codes", f"{output}.scales"
            outputs += self.coded[output]
            attributes |= {"code": CODE_ELEMENTS[code], "limit": LIMITS[code]}
        op = "FusedRmsNorm" if code is None else "FusedRmsNormQuant"
        self.call(op, inputs, outputs, name=output, **attributes)

    def attention(self, node: fx.Node) -> None:
        names = ("qkv", "past_key", "past_value", "cache_lengths", "visible", *_POSITION_INPUTS)
        arguments = [*zip(names, node.args, strict=True), *((n, node.kwargs[n]) for n in CACHE_SCALES)]
        given = {n: self.values[a] for n, a in arguments if isinstance(a, fx.Node)}
        expected = attention_inputs(self.spec)
        assert tuple(given) == expected, f"cached_attention was traced with {tuple(given)}, the spec has {expected}"
        outputs: dict[int, fx.Node] = {u.args[1]: u for u in node.users}  # type: ignore[misc]
        context = _tap_of(outputs[0])
        assert context is not None
        named = [self.define(outputs[i], label) for i, label in enumerate(("context", "key", "value"))]
        rope, kwargs = self.spec.rope, node.kwargs
        self.call(
            "CachedAttention",
            given.values(),
            named,
            name=context.removesuffix(".context"),
            heads=kwargs["heads"],
            kv_heads=kwargs["kv_heads"],
            scale=kwargs["scale"],
            rotary_dim=0 if rope is None else rope.dim,
            rotary_interleaved=int(bool(kwargs["rotary_interleaved"])),
            window=kwargs["window"],
            has_query_scale=int("query_scale" in given),
            has_alibi=int("alibi_slopes" in given),
        )

    def getitem(self, node: fx.Node) -> None:
        if node in self.values:  # an output of cached_attention, named there
            return
        source, index = node.args
        assert isinstance(source, fx.Node)
        if source.op == "placeholder":
            name = f"past.blocks.{index}.{str(source.target).removeprefix('past_')}"
            self.add_input(name, self.cache_dtype, tap_shape(self.spec, name))
            self.values[node] = name
        elif index == (slice(None), None):
            name = self.define(node, f"{self.values[source]}.column")
            self.emit("Unsqueeze", [self.values[source], self.constant(f"{name}.axis", [1])], name)
        else:
            raise TypeError(f"the exporter has no rule for {node.format_node()}")

    def squeeze(self, node: fx.Node) -> None:
        name = self.define(node, "squeezed")
        axis = node.args[1]
        assert isinstance(axis, int)
        self.emit("Squeeze", [self.arg(node, 0, "self"), self.constant(f"{name}.axis", [axis])], name)

    def tap(self, node: fx.Node) -> None:
        self.values[node] = self.arg(node, 1, "tensor")

    def rope_rows(self, node: fx.Node) -> None:
        name = self.define(node, "rope_rows")
        positions = node.args[2]
        assert isinstance(positions, int)
        column, offset = f"{name}.table", f"{name}.offset"
        self.emit("Unsqueeze", [self.arg(node, 1, "ntk_table"), self.constant(f"{name}.axis", [1])], column)
        self.emit("Mul", [column, self.constant(f"{name}.positions", positions)], offset)
        self.emit("Add", [self.arg(node, 0, "position_ids"), offset], name)

    def select_tokens(self, node: fx.Node) -> None:
        name = self.define(node, "selected")
        column = f"{name}.index"
        self.emit("Unsqueeze", [self.arg(node, 1, "index"), self.constant(f"{name}.axis", [-1])], column)
        self.emit("GatherND", [self.arg(node, 0, "x"), column], name, batch_dims=1)

    def table_rows(self, node: fx.Node) -> None:
        table = self.arg(node, 1, "weight")
        self.emit("Gather", [table, self.arg(node, 0, "input")], self.define(node, f"{table}.rows"), axis=0)

    def to_bool(self, node: fx.Node) -> None:
        self.emit("Cast", [self.arg(node, 0, "self")], self.define(node, "visible"), to=TensorProto.BOOL)

    def binary(self, op: str, node: fx.Node) -> None:
        name = self.define(node, op.lower())
        self.emit(op, [self.arg(node, 0, "input"), self.arg(node, 1, "other")], name)

    def silu(self, node: fx.Node) -> None:
        def body(x: str, output: str) -> None:
            self.emit("Mul", [x, self.emit("Sigmoid", [x], f"{output}.sigmoid")], output)

        self.wide(body, self.arg(node, 0, "input"), self.define(node, "silu"))

    def gelu(self, node: fx.Node) -> None:
        approximate = node.kwargs["approximate"]
        output = self.define(node, "gelu")
        self.wide(lambda x, y: self.emit("Gelu", [x], y, approximate=approximate), self.arg(node, 0, "input"), output)

    def relu(self, node: fx.Node) -> None:
        self.emit("Relu", [self.arg(node, 0, "input")], self.define(node, "relu"))

    def gelu_new(self, node: fx.Node) -> None:
        output = self.define(node, "gelu")
        call = helper.make_node("GeluNew", [self.arg(node, 0, "x")], [output], name=output, domain=DOMAIN)
        self.nodes += inline(self.functions["GeluNew"], call)


_RULES: Mapping[Any, Callable[[Lowering, fx.Node], None]] = {
    nn.Embedding: Lowering.embedding_module,
    nn.Linear: Lowering.linear,
    QuantizedLinear: quantized.lower,
    nn.LayerNorm: Lowering.layer_norm,
    fused_rms_norm: Lowering.rms_norm,
    cached_attention: Lowering.attention,
    tap: Lowering.tap,
    rope_rows: Lowering.rope_rows,
    select_tokens: Lowering.select_tokens,
    gelu_new: Lowering.gelu_new,
    operator.getitem: Lowering.getitem,
    operator.add: lambda lowering, node: lowering.binary("Add", node),
    operator.mul: lambda lowering, node: lowering.binary("Mul", node),
    "squeeze": Lowering.squeeze,
    "bool": Lowering.to_bool,
    F.embedding: Lowering.table_rows,
    F.silu: Lowering.silu,
    F.gelu: Lowering.gelu,
    F.relu: Lowering.relu,
}


def _tap_of(node: fx.Node) -> str | None:
    """The name under which the trace taps the value of `node`."""
    for user in node.users:
        if user.target is tap:
            name = user.args[0]
            assert isinstance(name, str)
            return name
    return None


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
