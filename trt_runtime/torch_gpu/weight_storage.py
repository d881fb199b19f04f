"""The weights of a reference decoder in the memory layout that the kernels read, still in one copy.

Gate and up of an MLP become adjacent, so that one kernel reads both.  Quantized layers whose input is not quantized are
packed: a `PackedLinear` replaces the module and unpacks the weight when the reference arithmetic needs it, so that a
model has its weights once, at four or eight bits each.  Layers whose inputs are quantized too keep their weights as
they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from refmodels.model import Decoder, Mlp
from refmodels.quantization.linear import QuantizedLinear
from trt_runtime.kernels import packing
from trt_runtime.torch_gpu.kernel_choice import storage_for


def arrange_weights(decoder: Decoder) -> None:
    """Bring the weights of a decoder into the layout that the kernels read, in place."""
    for module in decoder.modules():
        if isinstance(module, Mlp) and module.spec.gated:
            gate, up = module.gate, module.up
            if isinstance(gate, nn.Linear) and isinstance(up, nn.Linear):
                make_adjacent((gate, up), ("weight", "bias"))
            elif isinstance(gate, QuantizedLinear) and isinstance(up, QuantizedLinear) and mergeable(gate, up):
                module.gate, module.up = arranged(gate, up)
    for module in decoder.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                [stored] = arranged(child)
                setattr(module, name, stored)


def mergeable(gate: nn.Module, up: nn.Module) -> bool:
    """Whether two quantized layers can be one: one format, and an input that both read alike."""
    if not isinstance(gate, QuantizedLinear) or not isinstance(up, QuantizedLinear) or gate.format != up.format:
        return False
    own_input = gate.format.reordered or gate.format.pre_quant_scale or gate.input_scale is not None
    return not own_input and (gate.bias is None) == (up.bias is None)


def arranged(*linears: QuantizedLinear) -> tuple[QuantizedLinear, ...]:
    """Quantized layers of one format, adjacent and as the kernels read them: new `PackedLinear`s, or the same modules.

    Not on a GPU nothing is done.
    """
    first = linears[0]
    if isinstance(first, PackedLinear) or not first.scale.is_cuda:
        return linears
    storage = storage_for(first.format, in_features=first.in_features, dtype=first.scale.dtype)
    if storage == "packed":
        return pack(*linears)
    if storage == "quantized":
        make_adjacent(linears, ("weight", "scale"))
    return linears


def make_adjacent(linears: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Move parameters of that name (all present, or all None) next to each other, in the order of the layers."""
    for name in names:
        parts: list[nn.Parameter] = [getattr(linear, name) for linear in linears]
        if parts[0] is None or all(_is_behind(a, b) for a, b in pairwise(parts)):
            continue
        whole = torch.cat([part.data for part in parts])
        for linear, old, new in zip(linears, parts, whole.split([len(part) for part in parts]), strict=True):
            setattr(linear, name, nn.Parameter(new, requires_grad=old.requires_grad))


def adjacent_view(first: Tensor, second: Tensor) -> Tensor:
    """Both as one tensor along the first axis, without a copy; `second` lies right behind `first`."""
    first, second = first.detach(), second.detach()
    assert _is_behind(first, second)
    return first.as_strided((len(first) + len(second), *first.shape[1:]), first.stride())


def _is_behind(first: Tensor, second: Tensor) -> bool:
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return same and second.storage_offset() == first.storage_offset() + first.numel()


class PackedLinear(QuantizedLinear):
    """A `QuantizedLinear` with the same parameters, except that the weight is packed.

    Args:
        linear: the layer; its weight is not kept.
        packed: int32, `kernels.packing.pack` of the weight.
        scale_tiles: its scales, by tile of rows (`kernels.packing.by_tile`).
        offset_tiles: its zero points, if it has any (`kernels.packing.offsets`).
    """

    def __init__(
        self, linear: QuantizedLinear, *, packed: Tensor, scale_tiles: Tensor, offset_tiles: Tensor | None
    ) -> None:
        nn.Module.__init__(self)  # QuantizedLinear's makes room for an unpacked weight
        self.in_features, self.out_features, self.format = linear.in_features, linear.out_features, linear.format
        for name in ("scale", "zero", "input_scale", "order", "pre_quant_scale", "bias"):
            setattr(self, name, getattr(linear, name))
        self.packed, self.scale_tiles, self.offset_tiles = packed, scale_tiles, offset_tiles

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return packing.unpack(self.packed, self.format.weight, rows=self.out_features, columns=self.in_features)


def pack(*linears: QuantizedLinear) -> tuple[PackedLinear, ...]:
    """The same layers with packed weights, adjacent in memory; the layers have one format and one dtype."""
    code, dtype = linears[0].format.weight, linears[0].scale.dtype
    rows = [-(-linear.out_features // packing.ROWS) for linear in linears]
    packed = torch.cat([packing.pack(linear.weight.data, code) for linear in linears]).split(rows)
    scales = torch.cat([packing.by_tile(linear.scale.data) for linear in linears]).split(rows)
    zeros = [packing.offsets(linear.zero.data, code, dtype) for linear in linears if linear.zero is not None]
    offsets = torch.cat(zeros).split(rows) if zeros else [None] * len(linears)
    return tuple(
        PackedLinear(linear, packed=weight, scale_tiles=scale, offset_tiles=offset)
        for linear, weight, scale, offset in zip(linears, packed, scales, offsets, strict=True)
    )
