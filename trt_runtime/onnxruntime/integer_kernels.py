"""Quantized layers and caches on ONNX Runtime's CPU kernels: rewrites of a bundle's graph when it is loaded.

A bundle's quantized layers are QuantizeLinear and DequantizeLinear (`export.graph.quantized_rules`), which ONNX Runtime
runs one by one, on dequantized weights in fp32.  Where it has a kernel for the whole, the kernel replaces them:

    int4 weights                          MatMulNBits, which dequantizes inside the GEMM, in fp32
    int4, int8; int8 inputs per group     MatMulNBits at accuracy level 4, which rounds its input in the same way
                                          (`rounds_by_group` tries it)
    int8; int8 inputs per tensor, token   MatMulInteger: exact integer sums, of uint8 inputs (value + 128), because x86
                                          has no product of two signed bytes

All nodes of a form must match, so that a graph that differs in any of them runs unchanged.  Weights stay in their file:
the kernel's input declares the same bytes with another type, plus one XOR that ONNX Runtime folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from refmodels.errors import LogitLockError
from trt_runtime.onnxruntime.graph_edits import emit, initializer, replace

SESSION_OPTIONS = {
    # Weights without a kernel are dequantized once, at loading, and not in every step.
    "session.disable_quant_qdq": "1",
    # Without VNNI instructions, sums of unsigned times signed bytes would saturate.
    "session.x64quantprecision": "1",
    # On ARM its kernels round whole rows.
    "mlas.disable_kleidiai": "1",
}
"""Session options that quantized bundles need."""

_CONTRIB = "com.microsoft"
_BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes that MatMulNBits takes."""
_BITS = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}
_XOR = {ir.DataType.INT4: 0x88, ir.DataType.INT8: 0x80}
"""Two's complement <-> offset binary, in every byte."""
_FP8 = ir.DataType.FLOAT8E4M3FN


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight [out, in] that is dequantized and transposed in the graph; `unit`: its scale is the number 1."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    unit: bool

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = _dims(self.codes)
        return out_features, in_features

    @property
    def groups(self) -> int:
        """Scales a row."""
        shape = _dims(self.scale)
        return shape[1] if len(shape) == 2 else 1


