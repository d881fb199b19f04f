"""The bodies of the custom nodes, as ONNX functions made of standard operators.

They restate `refmodels/ops.py` in ONNX: a runtime without a kernel for a node (onnx.checker, the reference evaluator,
ONNX Runtime, TensorRT without our plugin) runs its body.  A body is generated for one spec, precision and numerics;
only what differs between layers (`scale`, `window`) is read from the node's attributes, the other attributes are for
the plugin.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from export.graph.attention_body import attention_body
from export.graph.function_text import PLUGIN, WIDE, ints, make_function
from export.graph.native_attention_body import native_attention_body, native_functions
from refmodels.attention import NODE_ATTRIBUTES, node_inputs
from refmodels.dtypes import DTYPE_TABLE
from refmodels.quantization.arithmetic import LEAST_AMAX
from refmodels.spec import Activation, ModelSpec, Numerics
from trt_runtime.bundle import AttentionMode, Precision

_STEPWISE: Mapping[Activation, str] = {
    "gelu_new": "GeluNew",
    "gelu_fast": "GeluFast",
    "quick_gelu": "QuickGelu",
}
"""The functions of activations that are rounded after each operation (`refmodels.model.gelu_new` …)."""


def make_functions(
    spec: ModelSpec, *, precision: Precision, numerics: Numerics, attention: AttentionMode = "plugin"
) -> dict[str, onnx.FunctionProto]:
    """The functions that a graph of this spec may call, by op type."""
    dtype = DTYPE_TABLE[precision].onnx
    native = attention == "native"
    body = native_attention_body(spec, dtype, numerics) if native else attention_body(spec, dtype, numerics)
    functions = [_attention(spec, body)]
    if spec.mlp.activation in _STEPWISE:
        functions.append(_stepwise(spec.mlp.activation, dtype))
    if native:
        functions += native_functions(spec, dtype)
    if spec.norm.kind == "rms":
        functions += [_rms_norm(spec, dtype), _rms_norm_quant(spec, dtype)]
    return {f.name: f for f in functions}


def inline(function: onnx.FunctionProto, call: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes of `function` in place of `call`; inner values and nodes are named under the name of the call."""
    values = {"": ""} | {n: f"{call.name}.{n}" for node in function.node for n in node.output}
    values |= dict(zip(function.input, call.input, strict=True)) | dict(zip(function.output, call.output, strict=True))
    attributes = {a.name: a for a in (*function.attribute_proto, *call.attribute)}
    nodes = []
    for inner in function.node:
        node = onnx.NodeProto()
        node.CopyFrom(inner)
        node.input[:] = [values[n] for n in inner.input]
        node.output[:] = [values[n] for n in inner.output]
        node.name = f"{call.name}.{inner.output[0]}"
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                name = attribute.name
                attribute.CopyFrom(attributes[attribute.ref_attr_name])
                attribute.name = name
        nodes.append(node)
    return nodes


_NORM_ATTRIBUTES = "epsilon: float = 1e-6, weight_in_float: int = 0"


def _rms_norm(spec: ModelSpec, dtype: int) -> onnx.FunctionProto:
    attributes = f"{_NORM_ATTRIBUTES}, {PLUGIN}"
    return make_function("FusedRmsNorm", ("x", "weight"), ("y",), _norm_lines(spec, dtype), attributes=attributes)


def _rms_norm_quant(spec: ModelSpec, dtype: int) -> onnx.FunctionProto:
    """The norm, and its result quantized per token, as by `refmodels.quantization.arithmetic.quantize_tokens`."""
    body = [
        *_norm_lines(spec, dtype),
        f"result = Cast <to = {WIDE}> (y)",
        "size = Abs (result)",
        "largest = ReduceMax (size, last)",
        f"least = Constant <value_float = {LEAST_AMAX!r}> ()",
        "amax = Max (largest, least)",
        "limit_number = Constant <value_float: float = @limit> ()",
        "inverse = Div (limit_number, amax)",
        "steps = Mul (result, inverse)",
        "one = Constant <value_float = 1.0> ()",
        "codes = QuantizeLinear <output_dtype: int = @code> (steps, one)",
        "scales = Div (amax, limit_number)",
    ]
    attributes = f"{_NORM_ATTRIBUTES}, code: int = 3, limit: float = 127.0, {PLUGIN}"
    return make_function("FusedRmsNormQuant", ("x", "weight"), ("y", "codes", "scales"), body, attributes=attributes)


