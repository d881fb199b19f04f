# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
"""Triton kernels of `cached_attention` for many tokens per row; `attention.py` chooses them for a shape."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trt_runtime.kernels.attention_tiles import LOG2E, finite, load_cache, load_rotated


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
    OVERLAP: tl.constexpr,
):
    """Writes rotated keys and values of all tokens into the caches, and the extent of each row's `visible`.

    Grid: 1 + token blocks * kv_heads, batch.  The first block of a row leaves in workspace, int32 [batch, 2], the first
    visible slot and the first beyond the last visible; their difference is negated if there are hidden slots between.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
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
        key = load_rotated(
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
    OVERLAP: tl.constexpr,
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

    column = tl.arange(0, BLOCK_D)
    step_m = tl.arange(0, BLOCK_M)
    step_n = tl.arange(0, BLOCK_N)
    exists = start_m + step_m < tokens
    inside = exists[:, None] & (column < HEAD_DIM)[None, :]
    first_token = batch.to(tl.int64) * tokens + start_m
    query = load_rotated(
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
        # wgmma takes a loaded operand from shared memory, a computed one from registers, which the loop then reloads.
        tl.store(to_tile, operand, mask=inside)
        tl.debug_barrier()
        operand = tl.load(to_tile, mask=inside, other=0.0)
    if OVERLAP:
        # `write` starts this kernel when all kernels before it have finished: qkv is complete, the caches are not.
        gdc_wait()
        gdc_launch_dependents()
    if HAS_ALIBI:
        slope = tl.load(alibi_slopes + head).to(tl.float32) * LOG2E

    length = tl.load(cache_lengths + batch).to(tl.int32)
    spans = workspace.to(tl.pointer_type(tl.int32)) + batch * 3
    span_begin = tl.load(spans)
    span_end = tl.load(spans + 1)
    whole = tl.load(spans + 2)

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
        k = load_cache(key_cache, offset, step_n, column, exists, HEAD_DIM, False)
        score = tl.dot(operand, tl.trans(k), input_precision="ieee")
        if HAS_ALIBI:
            score += slope * ((start + step_n)[None, :] - own[:, None]).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(score, 1))
        weight = tl.exp2(score - larger[:, None])
        old = tl.exp2(maximum - larger)
        total = total * old + tl.sum(weight, 1)
        v = load_cache(value_cache, offset, step_n, column, exists, HEAD_DIM, False)
        acc = tl.dot(weight.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
        maximum = larger
    for index in tl.range(begin, end - skipped, BLOCK_N, num_stages=STAGES):
        start = tl.where(index < full_begin, index, index + skipped)
        slot = start + step_n
        offset = at + start * HEAD_DIM
        k = load_cache(key_cache, offset, step_n, column, slot < live, HEAD_DIM, True)
        score = tl.dot(operand, tl.trans(k), input_precision="ieee")
        if HAS_ALIBI:
            score += slope * (slot[None, :] - own[:, None]).to(tl.float32)
        seen = tl.load(row + slot, mask=slot < end, other=0) != 0
        distance = own[:, None] - slot[None, :]
        score = tl.where(seen[None, :] & (distance >= 0) & (distance < window), score, float("-inf"))
        larger = tl.maximum(maximum, tl.max(score, 1))
        weight = tl.exp2(score - finite(larger)[:, None])
        old = tl.exp2(maximum - finite(larger))
        total = total * old + tl.sum(weight, 1)
        v = load_cache(value_cache, offset, step_n, column, slot < live, HEAD_DIM, True)
        acc = tl.dot(weight.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
        maximum = larger
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(to_tile, out.to(context.dtype.element_ty), mask=inside)
