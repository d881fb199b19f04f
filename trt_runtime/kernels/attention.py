"""The attention kernels that serve a `cached_attention`, their block sizes and grids.

Decode (one token) is one kernel with rotation and cache write inside; if rows and heads are too few to fill the GPU,
the slots are split and a second kernel (or, where blocks have one head, the last block) combines them.  Prefill is
two: write keys and values, then flash attention over the caches.  `attention_tiles.py` lists the common assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from trt_runtime.kernels import attention_decode, attention_prefill
from trt_runtime.kernels.launch import KERNEL_INPUTS, AttentionShape, Launch

MULTIPROCESSORS = 132
"""The H200's, on which the tables below were measured; on other GPUs it affects the speed, not the result."""

NO_WINDOW = 2**30
L2_BYTES = 32 * 2**20
"""Keys and values of the heads that prefill works on at once should fit in this."""


@dataclass(frozen=True, kw_only=True)
class DecodeBlocks:
    """`rows` heads of one kv head per block (1: elementwise products, else matrix products), `slots` per tile.

    `resident` blocks fit on a multiprocessor at once.  `last_combines`: splits are combined by the block that comes
    last instead of by a second kernel; only where a block has one head.
    """

    rows: int
    slots: int
    warps: int
    stages: int
    resident: int
    last_combines: bool = False


@dataclass(frozen=True, kw_only=True)
class PrefillBlocks:
    """`queries` per block, `slots` per tile.  `staged`: rotated queries go through memory, for wgmma to load."""

    queries: int
    slots: int
    warps: int
    stages: int
    staged: bool = False


