# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
"""Triton kernels of `cached_attention` for one token per row; `attention.py` chooses them for a shape."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trt_runtime.kernels.attention_tiles import LOG2E, finite, load_cache, load_rotated


@triton.jit
def _merge(maximum, total, acc, score, value):
    """Adds rows of value with weight 2 ** score to the sums of a running softmax, one score per row."""
    larger = tl.maximum(maximum, score)
    weight = tl.exp2(score - finite(larger))
    old = tl.exp2(maximum - finite(larger))
    return larger, total * old + weight, acc * old[:, None] + weight[:, None] * value


@triton.jit
def _split_range(length, window, splits, tile):
    """First tile's slot, number of tiles and of splits that have work, for a query at slot `length`."""
    begin = tl.maximum(length - window + 1, 0) // tile * tile
    tiles = tl.cdiv(length + 1 - begin, tile)
    return begin, tiles, tl.minimum(splits, tiles)


@triton.jit
def _combine_head(partial, partial_log, context, active, column, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr):
    """Columns of one head's context from its splits: partial [active, HEAD_DIM], weights 2 ** partial_log [active]."""
    inside = column < HEAD_DIM
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, column.shape[0]], tl.float32)
    for start in range(0, active, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        some = split < active
        # Written by other blocks of this launch, or the launch before: not through this multiprocessor's L1.
        log = tl.load(partial_log + split, mask=some, other=float("-inf"), cache_modifier=".cg")
        x = tl.load(
            partial + split[:, None] * HEAD_DIM + column[None, :],
            mask=some[:, None] & inside[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        larger = tl.maximum(maximum, tl.max(log, 0, keep_dims=True))
        weight = tl.exp2(log - finite(larger))
        old = tl.exp2(maximum - finite(larger))
        total = total * old + tl.sum(weight, 0, keep_dims=True)
        acc = acc * old[:, None] + tl.sum(weight[:, None] * x, 0, keep_dims=True)
        maximum = larger
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(context + column[None, :], out.to(context.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["slots", "capacity", "window", "splits"])
def decode(
    qkv,
    key_cache,
    value_cache,
    cache_lengths,
    visible,
    cos,
    sin,
    query_scale,
    alibi_slopes,
    context,
    workspace,
    counters,
    scale,
    slots,
    capacity,
    window,
    splits,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_QUERY_SCALE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    LAST_COMBINES: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token per row: rotation, cache write, and attention of ROWS heads of one kv head to a part of the slots.

    Grid: splits, kv_heads * row blocks, batch.  The slots below the row's live length are distributed evenly, so that a
    padded `slots` only adds blocks that end at once.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BLOCKS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    split = tl.program_id(0)
    kv_head = tl.program_id(1) // BLOCKS
    member = tl.program_id(1) % BLOCKS * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(2)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()

    # Before anything that needs the length, so that the latencies of these loads and of that one overlap.
    column = tl.arange(0, BLOCK_D)
    real = (column < HEAD_DIM)[None, :]
    token = qkv + batch.to(tl.int64) * WIDTH
    cos_row = cos + batch * (ROTARY // 2)
    sin_row = sin + batch * (ROTARY // 2)
    head = kv_head * GROUP + member
    present = (member < GROUP)[:, None] & real
    query = load_rotated(
        token,
        head[:, None] * HEAD_DIM,
        cos_row,
        sin_row,
        tl.zeros([ROWS, 1], tl.int32),
        column[None, :],
        present,
        ROTARY,
        PAIRS,
    )
    one = tl.zeros([1, 1], tl.int32)
    token_key = token + (HEADS + kv_head) * HEAD_DIM
    new_key = load_rotated(token_key, one, cos_row, sin_row, one, column[None, :], real, ROTARY, PAIRS)
    new_value = tl.load(token_key + KV_HEADS * HEAD_DIM + column[None, :], mask=real, other=0.0)
    factor = scale * LOG2E
    if HAS_QUERY_SCALE:
        factor *= tl.load(query_scale + batch).to(tl.float32)
    query *= factor
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + head, mask=member < GROUP, other=0.0).to(tl.float32) * LOG2E

    length = tl.load(cache_lengths + batch).to(tl.int32)
    begin, tiles, active = _split_range(length, window, splits, BLOCK_N)
    if split >= active:
        return
    first = begin + (tiles * split // active) * BLOCK_N
    last = tl.minimum(begin + (tiles * (split + 1) // active) * BLOCK_N, length + 1)
    at = (batch.to(tl.int64) * KV_HEADS + kv_head) * capacity * HEAD_DIM
    if split == active - 1:
        # Only this block reads the new slot.  (Or these, where row blocks share the kv head: they write the same bits.)
        new = at + length.to(tl.int64) * HEAD_DIM
        tl.store(key_cache + new + column[None, :], new_key.to(key_cache.dtype.element_ty), mask=real)
        tl.store(value_cache + new + column[None, :], new_value, mask=real)
        tl.debug_barrier()
    step = tl.arange(0, BLOCK_N)
    row = visible + batch.to(tl.int64) * slots
    # One tile ahead: nothing else hides the latency of this load.  Only the first tile can reach below the window.
    seen = tl.load(row + first + step, mask=(first + step < last) & (first + step > length - window), other=0) != 0
    if ROWS == 1:
        # Products element by element.  Every row of a tile keeps its own running maximum and sums, so that the loop has
        # no exchange between rows; they meet once, at the end.
        maximum = tl.full([BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
            slot = start + step
            offset = at + start * HEAD_DIM
            k = load_cache(key_cache, offset, step, column, slot < last, HEAD_DIM, True)
            v = load_cache(value_cache, offset, step, column, slot < last, HEAD_DIM, True)
            following = tl.load(row + slot + BLOCK_N, mask=slot + BLOCK_N < last, other=0) != 0
            score = tl.sum(query * k.to(tl.float32), 1)
            if HAS_ALIBI:
                score += slope * (slot - length).to(tl.float32)
            score = tl.where(seen, score, float("-inf"))
            maximum, total, acc = _merge(maximum, total, acc, score, v.to(tl.float32))
            seen = following
        tops = maximum
        maximum = tl.max(tops, 0, keep_dims=True)
        weight = tl.exp2(tops - finite(maximum))
        total = tl.sum(total * weight, 0, keep_dims=True)
        acc = tl.sum(acc * weight[:, None], 0, keep_dims=True)
    else:
        operand = query.to(key_cache.dtype.element_ty)
        maximum = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
            slot = start + step
            offset = at + start * HEAD_DIM
            k = load_cache(key_cache, offset, step, column, slot < last, HEAD_DIM, True)
            v = load_cache(value_cache, offset, step, column, slot < last, HEAD_DIM, True)
            following = tl.load(row + slot + BLOCK_N, mask=slot + BLOCK_N < last, other=0) != 0
            score = tl.dot(operand, tl.trans(k), input_precision="ieee")
            if HAS_ALIBI:
                score += slope[:, None] * (slot - length).to(tl.float32)[None, :]
            score = tl.where(seen[None, :], score, float("-inf"))
            larger = tl.maximum(maximum, tl.max(score, 1))
            weight = tl.exp2(score - finite(larger)[:, None])
            old = tl.exp2(maximum - finite(larger))
            total = total * old + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
            maximum = larger
            seen = following

    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    where = (batch * HEADS + head).to(tl.int64)
    if active == 1:
        to = context + where[:, None] * HEAD_DIM + column[None, :]
        tl.store(to, out.to(context.dtype.element_ty), mask=present)
    else:
        partial = workspace.to(tl.pointer_type(tl.float32))
        partial_log = partial + tl.num_programs(2).to(tl.int64) * HEADS * splits * HEAD_DIM
        tl.store(partial + (where[:, None] * splits + split) * HEAD_DIM + column[None, :], out, mask=present)
        log = tl.where(total > 0, maximum + tl.log2(total), float("-inf"))
        tl.store(partial_log + where * splits + split, log, mask=member < GROUP)
        if LAST_COMBINES:
            # Every thread's partial results must be written before the one atomic that announces them.
            tl.debug_barrier()
            counter = counters + batch * tl.num_programs(1) + tl.program_id(1)
            arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if arrived == active - 1:
                tl.store(counter, 0)
                at_head = (batch * HEADS + kv_head * GROUP + tl.program_id(1) % BLOCKS).to(tl.int64)
                _combine_head(
                    partial + at_head * splits * HEAD_DIM,
                    partial_log + at_head * splits,
                    context + at_head * HEAD_DIM,
                    active,
                    column,
                    HEAD_DIM,
                    32,
                )


@triton.jit(do_not_specialize=["window", "splits", "tile"])
def combine(
    cache_lengths,
    context,
    workspace,
    window,
    splits,
    tile,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Contexts from the splits that `decode`, with `tile` slots a tile, left in the workspace.

    Grid: heads, batch, column blocks.
    """
    head = tl.program_id(0)
    batch = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    length = tl.load(cache_lengths + batch).to(tl.int32)
    _, _, active = _split_range(length, window, splits, tile)
    if OVERLAP:
        # `decode` starts this kernel when the lengths are there, but not its results.
        gdc_wait()
        gdc_launch_dependents()
    if active == 1:
        return
    where = (batch * HEADS + head).to(tl.int64)
    partial = workspace.to(tl.pointer_type(tl.float32))
    partial_log = partial + tl.num_programs(1).to(tl.int64) * HEADS * splits * HEAD_DIM
    _combine_head(
        partial + where * splits * HEAD_DIM,
        partial_log + where * splits,
        context + where * HEAD_DIM,
        active,
        column,
        HEAD_DIM,
        BLOCK_S,
    )
