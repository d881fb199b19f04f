# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
"""Common functions of the decode and prefill kernels of `cached_attention`: loads of projections and of caches.

The mathematics is `refmodels.ops.cached_attention`, arithmetic "exact".  Softmax runs in base 2: log2(e) and `scale`
are factors of the query.  Cached slots below `cache_lengths` must be finite; the slots beyond are never used.

OVERLAP in the kernels is programmatic dependent launch: a kernel's blocks may start when those of the kernel before
have all passed their `gdc_launch_dependents`, and what that kernel writes is there after `gdc_wait`.  All kernels here
wait before they let others start, so nothing but its neighbours runs at the same time as a kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rotated(source, offset, cos, sin, table_offset, column, inside, ROTARY: tl.constexpr, PAIRS: tl.constexpr):
    """source[offset + column] in fp32, its first ROTARY columns rotated.

    offset, table_offset: [rows, 1]; column: [1, columns]; inside: [rows, columns].  A rotated element is
    x[d] * cos +- x[partner of d] * sin: one formula for both layouts, at the price of reading x twice.
    """
    x = tl.load(source + offset + column, mask=inside, other=0.0).to(tl.float32)
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        if PAIRS:
            first = column % 2 == 0
            partner = column ^ 1
            angle = column // 2
        else:
            first = column < HALF
            partner = tl.where(first, column + HALF, column - HALF)
            angle = tl.where(first, column, column - HALF)
            if HALF % 8 == 0:
                # The compiler cannot tell that eight neighbours stay neighbours under the selection.
                partner = tl.max_contiguous(tl.multiple_of(partner, [1, 8]), [1, 8])
                angle = tl.max_contiguous(tl.multiple_of(angle, [1, 8]), [1, 8])
        turned = inside & (column < ROTARY)
        y = tl.load(source + offset + partner, mask=turned, other=0.0).to(tl.float32)
        c = tl.load(cos + table_offset + angle, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + table_offset + angle, mask=turned, other=0.0).to(tl.float32)
        x = x * c + tl.where(first, -y, y) * s
    return x


@triton.jit
def load_cache(cache, offset, row, column, inside, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a cache as operands of a product; rows outside are 0, whatever the memory holds.

    The one place that knows how a cache is stored.
    """
    at = cache + offset + (row[:, None] * HEAD_DIM + column[None, :])
    if MASKED:
        return tl.load(at, mask=inside[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    elif column.shape[0] != HEAD_DIM:
        return tl.load(at, mask=(column < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def finite(maximum):
    """A maximum that can be subtracted: -inf (nothing seen yet) becomes 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)
