"""How the exporter writes each operation of the trace in ONNX: one rule per module class or function, in one table."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import fx, nn

from export.graph import quantized_rules
from export.graph.function_text import CODE_ELEMENTS, DOMAIN
from export.graph.functions import inline
from export.graph.lowering import Lowering, Rule, tap_of
from refmodels.attention import AttentionFacts, AttentionInputs, inputs_of, node_attributes
from refmodels.model import gelu_fast, gelu_new, quick_gelu
from refmodels.ops import (
    by_head,
    cached_attention,
    fused_rms_norm,
    heads_in_a_row,
    join_qkv,
    rope_rows,
    select_tokens,
    split_qkv,
)
from refmodels.quantization.formats import LIMITS
from refmodels.quantization.linear import QuantizedLinear
from refmodels.recorder import tap


def embedding_module(graph: Lowering, node: fx.Node) -> None:
    name = f"{node.target}.weight"
    graph.parameters[name] = "plain"
    graph.emit("Gather", [name, graph.arg(node, 0, "input")], graph.define(node, "rows"), axis=0)


def linear(graph: Lowering, node: fx.Node) -> None:
    module = graph.decoder.get_submodule(str(node.target))
    assert isinstance(module, nn.Linear)
    weight = f"{node.target}.weight"
    owner = graph.owners[id(module.weight)]
    if owner == weight:
        graph.parameters[weight] = "transposed"
    else:
        graph.emit("Transpose", [owner], weight, perm=[1, 0])
    output = graph.define(node, "linear")
    bias = None if module.bias is None else f"{node.target}.bias"
    if bias is not None:
        graph.parameters[bias] = "plain"

    def product(x: str, y: str) -> None:
        graph.emit("MatMul", [x, weight], y if bias is None else f"{y}.product")
        if bias is not None:
            graph.emit("Add", [f"{y}.product", bias], y)

    apply = graph.wide if output in graph.float32 else lambda op, x, y: op(x, y)
    apply(product, graph.arg(node, 0, "input"), output)


def layer_norm(graph: Lowering, node: fx.Node) -> None:
    module = graph.decoder.get_submodule(str(node.target))
    assert isinstance(module, nn.LayerNorm)
    inputs = [graph.arg(node, 0, "input"), f"{node.target}.weight", f"{node.target}.bias"]
    graph.parameters |= dict.fromkeys(inputs[1:], "plain")
    graph.emit("LayerNormalization", inputs, graph.define(node, "norm"), axis=-1, epsilon=module.eps, stash_type=1)


def rms_norm(graph: Lowering, node: fx.Node) -> None:
    output = graph.define(node, "norm")
    inputs, outputs = [graph.arg(node, 0, "x"), graph.arg(node, 1, "weight")], [output]
    attributes: dict[str, Any] = {
        "epsilon": node.kwargs["eps"],
        "weight_in_float": int(bool(node.kwargs["weight_in_float"])),
    }
    code = quantized_rules.norm_code(graph.decoder, node)
    if code is not None:
        graph.coded[output] = f"{output}.codes", f"{output}.scales"
        outputs += graph.coded[output]
        attributes |= {"code": CODE_ELEMENTS[code], "limit": LIMITS[code]}
    op = "FusedRmsNorm" if code is None else "FusedRmsNormQuant"
    graph.call(op, inputs, outputs, name=output, **attributes)


def attention(graph: Lowering, node: fx.Node) -> None:
    # torch.fx has a node for the construction of the named tuple.
    construction, facts = node.args
    assert isinstance(construction, fx.Node) and isinstance(facts, AttentionFacts)
    inputs = dict(zip(AttentionInputs._fields, construction.args, strict=True))
    given = {name: graph.values[value] for name, value in inputs.items() if isinstance(value, fx.Node)}
    expected = [row.name for row in inputs_of(graph.spec)]
    assert list(given) == expected, f"cached_attention was traced with {list(given)}, the spec has {expected}"
    outputs: dict[Any, fx.Node] = {u.args[1]: u for u in node.users}
    context = tap_of(outputs[0])
    assert context is not None
    named = [graph.define(outputs[i], label) for i, label in enumerate(("context", "key", "value"))]
    rope = graph.spec.rope
    attributes = node_attributes(facts, given, rotary_dim=0 if rope is None else rope.dim)
    graph.call("CachedAttention", given.values(), named, name=graph.spec.taps[context].module, **attributes)


def getitem(graph: Lowering, node: fx.Node) -> None:
    if node in graph.values:  # an output of cached_attention or split_qkv, named there
        return
    source, index = node.args
    assert isinstance(source, fx.Node)
    if source.op == "placeholder":
        tap = graph.spec.taps[f"blocks.{index}.{str(source.target).removeprefix('past_')}"]
        name = f"past.{tap.name}"
        graph.add_input(name, graph.cache_dtype, tap.shape)
        graph.values[node] = name
    elif index == (slice(None), None):
        name = graph.define(node, f"{graph.values[source]}.column")
        graph.emit("Unsqueeze", [graph.values[source], graph.constant(f"{name}.axis", [1])], name)
    else:
        raise TypeError(f"the exporter has no rule for {node.format_node()}")


def squeeze(graph: Lowering, node: fx.Node) -> None:
    name = graph.define(node, "squeezed")
    axis = node.args[1]
    assert isinstance(axis, int)
    graph.emit("Squeeze", [graph.arg(node, 0, "self"), graph.constant(f"{name}.axis", [axis])], name)


def lower_split_qkv(graph: Lowering, node: fx.Node) -> None:
    parts = {u.args[1]: u for u in node.users}
    named = [graph.define(parts[i], f"{label}_to_norm") for i, label in enumerate(("query", "key", "value"))]
    query, key = node.args[1:]
    assert isinstance(query, int) and isinstance(key, int)
    widths = graph.constant(f"{named[0]}.widths", [query, key, key])
    source = graph.arg(node, 0, "qkv")
    graph.nodes.append(helper.make_node("Split", [source, widths], named, name=named[0], axis=-1))


def lower_join_qkv(graph: Lowering, node: fx.Node) -> None:
    rows = [graph.arg(node, i, name) for i, name in enumerate(("query", "key", "value"))]
    graph.emit("Concat", rows, graph.define(node, "joined"), axis=-1)


def lower_by_head(graph: Lowering, node: fx.Node) -> None:
    head_dim = node.args[1]
    assert isinstance(head_dim, int)
    reshape(graph, node, "heads_to_norm", [0, 0, -1, head_dim])


def reshape(graph: Lowering, node: fx.Node, label: str, shape: list[int]) -> None:
    """0 keeps an axis, -1 stands for what is left."""
    name = graph.define(node, label)
    graph.emit("Reshape", [graph.arg(node, 0, "x"), graph.constant(f"{name}.shape", shape)], name)


def tapped(graph: Lowering, node: fx.Node) -> None:
    graph.values[node] = graph.arg(node, 1, "tensor")


def lower_rope_rows(graph: Lowering, node: fx.Node) -> None:
    name = graph.define(node, "rope_rows")
    positions = node.args[2]
    assert isinstance(positions, int)
    column, offset = f"{name}.table", f"{name}.offset"
    graph.emit("Unsqueeze", [graph.arg(node, 1, "ntk_table"), graph.constant(f"{name}.axis", [1])], column)
    graph.emit("Mul", [column, graph.constant(f"{name}.positions", positions)], offset)
    graph.emit("Add", [graph.arg(node, 0, "position_ids"), offset], name)


def lower_select_tokens(graph: Lowering, node: fx.Node) -> None:
    name = graph.define(node, "selected")
    column = f"{name}.index"
    graph.emit("Unsqueeze", [graph.arg(node, 1, "index"), graph.constant(f"{name}.axis", [-1])], column)
    graph.emit("GatherND", [graph.arg(node, 0, "x"), column], name, batch_dims=1)


def table_rows(graph: Lowering, node: fx.Node) -> None:
    table = graph.arg(node, 1, "weight")
    graph.emit("Gather", [table, graph.arg(node, 0, "input")], graph.define(node, f"{table}.rows"), axis=0)


def to_bool(graph: Lowering, node: fx.Node) -> None:
    graph.emit("Cast", [graph.arg(node, 0, "self")], graph.define(node, "visible"), to=TensorProto.BOOL)


def binary(graph: Lowering, op: str, node: fx.Node) -> None:
    name = graph.define(node, op.lower())
    graph.emit(op, [graph.arg(node, 0, "input"), graph.arg(node, 1, "other")], name)


def silu(graph: Lowering, node: fx.Node) -> None:
    def body(x: str, output: str) -> None:
        graph.emit("Mul", [x, graph.emit("Sigmoid", [x], f"{output}.sigmoid")], output)

    graph.wide(body, graph.arg(node, 0, "input"), graph.define(node, "silu"))


def gelu(graph: Lowering, node: fx.Node) -> None:
    approximate = node.kwargs["approximate"]
    output = graph.define(node, "gelu")
    graph.wide(lambda x, y: graph.emit("Gelu", [x], y, approximate=approximate), graph.arg(node, 0, "input"), output)


def relu(graph: Lowering, node: fx.Node) -> None:
    graph.emit("Relu", [graph.arg(node, 0, "input")], graph.define(node, "relu"))


def stepwise_activation(graph: Lowering, node: fx.Node, *, op_type: str) -> None:
    output = graph.define(node, "gelu")
    call = helper.make_node(op_type, [graph.arg(node, 0, "x")], [output], name=output, domain=DOMAIN)
    graph.nodes += inline(graph.functions[op_type], call)


RULES: Mapping[Any, Rule] = {
    nn.Embedding: embedding_module,
    nn.Linear: linear,
    QuantizedLinear: quantized_rules.lower,
    nn.LayerNorm: layer_norm,
    fused_rms_norm: rms_norm,
    AttentionInputs: lambda graph, node: None,
    cached_attention: attention,
    tap: tapped,
    rope_rows: lower_rope_rows,
    select_tokens: lower_select_tokens,
    split_qkv: lower_split_qkv,
    join_qkv: lower_join_qkv,
    by_head: lower_by_head,
    heads_in_a_row: lambda graph, node: reshape(graph, node, "rows", [0, 0, -1]),
    gelu_new: partial(stepwise_activation, op_type="GeluNew"),
    gelu_fast: partial(stepwise_activation, op_type="GeluFast"),
    quick_gelu: partial(stepwise_activation, op_type="QuickGelu"),
    operator.getitem: getitem,
    operator.add: lambda graph, node: binary(graph, "Add", node),
    operator.mul: lambda graph, node: binary(graph, "Mul", node),
    "squeeze": squeeze,
    "bool": to_bool,
    F.embedding: table_rows,
    F.silu: silu,
    F.gelu: gelu,
    F.relu: relu,
}
