"""`refmodels.ops.fused_rms_norm` as TensorRT plugins: FusedRmsNorm, and FusedRmsNormQuant with quantized output too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

from refmodels.dtypes import DTYPE_TABLE
from refmodels.errors import LogitLockError
from refmodels.quantization.formats import LIMITS, EightBit
from trt_runtime.kernels.launch import NormShape
from trt_runtime.tensorrt.api import tensorrt_type, trt
from trt_runtime.tensorrt.plugins.base import ELEMENTS, Plugin, reported


@dataclass(frozen=True, kw_only=True)
class NormAttributes:
    """As the arguments of the op; `weight_in_float` is 0 or 1."""

    epsilon: float
    weight_in_float: int


class FusedRmsNormPlugin(Plugin):
    """x [..., width] and weight [width] of one dtype (fp32, fp16, bf16) -> y like x."""

    NAME = "FusedRmsNorm"
    OUTPUTS = 1
    Attributes: ClassVar[type[Any]] = NormAttributes

    def inputs(self) -> tuple[str, ...]:
        return ("x", "weight")

    def input_types(self, types: Sequence[Any]) -> list[tuple[Any, ...]]:
        same = tuple(ELEMENTS) if not types else (types[0],)
        return [tuple(ELEMENTS), same]

    def output_types(self, types: Sequence[Any]) -> list[Any]:
        return [types[0]]

    @reported
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        return [trt.DimsExprs(inputs[0])]

    @reported
    def enqueue(
        self,
        input_descs: Sequence[Any],
        output_descs: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        shape = _shape(self.attributes, input_descs[0])
        self.launcher().rms_norm(shape, x=inputs[0], weight=inputs[1], y=outputs[0], stream=stream)


@dataclass(frozen=True, kw_only=True)
class QuantNormAttributes:
    """`code`: ONNX element type of the quantized output, INT8 or FLOAT8E4M3FN; `limit`: its largest value."""

    epsilon: float
    weight_in_float: int
    code: int
    limit: float


_CODES: dict[int, tuple[EightBit, Any, float]] = {
    DTYPE_TABLE[code].onnx: (code, tensorrt_type(code), LIMITS[code]) for code in get_args(EightBit)
}


class FusedRmsNormQuantPlugin(FusedRmsNormPlugin):
    """As `FusedRmsNorm`; outputs y, y quantized per token (int8 or fp8, like x), and the scales [..., 1] in fp32."""

    NAME = "FusedRmsNormQuant"
    OUTPUTS = 3
    Attributes = QuantNormAttributes

    def output_types(self, types: Sequence[Any]) -> list[Any]:
        code = _CODES.get(self.attributes.code)
        if code is None or code[2] != self.attributes.limit:
            known = " or ".join(f"code {number} with limit {limit:g}" for number, (_, _, limit) in _CODES.items())
            raise LogitLockError(
                f"code {self.attributes.code} with limit {self.attributes.limit:g}: it must be {known}"
            )
        return [types[0], code[1], trt.float32]

    @reported
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        scales = trt.DimsExprs(inputs[0])
        scales[len(inputs[0]) - 1] = builder.constant(1)
        return [trt.DimsExprs(inputs[0]), trt.DimsExprs(inputs[0]), scales]

    @reported
    def enqueue(
        self,
        input_descs: Sequence[Any],
        output_descs: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        shape = replace(_shape(self.attributes, input_descs[0]), quantized=_CODES[self.attributes.code][0])
        y, codes, scales = outputs
        self.launcher().rms_norm(
            shape, x=inputs[0], weight=inputs[1], y=y, quantized=codes, scales=scales, stream=stream
        )


def _shape(attributes: Any, x: Any) -> NormShape:
    *rows, width = x.dims
    return NormShape(
        rows=math.prod(rows),
        width=width,
        eps=attributes.epsilon,
        weight_in_float=bool(attributes.weight_in_float),
        dtype=ELEMENTS[x.type],
    )
