"""`quantized_gemm.gemm` for many tokens, on Hopper (compute capability 9.0) only.

Three groups of warps share the work: one warp fetches tiles of both operands by TMA into a ring of buffers, and two
groups of four multiply, each its half of the tokens, without ever waiting for each other.  It is written in Gluon,
because Triton's own pipeline waits for every int8 product before it starts the next: with the same TMA loads
`triton.jit` reached 1.6 to 1.8 times the speed of fp16 where this reaches 2.0 (benchmarks/results/gpu_quantized.log).

Sums are as exact as there: int8 in int32; fp8 in fp32 after every `BLOCK_K` columns.  Tokens are the left operand, so
that no result has to be transposed on its way to memory.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from refmodels.quantization.formats import EightBit
from trt_runtime.kernels.launch import ElementType, Launch

BLOCK_K = 128
"""Columns of a tile: the width that 128-byte swizzling of shared memory takes."""

# Renamed between Triton 3.6 and 3.9.
_fetch_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _place(
    unit,
    n,
    k,
    tokens,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """Which part of k, first token, first row, first and last step along k of a unit of work."""
    split = unit % SPLITS
    tile = unit // SPLITS
    # Blocks that run at the same time share tokens and rows: GROUP blocks of tokens, then the next rows.
    across = gl.cdiv(tokens, TOKENS)
    down = gl.cdiv(n, ROWS)
    first = tile // (GROUP * down) * GROUP
    size = gl.minimum(across - first, GROUP)
    inner = tile % (GROUP * down)
    steps = gl.cdiv(k, COLUMNS)
    token = (first + inner % size) * TOKENS
    return split, token, inner // size * ROWS, steps * split // SPLITS, steps * (split + 1) // SPLITS


@gluon.jit
def _fetch(
    x,
    weight,
    xs,
    ws,
    us,
    full,
    empty,
    n,
    k,
    tokens,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    SPLITS: gl.constexpr,
    GATED: gl.constexpr,
    STAGES: gl.constexpr,
):
    units = gl.cdiv(tokens, TOKENS) * gl.cdiv(n, ROWS) * SPLITS
    i = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _split, token, row, begin, end = _place(unit, n, k, tokens, TOKENS, ROWS, COLUMNS, GROUP, SPLITS)
        for step in range(begin, end):
            slot = i % STAGES
            # In the first round all buffers are free: a new barrier counts the phase before its first as over.
            mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
            ready = full.index(slot)
            # TMA fills the part of a tile outside the operand with zeros, and the barrier counts those bytes too.
            mbarrier.expect(ready, (TOKENS + ROWS * (1 + GATED)) * COLUMNS)
            _fetch_tile(x, [token, step * COLUMNS], ready, xs.index(slot))
            _fetch_tile(weight, [row, step * COLUMNS], ready, ws.index(slot))
            if GATED:
                _fetch_tile(weight, [n + row, step * COLUMNS], ready, us.index(slot))
            i += 1


@gluon.jit
def _scaled(total, token_scale, scale, bias, row, inside, kind: gl.constexpr):
    row_scale = gl.load(scale + row, mask=inside, other=0.0).to(gl.float32)
    y = (total.to(gl.float32) * (gl.expand_dims(token_scale, 1) * gl.expand_dims(row_scale, 0))).to(kind)
    if bias is not None:
        y = (y.to(gl.float32) + gl.expand_dims(gl.load(bias + row, mask=inside, other=0.0).to(gl.float32), 0)).to(kind)
    return y


@gluon.jit
def _multiply(
    input_scale,
    scale,
    bias,
    residual,
    out,
    xs,
    ws,
    us,
    full,
    empty,
    n,
    k,
    tokens,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    SPLITS: gl.constexpr,
    GATED: gl.constexpr,
    STATIC: gl.constexpr,
    STAGES: gl.constexpr,
    INTEGER: gl.constexpr,
    HALF: gl.constexpr,
):
    kind: gl.constexpr = out.dtype.element_ty
    sum_type: gl.constexpr = gl.int32 if INTEGER else gl.float32
    part: gl.constexpr = TOKENS // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        # Triton knows no int8 instruction of 256 rows.
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(ROWS, 128), 32]
    )  # fmt: skip
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16] if ROWS >= 128 else [4, 8], [4, 1], [1, 0])
    zeros = gl.zeros((part, ROWS), sum_type, layout=mma)
    units = gl.cdiv(tokens, TOKENS) * gl.cdiv(n, ROWS) * SPLITS
    i = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        split, token0, row0, begin, end = _place(unit, n, k, tokens, TOKENS, ROWS, COLUMNS, GROUP, SPLITS)
        token0 += HALF * part
        total = zeros
        total_up = zeros
        for step in range(begin, end):
            slot = i % STAGES
            mbarrier.wait(full.index(slot), i // STAGES & 1)
            a = xs.index(slot).slice(HALF * part, part, dim=0)
            b = ws.index(slot).permute((1, 0))
            if INTEGER:
                # One step behind: the matrix units always have the next product.
                total = warpgroup_mma(a, b, total, is_async=True)
                if GATED:
                    total_up = warpgroup_mma(a, us.index(slot).permute((1, 0)), total_up, is_async=True)
                    total, total_up = warpgroup_mma_wait(2, deps=[total, total_up])
                else:
                    total = warpgroup_mma_wait(1, deps=[total])
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), pred=step > begin)
            else:
                now = warpgroup_mma(a, b, zeros, use_acc=False, is_async=True)
                if GATED:
                    up = warpgroup_mma(a, us.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
                    now, up = warpgroup_mma_wait(0, deps=[now, up])
                    total_up += up
                else:
                    now = warpgroup_mma_wait(0, deps=[now])
                mbarrier.arrive(empty.index(slot))
                total += now
            i += 1
        if INTEGER:
            if GATED:
                total, total_up = warpgroup_mma_wait(0, deps=[total, total_up])
            else:
                total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES))
        at = token0 + gl.arange(0, part, layout=gl.SliceLayout(1, mma))
        channel = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(0, mma))
        here = at < tokens
        inside = channel < n
        if SPLITS > 1:
            sums = out + split.to(gl.int64) * tokens * n
            where = gl.expand_dims(at.to(gl.int64), 1) * n + gl.expand_dims(channel, 0)
            gl.store(sums + where, total, mask=gl.expand_dims(here, 1) & gl.expand_dims(inside, 0))
        else:
            if STATIC:
                token_scale = gl.zeros((part,), gl.float32, layout=gl.SliceLayout(1, mma))
                token_scale += gl.load(input_scale).to(gl.float32)
            else:
                token_scale = gl.load(input_scale + at, mask=here, other=0.0)
            y = _scaled(total, token_scale, scale, bias, channel, inside, kind)
            if GATED:
                z = _scaled(total_up, token_scale, scale, bias, n + channel, inside, kind)
                y = y.to(gl.float32)
                y = ((y / (1.0 + gl.exp(-y))).to(kind).to(gl.float32) * z.to(gl.float32)).to(kind)
            y = gl.convert_layout(y, stored)
            token = token0 + gl.arange(0, part, layout=gl.SliceLayout(1, stored))
            row = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(0, stored))
            to = gl.expand_dims(token.to(gl.int64), 1) * n + gl.expand_dims(row, 0)
            wanted = gl.expand_dims(token < tokens, 1) & gl.expand_dims(row < n, 0)
            if residual is not None:
                y = (y.to(gl.float32) + gl.load(residual + to, mask=wanted, other=0.0).to(gl.float32)).to(kind)
            gl.store(out + to, y, mask=wanted)


@gluon.jit
def _asm(text: gl.constexpr):
    gl.inline_asm_elementwise(text, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def hopper_gemm_kernel(
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
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    SPLITS: gl.constexpr,
    GATED: gl.constexpr,
    STATIC: gl.constexpr,
    STAGES: gl.constexpr,
    INTEGER: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """One block per multiprocessor, each for its share of the units of work."""
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, COLUMNS], x.layout)
    ws = gl.allocate_shared_memory(weight.dtype, [STAGES, ROWS, COLUMNS], weight.layout)
    us = ws
    if GATED:
        us = gl.allocate_shared_memory(weight.dtype, [STAGES, ROWS, COLUMNS], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    if OVERLAP:
        # `gdc_launch_dependents` and `gdc_wait`, which Gluon does not have.
        _asm("griddepcontrol.launch_dependents; // dummy $0")
        _asm("griddepcontrol.wait; // dummy $0")
    # Constants inside a tuple stay constants only where the tuple is written at the call.
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    input_scale, scale, bias, residual, out, xs, ws, us, full, empty, n, k, tokens,
                    TOKENS, ROWS, COLUMNS, GROUP, SPLITS, GATED, STATIC, STAGES, INTEGER, 0,
                ),
            ),
            (
                _multiply,
                (
                    input_scale, scale, bias, residual, out, xs, ws, us, full, empty, n, k, tokens,
                    TOKENS, ROWS, COLUMNS, GROUP, SPLITS, GATED, STATIC, STAGES, INTEGER, 1,
                ),
            ),
            (
                _fetch,
                (
                    x, weight, xs, ws, us, full, empty, n, k, tokens,
                    TOKENS, ROWS, COLUMNS, GROUP, SPLITS, GATED, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@triton.jit
def finish_kernel(
    sums,
    input_scale,
    scale,
    bias,
    residual,
    out,
    n,
    tokens,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STATIC: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Adds the sums of the parts of k in their order, and applies scales, bias, activation and residual."""
    kind: tl.constexpr = out.dtype.element_ty
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    token = tl.program_id(0)
    to = token.to(tl.int64) * n + row
    total = tl.load(sums + to, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(sums + tokens.to(tl.int64) * n * split + to, mask=inside, other=0)
    token_scale = tl.load(input_scale).to(tl.float32) if STATIC else tl.load(input_scale + token)
    y = (total.to(tl.float32) * (token_scale * tl.load(scale + row, mask=inside, other=0.0).to(tl.float32))).to(kind)
    if bias is not None:
        y = (y.to(tl.float32) + tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)).to(kind)
    if residual is not None:
        y = (y.to(tl.float32) + tl.load(residual + to, mask=inside, other=0.0).to(tl.float32)).to(kind)
    tl.store(out + to, y, mask=inside)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A unit of work.

    Attributes:
        tokens, rows: of out; of a gated product, twice as many rows of the weight.
        stages: buffers of the ring, as many as fit.
        splits: number of parts of k with separate sums.
    """

    tokens: int
    rows: int
    stages: int
    splits: int = 1


# Microseconds of one step of `BLOCK_K` columns by every multiprocessor at a time, measured on an H200.
_COSTS = {
    Tile(tokens=256, rows=128, stages=4): 0.70,
    Tile(tokens=128, rows=128, stages=6): 0.41,
    Tile(tokens=128, rows=64, stages=8): 0.32,
}
_GATED_COSTS = {Tile(tokens=128, rows=128, stages=4): 0.70, Tile(tokens=128, rows=64, stages=6): 0.41}
_SPLIT_COST = 7.0
"""Microseconds that two parts of k cost on top: their sums go through memory."""
_LARGEST_SUMS = 128 * 128
"""Limit of a tile's elements in fp8, each of which holds two sums: of all columns, and of the last `BLOCK_K`."""


