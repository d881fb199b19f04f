"""RMSNorm as a Triton kernel, optionally with the per-token int8 or fp8 copy that a quantized projection reads.

The mathematics is `refmodels.ops.fused_rms_norm` with every rounding where the eager body has it; only the order in
which the squares of a row are added differs.  One block holds one row in registers: on an H200 that was as fast as any
tiled, looped or persistent form at every row count (benchmarks/gpu_rms_norm.py).

The quantized copy (SmoothQuant, arXiv:2211.10438, per-token) is that of y, the normed row as rounded to its dtype:

    amax  = max(max |y|, 2^-96)                      one per row; a zero row has a scale that divides nothing by zero
    scale = amax / limit                             fp32, IEEE division; limit 127 (int8) or 448 (fp8 e4m3)
    code  = round(clamp(y * (limit / amax), -limit, limit))        fp32 product and quotient; half to even

A NaN in a row makes its scale NaN; the quantized values of such a row mean nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from refmodels.errors import LogitLockError
from refmodels.quantization.formats import LIMITS
from trt_runtime.kernels.launch import Launch, NormShape

MAX_WIDTH = 32768
"""Widest row, in elements."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _int8_bits(value):
    # 1.5 * 2^23 has no bits below the point: the addition rounds half to even, and its last byte is the integer.
    return (value + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _e4m3_bits(value):
    # In integers, because only sm_89 and later convert to e4m3: the same bits everywhere.  |value| <= 448.
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits &= 0x7FFFFFFF
    # Codes below 2^-6 are multiples of 2^-9, the last bit of 2^14: the addition rounds half to even.
    small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1) - (120 << 23)) >> 20
    return (tl.where(bits < (121 << 23), small, normal) | sign).to(tl.int8)


@triton.jit
def magnitude(x):
    """The largest |x|, but not less than 2^-96; NaN if there is one."""
    return _larger(tl.reduce(tl.abs(x), 0, _larger), 2.0**-96)


@triton.jit
def coded(scaled, lowest: tl.constexpr, LIMIT: tl.constexpr):
    """The nearest codes between `lowest` and LIMIT, as bytes: int8 if the limit is its, else e4m3."""
    code = tl.minimum(tl.maximum(scaled, lowest), LIMIT)
    return _int8_bits(code) if LIMIT == 127.0 else _e4m3_bits(code)


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    y,
    quantized,
    scales,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHT_IN_FLOAT: tl.constexpr,
    LIMIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        # Wait before any load: the weight too may have been written by the kernel ahead.
        gdc_launch_dependents()
        gdc_wait()
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = tl.program_id(0).to(tl.int64)
    # Both loads are under way before the reduction waits for x.
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) * (1.0 / WIDTH) + eps)
    if WEIGHT_IN_FLOAT:
        out = (normed * w).to(y.dtype.element_ty)
    else:
        # The product of two half-precision numbers is exact in fp32, so this rounds once, as eager does.
        out = (normed.to(y.dtype.element_ty).to(tl.float32) * w).to(y.dtype.element_ty)
    tl.store(y + row * WIDTH + column, out, mask=inside)
    if quantized is not None:
        rounded = out.to(tl.float32)
        amax = magnitude(rounded)
        codes = coded(rounded * tl.div_rn(LIMIT, amax), -LIMIT, LIMIT)
        tl.store(quantized + row * WIDTH + column, codes, mask=inside)
        tl.store(scales + row, tl.div_rn(amax, LIMIT))


def launches(
    shape: NormShape, *, x: Any, weight: Any, y: Any, quantized: Any = None, scales: Any = None
) -> list[Launch]:
    """The launches of `fused_rms_norm` on contiguous rows: one, or none for no rows.

    Args:
        shape: rows, width <= `MAX_WIDTH`, dtype and so on.
        x, y: [rows, width] of `shape.dtype`, tensors or addresses; y may be x.  16-byte aligned, as all others.
        weight: [width] of `shape.dtype`.
        quantized: [rows, width], one byte per element (int8 or fp8 e4m3 bits); exactly if `shape.quantized`.
        scales: [rows] fp32; likewise.
    Raises:
        LogitLockError: a row is wider than `MAX_WIDTH`.
    """
    if not 0 < shape.width <= MAX_WIDTH:
        raise LogitLockError(f"rows of {shape.width} elements: the RMSNorm kernel takes 1 to {MAX_WIDTH}")
    if shape.rows == 0:
        return []
    block = triton.next_power_of_2(shape.width)
    return [
        Launch(
            kernel=rms_norm_kernel,
            grid=(shape.rows, 1, 1),
            arguments={
                "x": x,
                "weight": weight,
                "y": y,
                "quantized": quantized,
                "scales": scales,
                "eps": shape.eps,
            },
            constants={
                "WIDTH": shape.width,
                "BLOCK": block,
                "WEIGHT_IN_FLOAT": shape.weight_in_float,
                "LIMIT": LIMITS[shape.quantized] if shape.quantized else 0.0,
                "OVERLAP": True,
            },
            pointers={
                "x": shape.dtype,
                "weight": shape.dtype,
                "y": shape.dtype,
                "quantized": "i8",
                "scales": "fp32",
            },
            warps=min(max(1, block // 512), 8 if block <= 8192 else 32),
            # Contracted to a fused multiply-add, the rounding to integers would skip the product's.
            options={"enable_fp_fusion": False, "launch_pdl": True},
        )
    ]


def variants(shape: NormShape) -> list[Launch]:
    """One launch for each kernel that `launches` asks for at any row count of `shape`: there is one."""
    byte = 0 if shape.quantized else None
    return launches(replace(shape, rows=1), x=0, weight=0, y=0, quantized=byte, scales=byte)
