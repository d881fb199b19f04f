# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
"""Triton kernels of `cached_attention`, arithmetic "exact"; `attention.py` says which of them serve a shape, and how.

The mathematics is `refmodels.ops.cached_attention`.  Softmax runs in base 2: log2(e) and `scale` are factors of the
query.  Cached slots below `cache_lengths` must be finite; what lies beyond, in unwritten slots, is never used.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rotated(source, offset, cos, sin, table_offset, column, inside, ROTARY: tl.constexpr, PAIRS: tl.constexpr):
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
                # The compiler does not see through the selection that eight neighbours stay neighbours.
                partner = tl.max_contiguous(tl.multiple_of(partner, [1, 8]), [1, 8])
                angle = tl.max_contiguous(tl.multiple_of(angle, [1, 8]), [1, 8])
        turned = inside & (column < ROTARY)
        y = tl.load(source + offset + partner, mask=turned, other=0.0).to(tl.float32)
        c = tl.load(cos + table_offset + angle, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + table_offset + angle, mask=turned, other=0.0).to(tl.float32)
        x = x * c + tl.where(first, -y, y) * s
    return x


@triton.jit
def _load_cache(cache, offset, row, column, inside, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a cache as operands of a product; rows outside are 0, whatever memory holds.

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
def _finite(maximum):
    """A maximum that can be subtracted: -inf (nothing seen yet) becomes 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _split_range(length, window, splits, BLOCK_N: tl.constexpr):
    """First tile's slot, number of tiles and of splits that have work, for a query at slot `length`."""
    begin = tl.maximum(length - window + 1, 0) // BLOCK_N * BLOCK_N
    tiles = tl.cdiv(length - begin, BLOCK_N)
    return begin, tiles, tl.minimum(splits, tl.maximum(tiles, 1))


