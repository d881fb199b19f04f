"""Faults of linear layers whose weight or input was rounded to a coarser grid than it should be.

The grids are those of quantizers that people use: scale = max / 7 and max / 8 (with the sign of the largest value: ONNX
Runtime, llama.cpp), asymmetric with an integer zero point (GPTQ, AWQ, ONNX Runtime) or with a float minimum (HQQ),
per tensor, row, column or group, scales kept in fp32 or fp16.  Each is first tried on a few rows, because there are
hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import Variants, fault
from debug.comparison.faults.pairs import LARGEST, SMALL, Block
from debug.comparison.faults.parts import FORMATS, real_rows
from debug.comparison.modules import Module, linear_of
from refmodels.quantization.linear import QuantizedLinear


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """How a weight [out, in] is quantized: steps per [out, groups].  floor: added after scaling (a float minimum)."""

    words: str
    scale: Tensor
    zero: Tensor
    low: int
    high: int
    floor: Tensor | None = None

    def steps(self, weight: Tensor, rows: slice) -> Tensor:
        """Integers [out, groups, size], not yet clamped."""
        grouped = weight[rows].unflatten(1, (self.scale.shape[1], -1))
        if self.floor is not None:
            grouped = grouped - self.floor[rows, :, None]
        steps: Tensor = (grouped / self.scale[rows, :, None]).round() + self.zero[rows, :, None]
        return steps

    def back(self, steps: Tensor, rows: slice, *, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        scale, zero = self.scale if scale is None else scale, self.zero if zero is None else zero
        values = (steps - zero[rows, :, None]) * scale[rows, :, None]
        return (values if self.floor is None else values + self.floor[rows, :, None]).flatten(1)

    def clamped(self, steps: Tensor) -> Tensor:
        return steps.clamp(self.low, self.high)


Made = Callable[[slice], Tensor]


def _grids(m: Module, weight: Tensor) -> Iterator[_Grid]:
    for span, low, high in _ranges(m, weight):
        largest = torch.maximum(-low, high)
        signed = torch.where(high >= -low, high, low)
        for bits in (8, 4, 3, 2, 6, 5):
            half, last = 2 ** (bits - 1), 2**bits - 1
            none = torch.zeros_like(low)
            least, most = low.clamp(max=0), high.clamp(min=0)
            wide = (most - least) / last
            schemes: list[tuple[str, Tensor, Tensor, int, int, Tensor | None]] = [
                (f"symmetric, scale = max/{half - 1}", largest / max(half - 1, 1), none, -half, half - 1, None),
                (f"symmetric, scale = max/{half}", largest / half, none, -half, half - 1, None),
                (f"symmetric, scale = -max/{half} with its sign", -signed / half, none, -half, half - 1, None),
                (
                    "symmetric, the lowest value used",
                    torch.maximum(most / max(half - 1, 1), -least / half),
                    none,
                    -half,
                    half - 1,
                    None,
                ),
                ("asymmetric", wide, (-least / _safe(wide)).round(), 0, last, None),
                ("asymmetric, float minimum", (high - low) / last, none, 0, last, low),
            ]
            for scheme, scale, zero, first, end, floor in schemes:
                for kept, dtype in (("", None), (", fp16 scales", torch.float16)):
                    stored = scale if dtype is None else scale.to(dtype).double()
                    yield _Grid(
                        words=f"int{bits}, {span}, {scheme}{kept}",
                        scale=_safe(stored),
                        zero=zero,
                        low=first,
                        high=end,
                        floor=floor if dtype is None or floor is None else floor.to(dtype).double(),
                    )


def _safe(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.full_like(scale, 2.0**-24), scale)


def _ranges(m: Module, weight: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(words, lowest, highest value) for each way of sharing scales, [out, groups] both."""
    rows, columns = weight.shape
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    yield "one scale per row", low, high
    for size in (32, 64, 128, 16, 256):
        if columns % size == 0 and columns > size:
            grouped = weight.unflatten(1, (-1, size))
            yield f"groups of {size}", grouped.amin(2), grouped.amax(2)
    yield "one scale for all", low.amin().expand(rows, 1), high.amax().expand(rows, 1)
    if weight.numel() <= SMALL:
        # A scale for each element of a block: this is as much work as the whole weight, for each grid.
        least, most = weight.amin(0, keepdim=True), weight.amax(0, keepdim=True)
        yield "one scale per input channel", least.expand(rows, columns), most.expand(rows, columns)
    if m.part == "attn.qkv":
        a = m.decoder.spec.attention
        parts = [n * a.head_dim for n in (a.heads, a.kv_heads, a.kv_heads)]
        each = [
            torch.cat([f(t).expand(n, 1) for t, n in zip(x.split(parts), parts, strict=True)])
            for f, x in ((torch.amin, low), (torch.amax, high))
        ]
        yield "one scale each for query, key and value", each[0], each[1]


