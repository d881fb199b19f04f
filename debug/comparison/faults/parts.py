"""Names of sets of rows, columns and heads, and rounding to formats: the words of the fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from debug.comparison.modules import Module

_LISTED = 4
"""Up to this many scattered indices are listed; more are no simple fact."""


def real_rows(m: Module, tensor: Tensor) -> Tensor:
    """The real tokens, [tokens, width] fp64."""
    return tensor[m.forward.inputs.new_mask].double()


def output_name(m: Module, rows: Tensor) -> str | None:
    """Which outputs [out] bool of a linear layer, in words: "value", "query head 3", "rows 4 to 7"."""
    if m.part == "attn.qkv":
        a = m.decoder.spec.attention
        start = 0
        named = []
        for part, heads in zip(("query", "key", "value"), (a.heads, a.kv_heads, a.kv_heads), strict=True):
            own = rows[start : start + heads * a.head_dim].view(heads, -1)
            start += heads * a.head_dim
            if bool(own.all()):
                named.append(part)
            elif bool(own.any()):
                whole = own.all(1)
                if not torch.equal(whole, own.any(1)):
                    return index_name(rows, "row")
                described = index_name(whole, f"{part} head")
                if described is None:
                    return None
                named.append(described)
        return " and ".join(named)
    return index_name(rows, "row")


def input_name(m: Module, columns: Tensor) -> str | None:
    """Which inputs [in] bool of a linear layer, in words."""
    if m.part == "attn.out":
        own = columns.view(-1, m.decoder.spec.attention.head_dim)
        if torch.equal(own.all(1), own.any(1)):
            return index_name(own.all(1), "head")
    return index_name(columns, "input channel")


def index_name(chosen: Tensor, what: str) -> str | None:
    """Which of n things, in words; None: there is no simple way to say it."""
    found, total = chosen.nonzero().flatten().tolist(), len(chosen)
    if not found or len(found) == total:
        return None
    if len(found) == 1:
        return f"{what} {found[0]}"
    steps = {b - a for a, b in itertools.pairwise(found)}
    if steps == {1}:
        half = {0: "first", total // 2: "second"}.get(found[0])
        if 2 * len(found) == total and half is not None:
            return f"the {half} half of the {what}s"
        return f"{what}s {found[0]} to {found[-1]}"
    if len(steps) == 1 and len(found) > 2:
        return f"every {steps.pop()}th {what} from {found[0]} on"
    return f"{what}s {', '.join(map(str, found))}" if len(found) <= _LISTED else None


def order_name(order: Tensor) -> str | None:
    """A permutation of n things in words: where place i reads order[i]."""
    n = len(order)
    own = torch.arange(n)
    if torch.equal(order, own.flip(0)):
        return "in reverse order"
    shift = int(order[0])
    if shift and torch.equal(order, own.roll(-shift)):
        near = shift if shift <= n // 2 else shift - n
        return "halves exchanged" if 2 * shift == n else f"shifted by {near}"
    for size in (2, 4, 8):
        if n % size == 0 and torch.equal(order, own.view(-1, size).flip(1).flatten()):
            return "neighbours exchanged" if size == 2 else f"reversed within groups of {size}"
    for rows in range(2, n // 2 + 1):
        if n % rows == 0:
            if torch.equal(order, own.view(rows, -1).t().flatten()):
                return f"read as [{n // rows}, {rows}] instead of [{rows}, {n // rows}]"
            if torch.equal(order, own.view(rows, -1).flip(0).flatten()):
                return f"blocks of {n // rows} in reverse order"
    moved = (order != own).nonzero().flatten().tolist()
    if len(moved) == 2:
        return f"{moved[0]} and {moved[1]} exchanged"
    for size in range(n // 2, 1, -1):
        if n % size == 0:
            blocks = order.view(-1, size)
            if torch.equal(blocks, blocks[:, :1] + torch.arange(size)) and bool((blocks[:, 0] % size == 0).all()):
                if n // size <= 16:
                    return f"blocks of {size} in the order {(blocks[:, 0] // size).tolist()}"
                break
    return None


def rounded_bits(x: Tensor, bits: int) -> Tensor:
    """x rounded to a mantissa of `bits` bits after the leading one (TF32: 10), half to even, fp64."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.round(mantissa * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "float16": lambda x: x.to(torch.float16).double(),
    "bfloat16": lambda x: x.to(torch.bfloat16).double(),
    "TF32": lambda x: rounded_bits(x, 10),
    "TF32 (cut off)": lambda x: (x.float().view(torch.int32) & -8192).view(torch.float32).double(),
    "bfloat16 (cut off)": lambda x: (x.float().contiguous().view(torch.int32) & -65536).view(torch.float32).double(),
    "float8_e4m3fn": lambda x: x.float().clamp(-448, 448).to(torch.float8_e4m3fn).double(),
    "float8_e5m2": lambda x: x.float().clamp(-57344, 57344).to(torch.float8_e5m2).double(),
}
"""Floating-point formats without a scale."""
