"""The exact arithmetic of quantization: the reference that every engine is compared with.

A code is a quantized value, the integer or fp8 number that is stored.

    weight          code = round(w / scale) + zero, clamped;     w ~ (code - zero) * scale
    input           code = round(x / scale), clamped;            x ~ code * scale
    linear layer    sum(code_x * code_w) exactly, times (scale_x * scale_w), rounded once to the working dtype;
                    with scales per group, the sum over all groups of this

Rounding is half to even, as in ONNX's QuantizeLinear, TensorRT and CUDA's conversions.  "Wide" is fp32, or fp64 for
fp64 (`refmodels.dtypes.wide_dtype`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refmodels.dtypes import wide_dtype
from refmodels.errors import LogitLockError
from refmodels.quantization.formats import CODE_TYPES, LIMITS, Code, EightBit, LinearFormat

LEAST_AMAX = 2.0**-96
"""Lower bound of a row's or token's largest magnitude, so that the scale of an all-zero row is not zero."""

LEAST_SCALE = 2.0**-24
"""The smallest positive fp16 number: the scale of all-zero data, which no working dtype flushes to zero."""


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A quantized weight [out, in].

    codes: [out, in], dtype as in `CODE_TYPES`.  scale: [out, groups].  zero: [out, groups] int8, or None (symmetric).
    order: [in] int64, or None: column c of the codes is multiplied with element order[c] of the input.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    order: Tensor | None = None

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] in the order of the input, in `dtype` (that of the scale by default)."""
        scale = self.scale if dtype is None else self.scale.to(dtype)
        weight = dequantize(self.codes, scale, self.zero)
        return weight if self.order is None else weight[:, self.order.argsort()]


def code_range(code: Code) -> tuple[float, float]:
    """The lowest and the highest code, both included."""
    limit = LIMITS[code]
    return (-limit, limit) if code == "fp8" else (-limit - 1, limit)


def weight_scale(weight: Tensor, linear: LinearFormat) -> tuple[Tensor, Tensor | None]:
    """The smallest scales (and their zero points) that cover every row or group.

    Args:
        weight: [out, in], a float dtype; the arithmetic is wide.
    Returns: scale [out, groups] in the wide dtype; zero [out, groups] int8, or None.
    Raises:
        LogitLockError: the group size does not divide the number of columns.
    """
    grouped = weight.to(wide_dtype(weight.dtype)).unflatten(1, (linear.groups(weight.shape[1]), -1))
    low, high = code_range(linear.weight)
    # Zero is always representable: a pruned weight stays pruned.
    least, most = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if linear.symmetric:
        # The lowest code is used too: one of sixteen in int4, which reduces the squared error by a tenth.
        return torch.maximum(most / high, least / low).clamp(min=LEAST_SCALE), None
    scale = ((most - least) / (high - low)).clamp(min=LEAST_SCALE)
    return scale, (low - least / scale).round().clamp(low, high).to(torch.int8)


