"""Quantized linear layers in the graph: `refmodels.quantization.linear` as QuantizeLinear and DequantizeLinear.

Weights are initializers of quantized values (codes), as the model stores them: [out, in], int8, INT4 (packed in pairs)
or FLOAT8E4M3FN.

    no quantized input   y = MatMul(x, Transpose(DequantizeLinear(codes, scale, zero)))          in the working dtype
    a constant scale, or one per token
                         sums = MatMul(DequantizeLinear(codes of x, 1), Transpose(DequantizeLinear(codes, 1)))
                         y = sums * (scale of x * scale)                                          in fp32, then rounded
    one per token and group
                         y = MatMul(codes of x * their scales, Transpose(DequantizeLinear(...)))  in fp32, then rounded

The second form multiplies quantized values, as the reference does, and scales the sums.  With the scales in
DequantizeLinear, the usual form, every dequantized number would be rounded to the working dtype; ONNX Runtime 1.31
(int8) and TensorRT-RTX 1.7 (fp8) refuse a DequantizeLinear from an fp16 scale to fp32.  TensorRT runs both forms as the
same int8 and fp8 GEMMs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from onnx import TensorProto
from torch import fx, nn

from export.graph.function_text import CODE_ELEMENTS
from refmodels.errors import LogitLockError
from refmodels.quantization.arithmetic import LEAST_AMAX
from refmodels.quantization.formats import LIMITS, EightBit, LinearFormat, describe_format
from refmodels.quantization.linear import QuantizedLinear
from refmodels.recorder import tap
from refmodels.spec import ModelSpec

if TYPE_CHECKING:
    from export.graph.lowering import Lowering

_FP8_CAPABILITY = 89
_INT4_CAPABILITY = 80


def lower(graph: Lowering, node: fx.Node) -> None:
    """The rule for a `QuantizedLinear`."""
    module = graph.decoder.get_submodule(str(node.target))
    assert isinstance(module, QuantizedLinear)
    _Layer(graph, str(node.target), module, graph.define(node, "linear"), graph.arg(node, 0, "x")).lower()


def norm_code(decoder: nn.Module, norm: fx.Node) -> EightBit | None:
    """The type to which the linear layers quantize this norm's result per token; None: none does, or they differ."""
    codes: set[EightBit | None] = set()
    for user in (reader for tapped in norm.users if tapped.target is tap for reader in tapped.users):
        module = decoder.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, QuantizedLinear) and _by_token(module.format):
            codes.add(module.format.input)
    return codes.pop() if len(codes) == 1 else None


def _by_token(linear: LinearFormat) -> bool:
    own = linear.reordered or linear.pre_quant_scale
    return linear.input is not None and linear.input_scale == "token" and not own