@triton.jit
def _combine_head(partial, partial_log, context, active, column, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr):
    """One head's context from its splits: partial [active, HEAD_DIM], weighted by 2 ** partial_log [active]."""
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, column.shape[0]], tl.float32)
    for start in range(0, active, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        inside = split < active
        # Written by other blocks of this launch, or the launch before: not through this multiprocessor's L1.
        log = tl.load(partial_log + split, mask=inside, other=float("-inf"), cache_modifier=".cg")
        x = tl.load(
            partial + split[:, None] * HEAD_DIM + column[None, :],
            mask=inside[:, None] & (column < HEAD_DIM)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        larger = tl.maximum(maximum, tl.max(log, 0, keep_dims=True))
        weight = tl.exp2(log - _finite(larger))
        old = tl.exp2(maximum - _finite(larger))
        total = total * old + tl.sum(weight, 0, keep_dims=True)
        acc = acc * old[:, None] + tl.sum(weight[:, None] * x, 0, keep_dims=True)
        maximum = larger
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(context + column[None, :], out.to(context.dtype.element_ty), mask=(column < HEAD_DIM)[None, :])


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
):
    """One token a row: rotation, cache write, and attention of ROWS heads that share a kv head to a part of the slots.

    Grid: splits, kv_heads * row blocks, batch.  The slots below the row's live length are dealt out evenly, so that a
    padded `slots` costs nothing but blocks that end at once.  The new token itself comes from qkv, never from the
    caches, so no block waits for the one that writes it.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BLOCKS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    split = tl.program_id(0)
    kv_head = tl.program_id(1) // BLOCKS
    member = tl.program_id(1) % BLOCKS * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(2)
    length = tl.load(cache_lengths + batch).to(tl.int32)
    begin, tiles, active = _split_range(length, window, splits, BLOCK_N)
    if split >= active:
        return

    column = tl.arange(0, BLOCK_D)
    real = column < HEAD_DIM
    token = qkv + batch.to(tl.int64) * WIDTH
    cos_row = cos + batch * (ROTARY // 2)
    sin_row = sin + batch * (ROTARY // 2)
    head = kv_head * GROUP + member
    present = (member < GROUP)[:, None] & real[None, :]
    none = tl.zeros([ROWS, 1], tl.int32)
    query = _load_rotated(
        token, head[:, None] * HEAD_DIM, cos_row, sin_row, none, column[None, :], present, ROTARY, PAIRS
    )
    factor = scale * LOG2E
    if HAS_QUERY_SCALE:
        factor *= tl.load(query_scale + batch).to(tl.float32)
    query *= factor
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + head, mask=member < GROUP, other=0.0).to(tl.float32) * LOG2E

    at = (batch.to(tl.int64) * KV_HEADS + kv_head) * capacity * HEAD_DIM
    row = visible + batch.to(tl.int64) * slots
    new_score = tl.full([ROWS], float("-inf"), tl.float32)
    new_value = tl.zeros([1, BLOCK_D], tl.float32)
    if split == 0:
        key = _load_rotated(
            token + (HEADS + kv_head) * HEAD_DIM,
            tl.zeros([1, 1], tl.int32),
            cos_row,
            sin_row,
            tl.zeros([1, 1], tl.int32),
            column[None, :],
            real[None, :],
            ROTARY,
            PAIRS,
        ).to(key_cache.dtype.element_ty)
        value = tl.load(
            token + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + column[None, :], mask=real[None, :], other=0.0
        )
        if tl.program_id(1) % BLOCKS == 0:
            new = at + length.to(tl.int64) * HEAD_DIM
            tl.store(key_cache + new + column[None, :], key, mask=real[None, :])
            tl.store(value_cache + new + column[None, :], value, mask=real[None, :])
        if tl.load(row + length):
            new_score = tl.sum(query * key.to(tl.float32), 1)
        new_value = value.to(tl.float32)

    first = begin + (tiles * split // active) * BLOCK_N
    last = tl.minimum(begin + (tiles * (split + 1) // active) * BLOCK_N, length)
    step = tl.arange(0, BLOCK_N)
    if ROWS == 1:
        # Products element by element.  Every row of a tile keeps its own running maximum and sums, so that the loop has
        # no exchange between rows; they meet once, at the end.
        maximum = tl.full([BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
            slot = start + step
            inside = slot < last
            seen = tl.load(row + slot, mask=inside & (slot > length - window), other=0) != 0
            offset = at + start * HEAD_DIM
            k = _load_cache(key_cache, offset, step, column, inside, HEAD_DIM, True)
            v = _load_cache(value_cache, offset, step, column, inside, HEAD_DIM, True)
            score = tl.sum(query * k.to(tl.float32), 1)
            if HAS_ALIBI:
                score += slope * (slot - length).to(tl.float32)
            score = tl.where(seen, score, float("-inf"))
            larger = tl.maximum(maximum, score)
            weight = tl.exp2(score - _finite(larger))
            old = tl.exp2(maximum - _finite(larger))
            total = total * old + weight
            acc = acc * old[:, None] + weight[:, None] * v.to(tl.float32)
            maximum = larger
        tops = maximum
        maximum = tl.max(tops, 0, keep_dims=True)
        weight = tl.exp2(tops - _finite(maximum))
        total = tl.sum(total * weight, 0, keep_dims=True)
        acc = tl.sum(acc * weight[:, None], 0, keep_dims=True)
    else:
        operand = query.to(key_cache.dtype.element_ty)
        maximum = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
            slot = start + step
            inside = slot < last
            seen = tl.load(row + slot, mask=inside & (slot > length - window), other=0) != 0
            offset = at + start * HEAD_DIM
            k = _load_cache(key_cache, offset, step, column, inside, HEAD_DIM, True)
            v = _load_cache(value_cache, offset, step, column, inside, HEAD_DIM, True)
            score = tl.dot(operand, tl.trans(k), input_precision="ieee")
            if HAS_ALIBI:
                score += slope[:, None] * (slot - length).to(tl.float32)[None, :]
            score = tl.where(seen[None, :], score, float("-inf"))
            larger = tl.maximum(maximum, tl.max(score, 1))
            weight = tl.exp2(score - _finite(larger)[:, None])
            old = tl.exp2(maximum - _finite(larger))
            total = total * old + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
            maximum = larger

    larger = tl.maximum(maximum, new_score)
    weight = tl.exp2(new_score - _finite(larger))
    old = tl.exp2(maximum - _finite(larger))
    total = total * old + weight
    acc = acc * old[:, None] + weight[:, None] * new_value
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    where = (batch * HEADS + head).to(tl.int64)
    if active == 1:
        tl.store(context + where[:, None] * HEAD_DIM + column[None, :], out.to(context.dtype.element_ty), mask=present)
    else:
        partial = workspace.to(tl.pointer_type(tl.float32))
        partial_log = partial + tl.num_programs(2).to(tl.int64) * HEADS * splits * HEAD_DIM
        tl.store(partial + (where[:, None] * splits + split) * HEAD_DIM + column[None, :], out, mask=present)
        log = tl.where(total > 0, larger + tl.log2(total), float("-inf"))
        tl.store(partial_log + where * splits + split, log, mask=member < GROUP)
        if LAST_COMBINES:
            # Every thread's partial results must be written before the one atomic that announces them.
            tl.debug_barrier()
            counter = counters + batch * tl.num_programs(1) + tl.program_id(1)
            arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if arrived == active - 1:
                tl.store(counter, 0)
                for r in range(
                    tl.program_id(1) % BLOCKS * ROWS, tl.minimum(GROUP, tl.program_id(1) % BLOCKS * ROWS + ROWS)
                ):
                    at_head = (batch * HEADS + kv_head * GROUP + r).to(tl.int64)
                    _combine_head(
                        partial + at_head * splits * HEAD_DIM,
                        partial_log + at_head * splits,
                        context + at_head * HEAD_DIM,
                        active,
                        column,
                        HEAD_DIM,
                        32,
                    )


@triton.jit(do_not_specialize=["window", "splits"])
def combine(
    cache_lengths,
    context,
    workspace,
    window,
    splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Contexts from the splits that `decode` left in the workspace.  Grid: heads, batch."""
    head = tl.program_id(0)
    batch = tl.program_id(1)
    length = tl.load(cache_lengths + batch).to(tl.int32)
    _, _, active = _split_range(length, window, splits, BLOCK_N)
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
        tl.arange(0, BLOCK_D),
        HEAD_DIM,
        32,
    )


