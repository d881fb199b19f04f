"""From the reference decoder to the one of fused layers, on the same weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from refmodels.model import Block, Decoder, Mlp
from refmodels.quantization.linear import QuantizedLinear
from trt_runtime.torch_gpu.chain import chain_blocks
from trt_runtime.torch_gpu.fused import FusedBlock, FusedDecoder
from trt_runtime.torch_gpu.linear import Projection
from trt_runtime.torch_gpu.quantized_linear import (
    PackedLinear,
    QuantizedProjection,
    fetch_ahead,
    put_together,
)


def fused_decoder(decoder: Decoder) -> FusedDecoder:
    """A decoder on the same parameters, in eval mode, that runs `FusedBlock`s.

    The weights of `gate` and `up` move next to each other into one tensor, layer by layer; the modules of `decoder`
    keep views of it and work as before.  Position tables that `decoder` has are taken over; later ones are its own.
    """
    with torch.no_grad():
        for module in decoder.modules():
            if isinstance(module, Mlp) and module.spec.gated:
                _put_together(module)
        put_together(decoder, [(m.gate, m.up) for m in decoder.modules() if isinstance(m, Mlp) and m.spec.gated])
    shared = [*decoder.parameters(), *(v for v in vars(decoder).values() if isinstance(v, Tensor))]
    shared += [tensor for m in decoder.modules() if isinstance(m, PackedLinear) for tensor in m.tensors()]
    fused = copy.deepcopy(decoder, {id(tensor): tensor for tensor in shared})
    fused.__class__ = FusedDecoder
    assert isinstance(fused, FusedDecoder)
    for module in list(fused.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Projection(child.weight, child.bias))
            elif isinstance(child, QuantizedLinear):
                setattr(module, name, QuantizedProjection(child))
    for i, block in enumerate(fused.blocks):
        assert isinstance(block, Block)
        fused.blocks[i] = FusedBlock(block)
    chain_blocks(fused)
    fetch_ahead([*(p for block in fused.blocks if isinstance(block, FusedBlock) for p in block.products()), fused.head])
    return fused.eval()


def _put_together(mlp: Mlp) -> None:
    gate, up = mlp.gate, mlp.up
    if isinstance(gate, QuantizedLinear) or isinstance(up, QuantizedLinear):
        return
    if gate.weight.untyped_storage().data_ptr() == up.weight.untyped_storage().data_ptr():
        return
    for name in ("weight", "bias"):
        first, second = getattr(gate, name), getattr(up, name)
        if first is not None:
            both = torch.cat([first, second])
            for linear, part in ((gate, both[: len(first)]), (up, both[len(first) :])):
                setattr(linear, name, nn.Parameter(part, requires_grad=first.requires_grad))