def use_integer_kernels(model: ir.Model, *, weights_rounded: bool) -> None:
    """Replace quantized products by ONNX Runtime's own kernels, in place.  Nodes that only these read stay.

    Args:
        model: without functions, with dtypes (`trt_runtime.onnxruntime.graph_edits.inline_and_type`).
        weights_rounded: dequantized weights are rounded to the working dtype (an emulated half bundle), which
            MatMulNBits does not do: leave products with unquantized inputs as they are.
    """
    unsigned: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        weight = _weight(node.inputs[1]) if node.op_type == "MatMul" else None
        if weight is None:
            continue
        x = node.inputs[0]
        assert x is not None
        if weight.unit:
            codes = _signed_codes(x)
            if codes is not None and weight.codes.dtype == ir.DataType.INT8:
                _integer_product(node, codes, weight, unsigned)
        elif (source := _rounded_by_group(x, weight)) is not None and rounds_by_group():
            _block_product(node, source, weight, weight.shape[1] // weight.groups, accuracy=4)
        elif weight.codes.dtype == ir.DataType.INT4 and not weights_rounded:
            block = next((b for b in _BLOCKS if (weight.shape[1] // weight.groups) % b == 0), None)
            if block is not None:
                _block_product(node, x, weight, block, accuracy=0)
    if any(node.domain == _CONTRIB for node in model.graph):
        model.opset_imports[_CONTRIB] = 1


def _integer_product(node: ir.Node, codes: ir.Node, weight: _Weight, unsigned: dict[ir.Value, ir.Value]) -> None:
    """MatMulInteger in the place of `node`; `unsigned` keeps the inputs of uint8 by those of int8."""
    name, put = node.name, partial(emit, before=node)
    offset = _constant(node, f"{name}.offset", np.array(128, np.uint8))
    source = codes.outputs[0]
    if source not in unsigned:
        # The same rounding and clamping, 128 further up.
        unsigned[source] = put("QuantizeLinear", [*codes.inputs[:2], offset], f"{source.name}.unsigned")
    columns = put("Transpose", [weight.codes], f"{name}.columns", perm=[1, 0])
    sums = put("MatMulInteger", [unsigned[source], columns, offset], f"{name}.integers")
    replace(node, put("Cast", [sums], f"{name}.number", to=int(ir.DataType.FLOAT)))


def _block_product(node: ir.Node, x: ir.Value, weight: _Weight, block: int, *, accuracy: int) -> None:
    """MatMulNBits in the place of `node`."""
    name, (rows, columns) = node.name, weight.shape
    bits = _BITS[_type(weight.codes)]
    repeats = columns // block // weight.groups
    scale = weight.scale
    if repeats > 1 or len(_dims(scale)) == 1:
        shapes = {"column": (rows, -1, 1), "repeated": (1, 1, repeats), "by_block": (rows, -1)}
        for (part, shape), op in zip(shapes.items(), ("Reshape", "Expand", "Reshape"), strict=True):
            target = _constant(node, f"{name}.scale_{part}_shape", _ints(*shape))
            scale = emit(op, [scale, target], f"{name}.scale_{part}", before=node)
            # Half ones are widened later by what their type says.
            scale.type = ir.TensorType(_type(weight.scale))
    inputs = [x, _offset_binary(node, weight.codes, (rows, columns // block, block * bits // 8)), scale]
    if weight.zero is not None:
        inputs.append(_zeros(node, weight.zero, rows, weight.groups, repeats, f"{name}.zeros"))
    product = emit(
        "MatMulNBits", inputs, f"{name}.blocks", before=node, domain=_CONTRIB,
        K=columns, N=rows, bits=bits, block_size=block, accuracy_level=accuracy,
    )  # fmt: skip
    replace(node, product)


def _offset_binary(before: ir.Node, codes: ir.Value, shape: Sequence[int]) -> ir.Value:
    """The bytes of an initializer of quantized values as unsigned ones."""
    tensor = codes.const_value
    name = f"{codes.name}.bytes"
    if isinstance(tensor, ir.ExternalTensor):
        stored: ir.TensorProtocol = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, ir.DataType.UINT8, shape=ir.Shape(shape), name=name,
            base_dir=tensor.base_dir,
        )  # fmt: skip
    else:
        assert tensor is not None
        stored = ir.Tensor(np.frombuffer(tensor.tobytes(), np.uint8).reshape(shape), name=name)
    flip = _constant(before, f"{name}.flip", np.array(_XOR[_type(codes)], np.uint8))
    return emit("BitwiseXor", [initializer(before, name, stored), flip], f"{name}.unsigned", before=before)


def _zeros(before: ir.Node, zero: ir.Value, rows: int, groups: int, repeats: int, name: str) -> ir.Value:
    """Zero points as MatMulNBits packs them: every row begins in a byte of its own."""
    bits = _BITS[_type(zero)]
    if repeats == 1 and groups * bits % 8 == 0:
        return _offset_binary(before, zero, (rows, groups * bits // 8))
    assert zero.const_value is not None
    numbers = zero.const_value.numpy().astype(np.int8).reshape(rows, groups).repeat(repeats, 1)
    unsigned = (numbers + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        unsigned = np.pad(unsigned, ((0, 0), (0, unsigned.shape[1] % 2)))
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return _constant(before, name, unsigned)


@lru_cache(maxsize=1)
def rounds_by_group() -> bool:
    """Whether MatMulNBits at accuracy level 4 rounds its input as `quantize_groups` does, in groups of the weight.

    ONNX Runtime's kernels for x86 do; its documentation does not say, and some for ARM round whole rows.  So we try a
    small product, with one large number in a row, against which a group of small ones would vanish.
    """
    rows, groups, size = 8, 4, 32
    draw = np.random.default_rng(0)
    x = draw.standard_normal((3, groups * size)).astype(np.float32)
    x[:, 0] = 1000
    codes = draw.integers(0, 256, (rows, groups, size // 2), dtype=np.uint8)
    end = ir.Node("", "Identity", [ir.Value(name="x")], num_outputs=1)
    graph = ir.Graph([], [], nodes=[end], name="probe")
    source = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(source)
    inputs = [source, _constant(end, "codes", codes), _constant(end, "scales", np.ones((rows, groups), np.float32))]
    y = emit(
        "MatMulNBits", inputs, "y", before=end, domain=_CONTRIB,
        K=groups * size, N=rows, bits=4, block_size=size, accuracy_level=4,
    )  # fmt: skip
    y.shape, y.type = ir.Shape((3, rows)), ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(y)
    graph.remove(end, safe=True)
    model = ir.Model(graph, ir_version=10)
    graph.opset_imports.update({"": 21, _CONTRIB: 1})
    options = ort.SessionOptions()
    for key, value in SESSION_OPTIONS.items():
        options.add_session_config_entry(key, value)
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    found = np.asarray(session.run(None, {"x": x})[0])
    by_group = x.reshape(3, groups, size)
    scale = np.abs(by_group).max(-1, keepdims=True) / np.float32(127)
    rounded = np.rint(by_group / scale) * scale.astype(np.float64)
    numbers = np.stack((codes & 15, codes >> 4), -1).reshape(rows, -1).astype(np.float64) - 8
    expected = rounded.reshape(3, -1) @ numbers.T
    return bool(np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max() / 127)


def _weight(value: ir.Value | None) -> _Weight | None:
    transpose = _made_by(value, "Transpose")
    number = None if transpose is None else _made_by(transpose.inputs[0], "DequantizeLinear")
    if transpose is None or number is None or list(transpose.attributes["perm"].as_ints()) != [1, 0]:
        return None
    codes, scale, *rest = number.inputs
    zero = rest[0] if rest else None
    if codes is None or scale is None or codes.const_value is None or codes.dtype not in _BITS:
        return None
    if _number(scale) == 1.0 and zero is None:
        return _Weight(codes, scale, None, unit=True)
    stored = scale
    cast = _made_by(scale, "Cast")
    if cast is not None and cast.inputs[0] is not None:
        stored = cast.inputs[0]
    constant = stored.const_value is not None and (zero is None or zero.const_value is not None)
    rows, columns = _dims(codes)
    shape = _dims(stored)
    if not constant or shape[0] != rows or (zero is not None and zero.dtype != codes.dtype):
        return None
    axis = number.attributes["axis"].as_int() if "axis" in number.attributes else 1
    block = number.attributes["block_size"].as_int() if "block_size" in number.attributes else 0
    fits = (len(shape), axis, block) == (1, 0, 0) or (
        len(shape) == 2 and axis == 1 and block > 0 and block * shape[1] == columns
    )
    if not fits:
        return None
    if scale.shape is None:
        scale.shape = stored.shape
    return _Weight(codes, scale, zero, unit=False)


def _signed_codes(x: ir.Value) -> ir.Node | None:
    """The QuantizeLinear to int8 with one scale whose dequantized result is `x`."""
    number = _made_by(x, "DequantizeLinear")
    if number is None or len(number.inputs) != 2 or _number(number.inputs[1]) != 1.0:
        return None
    codes = _made_by(number.inputs[0], "QuantizeLinear")
    if codes is None or len(codes.inputs) != 2 or codes.outputs[0].dtype != ir.DataType.INT8:
        return None
    scale = codes.inputs[1]
    one = _number(scale) is not None or (scale is not None and scale.shape is not None and len(scale.shape) == 0)
    return codes if one else None


def _rounded_by_group(x: ir.Value, weight: _Weight) -> ir.Value | None:
    """The fp32 value of which `x` is the rounding to int8 with one scale per token and group of the weight."""
    columns = weight.shape[1]
    size = columns // weight.groups
    outer = _made_by(x, "Reshape")
    product = None if outer is None else _made_by(outer.inputs[0], "Mul")
    if outer is None or product is None or size not in _BLOCKS or _list(outer.inputs[1]) != [0, 0, columns]:
        return None
    number, scale = (_made_by(product.inputs[0], "DequantizeLinear"), _made_by(product.inputs[1], "Div"))
    if number is None or scale is None:
        return None
    codes = _signed_codes(product.inputs[0])  # type: ignore[arg-type]
    steps = None if codes is None or _number(codes.inputs[1]) != 1.0 else _made_by(codes.inputs[0], "Mul")
    inverse = None if steps is None else _made_by(steps.inputs[1], "Div")
    amax = _made_by(scale.inputs[0], "Max")
    if steps is None or inverse is None or amax is None or len(amax.inputs) != 2:
        return None
    largest = _made_by(amax.inputs[0], "ReduceMax")
    magnitude = None if largest is None else _made_by(largest.inputs[0], "Abs")
    if largest is None or magnitude is None or "keepdims" in largest.attributes:
        return None
    least = _number(amax.inputs[1])
    limits = _number(scale.inputs[1]), _number(inverse.inputs[0])
    grouped = _made_by(steps.inputs[0], "Reshape")
    same = inverse.inputs[1] is amax.outputs[0] and magnitude.inputs[0] is steps.inputs[0]
    shapes = grouped is not None and _list(grouped.inputs[1]) == [0, 0, weight.groups, size]
    if not (same and shapes and limits == (127.0, 127.0) and _list(largest.inputs[1]) == [-1]):
        return None
    # The kernel treats a group of zeros alike for every tiny bound.
    if least is None or not 0 < least < 2.0**-64:
        return None
    assert grouped is not None
    return grouped.inputs[0]


def _made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op and node.domain in ("", "ai.onnx") else None


def _array(value: ir.Value | None) -> np.ndarray | None:
    """A small constant."""
    if value is None:
        return None
    if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor):
        return value.const_value.numpy()
    node = _made_by(value, "Constant")
    if node is None:
        return None
    for attribute in node.attributes.values():
        return np.asarray(attribute.value.numpy() if attribute.name == "value" else attribute.value)
    return None


def _number(value: ir.Value | None) -> float | None:
    array = _array(value)
    return float(array) if array is not None and array.ndim == 0 else None


def _list(value: ir.Value | None) -> list[int] | None:
    array = _array(value)
    return None if array is None or array.ndim != 1 else [int(n) for n in array]


def _constant(beside: ir.Node, name: str, array: np.ndarray) -> ir.Value:
    return initializer(beside, name, ir.Tensor(array, name=name))


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _dims(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None, f"{value.name} has no shape"
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def _type(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None, f"{value.name} has no dtype"
    return value.dtype


# fp8 caches


def cache_as_bytes(model: ir.Model) -> None:
    """Turn fp8 caches into uint8 ones of the same bytes: ONNX Runtime's CPU kernels do not move fp8; changed in place.

    The write makes an fp16 number and takes its top half: fp16 has e4m3's layout with one more exponent bit, so that
    bits 7 to 13 of value * 2**-8 are the fp8 value.  The read looks bytes up in a table of the 256 values, and
    dequantizes the used slots only.

    Args:
        model: without functions, with dtypes, after every other rewrite.
    Raises:
        LogitLockError: this ONNX Runtime lacks BitCast.
    """
    writes = [n for n in model.graph if n.op_type == "TensorScatter" and n.outputs[0].dtype == _FP8]
    if not writes:
        return
    if not any(kernel.op_name == "BitCast" for kernel in ort_state.get_all_opkernel_def()):
        raise LogitLockError("this ONNX Runtime has no BitCast, which an fp8 cache needs; install onnxruntime >= 1.31")
    model.opset_imports[""] = 26
    for node in writes:
        past, update, _ = node.inputs
        assert past is not None and update is not None
        node.replace_input_with(1, _bits(node, update))
        for value in (past, node.outputs[0]):
            value.type = ir.TensorType(ir.DataType.UINT8)
        for reader in list(node.outputs[0].consumers()):
            assert reader.op_type == "DequantizeLinear", f"a quantized cache is read by {reader.op_type}"
            for live in list(reader.outputs[0].consumers()):
                assert live.op_type == "Slice", f"a dequantized cache is read by {live.op_type}"
                _read(reader, live)


def _bits(before: ir.Node, codes: ir.Value) -> ir.Value:
    """The bytes of fp8 values."""
    name, put, constant = codes.name, partial(emit, before=before), partial(_constant, before)
    number = put("Cast", [codes], f"{name}.number", to=int(ir.DataType.FLOAT))
    shift = constant("fp8.exponent_shift", np.array(2.0**-8, np.float32))
    half = put("Mul", [number, shift], f"{name}.shifted")
    half = put("Cast", [half], f"{name}.half", to=int(ir.DataType.FLOAT16))
    bits = put("BitCast", [half], f"{name}.half_bits", to=int(ir.DataType.UINT16))
    bits = put("Cast", [bits], f"{name}.wide_bits", to=int(ir.DataType.UINT32))
    scaled = [put("Div", [bits, constant(f"fp8.{n}", np.array(n, np.uint32))], f"{name}.over_{n}") for n in (128, 256)]
    masked = [
        put("BitwiseAnd", [v, constant(f"fp8.mask_{m}", np.array(m, np.uint32))], f"{name}.mask_{m}")
        for v, m in zip(scaled, (0x7F, 0x80), strict=True)
    ]
    return put("Cast", [put("BitwiseOr", masked, f"{name}.bits")], f"{name}.bytes", to=int(ir.DataType.UINT8))


def _read(number: ir.Node, live: ir.Node) -> None:
    """The used slots of fp8 bytes [batch, kv_heads, capacity, head_dim], dequantized; scale [kv_heads]."""
    codes, scale = number.inputs
    assert codes is not None and scale is not None
    name, put, constant = live.name, partial(emit, before=live), partial(_constant, live)
    every = np.arange(256, dtype=np.uint8).view(_FP8.numpy())
    dtype = _type(scale)
    table = constant(f"fp8.values_{dtype.name.lower()}", every.astype(np.float32).astype(dtype.numpy()))
    index = put("Slice", [codes, *live.inputs[1:]], f"{name}.bytes")
    index = put("Cast", [index], f"{name}.index", to=int(ir.DataType.INT32))
    values = put("Gather", [table, index], f"{name}.values", axis=0)
    column = put("Reshape", [scale, constant("fp8.by_head", _ints(-1, 1, 1))], f"{name}.by_head")
    replace(live, put("Mul", [values, column], f"{name}.scaled"))