def _norm_lines(spec: ModelSpec, dtype: int) -> list[str]:
    body = [
        f"wide = Cast <to = {WIDE}> (x)",
        "two = Constant <value_float = 2.0> ()",
        "square = Pow (wide, two)",
        ints("last", -1),
        "mean = ReduceMean (square, last)",
        "eps = Constant <value_float: float = @epsilon> ()",
        "biased = Add (mean, eps)",
        "root = Sqrt (biased)",
        "normed = Div (wide, root)",
    ]
    if spec.norm.weight_in_float:
        body += [
            f"wide_weight = Cast <to = {WIDE}> (weight)",
            "scaled = Mul (normed, wide_weight)",
            f"y = Cast <to = {dtype}> (scaled)",
        ]
    else:
        body += [f"rounded = Cast <to = {dtype}> (normed)", "y = Mul (rounded, weight)"]
    return body


def _stepwise(activation: Activation, dtype: int) -> onnx.FunctionProto:
    """One of transformers' activations written out in single steps, each rounded, as torch does it in half
    precision."""
    number = 0
    body = []

    def step(name: str, op: str, x: str, y: str | float) -> None:
        # A Python number next to a half tensor in torch is not rounded to half, so each step is computed wide.
        nonlocal number
        operands = []
        for operand in (x, y):
            number += 1
            wide = f"wide_{number}"
            body.append(
                f"{wide} = Cast <to = {WIDE}> ({operand})"
                if isinstance(operand, str)
                else f"{wide} = Constant <value_float = {operand!r}> ()"
            )
            operands.append(wide)
        body.append(f"{name}_wide = {op} ({', '.join(operands)})")
        body.append(f"{name} = Cast <to = {dtype}> ({name}_wide)")

    if activation == "quick_gelu":
        step("scaled", "Mul", "x", 1.702)
        # Runtimes without a sigmoid in half precision round inside it.
        body.append(f"scaled_again = Cast <to = {WIDE}> (scaled)")
        body.append("sigmoid_wide = Sigmoid (scaled_again)")
        body.append(f"sigmoid = Cast <to = {dtype}> (sigmoid_wide)")
        body.append("y = Mul (x, sigmoid)")
    else:
        step("half", "Mul", "x", 0.5)
        if activation == "gelu_new":
            step("cube", "Pow", "x", 3.0)
            step("small", "Mul", "cube", 0.044715)
            step("inner", "Add", "x", "small")
            step("scaled", "Mul", "inner", 0.7978845608028654)
        else:
            step("outer", "Mul", "x", 0.7978845608)
            step("small", "Mul", "x", 0.044715)
            step("square", "Mul", "small", "x")
            step("inner", "Add", "square", 1.0)
            step("scaled", "Mul", "outer", "inner")
        body.append("tanh = Tanh (scaled)")
        step("plus_one", "Add", "tanh", 1.0)
        body.append("y = Mul (half, plus_one)")
    return make_function(_STEPWISE[activation], ("x",), ("y",), body)


def _attention(spec: ModelSpec, body: list[str]) -> onnx.FunctionProto:
    kinds = sorted(NODE_ATTRIBUTES.items(), key=lambda attribute: attribute[1] is float)
    attributes = ", ".join((*(f"{n}: int = 0" if t is int else f"{n}: float = 1.0" for n, t in kinds), PLUGIN))
    function = make_function(
        "CachedAttention", node_inputs(spec), ("context", "key", "value"), body, attributes=attributes
    )
    unread = set(function.input) - {name for node in function.node for name in node.input}
    assert not unread, f"the body of CachedAttention does not read {', '.join(sorted(unread))}"
    return function
