"""The GEMVs of a decode step, with bias, activation and residual in the same kernel.

For one token, the time of a product with a weight matrix is that of reading the weights.  `gemv` reads those of 7B
models at 77 to 95 % of the bandwidth of a long read on an H200, where cuBLAS reaches 54 to 91 %
(benchmarks/gpu_linear.py), and computes bias, activation of a gated MLP and residual in registers.  It rounds where the
separate operations round.  For several tokens cuBLAS is as fast; `gate`, the activation of a gated MLP, follows it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from refmodels.dtypes import DTYPES
from trt_runtime.kernels.launch import ElementType, Launch

WARPS = 4


@triton.jit
def gemv_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    n,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    kind: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < n
    # A thread adds up its own 16 bytes before anything is exchanged or kept: few registers, thus many resident blocks.
    column = (tl.arange(0, COLUMNS // VECTOR) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    tile = weight + row.to(tl.int64)[:, None, None] * k + column[None, :, :]
    tile_up = weight + (row + n).to(tl.int64)[:, None, None] * k + column[None, :, :]
    there = live[:, None, None] & (column < k)[None, :, :]
    w = tl.load(tile, mask=there, other=0.0, eviction_policy="evict_first")
    if GATED:
        up = tl.load(tile_up, mask=there, other=0.0, eviction_policy="evict_first")
    if OVERLAP:
        # No kernel writes weights: the load of the first tile starts before the kernel ahead has written x.
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((ROWS, COLUMNS // VECTOR), tl.float32)
    total_up = tl.zeros((ROWS, COLUMNS // VECTOR), tl.float32)
    for start in range(0, k, COLUMNS):
        here = start + column
        a = tl.load(x + here, mask=here < k, other=0.0).to(tl.float32)[None, :, :]
        # The load of the next tile starts before this one is used.
        there = live[:, None, None] & (here + COLUMNS < k)[None, :, :]
        following = tl.load(tile + start + COLUMNS, mask=there, other=0.0, eviction_policy="evict_first")
        total += tl.sum(a * w.to(tl.float32), 2)
        w = following
        if GATED:
            following = tl.load(tile_up + start + COLUMNS, mask=there, other=0.0, eviction_policy="evict_first")
            total_up += tl.sum(a * up.to(tl.float32), 2)
            up = following
    y = tl.sum(total, 1)
    if bias is not None:
        y += tl.load(bias + row, mask=live, other=0.0).to(tl.float32)
    if GATED:
        y_up = tl.sum(total_up, 1)
        if bias is not None:
            y_up += tl.load(bias + n + row, mask=live, other=0.0).to(tl.float32)
        y = y.to(kind).to(tl.float32)
        y = (y / (1.0 + tl.exp(-y))).to(kind).to(tl.float32) * y_up.to(kind).to(tl.float32)
    if residual is not None:
        y = y.to(kind).to(tl.float32) + tl.load(residual + row, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row, y.to(kind), mask=live)


@triton.jit
def gate_kernel(x, out, n, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    kind: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < n
    y = tl.load(x + row * 2 * n + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * n + n + column, mask=live, other=0.0).to(tl.float32)
    y = (y / (1.0 + tl.exp(-y))).to(kind).to(tl.float32) * up
    tl.store(out + row * n + column, y.to(kind), mask=live)


def block_of(k: int, *, gated: bool) -> tuple[int, int]:
    """Rows and columns of a tile of the matrix: what made whole decode steps of 7B models fastest on an H200.

    Alone, each product is within 7 % of its best with any of them (benchmarks/gpu_linear.py).
    """
    if gated:
        return 1, 4096
    return (2, 1024) if k > 8192 else (2, 2048)


def gemv(
    *,
    n: int,
    k: int,
    dtype: ElementType,
    x: Any,
    weight: Any,
    out: Any,
    bias: Any = None,
    residual: Any = None,
    gated: bool = False,
    block: tuple[int, int, int] | None = None,
) -> Launch:
    """out = residual + (weight @ x + bias), or with `gated` silu of its first half times its second half.

    Args:
        n, k: elements of out and of x; a row of k elements is a multiple of 16 bytes.
        x [k], weight [n, k], out [n], bias [n], residual [n]: of `dtype`; weight [2 * n, k] and bias [2 * n] if gated.
            Products are added in fp32.  out may be residual.
        block: rows and columns of a tile, and warps; overrides `block_of` (for measurements).
    """
    rows, columns, warps = block or (*block_of(k, gated=gated), WARPS)
    return Launch(
        kernel=gemv_kernel,
        grid=(triton.cdiv(n, rows), 1, 1),
        arguments={"x": x, "weight": weight, "bias": bias, "residual": residual, "out": out, "n": n, "k": k},
        constants={
            "ROWS": rows,
            "COLUMNS": columns,
            "VECTOR": 16 // DTYPES[dtype].itemsize,
            "GATED": gated,
            "OVERLAP": True,
        },
        pointers=dict.fromkeys(("x", "weight", "bias", "residual", "out"), dtype),
        warps=warps,
        options={"launch_pdl": True},
    )


def gate(*, rows: int, n: int, dtype: ElementType, x: Any, out: Any, block: int = 1024) -> Launch:
    """out [rows, n] = silu of the first n columns of x [rows, 2 * n], times the others."""
    return Launch(
        kernel=gate_kernel,
        grid=(rows, triton.cdiv(n, block), 1),
        arguments={"x": x, "out": out, "n": n},
        constants={"BLOCK": block, "OVERLAP": True},
        pointers={"x": dtype, "out": dtype},
        warps=WARPS,
        options={"launch_pdl": True},
    )