def quantize_weight(
    weight: Tensor, linear: LinearFormat, *, scale: Tensor | None = None, zero: Tensor | None = None
) -> QuantizedWeight:
    """Round a weight to the nearest codes.

    Args:
        weight: [out, in], a float dtype.
        scale, zero: [out, groups]; by default those of `weight_scale`.
    Raises:
        LogitLockError: the group size does not divide the number of columns, or the weight is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise LogitLockError("a weight to quantize holds NaN or infinity")
    if scale is None:
        scale, zero = weight_scale(weight, linear)
    wide = weight.to(wide_dtype(weight.dtype)).unflatten(1, (linear.groups(weight.shape[1]), -1))
    steps = wide / scale.to(wide.dtype)[:, :, None]
    if zero is not None:
        steps = steps.round() + zero[:, :, None]
    codes = to_codes(steps, linear.weight).flatten(1)
    return QuantizedWeight(codes=codes, scale=scale, zero=zero)


def to_codes(steps: Tensor, code: Code) -> Tensor:
    """Round and clamp numbers, given in units of their scale, to codes."""
    low, high = code_range(code)
    return (steps if code == "fp8" else steps.round()).clamp(low, high).to(CODE_TYPES[code])


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """(code - zero) * scale, in the dtype of `scale`.

    Args:
        codes: [out, in]; scale, zero: [out, groups].
    """
    grouped: Tensor = codes.to(scale.dtype).unflatten(1, (scale.shape[1], -1))
    if zero is not None:
        grouped = grouped - zero.to(scale.dtype)[:, :, None]
    return (grouped * scale[:, :, None]).flatten(1)


def quantize_tokens(x: Tensor, code: EightBit) -> tuple[Tensor, Tensor]:
    """Quantize x [..., n] per token: its codes, and the scales [..., 1] (wide).

    amax = max(max |x|, 2^-96); scale = amax / limit; code = round(clamp(x * (limit / amax))).  Kernels multiply by the
    inverse instead of dividing (`trt_runtime.kernels.rms_norm`), and so does this; the two differ in ties at most.
    """
    wide = x.to(wide_dtype(x.dtype))
    limit = LIMITS[code]
    amax = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX)
    # Not limit / amax with a Python number: torch computes a reciprocal and a product, which is not the quotient.
    steps = (wide * (torch.full_like(amax, limit) / amax)).clamp(-limit, limit)
    return to_codes(steps, code), amax / limit


def quantize_groups(x: Tensor, code: EightBit, groups: int) -> tuple[Tensor, Tensor]:
    """As `quantize_tokens` for each of `groups` equal groups of columns: codes [..., n] and scales [..., groups]."""
    codes, scale = quantize_tokens(x.unflatten(-1, (groups, -1)), code)
    return codes.flatten(-2), scale.squeeze(-1)


def quantize_static(x: Tensor, scale: Tensor, code: Code) -> Tensor:
    """Quantize x with a static scale that broadcasts against it: round(x / scale), clamped, as QuantizeLinear does."""
    wide = x.to(wide_dtype(x.dtype))
    return to_codes(wide / scale.to(wide.dtype), code)


def coded_product(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix product of quantized inputs [..., in] and quantized weights [out, in], in `dtype`.

    x_scale: broadcasts against [..., 1]; scale: [out, 1].  Codes are multiplied and summed in fp64, which is exact for
    int8 and for fp8 (products have 8 bits and lie in 2^-18 .. 2^18); the scales are multiplied wide.
    """
    wide = wide_dtype(dtype)
    total = F.linear(x.to(torch.float64), weight.to(torch.float64))
    return (total.to(wide) * (x_scale.to(wide) * scale.to(wide).flatten())).to(dtype)


def quantize_cache(x: Tensor, scale: Tensor, code: EightBit) -> Tensor:
    """Quantize new keys or values [batch, tokens, kv_heads, head_dim]; scale [kv_heads]."""
    return quantize_static(x, scale[:, None], code)


def dequantize_cache(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """code * scale in `dtype`, for cached codes [batch, kv_heads, slots, head_dim]; scale [kv_heads]."""
    return codes.to(dtype) * scale.to(dtype)[:, None, None]


def grouped_product(x: Tensor, x_scale: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix product of inputs [..., in] and a weight, both quantized in the same groups, in `dtype`.

    x_scale: [..., groups].  The arithmetic is fp64, where the rounding of codes times scales is negligible: the result
    is the sum over groups of exact integer products times both scales.
    """
    columns: Tensor = x.to(torch.float64).unflatten(-1, (x_scale.shape[-1], -1)) * x_scale.to(torch.float64)[..., None]
    rows = dequantize(weight.codes, weight.scale.to(torch.float64), weight.zero)
    return F.linear(columns.flatten(-2), rows).to(wide_dtype(dtype)).to(dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack two int4 values per byte, [..., n / 2] uint8: even columns in the low nibble, two's complement (ONNX
    INT4)."""
    low, high = codes[..., 0::2], codes[..., 1::2]
    return (low & 0xF).to(torch.uint8) | ((high & 0xF).to(torch.uint8) << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: int8 [..., 2 n]."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)
