"""The quantized linear layer, which replaces `nn.Linear` in `Decoder` if its spec says so."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refmodels.quantization.arithmetic import (
    QuantizedWeight,
    coded_product,
    dequantize,
    grouped_product,
    quantize_groups,
    quantize_static,
    quantize_tokens,
)
from refmodels.quantization.formats import CODE_TYPES, LinearFormat


class QuantizedLinear(nn.Module):
    """x [..., in] -> [..., out], with the arithmetic of `refmodels.quantization.arithmetic`.

    Parameters (none requires grad; floats have the working dtype):
        weight: quantized values [out, in], int8 or float8_e4m3fn.
        scale: [out, groups].
        zero: [out, groups] int8; only if the format is not symmetric.
        input_scale: []; only with a static input scale.
        order: [in] int64; only if the format is reordered.
        pre_quant_scale: [in]; only if the format has one.
        bias: [out], or None.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, linear: LinearFormat) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, linear
        groups = linear.groups(in_features)
        self.weight = _constant(out_features, in_features, dtype=CODE_TYPES[linear.weight])
        self.scale = _constant(out_features, groups)
        self.zero = None if linear.symmetric else _constant(out_features, groups, dtype=torch.int8)
        static = linear.input is not None and linear.input_scale == "tensor"
        self.input_scale = _constant() if static else None
        self.order = _constant(in_features, dtype=torch.int64) if linear.reordered else None
        self.pre_quant_scale = _constant(in_features) if linear.pre_quant_scale else None
        self.bias = _constant(out_features) if bias else None

    @property
    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(codes=self.weight, scale=self.scale, zero=self.zero, order=self.order)

    def scaled(self, x: Tensor) -> Tensor:
        """x [..., in] times the pre-quant scale, rounded to the working dtype; x itself if there is none."""
        return x if self.pre_quant_scale is None else x * self.pre_quant_scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.scaled(x)
        if self.order is not None:
            x = x[..., self.order]
        if self.format.input is None:
            return F.linear(x, dequantize(self.weight, self.scale, self.zero), self.bias)
        if self.format.input_scale == "group":
            codes, x_scale = quantize_groups(x, self.format.input, self.scale.shape[1])
            y = grouped_product(codes, x_scale, self.quantized, x.dtype)
            return y if self.bias is None else y + self.bias
        if self.input_scale is None:
            codes, x_scale = quantize_tokens(x, self.format.input)
        else:
            codes, x_scale = quantize_static(x, self.input_scale, self.format.input), self.input_scale
        y = coded_product(codes, x_scale, self.weight, self.scale, x.dtype)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}"


def _constant(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
