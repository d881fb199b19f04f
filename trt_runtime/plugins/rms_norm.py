"""FusedRmsNorm: `refmodels.ops.fused_rms_norm` as a TensorRT plugin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trt_runtime.kernels.launch import NormShape
from trt_runtime.plugins.base import ELEMENTS, Plugin, reported
from trt_runtime.tensorrt_api import trt


@dataclass(frozen=True, kw_only=True)
class NormAttributes:
    """As the arguments of the op; `weight_in_float` is 0 or 1."""

    epsilon: float
    weight_in_float: int


class FusedRmsNorm(Plugin):
    """x [..., width] and weight [width] of one dtype (fp32, fp16, bf16) -> y like x."""

    NAME = "FusedRmsNorm"
    OUTPUTS = 1
    Attributes = NormAttributes

    def inputs(self) -> tuple[str, ...]:
        return ("x", "weight")

    def input_types(self, types: Sequence[Any]) -> list[tuple[Any, ...]]:
        same = tuple(ELEMENTS) if not types else (types[0],)
        return [tuple(ELEMENTS), same]

    def output_sources(self) -> tuple[int, ...]:
        return (0,)

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
        *rows, width = input_descs[0].dims
        shape = NormShape(
            rows=math.prod(rows),
            width=width,
            eps=self.attributes.epsilon,
            weight_in_float=bool(self.attributes.weight_in_float),
            dtype=ELEMENTS[input_descs[0].type],
        )
        self.launcher().rms_norm(shape, x=inputs[0], weight=inputs[1], y=outputs[0], stream=stream)
