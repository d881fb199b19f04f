"""int8 and fp8 GEMMs of quantized inputs and weights (SmoothQuant's W8A8, arXiv:2211.10438), and input quantization.

The product is that of `refmodels.quantization.arithmetic.coded_product`: the sum of products of quantized values, times
the scales of token and output channel, rounded once; bias, activation of a gated MLP and residual follow in registers.
int8 sums are exact.  Hopper's matrix units keep 14 bits of an fp8 sum in flight (DeepSeek-V3, arXiv:2412.19437, 3.3.2):
every `BLOCK_K` columns the kernel adds it to one in fp32.

Weights stand on the left and tokens on the right, because matrix instructions have at least 64 rows, and a decode step
has few tokens but always many weights.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from refmodels.errors import LogitLockError
from refmodels.quantization.formats import LIMITS, EightBit
from trt_runtime.kernels.launch import ElementType, Launch
from trt_runtime.kernels.rms_norm import MAX_WIDTH, coded, magnitude


@triton.jit
def quantize_kernel(
    x, static, quantized, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, OVERLAP: tl.constexpr
):
    """A row of x, quantized with a scale of its own or with the one number `static`."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = tl.program_id(0).to(tl.int64)
    wide = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if static is not None:
        scaled = tl.div_rn(wide, tl.zeros_like(wide) + tl.load(static).to(tl.float32))
    else:
        amax = magnitude(wide)
        scaled = wide * tl.div_rn(LIMIT, amax)
        tl.store(scales + row, tl.div_rn(amax, LIMIT))
    # With a constant int8 scale a value may be below -127.
    lowest: tl.constexpr = -128.0 if static is not None and LIMIT == 127.0 else -LIMIT
    tl.store(quantized + row * WIDTH + column, coded(scaled, lowest, LIMIT), mask=inside)


@triton.jit
def _gated(y, up, kind: tl.constexpr):
    """silu(y) * up, rounded where the separate operations round."""
    y = y.to(kind).to(tl.float32)
    return (y / (1.0 + tl.exp(-y))).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)


@triton.jit
def coded_gemm_kernel(
    x,
    input_scale,
    weight,
    scale,
    bias,
    residual,
    out,
    n,
    k,
    tokens,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    STATIC: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    kind: tl.constexpr = out.dtype.element_ty
    integer: tl.constexpr = weight.dtype.element_ty == tl.int8
    # Blocks that run at the same time share rows and tokens: GROUP blocks of rows, then the next tokens.
    across = tl.cdiv(tokens, TOKENS)
    down = tl.num_programs(0) // across
    per: tl.constexpr = GROUP
    first = tl.program_id(0) // (per * across) * per
    size = tl.minimum(down - first, per)
    inner = tl.program_id(0) % (per * across)
    row = (first + inner % size) * ROWS + tl.arange(0, ROWS)
    token = inner // size * TOKENS + tl.arange(0, TOKENS)
    at = tl.arange(0, BLOCK_K)
    # Rows and tokens beyond the last are computed from the last one's memory and never stored.
    left = weight + tl.minimum(row, n - 1).to(tl.int64)[:, None] * k + at[None, :]
    right = x + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * k + at[None, :]
    up = left + n.to(tl.int64) * k
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    if integer:
        total = tl.zeros((ROWS, TOKENS), tl.int32)
        total_up = tl.zeros((ROWS, TOKENS), tl.int32)
    else:
        total = tl.zeros((ROWS, TOKENS), tl.float32)
        total_up = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        if EVEN:
            w = tl.load(left + start)
            b = tl.load(right + start)
        else:
            live = (start + at < k)[None, :]
            w = tl.load(left + start, mask=live, other=0.0)
            b = tl.load(right + start, mask=live, other=0.0)
        if integer:
            total = tl.dot(w, tl.trans(b), total, out_dtype=tl.int32)
        else:
            total = tl.dot(w, tl.trans(b), total, max_num_imprecise_acc=BLOCK_K)
        if GATED:
            u = tl.load(up + start) if EVEN else tl.load(up + start, mask=live, other=0.0)
            if integer:
                total_up = tl.dot(u, tl.trans(b), total_up, out_dtype=tl.int32)
            else:
                total_up = tl.dot(u, tl.trans(b), total_up, max_num_imprecise_acc=BLOCK_K)
    inside = row < n
    here = token < tokens
    if STATIC:
        token_scale = tl.zeros((TOKENS,), tl.float32) + tl.load(input_scale).to(tl.float32)
    else:
        token_scale = tl.load(input_scale + token, mask=here, other=0.0)
    row_scale = tl.load(scale + row, mask=inside, other=0.0).to(tl.float32)
    y = (total.to(tl.float32) * (token_scale[None, :] * row_scale[:, None])).to(kind)
    if bias is not None:
        y = (y.to(tl.float32) + tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]).to(kind)
    if GATED:
        up_scale = tl.load(scale + n + row, mask=inside, other=0.0).to(tl.float32)
        z = (total_up.to(tl.float32) * (token_scale[None, :] * up_scale[:, None])).to(kind)
        if bias is not None:
            z = (z.to(tl.float32) + tl.load(bias + n + row, mask=inside, other=0.0).to(tl.float32)[:, None]).to(kind)
        y = _gated(y, z, kind).to(kind)
    # Memory has the rows of a token next to each other.
    y = tl.trans(y)
    to = token.to(tl.int64)[:, None] * n + row[None, :]
    wanted = here[:, None] & inside[None, :]
    if residual is not None:
        y = (y.to(tl.float32) + tl.load(residual + to, mask=wanted, other=0.0).to(tl.float32)).to(kind)
    tl.store(out + to, y, mask=wanted)


