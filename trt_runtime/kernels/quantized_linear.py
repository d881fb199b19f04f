"""GEMV with int4, int8 or fp8 weights, for up to `MAX_TOKENS` tokens.

The quantized weights (codes) stay packed.  A tile is 16 rows by 16 words of 16 bits, laid out so that the 16 bytes that
a thread loads are its part of a matrix instruction's operand: two of mma.m16n8k16's rows, four of its columns; threads
exchange nothing.  A word holds codes of columns four apart, one in each nibble or byte, as unsigned numbers u.  They
become floats two at a time, without a conversion:

    int4 in fp16    the bits where they are: fp16 subnormals u * 2^-24 (and u * 2^-20), which matrix units take as any
                    other number; 8 * 2^-24 times the sum of the inputs, made by the same units, is taken off the sum
    other integers  or-ed into the mantissa of 1024 (fp16) or 128 (bf16): 1024 + u, less 1024 and the zero
                    (Kim et al., arXiv:2211.10017)
    fp8             its bits in their place in fp16 or bf16, times a power of two

All of that is exact.  Products are exact, and the matrix units add them in fp32; the scale of a group multiplies the
group's sum, in fp32, where `refmodels.quantization.arithmetic` rounds every code * scale to the working dtype: this is
nearer to the exact product.  Groups that end within a run of columns are the exception: there the weight is rounded as
in the reference.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, assignment, var-annotated"
# ruff: noqa: RUF005, SIM108 (what Triton compiles is a subset of Python)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from refmodels.quantization.formats import Code
from trt_runtime.kernels.coded_tiles import (
    centred,
    codes,
    fetch_share,
    lifted,
    matrix,
    middle_of,
    minus_8,
    scales_of,
    words_of,
)
from trt_runtime.kernels.launch import ElementType, Launch

ROWS = 16
"""Rows of a tile."""
WORDS = 16
"""Words of 16 bits in a row of a tile; also the distance of the columns in one word."""
CODES = {"int4": 4, "int8": 2, "fp8": 2}
"""Codes in a word."""
MAX_TOKENS = 16

# Where Triton lets a matrix instruction's operands lie: 3.6 gives a thread four columns in a row, 3.9 two pairs.
_QUADS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


@triton.jit
def coded_gemv_kernel(
    x,
    weight,
    scale,
    offset,
    bias,
    residual,
    out,
    next_weight,
    later_weight,
    n,
    tiles,
    tokens,
    next_bytes,
    next_share,
    later_bytes,
    later_share,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    CODE: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILES: tl.constexpr,
    RUN: tl.constexpr,
    EIGHTS: tl.constexpr,
    GATED: tl.constexpr,
    QUADS: tl.constexpr,
    FAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    kind: tl.constexpr = out.dtype.element_ty
    PARTS: tl.constexpr = 4 if CODE == "int4" else 2
    COLUMNS: tl.constexpr = 16 * PARTS
    UNITS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    RUNS: tl.constexpr = (UNITS + RUN - 1) // RUN
    STEPS: tl.constexpr = (RUNS + WARPS - 1) // WARPS
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    # A scale for all columns multiplies the whole sum, one for a run of units theirs; a finer one every weight.
    WHOLE: tl.constexpr = GROUPS == 1
    FINE: tl.constexpr = not WHOLE and GROUP % (RUN * COLUMNS) != 0
    # int4 in fp16 needs no arithmetic at all: see `lifted`.
    LIFTED: tl.constexpr = CODE == "int4" and kind == tl.float16 and not WHOLE and not FINE and offset is None
    # Sums of eight tokens each; none: one token, of which all eight columns of a product are copies.
    SUMS: tl.constexpr = EIGHTS if EIGHTS > 0 else 1
    block = tl.program_id(0)
    warp = tl.arange(0, WARPS)
    # The warps share the columns: run by run in turn, so that a block reads memory in order.
    place = weight + (warp * (RUN * 128))[:, None] + tl.arange(0, 128)[None, :]
    held = ()
    scales = ()
    zeros = ()
    for i in tl.static_range(DEPTH):
        for m in tl.static_range(TILES):
            first = block + m * tiles if GATED else block * TILES + m
            most = UNITS if GATED else tl.where(first < tiles, UNITS, 0)
            for u in tl.static_range(RUN):
                some = (i * WARPS + warp) * RUN + u < most
                ahead = place + (first.to(tl.int64) * UNITS + i * WARPS * RUN + u) * 128
                held = held + (tl.load(ahead, mask=some[:, None], other=0, eviction_policy="evict_first"),)
                if FINE or (u == 0 and not WHOLE):
                    unit_ = (i * WARPS + warp) * RUN + u
                    scales = scales + (scales_of(scale, first, unit_, some, COLUMNS, GROUP, GROUPS),)
                if offset is not None and (FINE or u == 0):
                    unit_ = (i * WARPS + warp) * RUN + u
                    zeros = zeros + (scales_of(offset, first, unit_, some, COLUMNS, GROUP, GROUPS),)
    row = tl.arange(0, 16)
    biases = ()
    if bias is not None:
        for m in tl.static_range(TILES):
            o = (block if GATED else block * TILES + m) * 16 + row
            biases = biases + (tl.load(bias + (m * n if GATED else 0) + o, mask=o < n, other=0.0),)
    if OVERLAP:
        # No kernel writes weights: these loads start before the kernel ahead has written x.
        gdc_launch_dependents()
        gdc_wait()
    onto = ()
    if residual is not None:
        # Loaded early: at the end nothing would hide the latency.
        for m in tl.static_range(1 if GATED else TILES):
            for r in tl.static_range(SUMS):
                o = (block if GATED else block * TILES + m) * 16 + row
                which = 8 * r + tl.arange(0, 8)
                wanted = (o < n)[:, None] & (which < tokens)[None, :]
                onto = onto + (tl.load(residual + which[None, :] * n + o[:, None], mask=wanted, other=0.0),)
    # Eight columns in a row are a thread's, of one token of eight.
    e = tl.arange(0, 256)
    eighth = e // 32
    across = tl.max_contiguous(tl.multiple_of(e // 8 % 4 * (COLUMNS // 4) + e % 8, 8), 8)[None, :]
    acc = ()
    for _ in tl.static_range(TILES * SUMS):
        acc = acc + (tl.zeros((WARPS, 16, 8), tl.float32),)
    for start in range(0, STEPS, DEPTH):
        following = ()
        scales_following = ()
        zeros_following = ()
        for d in tl.static_range(DEPTH):
            inputs = ()
            for r in tl.static_range(SUMS):
                for u in tl.static_range(RUN):
                    unit = ((start + d) * WARPS + warp) * RUN + u
                    for h in tl.static_range(PARTS // 2):
                        column = unit[:, None] * COLUMNS + 8 * h + across
                        if K % COLUMNS == 0:
                            live = (unit < UNITS)[:, None]
                        else:
                            live = column < K
                        if EIGHTS == 0:
                            b = tl.load(x + column, mask=live, other=0.0)
                        else:
                            token = 8 * r + eighth
                            live = live & (token < tokens)[None, :]
                            b = tl.load(x + (token * K)[None, :] + column, mask=live, other=0.0)
                        b = tl.reshape(b, (WARPS, 8, 4, 2, 2, 2))
                        b = tl.permute(b, (0, 2, 4, 5, 1, 3)) if QUADS else tl.permute(b, (0, 4, 2, 5, 1, 3))
                        one, two = tl.split(b)
                        inputs = inputs + (tl.reshape(one, (WARPS, 16, 8)), tl.reshape(two, (WARPS, 16, 8)))
            if LIFTED:
                eights = ()
                for r in tl.static_range(SUMS):
                    # Two chains: each matrix instruction waits for the one whose sum it adds to.
                    first_half = tl.zeros((WARPS, 16, 8), tl.float32)
                    other_half = tl.zeros((WARPS, 16, 8), tl.float32)
                    a = matrix(minus_8(words_of(held[d * TILES * RUN], WARPS), FAST), WARPS, QUADS)
                    for i in tl.static_range(RUN * PARTS // 2):
                        first_half = tl.dot(a, inputs[r * RUN * PARTS + 2 * i], first_half)
                        other_half = tl.dot(a, inputs[r * RUN * PARTS + 2 * i + 1], other_half)
                    eights = eights + (first_half + other_half,)
            sums = ()
            for m in tl.static_range(TILES):
                tile = block + m * tiles if GATED else block * TILES + m
                odd = ()
                totals = ()
                for r in tl.static_range(SUMS):
                    if WHOLE or FINE:
                        totals = totals + (acc[m * SUMS + r],)
                    else:
                        totals = totals + (tl.zeros((WARPS, 16, 8), tl.float32),)
                    odd = odd + (tl.zeros((WARPS, 16, 8), tl.float32),)
                for u in tl.static_range(RUN):
                    words = words_of(held[(d * TILES + m) * RUN + u], WARPS)
                    for j in tl.static_range(PARTS):
                        if LIFTED:
                            a = lifted(words, j, FAST)
                        elif offset is not None:
                            z = zeros[(d * TILES + m) * RUN + u if FINE else d * TILES + m]
                            zero = tl.reshape(z, (WARPS, 8, 4, 1, 2, 1))
                            a = codes(words, zero, kind, CODE, j, FAST)
                        else:
                            a = centred(words, kind, CODE, j, FAST)
                        if FINE:
                            a = (a * tl.reshape(scales[(d * TILES + m) * RUN + u], (WARPS, 8, 4, 1, 2, 1))).to(kind)
                        a = matrix(a, WARPS, QUADS)
                        if LIFTED and j % 2 == 1:
                            sofar = odd
                            odd = ()
                            for r in tl.static_range(SUMS):
                                odd = odd + (tl.dot(a, inputs[(r * RUN + u) * PARTS + j], sofar[r]),)
                        else:
                            sofar = totals
                            totals = ()
                            for r in tl.static_range(SUMS):
                                totals = totals + (tl.dot(a, inputs[(r * RUN + u) * PARTS + j], sofar[r]),)
                if WHOLE or FINE:
                    sums = sums + totals
                else:
                    s = tl.reshape(scales[d * TILES + m], (WARPS, 8, 4, 2, 1)).to(tl.float32)
                    if LIFTED:
                        s *= 2.0**24
                    s = tl.permute(tl.broadcast_to(s, (WARPS, 8, 4, 2, 2)), (0, 3, 1, 2, 4))
                    s = tl.reshape(s, (WARPS, 16, 8))
                    for r in tl.static_range(SUMS):
                        if LIFTED:
                            whole_run = (totals[r] + odd[r] * 0.0625 + eights[r]) * s
                        else:
                            whole_run = totals[r] * s
                        sums = sums + (acc[m * SUMS + r] + whole_run,)
                # Loaded into the registers that have just been used, so that nothing has to be moved and waited for.
                if STEPS > DEPTH:
                    for u in tl.static_range(RUN):
                        next = ((start + DEPTH + d) * WARPS + warp) * RUN + u
                        later = next < (UNITS if GATED else tl.where(tile < tiles, UNITS, 0))
                        at = place + (tile.to(tl.int64) * UNITS + (start + DEPTH + d) * WARPS * RUN + u) * 128
                        loaded = tl.load(at, mask=later[:, None], other=0, eviction_policy="evict_first")
                        following = following + (loaded,)
                        if FINE or (u == 0 and not WHOLE):
                            more = scales_of(scale, tile, next, later, COLUMNS, GROUP, GROUPS)
                            scales_following = scales_following + (more,)
                        if offset is not None and (FINE or u == 0):
                            more = scales_of(offset, tile, next, later, COLUMNS, GROUP, GROUPS)
                            zeros_following = zeros_following + (more,)
            acc = sums
        if STEPS > DEPTH:
            held = following
            scales = scales_following
            zeros = zeros_following
    if OVERLAP and next_weight is not None:
        fetch_share(next_weight, next_bytes, next_share)
    if OVERLAP and later_weight is not None:
        fetch_share(later_weight, later_bytes, later_share)
    for r in tl.static_range(SUMS):
        which = 8 * r + tl.arange(0, 8)
        y = tl.zeros((16, 8), tl.float32)
        for m in tl.static_range(TILES):
            mine = block + m * tiles if GATED else block * TILES + m
            whole = tl.sum(acc[m * SUMS + r], 0)
            o = (block if GATED else mine) * 16 + row
            inside = o < n
            if WHOLE:
                factor = tl.load(scale + mine * 16 + row % 8 * 2 + row // 8, mask=inside, other=0.0)
                whole *= factor.to(tl.float32)[:, None]
            if bias is not None:
                whole += biases[m].to(tl.float32)[:, None]
            if GATED:
                whole = whole.to(kind).to(tl.float32)
                if m == 0:
                    y = (whole / (1.0 + tl.exp(-whole))).to(kind).to(tl.float32)
                else:
                    y *= whole
            else:
                y = whole
            if not GATED or m == 1:
                where = which[None, :] * n + o[:, None]
                wanted = inside[:, None] & (which < tokens)[None, :]
                if residual is not None:
                    y = y.to(kind).to(tl.float32) + onto[r if GATED else m * SUMS + r].to(tl.float32)
                tl.store(out + where, y.to(kind), mask=wanted)


@triton.jit
def _parts(words, zero, factor, kind: tl.constexpr, CODE: tl.constexpr, PART: tl.constexpr, FAST: tl.constexpr):
    return (codes(words, zero, kind, CODE, PART, FAST) * factor).to(kind)


@triton.jit
def dequantize_kernel(
    weight,
    scale,
    offset,
    out,
    n,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Rows of 16, BLOCK units of columns at a time."""
    kind: tl.constexpr = out.dtype.element_ty
    PARTS: tl.constexpr = 4 if CODE == "int4" else 2
    COLUMNS: tl.constexpr = 16 * PARTS
    UNITS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    MIDDLE: tl.constexpr = middle_of(kind, CODE)
    tile = tl.program_id(0)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    some = unit < UNITS
    at = weight + (tile.to(tl.int64) * UNITS + unit)[:, None] * 128 + tl.arange(0, 128)[None, :]
    words = words_of(tl.load(at, mask=some[:, None], other=0), BLOCK)
    factor = tl.reshape(scales_of(scale, tile, unit, some, COLUMNS, GROUP, GROUPS), (BLOCK, 8, 4, 1, 2, 1))
    if offset is not None:
        zero = tl.reshape(scales_of(offset, tile, unit, some, COLUMNS, GROUP, GROUPS), (BLOCK, 8, 4, 1, 2, 1))
    else:
        zero = tl.full((1, 1, 1, 1, 1, 1), MIDDLE, kind)
    if OVERLAP:
        # The kernel that reads out starts after this has ended, and the readers of its old contents have ended too.
        gdc_launch_dependents()
        gdc_wait()
    # The parts of a thread's words are next to each other in a row: 16 columns of int4, 8 of the others.
    first = _parts(words, zero, factor, kind, CODE, 0, FAST)
    second = _parts(words, zero, factor, kind, CODE, 1, FAST)
    if PARTS == 4:
        first = tl.join(first, _parts(words, zero, factor, kind, CODE, 2, FAST))
        second = tl.join(second, _parts(words, zero, factor, kind, CODE, 3, FAST))
        w = tl.permute(tl.join(first, second), (0, 4, 1, 2, 6, 7, 3, 5))
    else:
        w = tl.permute(tl.join(first, second), (0, 4, 1, 2, 6, 3, 5))
    w = tl.reshape(w, (BLOCK, 16, COLUMNS))
    o = tile * 16 + tl.arange(0, 16)
    column = (unit * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    to = out + o.to(tl.int64)[None, :, None] * K + column[:, None, :]
    tl.store(to, w, mask=(o < n)[None, :, None] & (column < K)[:, None, :])


def units_of(k: int, code: Code) -> int:
    """The number of tiles side by side."""
    return -(-k // (WORDS * CODES[code]))


def serves(*, k: int, group: int | None, dtype: ElementType) -> bool:
    """Whether the kernels take such a weight: half precision, and groups of a multiple of 16 columns."""
    return dtype != "fp32" and (group is None or group >= k or group % WORDS == 0) and k % 8 == 0


def _fast() -> bool:
    """Inline assembly, which Triton's interpreter does not support."""
    return not triton.knobs.runtime.interpret


def block_of(n: int, k: int, *, tokens: int, gated: bool) -> tuple[int, ...]:
    """Warps of a block, runs that each holds in advance, tiles of rows, and the most registers of a thread if there is
    such a limit, for a product [n, k].

    These made whole decode steps of Qwen-7B in int4 fastest on an H200 (benchmarks/gpu_quantized.py).  More registers,
    for more tiles or runs, bring nothing: blocks that do not fit at once wait for the others to finish.
    """
    if gated:
        return 4, 1, 1
    if n > 32768:
        return (4, 2, 2) if tokens == 1 else (2, 4, 1)
    if k > 8192:
        return 8, 3, 1
    if n > 8192:
        # 84 registers: six blocks on a multiprocessor, and so all of Qwen-7B's query, key and value at once.
        return (4, 2, 1, 84) if tokens == 1 else (4, 2, 1)
    return 8, 4, 1


def gemv(
    *,
    n: int,
    k: int,
    tokens: int,
    dtype: ElementType,
    code: Code,
    group: int | None,
    x: Any,
    weight: Any,
    scale: Any,
    out: Any,
    offset: Any = None,
    bias: Any = None,
    residual: Any = None,
    gated: bool = False,
    prefetch: Sequence[tuple[Any, int]] = (),
    block: tuple[int, ...] | None = None,
) -> Launch:
    """out = residual + (x @ weight.T + bias), or with `gated` silu of its first half times its second half.

    Args:
        n, k, tokens: out is [tokens, n], x [tokens, k], tokens <= `MAX_TOKENS`; out may be residual.
        dtype: fp16 or bf16, of everything without another dtype here.
        code, group: of the weight; columns that share a scale, None for all.
        weight: int32, from `packing.pack`; [2 * n, k] of which each half is padded to whole tiles, if gated.
        scale: [tiles, groups, 16], from `packing.by_tile`; offset: likewise from `packing.offsets`, or None.
        bias: [n], or [2 * n] if gated.
        prefetch: up to two pieces of memory (and their bytes, multiples of 16) that later kernels will read: from
            compute capability 9.0 on they are brought into the L2 cache, while the memory would be idle between two
            products.
        block: overrides `block_of` (for measurements).
    """
    warps, depth, rows, *registers = block or block_of(n, k, tokens=tokens, gated=gated)
    rows = 2 if gated else rows
    group = min(group or k, k)
    run = 2 if group == k or group % (2 * WORDS * CODES[code]) == 0 else 1
    steps = triton.cdiv(triton.cdiv(units_of(k, code), run), warps)
    tiles = triton.cdiv(n, ROWS)
    blocks = tiles if gated else triton.cdiv(tiles, rows)
    pieces = prefetch if _fast() else ()
    (following, size), (later, later_size) = (*pieces, (None, 0), (None, 0))[:2]
    return Launch(
        kernel=coded_gemv_kernel,
        grid=(blocks, 1, 1),
        arguments={
            "x": x,
            "weight": weight,
            "scale": scale,
            "offset": offset,
            "bias": bias,
            "residual": residual,
            "out": out,
            "next_weight": following,
            "later_weight": later,
            "n": n,
            "tiles": tiles,
            "tokens": tokens,
            "next_bytes": size,
            "next_share": triton.cdiv(size, 16 * blocks) * 16,
            "later_bytes": later_size,
            "later_share": triton.cdiv(later_size, 16 * blocks) * 16,
        },
        constants={
            "K": k,
            "GROUP": group,
            "CODE": code,
            "WARPS": warps,
            "DEPTH": min(depth, steps),
            "TILES": rows,
            "RUN": run,
            "EIGHTS": 0 if tokens == 1 else triton.cdiv(tokens, 8),
            "GATED": gated,
            "QUADS": _QUADS,
            "FAST": _fast(),
            "OVERLAP": True,
        },
        pointers={
            **dict.fromkeys(("x", "scale", "offset", "bias", "residual", "out"), dtype),
            **dict.fromkeys(("weight", "next_weight", "later_weight"), "i32"),
        },
        warps=warps,
        # Triton would bring x through shared memory in stages, which takes ten times as long.
        stages=1,
        options={"launch_pdl": True, **({"maxnreg": registers[0]} if registers else {})},
    )


def dequantize(
    *,
    n: int,
    k: int,
    dtype: ElementType,
    code: Code,
    group: int | None,
    weight: Any,
    scale: Any,
    out: Any,
    offset: Any = None,
) -> Launch:
    """out [n, k] = the weight, as `refmodels.quantization.arithmetic.dequantize`; arguments as `gemv`."""
    units = units_of(k, code)
    block = 8
    return Launch(
        kernel=dequantize_kernel,
        grid=(triton.cdiv(n, ROWS), triton.cdiv(units, block), 1),
        arguments={"weight": weight, "scale": scale, "offset": offset, "out": out, "n": n},
        constants={
            "K": k,
            "GROUP": min(group or k, k),
            "CODE": code,
            "BLOCK": block,
            "FAST": _fast(),
            "OVERLAP": True,
        },
        pointers={**dict.fromkeys(("scale", "offset", "out"), dtype), "weight": "i32"},
        warps=4,
        options={"launch_pdl": True},
    )