@triton.jit(do_not_specialize=["tokens", "slots", "capacity"])
def write(
    qkv,
    key_cache,
    value_cache,
    cache_lengths,
    visible,
    cos,
    sin,
    workspace,
    tokens,
    slots,
    capacity,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Rotated keys and values of all tokens into the caches, and what `prefill` must know of each row's `visible`.

    Grid: 1 + token blocks * kv_heads, batch.  The first block of a row leaves in workspace, int32 [batch, 2], the first
    visible slot and the first beyond the last visible; their difference is negated if there are hidden slots between.
    """
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    batch = tl.program_id(1)
    length = tl.load(cache_lengths + batch).to(tl.int32)
    if tl.program_id(0) == 0:
        SCAN: tl.constexpr = 2048
        live = tl.minimum(length + tokens, slots)
        row = visible + batch.to(tl.int64) * slots
        low = tl.full([SCAN], 2147483647, tl.int32)
        high = tl.zeros([SCAN], tl.int32)
        count = tl.zeros([SCAN], tl.int32)
        for start in range(0, live, SCAN):
            slot = start + tl.arange(0, SCAN)
            seen = tl.load(row + slot, mask=slot < live, other=0) != 0
            low = tl.where(seen, tl.minimum(low, slot), low)
            high = tl.where(seen, slot + 1, high)
            count += seen.to(tl.int32)
        first = tl.min(low, 0)
        end = tl.max(high, 0)
        whole = tl.sum(count, 0) == end - first
        spans = workspace.to(tl.pointer_type(tl.int32)) + batch * 3
        tl.store(spans, tl.minimum(first, end))
        tl.store(spans + 1, end)
        tl.store(spans + 2, whole.to(tl.int32))
    else:
        kv_head = (tl.program_id(0) - 1) % KV_HEADS
        start = (tl.program_id(0) - 1) // KV_HEADS * BLOCK_T
        column = tl.arange(0, BLOCK_D)
        step = tl.arange(0, BLOCK_T)
        inside = (start + step < tokens)[:, None] & (column < HEAD_DIM)[None, :]
        first_token = batch.to(tl.int64) * tokens + start
        source = qkv + first_token * WIDTH + (HEADS + kv_head) * HEAD_DIM
        key = _load_rotated(
            source,
            (step * WIDTH)[:, None],
            cos + first_token * (ROTARY // 2),
            sin + first_token * (ROTARY // 2),
            (step * (ROTARY // 2))[:, None],
            column[None, :],
            inside,
            ROTARY,
            PAIRS,
        )
        value = tl.load(source + KV_HEADS * HEAD_DIM + (step * WIDTH)[:, None] + column[None, :], mask=inside)
        at = ((batch.to(tl.int64) * KV_HEADS + kv_head) * capacity + length + start) * HEAD_DIM
        to = at + step[:, None] * HEAD_DIM + column[None, :]
        tl.store(key_cache + to, key.to(key_cache.dtype.element_ty), mask=inside)
        tl.store(value_cache + to, value, mask=inside)


@triton.jit(do_not_specialize=["tokens", "slots", "capacity", "window", "heads_at_once"])
def prefill(
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
    scale,
    tokens,
    slots,
    capacity,
    window,
    heads_at_once,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_QUERY_SCALE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    STAGES: tl.constexpr,
    STAGED: tl.constexpr,
):
    """BLOCK_M queries of one head over the caches that `write` has filled (flash attention, arXiv:2307.08691).

    Grid: query blocks * heads, batch.  Blocks with many keys come first, `heads_at_once` heads side by side, so that
    their keys and values stay in L2.
    """
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    blocks = tl.cdiv(tokens, BLOCK_M)
    program = tl.program_id(0)
    turn = program // (blocks * heads_at_once)
    rest = program % (blocks * heads_at_once)
    head = turn * heads_at_once + rest % heads_at_once
    start_m = (blocks - 1 - rest // heads_at_once) * BLOCK_M
    batch = tl.program_id(1)

    length = tl.load(cache_lengths + batch).to(tl.int32)
    spans = workspace.to(tl.pointer_type(tl.int32)) + batch * 3
    span_begin = tl.load(spans)
    span_end = tl.load(spans + 1)
    whole = tl.load(spans + 2)

    column = tl.arange(0, BLOCK_D)
    step_m = tl.arange(0, BLOCK_M)
    step_n = tl.arange(0, BLOCK_N)
    exists = start_m + step_m < tokens
    inside = exists[:, None] & (column < HEAD_DIM)[None, :]
    first_token = batch.to(tl.int64) * tokens + start_m
    query = _load_rotated(
        qkv + first_token * WIDTH + head * HEAD_DIM,
        (step_m * WIDTH)[:, None],
        cos + first_token * (ROTARY // 2),
        sin + first_token * (ROTARY // 2),
        (step_m * (ROTARY // 2))[:, None],
        column[None, :],
        inside,
        ROTARY,
        PAIRS,
    )
    if HAS_QUERY_SCALE:
        logn = tl.load(query_scale + first_token + step_m, mask=exists, other=0.0).to(tl.float32)
        query *= (logn * (scale * LOG2E))[:, None]
    else:
        query *= scale * LOG2E
    operand = query.to(key_cache.dtype.element_ty)
    to = first_token * (HEADS * HEAD_DIM) + head * HEAD_DIM
    to_tile = context + to + (step_m * (HEADS * HEAD_DIM))[:, None] + column[None, :]
    if STAGED:
        tl.store(to_tile, operand, mask=inside)
        tl.debug_barrier()
        operand = tl.load(to_tile, mask=inside, other=0.0)
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + head).to(tl.float32) * LOG2E

    first_slot = length + start_m
    last_slot = length + tl.minimum(start_m + BLOCK_M, tokens) - 1
    own = first_slot + step_m
    live = length + tokens
    # Every query of the block sees all of [full_begin, full_end); [begin, end) has all that any query sees.
    begin = tl.maximum(span_begin, first_slot - window + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(span_end, last_slot + 1)
    full_begin = tl.cdiv(tl.maximum(span_begin, last_slot - window + 1), BLOCK_N) * BLOCK_N
    full_end = tl.where(whole != 0, tl.minimum(span_end, first_slot + 1), 0) // BLOCK_N * BLOCK_N
    full_end = tl.maximum(full_begin, full_end)
    skipped = full_end - full_begin
    if skipped == 0:
        full_begin = end
        full_end = end

    at = (batch.to(tl.int64) * KV_HEADS + head // (HEADS // KV_HEADS)) * capacity * HEAD_DIM
    row = visible + batch.to(tl.int64) * slots
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(full_begin, full_end, BLOCK_N, num_stages=STAGES):
        offset = at + start * HEAD_DIM
        k = _load_cache(key_cache, offset, step_n, column, exists, HEAD_DIM, False)
        score = tl.dot(operand, tl.trans(k), input_precision="ieee")
        if HAS_ALIBI:
            score += slope * ((start + step_n)[None, :] - own[:, None]).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(score, 1))
        weight = tl.exp2(score - larger[:, None])
        old = tl.exp2(maximum - larger)
        total = total * old + tl.sum(weight, 1)
        v = _load_cache(value_cache, offset, step_n, column, exists, HEAD_DIM, False)
        acc = tl.dot(weight.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
        maximum = larger
    for index in tl.range(begin, end - skipped, BLOCK_N, num_stages=STAGES):
        start = tl.where(index < full_begin, index, index + skipped)
        slot = start + step_n
        offset = at + start * HEAD_DIM
        k = _load_cache(key_cache, offset, step_n, column, slot < live, HEAD_DIM, True)
        score = tl.dot(operand, tl.trans(k), input_precision="ieee")
        if HAS_ALIBI:
            score += slope * (slot[None, :] - own[:, None]).to(tl.float32)
        seen = tl.load(row + slot, mask=slot < end, other=0) != 0
        distance = own[:, None] - slot[None, :]
        score = tl.where(seen[None, :] & (distance >= 0) & (distance < window), score, float("-inf"))
        larger = tl.maximum(maximum, tl.max(score, 1))
        weight = tl.exp2(score - _finite(larger)[:, None])
        old = tl.exp2(maximum - _finite(larger))
        total = total * old + tl.sum(weight, 1)
        v = _load_cache(value_cache, offset, step_n, column, slot < live, HEAD_DIM, True)
        acc = tl.dot(weight.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
        maximum = larger
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(to_tile, out.to(context.dtype.element_ty), mask=inside)