def _misread(grid: _Grid, weight: Tensor) -> Iterator[tuple[str, Made]]:
    """The grid, and mistakes with it, as functions of the wanted rows."""

    def right(rows: slice) -> Tensor:
        return grid.back(grid.clamped(grid.steps(weight, rows)), rows)

    yield grid.words, right
    if "fp16" in grid.words or not grid.words.startswith(("int8", "int4")) or "input channel" in grid.words:
        return
    size = 256 if grid.words.startswith("int8") else 16

    def changed(change: Callable[[Tensor], Tensor]) -> Made:
        return lambda rows: grid.back(change(grid.clamped(grid.steps(weight, rows))), rows)

    def scaled(scale: Tensor) -> Made:
        return lambda rows: grid.back(grid.clamped(grid.steps(weight, rows)), rows, scale=scale)

    def zeroed(zero: Tensor) -> Made:
        return lambda rows: grid.back(grid.clamped(grid.steps(weight, rows)), rows, zero=zero)

    for shift, which in ((1, "before"), (-1, "after")):
        yield f"{grid.words}; scales of the row {which}", scaled(grid.scale.roll(shift, 0))
        if grid.scale.shape[1] > 1:
            yield f"{grid.words}; scales of the group {which}", scaled(grid.scale.roll(shift, 1))
    yield f"{grid.words}; scales in reverse order of rows", scaled(grid.scale.flip(0))
    if grid.scale.shape[1] > 1:
        yield f"{grid.words}; scales in reverse order of groups", scaled(grid.scale.flip(1))
        yield (
            f"{grid.words}; the first group's scale for the whole row",
            scaled(grid.scale[:, :1].expand_as(grid.scale)),
        )
    for offset in (1, -1):
        yield f"{grid.words}; zero point off by {offset:+d}", zeroed(grid.zero + offset)
    if bool(grid.zero.any()):
        yield f"{grid.words}; zero point ignored", zeroed(torch.zeros_like(grid.zero))
        yield f"{grid.words}; zero points of the row before", zeroed(grid.zero.roll(1, 0))
    if grid.low < 0:
        wrap = changed(lambda q: torch.where(q < 0, q + size / 2, q - size / 2))
        yield f"{grid.words}; uint{size.bit_length() - 1} read as int{size.bit_length() - 1} (or the reverse)", wrap
        yield f"{grid.words}; negative values read as unsigned", changed(lambda q: q % size)
    elif grid.floor is None:
        signed = changed(lambda q: torch.where(q >= size / 2, q - size, q))
        yield f"{grid.words}; uint{size.bit_length() - 1} read as int{size.bit_length() - 1}", signed
    if size == 16 and weight.shape[1] % 2 == 0:
        swapped = changed(lambda q: q.flatten(1).unflatten(1, (-1, 2)).flip(2).flatten(1).view_as(q))
        yield f"{grid.words}; the two of a byte exchanged", swapped
    yield (
        f"{grid.words}; wrapped instead of saturated",
        lambda rows: grid.back((grid.steps(weight, rows) - grid.low) % size + grid.low, rows),
    )