def quantize(
    *, rows: int, width: int, dtype: ElementType, code: EightBit, x: Any, quantized: Any, scales: Any = None,
    static: Any = None,
) -> list[Launch]:  # fmt: skip
    """Quantize x [rows, width] as `quantize_tokens` or `quantize_static` of `refmodels.quantization.arithmetic`.

    Args:
        quantized: [rows, width], one byte each.
        scales: [rows] fp32, written; or static: one number of `dtype`, read.
    Raises:
        LogitLockError: a row is wider than the RMSNorm kernel's widest.
    """
    if not 0 < width <= MAX_WIDTH:
        raise LogitLockError(f"rows of {width} elements: the kernel that quantizes takes 1 to {MAX_WIDTH}")
    block = triton.next_power_of_2(width)
    return [
        Launch(
            kernel=quantize_kernel,
            grid=(rows, 1, 1),
            arguments={"x": x, "static": static, "quantized": quantized, "scales": scales},
            constants={"WIDTH": width, "BLOCK": block, "LIMIT": LIMITS[code], "OVERLAP": True},
            pointers={"x": dtype, "static": dtype, "quantized": "i8", "scales": "fp32"},
            warps=min(max(1, block // 512), 8 if block <= 8192 else 32),
            # As in the RMSNorm kernel: a fused multiply-add would skip a rounding.
            options={"enable_fp_fusion": False, "launch_pdl": True},
        )
    ]


def tile_of(n: int, tokens: int, *, code: EightBit, gated: bool) -> tuple[int, int, int, int, int]:
    """Rows, tokens and columns of a tile, warps and stages: the fastest on an H200 (benchmarks/gpu_quantized.py)."""
    if tokens <= 16:
        return 64, 16, 256, 4, 4
    if tokens <= 64:
        return (128, 64, 128, 8, 5) if n > 8192 else (64, 64, 256, 4, 4)
    if tokens <= 256:
        return 64, 128, 128, 4, 5
    if gated:
        return 128, 128, 128, 8, 4
    return (128, 256, 128, 8, 3) if code == "int8" else (256, 128, 128, 8, 3)


def gemm(
    *,
    n: int,
    k: int,
    tokens: int,
    dtype: ElementType,
    code: EightBit,
    x: Any,
    input_scale: Any,
    weight: Any,
    scale: Any,
    out: Any,
    bias: Any = None,
    residual: Any = None,
    static: bool = False,
    gated: bool = False,
    tile: tuple[int, int, int, int, int] | None = None,
) -> Launch:
    """out = residual + (x @ weight.T * scales + bias), or with `gated` silu of its first half times its second half.

    Args:
        n, k, tokens: out is [tokens, n]; k is a multiple of 16.
        x: quantized [tokens, k], int8 or float8_e4m3fn; input_scale: [tokens] fp32, or one number of `dtype` if
            `static`.
        weight: quantized [n, k]; scale [n], bias [n] of `dtype`; each twice as long if gated.
        tile: overrides `tile_of` (for measurements).
    """
    rows, columns, depth, warps, stages = tile or tile_of(n, tokens, code=code, gated=gated)
    element = "i8" if code == "int8" else "fp8e4nv"
    return Launch(
        kernel=coded_gemm_kernel,
        grid=(triton.cdiv(n, rows) * triton.cdiv(tokens, columns), 1, 1),
        arguments={
            "x": x,
            "input_scale": input_scale,
            "weight": weight,
            "scale": scale,
            "bias": bias,
            "residual": residual,
            "out": out,
            "n": n,
            "k": k,
            "tokens": tokens,
        },
        constants={
            "ROWS": rows,
            "TOKENS": columns,
            "BLOCK_K": depth,
            "GROUP": 8,
            "GATED": gated,
            "STATIC": static,
            "EVEN": k % depth == 0,
            "STAGES": stages,
            "OVERLAP": True,
        },
        pointers={
            **dict.fromkeys(("scale", "bias", "residual", "out"), dtype),
            "x": element,
            "weight": element,
            "input_scale": dtype if static else "fp32",
        },
        warps=warps,
        stages=stages,
        options={"launch_pdl": True},
    )
