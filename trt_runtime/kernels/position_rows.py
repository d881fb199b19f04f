"""The rows of a decoder's position tables that the new tokens need, in one kernel: `Decoder.positions`."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trt_runtime.kernels.launch import ElementType, Launch


@triton.jit(do_not_specialize=["positions"])
def position_rows_kernel(
    position_ids,
    ntk_table,
    cos_table,
    sin_table,
    logn,
    cos,
    sin,
    query_scale,
    positions,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0)
    position = tl.load(position_ids + token)
    if cos_table is not None:
        table = position
        if ntk_table is not None:
            table += tl.load(ntk_table + token) * positions
        column = tl.arange(0, BLOCK)
        inside = column < HALF
        c = tl.load(cos_table + table * HALF + column, mask=inside)
        s = tl.load(sin_table + table * HALF + column, mask=inside)
        tl.store(cos + token * HALF + column, c, mask=inside)
        tl.store(sin + token * HALF + column, s, mask=inside)
    if logn is not None:
        tl.store(query_scale + token, tl.load(logn + position))


def position_rows(
    *,
    tokens: int,
    half: int,
    positions: int,
    dtype: ElementType,
    position_ids: Any,
    ntk_table: Any,
    cos_table: Any,
    sin_table: Any,
    logn: Any,
    cos: Any,
    sin: Any,
    query_scale: Any,
) -> Launch:
    """cos, sin [tokens, half] and query_scale [tokens] from their tables, of which each may be None.

    Args:
        position_ids: int64 [tokens].
        ntk_table: int64 [tokens], which NTK table, or None; positions: rows of one of them.
    """
    return Launch(
        kernel=position_rows_kernel,
        grid=(tokens, 1, 1),
        arguments={
            "position_ids": position_ids,
            "ntk_table": ntk_table,
            "cos_table": cos_table,
            "sin_table": sin_table,
            "logn": logn,
            "cos": cos,
            "sin": sin,
            "query_scale": query_scale,
            "positions": positions,
        },
        constants={"HALF": half, "BLOCK": triton.next_power_of_2(max(1, half)), "OVERLAP": True},
        pointers=dict.fromkeys(("cos_table", "sin_table", "logn", "cos", "sin", "query_scale"), dtype)
        | {"position_ids": "i64", "ntk_table": "i64"},
        warps=1,
        options={"launch_pdl": True},
    )
