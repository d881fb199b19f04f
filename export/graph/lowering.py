"""The graph under construction: names, nodes and initializers that the rules add, one call per node of the trace.

Values are named after taps, nodes after the value they make, initializers after parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto, helper
from torch import Tensor, fx

from export.graph.external_data import ByteLayout
from export.graph.function_text import CODE_ELEMENTS, DOMAIN, OPSET
from export.graph.functions import inline, make_functions
from refmodels.dtypes import DTYPE_TABLE
from refmodels.model import Decoder
from refmodels.recorder import tap
from refmodels.spec import ModelSpec, Numerics
from trt_runtime.bundle import AttentionMode, Precision

TABLES = ("rope_cos", "rope_sin", "logn", "alibi_slopes")
"""Attributes of a decoder that hold position tables; they become initializers."""

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
    """An ONNX model without its initializers, and a description of them.

    model: complete but for `graph.initializer`.  parameters: names of `Decoder` parameters, and how they are stored.
    tables: position tables, stored as they are.
    """

    model: onnx.ModelProto
    parameters: dict[str, ByteLayout]
    tables: dict[str, Tensor]


Rule = Callable[["Lowering", fx.Node], None]
"""Writes one node of the trace as ONNX."""


@dataclass
class Lowering:
    """The trace on its way to a graph; rules add nodes to it.

    coded: for values that a norm also outputs quantized, the names of the quantized values and of their scales.
    """

    decoder: Decoder
    spec: ModelSpec
    precision: Precision
    numerics: Numerics
    mode: AttentionMode
    float32: frozenset[str]
    rules: Mapping[Any, Rule]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    parameters: dict[str, ByteLayout] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    values: dict[fx.Node, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    coded: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtype = DTYPE_TABLE[self.precision].onnx
        code = self.spec.cache_code
        self.cache_dtype = self.dtype if code is None else CODE_ELEMENTS[code]
        self.functions = make_functions(
            self.spec, precision=self.precision, numerics=self.numerics, attention=self.mode
        )
        self.owners = {id(p): name for name, p in self.decoder.named_parameters()}
        self.taken |= set(self.spec.taps)

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
        infos = {
            n: helper.make_tensor_value_info(n, self.cache_dtype if tap.kind == "cache" else self.dtype, tap.shape)
            for n, tap in self.spec.taps.items()
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
            table = getattr(self.decoder, name, None) if name in TABLES else None
            if table is None:
                self.parameters[name] = "plain"
            else:
                self.tables[name] = table
            self.values[node] = name
        else:
            kind = type(self.decoder.get_submodule(str(node.target))) if node.op == "call_module" else node.target
            try:
                rule = self.rules[kind]
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
        name = tap_of(node)
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
        """Emit a call of one of our functions, or the body instead."""
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


def tap_of(node: fx.Node) -> str | None:
    """The name under which the trace taps the value of `node`."""
    for user in node.users:
        if user.target is tap:
            name = user.args[0]
            assert isinstance(name, str)
            return name
    return None


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