@fault("weight quantized wrongly", "linear", first=True)
def weight_grid(m: Module, engine: Tensor) -> Variants:
    if isinstance(linear_of(m.decoder, m.tap), QuantizedLinear):
        return  # see debug.comparison.faults.quantized
    if m["weight"].numel() > LARGEST:
        return
    exact: Tensor = m["weight"].double()
    stored = exact.to(m.forward.tensors[m.tap].dtype).double()
    # Quantization starts from the weights in the dtype of the engine, or from those of the checkpoint.
    starts = [stored] if torch.equal(stored, exact) else [stored, exact]
    tried = Block(m, engine, exact)
    for weight in starts:
        for grid in _grids(m, weight):
            right: Tensor | None = None
            for words, made in _misread(grid, weight):
                block = made(tried.rows)
                if right is None:
                    right = block
                elif torch.equal(block, right):
                    # A mistake that changes nothing here.
                    continue
                if tried.promising(block):
                    yield words, {"weight": made(slice(None)).to(m["weight"])}


@fault("weight rounded", "linear", first=True)
def weight_format(m: Module, engine: Tensor) -> Variants:
    if m["weight"].numel() > LARGEST:
        return
    weight: Tensor = m["weight"].double()
    tried = Block(m, engine, weight)
    for name, rounded in FORMATS.items():
        if tried.promising(rounded(weight[tried.rows])):
            yield f"to {name}", {"weight": rounded(weight).to(m["weight"])}
    for name, limit in (("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0)):
        for span, largest in (
            ("tensor", weight.abs().amax().expand(len(weight), 1)),
            ("row", weight.abs().amax(1, keepdim=True)),
        ):
            scale = _safe(largest / limit)

            def made(rows: slice, scale: Tensor = scale, name: str = name) -> Tensor:
                return FORMATS[name](weight[rows] / scale[rows]) * scale[rows]

            if tried.promising(made(tried.rows)):
                yield f"to {name}, one scale per {span}", {"weight": made(slice(None)).to(m["weight"])}


@fault("input rounded", "linear", first=True)
def input_format(m: Module, _: Tensor) -> Variants:
    x: Tensor = m["input"]
    for name, rounded in FORMATS.items():
        if name == "float16" and torch.equal(FORMATS["TF32"](x), rounded(x)):
            name = "TF32 (or float16, which is the same here)"
        elif name == "TF32" and torch.equal(FORMATS["float16"](x), rounded(x)):
            continue
        yield f"to {name}", {"input": rounded(x).to(x)}
        if name.startswith("TF32"):
            yield f"to {name}, and the weight", {"input": rounded(x).to(x), "weight": rounded(m["weight"]).to(x)}
    if isinstance(linear_of(m.decoder, m.tap), QuantizedLinear):
        return  # see debug.comparison.faults.quantized
    wide = x.double()
    real = real_rows(m, x)
    for span, low, high in (
        ("token", wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)),
        ("tensor", real.amin(), real.amax()),
    ):
        scale = _safe(torch.maximum(-low, high) / 127)
        yield f"to int8, one scale per {span}", {"input": ((wide / scale).round().clamp(-128, 127) * scale).to(x)}
        scale = _safe((high.clamp(min=0) - low.clamp(max=0)) / 255)
        zero = (-low.clamp(max=0) / scale).round()
        steps = ((wide / scale).round() + zero).clamp(0, 255)
        yield f"to uint8, asymmetric, one scale per {span}", {"input": ((steps - zero) * scale).to(x)}
        scale = _safe(torch.maximum(-low, high) / 448)
        yield (
            f"to float8_e4m3fn, one scale per {span}",
            {"input": (FORMATS["float8_e4m3fn"](wide / scale) * scale).to(x)},
        )