def decode_blocks(shape: AttentionShape, capability: int) -> DecodeBlocks:
    """The one table of decode block sizes (shared memory in KiB: capability 80 has 163, 90 227, 86, 89 and 120 99)."""
    group = shape.heads // shape.kv_heads
    wide = max(1, _block_d(shape) // 128)
    if shape.dtype == "fp32":
        return DecodeBlocks(rows=1, slots=32 // wide, warps=4, stages=1, resident=3, last_combines=True)
    rows = min(64, max(16, _power_of_2(group)))
    few = shape.batch * shape.kv_heads * _cdiv(group, rows) <= MULTIPROCESSORS
    if capability == 90 and few and rows == 16:
        return DecodeBlocks(rows=16, slots=128 // wide, warps=4, stages=3, resident=1, last_combines=group == 1)
    return DecodeBlocks(rows=rows, slots=64 // wide, warps=4, stages=2, resident=4, last_combines=group == 1)


def prefill_blocks(shape: AttentionShape, capability: int) -> PrefillBlocks:
    """The one table of prefill block sizes; shared memory as for decode."""
    block_d = _block_d(shape)
    if shape.dtype == "fp32":
        return PrefillBlocks(queries=32 if block_d <= 64 else 16, slots=32, warps=4 if block_d <= 64 else 8, stages=1)
    if capability == 90 and block_d <= 128:
        if shape.tokens >= 4096:
            return PrefillBlocks(queries=128, slots=64, warps=8, stages=3, staged=True)
        return PrefillBlocks(queries=64, slots=64, warps=4, stages=3, staged=True)
    if capability == 90:
        return PrefillBlocks(queries=128, slots=64, warps=8, stages=2, staged=True)
    if block_d <= 128:
        return PrefillBlocks(
            queries=128 if shape.tokens > 64 else 64, slots=64 if block_d <= 64 else 32, warps=4, stages=2
        )
    return PrefillBlocks(queries=64, slots=32, warps=4, stages=2)


def launches(
    shape: AttentionShape,
    *,
    context: Any,
    workspace: Any,
    counters: Any,
    capability: int = 90,
    decode: DecodeBlocks | None = None,
    prefill: PrefillBlocks | None = None,
    splits: int | None = None,
    **inputs: Any,
) -> list[Launch]:
    """The launches that do `refmodels.ops.cached_attention`, arithmetic "exact", in order.

    Args:
        context: [batch, tokens, heads * head_dim], written.
        workspace: `workspace_bytes(shape)` bytes, aligned to 16, with any contents.
        counters: int32 [`counter_count(shape)`], zero before the first launch ever; every launch leaves zeros.
        capability: of the device, 90 for 9.0: decides block sizes, and whether launches may overlap.
        decode, prefill, splits: override those of the tables (for measurements).
        inputs: the op's tensors, or their addresses, by their names in `KERNEL_INPUTS`; those that `shape` says are
            absent may be None.
    """
    # A kernel loads nothing of an input that is absent, but wants an address.
    tensors = {row.name: inputs[row.name if shape.gives(row) else "qkv"] for row in KERNEL_INPUTS}
    tensors |= {"context": context, "workspace": workspace, "counters": counters}
    elements = {"int64": "i64", "bool": "i1", "table": shape.table_dtype, "fp32": "fp32"}
    types: dict[str, str] = {
        **{
            row.name: elements.get(row.dtype, shape.dtype) if shape.gives(row) else shape.dtype for row in KERNEL_INPUTS
        },
        "context": shape.dtype,
        "workspace": "fp32",
        "counters": "i32",
    }
    sizes = {
        "scale": float(shape.scale),
        "tokens": shape.tokens,
        "slots": shape.slots,
        "capacity": shape.capacity,
        "window": shape.window or NO_WINDOW,
    }
    constants = {
        "HEADS": shape.heads,
        "KV_HEADS": shape.kv_heads,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_D": _block_d(shape),
        "ROTARY": shape.rotary_dim,
        "PAIRS": shape.rotary_interleaved,
        "HAS_QUERY_SCALE": shape.has_query_scale,
        "HAS_ALIBI": shape.has_alibi,
        "OVERLAP": capability >= 90,
    }

    def launch(kernel: Any, grid: tuple[int, int, int], warps: int, **more: Any) -> Launch:
        given = {**tensors, **sizes, **constants, **more}
        names = kernel.arg_names
        return Launch(
            kernel=kernel,
            grid=grid,
            arguments={name: given[name] for name in names if not name.isupper()},
            constants={name: given[name] for name in names if name.isupper()},
            pointers={name: types[name] for name in names if name in types},
            warps=warps,
            stages=3,
            options={"launch_pdl": True} if capability >= 90 else {},
        )

    if shape.tokens == 1:
        blocks = decode or decode_blocks(shape, capability)
        splits = splits or _splits(shape, blocks)
        row_blocks = _cdiv(shape.heads // shape.kv_heads, blocks.rows)
        first = launch(
            attention_decode.decode,
            (splits, shape.kv_heads * row_blocks, shape.batch),
            blocks.warps,
            splits=splits,
            ROWS=blocks.rows,
            BLOCK_N=blocks.slots,
            LAST_COMBINES=blocks.last_combines,
            STAGES=blocks.stages,
        )
        if splits == 1 or blocks.last_combines:
            return [first]
        columns = min(32, _block_d(shape))
        grid = (shape.heads, shape.batch, _cdiv(shape.head_dim, columns))
        second = launch(
            attention_decode.combine, grid, 4, splits=splits, tile=blocks.slots, BLOCK_C=columns, BLOCK_S=128
        )
        return [first, second]

    tiles = prefill or prefill_blocks(shape, capability)
    block_t = max(1, 4096 // _block_d(shape))
    write_grid = (1 + _cdiv(shape.tokens, block_t) * shape.kv_heads, shape.batch, 1)
    return [
        launch(attention_prefill.write, write_grid, 4, BLOCK_T=block_t),
        launch(
            attention_prefill.prefill,
            (_cdiv(shape.tokens, tiles.queries) * shape.heads, shape.batch, 1),
            tiles.warps,
            heads_at_once=_heads_at_once(shape),
            BLOCK_M=tiles.queries,
            BLOCK_N=tiles.slots,
            STAGES=tiles.stages,
            STAGED=tiles.staged,
        ),
    ]


def workspace_bytes(shape: AttentionShape) -> int:
    """Bytes of workspace for this shape and every smaller batch, number of tokens and of slots."""
    # Splits fill at most the resident blocks, and a block has a partial result for each of its heads.
    group = shape.heads // shape.kv_heads
    partial = (4 * MULTIPROCESSORS + shape.batch * shape.kv_heads) * group * (shape.head_dim + 1) * 4
    return max(partial, shape.batch * 3 * 4)


def counter_count(shape: AttentionShape) -> int:
    """Number of int32 counters for this shape and every smaller batch."""
    return shape.batch * shape.heads


def variants(limits: AttentionShape, *, capability: int = 90) -> list[Launch]:
    """One launch (addresses 0) of every distinct kernel, constants and warps that shapes within `limits` can need."""
    shapes = [
        replace(limits, batch=batch, tokens=tokens)
        for batch in sorted({min(limits.batch, 2**i) for i in range(17)})
        for tokens in sorted({1, min(2, limits.tokens), limits.tokens})
    ]
    found: dict[object, Launch] = {}
    for shape in shapes:
        addresses: dict[str, Any] = dict.fromkeys(
            (*(row.name for row in KERNEL_INPUTS), "context", "workspace", "counters"), 0
        )
        for launch in launches(shape, **addresses, capability=capability):
            found[(launch.kernel, tuple(launch.constants.items()), launch.warps)] = launch
    return list(found.values())


def _splits(shape: AttentionShape, blocks: DecodeBlocks) -> int:
    """The largest number at which all blocks are resident; with few rows and heads, one block per multiprocessor."""
    busy = shape.batch * shape.kv_heads * _cdiv(shape.heads // shape.kv_heads, blocks.rows)
    wanted = MULTIPROCESSORS * (blocks.resident if busy > MULTIPROCESSORS else 1)
    # Tiles that a split must have: where the last block combines at once and there is room, one is enough.
    tiles = 1 if blocks.last_combines and busy <= MULTIPROCESSORS else 2
    return max(1, min(wanted // busy, _cdiv(shape.slots, tiles * blocks.slots)))


def _heads_at_once(shape: AttentionShape) -> int:
    """A divisor of `heads`, not above 8 (by measurement): as many as have their keys and values in L2 together."""
    element = 4 if shape.dtype == "fp32" else 2
    room = L2_BYTES // (2 * shape.slots * shape.head_dim * element) * (shape.heads // shape.kv_heads)
    return max(d for d in range(1, 9) if shape.heads % d == 0 and d <= max(1, room))


def _block_d(shape: AttentionShape) -> int:
    return max(16, _power_of_2(shape.head_dim))


def _power_of_2(n: int) -> int:
    return 1 << math.ceil(math.log2(n))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
