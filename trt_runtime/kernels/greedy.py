"""The most likely token of each row and whether all its logits are finite, in one pass over them."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trt_runtime.kernels.launch import ElementType, Launch


@triton.jit
def greedy_kernel(logits, chosen, rows, n, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    start = logits + row.to(tl.int64) * n
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_at = column
    bad = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n, BLOCK):
        at = first + column
        value = tl.load(start + at, mask=at < n, other=float("-inf")).to(tl.float32)
        # False for NaN as well.
        finite = tl.abs(value) < float("inf")
        bad |= ((at < n) & ~finite).to(tl.int32)
        best_at = tl.where(value > best, at, best_at)
        best = tl.maximum(best, value)
    highest = tl.max(best, 0)
    # Of equals the first, as torch.argmax.
    token = tl.min(tl.where(best == highest, best_at, n), 0)
    tl.store(chosen + row, token.to(tl.int64))
    tl.store(chosen + rows + row, 1 - tl.max(bad, 0).to(tl.int64))


def greedy(*, rows: int, n: int, dtype: ElementType, logits: Any, chosen: Any) -> Launch:
    """chosen [2, rows] int64: of each row of logits [rows, n] the index of the largest, and 1 if all are finite."""
    return Launch(
        kernel=greedy_kernel,
        grid=(rows, 1, 1),
        arguments={"logits": logits, "chosen": chosen, "rows": rows, "n": n},
        constants={"BLOCK": 8192, "OVERLAP": True},
        pointers={"logits": dtype, "chosen": "i64"},
        warps=32,
        options={"launch_pdl": True},
    )