class _Layer:
    """One quantized layer that computes the value `y` from the value `x`."""

    def __init__(self, graph: Lowering, path: str, module: QuantizedLinear, y: str, x: str) -> None:
        self.graph, self.path, self.module, self.y, self.x = graph, path, module, y, x
        self.format = module.format
        self.working = TensorProto.FLOAT if y in graph.float32 else graph.dtype
        """dtype of scales and bias, and of the product, before it is rounded to the graph's."""

    def lower(self) -> None:
        graph, linear = self.graph, self.format
        packed = linear.weight == "int4"
        graph.parameters[f"{self.path}.weight"] = "int4" if packed else "plain"
        if self.module.bias is not None:
            graph.parameters[f"{self.path}.bias"] = "plain"
        graph.parameters[f"{self.path}.scale"] = "plain" if self.in_groups else "row"
        if self.module.zero is not None:
            graph.parameters[f"{self.path}.zero"] = "int4" if packed else "plain" if self.in_groups else "row"
        x = self.x
        if self.module.pre_quant_scale is not None:
            graph.parameters[f"{self.path}.pre_quant_scale"] = "plain"
            if self.working != graph.dtype:
                x = graph.emit("Cast", [x], f"{self.y}.input_to_scale", to=self.working)
            x = graph.emit("Mul", [x, f"{self.path}.pre_quant_scale"], f"{self.y}.scaled")
        if self.module.order is not None:
            graph.parameters[f"{self.path}.order"] = "plain"
            x = graph.emit("Gather", [x, f"{self.path}.order"], f"{self.y}.ordered", axis=-1)
        if linear.input is None:
            self.weight_only(x)
        elif linear.input_scale == "group":
            self.grouped(x, linear.input)
        else:
            self.coded(x, linear.input)

    @property
    def in_groups(self) -> bool:
        """Whether a row has several scales; otherwise scales (and zero points) are stored as [out]."""
        return self.module.scale.shape[1] > 1

    def weight_only(self, x: str) -> None:
        if self.working != self.graph.dtype:
            x = self.graph.emit("Cast", [x], f"{self.y}.wide_input", to=self.working)
        self.with_bias(lambda y: self.graph.emit("MatMul", [x, self.dequantized(f"{self.path}.scale")], y))

    def coded(self, x: str, code: EightBit) -> None:
        """Sums of products of quantized values, then scaled."""
        graph, y = self.graph, self.y
        one = graph.emit("Constant", [], f"{y}.one", value_float=1.0)
        if self.format.input_scale == "tensor":
            graph.parameters[f"{self.path}.input_scale"] = "plain"
            x_scale = self.wide(f"{self.path}.input_scale")
            codes = self.quantize(self.wide_x(x), x_scale, code)
        elif x in graph.coded:
            codes, x_scale = graph.coded[x]
        else:
            steps, amax, limit = self.steps(self.wide_x(x), code)
            codes = self.quantize(steps, one, code)
            x_scale = graph.emit("Div", [amax, limit], f"{y}.token_scale")
        numbers = graph.emit("DequantizeLinear", [codes, one], f"{y}.codes.number")
        weight = graph.emit("DequantizeLinear", [f"{self.path}.weight", one], f"{self.path}.weight.number")
        weight = graph.emit("Transpose", [weight], f"{self.path}.weight.columns", perm=[1, 0])
        sums = graph.emit("MatMul", [numbers, weight], f"{y}.sums")
        scale = graph.emit("Mul", [x_scale, self.wide(f"{self.path}.scale")], f"{y}.scales")
        self.from_wide(lambda output: graph.emit("Mul", [sums, scale], output))

    def grouped(self, x: str, code: EightBit) -> None:
        """Inputs quantized with one scale per token and group, and dequantized; then a plain product."""
        graph, y = self.graph, self.y
        columns, groups = self.module.in_features, self.module.scale.shape[1]
        shape = graph.constant(f"{y}.groups", [0, 0, groups, columns // groups])
        by_group = graph.emit("Reshape", [self.wide_x(x), shape], f"{y}.by_group")
        one = graph.emit("Constant", [], f"{y}.one", value_float=1.0)
        steps, amax, limit = self.steps(by_group, code)
        numbers = graph.emit("DequantizeLinear", [self.quantize(steps, one, code), one], f"{y}.codes.number")
        x_scale = graph.emit("Div", [amax, limit], f"{y}.group_scale")
        rounded = graph.emit("Mul", [numbers, x_scale], f"{y}.rounded_by_group")
        rows = graph.constant(f"{y}.rows", [0, 0, columns])
        rounded = graph.emit("Reshape", [rounded, rows], f"{y}.rounded")
        weight = self.dequantized(self.wide(f"{self.path}.scale"))
        self.from_wide(lambda output: graph.emit("MatMul", [rounded, weight], output))

    # Steps of these

    def wide_x(self, x: str) -> str:
        wide = self.graph.dtype == TensorProto.FLOAT
        return x if wide else self.graph.emit("Cast", [x], f"{self.y}.wide_input", to=TensorProto.FLOAT)

    def wide(self, parameter: str) -> str:
        """A parameter in fp32."""
        if self.working == TensorProto.FLOAT:
            return parameter
        return self.graph.emit("Cast", [parameter], f"{parameter}.wide", to=TensorProto.FLOAT)

    def steps(self, x: str, code: EightBit) -> tuple[str, str, str]:
        """x (fp32) in units of its scale, amax over the last axis, the largest quantized value: `quantize_tokens`."""
        graph, y = self.graph, self.y
        size = graph.emit("Abs", [x], f"{y}.size")
        largest = graph.emit("ReduceMax", [size, graph.constant(f"{y}.last", [-1])], f"{y}.largest")
        least = graph.emit("Constant", [], f"{y}.least", value_float=LEAST_AMAX)
        amax = graph.emit("Max", [largest, least], f"{y}.amax")
        limit = graph.emit("Constant", [], f"{y}.limit", value_float=LIMITS[code])
        inverse = graph.emit("Div", [limit, amax], f"{y}.inverse")
        return graph.emit("Mul", [x, inverse], f"{y}.steps"), amax, limit

    def quantize(self, x: str, scale: str, code: EightBit) -> str:
        return self.graph.emit("QuantizeLinear", [x, scale], f"{self.y}.codes", output_dtype=CODE_ELEMENTS[code])

    def dequantized(self, scale: str) -> str:
        """The weight [in, out] in the dtype of `scale`."""
        inputs = [f"{self.path}.weight", scale]
        if self.module.zero is not None:
            inputs.append(f"{self.path}.zero")
        groups = {"axis": 1, "block_size": self.module.in_features // self.module.scale.shape[1]}
        where = groups if self.in_groups else {"axis": 0}
        weight = self.graph.emit("DequantizeLinear", inputs, f"{self.path}.weight.number", **where)
        return self.graph.emit("Transpose", [weight], f"{self.path}.weight.columns", perm=[1, 0])

    def with_bias(self, product: _Emit) -> None:
        """`product` in the working dtype, plus bias, rounded to the graph's dtype."""
        result = self.y if self.working == self.graph.dtype else f"{self.y}.wide"
        if self.module.bias is None:
            product(result)
        else:
            self.graph.emit("Add", [product(f"{self.y}.product"), f"{self.path}.bias"], result)
        if result != self.y:
            self.graph.emit("Cast", [result], self.y, to=self.graph.dtype)

    def from_wide(self, product: _Emit) -> None:
        """The same where `product` is in fp32: rounded to the working dtype, then plus bias."""
        if self.working == TensorProto.FLOAT:
            self.with_bias(product)
            return
        wide = product(f"{self.y}.wide")
        self.with_bias(lambda output: self.graph.emit("Cast", [wide], output, to=self.working))


if TYPE_CHECKING:
    from collections.abc import Callable

    _Emit = Callable[[str], str]
    """Emits the nodes that make the value of that name, and returns the name."""


def check_quantization(spec: ModelSpec, capabilities: Iterable[int] = ()) -> None:
    """Refuse before the work a quantization that TensorRT cannot build.

    Args:
        capabilities: GPUs to build for, 89 for 8.9.
    Raises:
        LogitLockError: zero points, a quantized cache, input scales per group, or a type that a GPU lacks.
    """
    if spec.cache_code is not None:
        raise LogitLockError(
            f"TensorRT has no {spec.cache_code} cache (its KV cache update takes fp32, fp16 and bf16 only); use "
            "--backend onnxruntime, or quantize without --kv-cache"
        )
    for module in spec.linears:
        linear = spec.format_of(module)
        if linear is None:
            continue
        if not linear.symmetric:
            raise LogitLockError(
                f"{module} has {describe_format(linear)}; TensorRT takes symmetric quantization only: use --backend "
                "onnxruntime, or quantize symmetrically"
            )
        if linear.input is not None and linear.input_scale == "group":
            raise LogitLockError(
                f"{module} has {describe_format(linear)}, the arithmetic of ONNX Runtime's CPU kernel, for which "
                "TensorRT has none; use --backend onnxruntime, or leave the inputs as they are"
            )
        least = {"fp8": _FP8_CAPABILITY, "int4": _INT4_CAPABILITY}.get(linear.weight, 0)
        for capability in capabilities:
            if capability < least:
                raise LogitLockError(
                    f"{module} has {describe_format(linear)}, which needs compute capability {least / 10} or later, "
                    f"not {capability / 10}"
                )