def tile_of(n: int, k: int, tokens: int, *, code: EightBit, gated: bool, processors: int) -> Tile:
    """The tile with the least estimated time, in whole rounds of all multiprocessors: a partial round costs as much.

    Args: as of `gemm`.
    """
    steps = triton.cdiv(k, BLOCK_K)
    best: dict[Tile, float] = {}
    for tile, cost in (_GATED_COSTS if gated else _COSTS).items():
        if code == "fp8" and tile.tokens * tile.rows * (1 + gated) > _LARGEST_SUMS:
            continue
        for splits in (1,) if gated or steps < 2 else (1, 2):
            rounds = triton.cdiv(_units(tile, n, tokens) * splits, processors)
            best[replace(tile, splits=splits)] = rounds * cost * steps / splits + _SPLIT_COST * (splits - 1)
    return min(best, key=best.__getitem__)


def _units(tile: Tile, n: int, tokens: int) -> int:
    return int(triton.cdiv(tokens, tile.tokens) * triton.cdiv(n, tile.rows))


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
    tile: Tile,
    processors: int,
    sums: Any = None,
    bias: Any = None,
    residual: Any = None,
    static: bool = False,
    gated: bool = False,
) -> list[Launch]:
    """As `quantized_gemm.gemm`, of tensors on a GPU of compute capability 9.0.

    Args:
        x, weight: tensors, contiguous from a multiple of 16 bytes.
        tile: `tile_of` the other arguments.
        processors: multiprocessors of the GPU.
        sums: [splits, tokens, n] int32 for int8, fp32 for fp8, written; needed if the tile splits k.
    """
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    split = tile.splits > 1
    after = {"bias": bias, "residual": residual}
    product = Launch(
        kernel=hopper_gemm_kernel,
        grid=(min(_units(tile, n, tokens) * tile.splits, processors), 1, 1),
        arguments={
            "x": TensorDescriptor(x, [tokens, k], [k, 1], [tile.tokens, BLOCK_K], layout),
            "input_scale": input_scale,
            "weight": TensorDescriptor(weight, [n * (1 + gated), k], [k, 1], [tile.rows, BLOCK_K], layout),
            "scale": scale,
            **(dict.fromkeys(after) if split else after),
            "out": sums if split else out,
            "n": n,
            "k": k,
            "tokens": tokens,
        },
        constants={
            "TOKENS": tile.tokens,
            "ROWS": tile.rows,
            "COLUMNS": BLOCK_K,
            "GROUP": 8,
            "SPLITS": tile.splits,
            "GATED": gated,
            "STATIC": static,
            "STAGES": tile.stages,
            "INTEGER": code == "int8",
            "OVERLAP": True,
        },
        pointers={},
        warps=4,
        # Registers per thread with twelve warps (one of the last four works); Gluon gives most to those that multiply.
        options={"launch_pdl": True, "maxnreg": 168},
    )
    if not split:
        return [product]
    block = min(1024, triton.next_power_of_2(n))
    finish = Launch(
        kernel=finish_kernel,
        grid=(tokens, triton.cdiv(n, block), 1),
        arguments={
            "sums": sums,
            "input_scale": input_scale,
            "scale": scale,
            **after,
            "out": out,
            "n": n,
            "tokens": tokens,
        },
        constants={"SPLITS": tile.splits, "BLOCK": block, "STATIC": static, "OVERLAP": True},
        pointers={
            **dict.fromkeys(("scale", "bias", "residual", "out"), dtype),
            "sums": "i32" if code == "int8" else "fp32",
            "input_scale": dtype if static else "fp32",
        },
        options={"launch_pdl": True},
    )
    return [product, finish]
