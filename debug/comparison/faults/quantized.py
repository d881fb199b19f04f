"""Faults of quantized linear layers: weights, zero points, scales, inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import Variants, fault
from debug.comparison.modules import Module, linear_of
from refmodels.quantization.arithmetic import QuantizedWeight
from refmodels.quantization.linear import QuantizedLinear


def _codes(m: Module) -> tuple[QuantizedLinear, QuantizedWeight] | None:
    layer = linear_of(m.decoder, m.tap)
    return (layer, layer.quantized) if isinstance(layer, QuantizedLinear) else None


def _weight(weight: QuantizedWeight, m: Module, **changes: Tensor | None) -> dict[str, Tensor]:
    changed = QuantizedWeight(**{**vars(weight), **changes})
    return {"weight": changed.dequantized(m["weight"].dtype)}


@fault("codes unpacked in the wrong order", "linear")
def unpacked(m: Module, _: Tensor) -> Variants:
    found = _codes(m)
    if found is None or found[0].format.weight != "int4":
        return
    codes = found[1].codes
    if codes.shape[1] % 8 == 0:
        yield "the two of a byte exchanged", _weight(found[1], m, codes=codes.unflatten(1, (-1, 2)).flip(2).flatten(1))
        # AWQ's order of eight columns per word, read in sequence.
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        for detail, index in (("AWQ's order read in sequence", order), ("in AWQ's order", order.argsort())):
            yield detail, _weight(found[1], m, codes=codes.unflatten(1, (-1, 8))[:, :, index].flatten(1))
    yield (
        "offset binary read as two's complement",
        _weight(found[1], m, codes=torch.where(codes < 0, codes + 8, codes - 8)),
    )


@fault("zero point wrong", "linear")
def zero_point(m: Module, _: Tensor) -> Variants:
    found = _codes(m)
    if found is None or found[0].format.weight == "fp8":
        return
    weight = found[1]
    zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero is None else weight.zero
    for offset in (1, -1):
        yield f"off by {offset:+d}", _weight(weight, m, zero=zero + offset)
    if weight.zero is not None:
        yield "ignored", _weight(weight, m, zero=None)


@fault("scales of the wrong group", "linear")
def scales(m: Module, _: Tensor) -> Variants:
    found = _codes(m)
    if found is None:
        return
    weight = found[1]
    rows, groups = weight.scale.shape
    if groups > 1:
        for shift in (1, -1):
            yield (
                f"of the group {'before' if shift == 1 else 'after'}",
                _weight(weight, m, scale=weight.scale.roll(shift, 1)),
            )
        yield "read as [groups, out]", _weight(weight, m, scale=weight.scale.reshape(groups, rows).t())
        yield "one for all groups", _weight(weight, m, scale=weight.scale[:, :1].expand(rows, groups))
        yield "in reverse order of groups", _weight(weight, m, scale=weight.scale.flip(1))
    yield "of the row before", _weight(weight, m, scale=weight.scale.roll(1, 0))
    yield "of the row after", _weight(weight, m, scale=weight.scale.roll(-1, 0))
    yield "in reverse order of rows", _weight(weight, m, scale=weight.scale.flip(0))
    yield "one for all rows", _weight(weight, m, scale=weight.scale[:1].expand(rows, groups))
    yield "missing", _weight(weight, m, scale=torch.ones_like(weight.scale))


@fault("input quantized otherwise", "linear")
def inputs(m: Module, _: Tensor) -> Variants:
    found = _codes(m)
    if found is None:
        return
    layer = found[0]
    if layer.format.input is not None:
        yield "not at all", {"rounding": None}
        if layer.format.input_scale != "token":
            yield "with a scale per token", {"rounding": "token"}
        return
    yield "to int8, with a scale per token", {"rounding": "token"}
    if layer.format.group is not None:
        yield "to int8, with a scale per token and group", {"rounding": "group"}


@fault("pre-quant scale ignored", "linear")
def pre_quant_scale(m: Module, _: Tensor) -> Variants:
    found = _codes(m)
    if found is not None and found[0].pre_quant_scale is not None:
        yield "", {"input": m["input"] / found[0].pre_quant_scale}
