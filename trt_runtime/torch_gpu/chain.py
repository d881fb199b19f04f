"""A decode step of one row in two launches per block, if `kernels.quantized_chain` serves the model.

One launch is the attention; the other computes everything up to the next block's attention, or to the end of the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn

from refmodels.errors import LogitLockError
from refmodels.model import Block, Decoder, RmsNorm
from trt_runtime.kernels import quantized_chain
from trt_runtime.kernels.quantized_chain import ChainRunner
from trt_runtime.torch_gpu.kernel_choice import chain_serves
from trt_runtime.torch_gpu.linear import PREFETCH_BYTES
from trt_runtime.torch_gpu.quantized_linear import FusedQuantizedLinear
from trt_runtime.torch_gpu.weight_storage import PackedLinear, mergeable


class Carry(NamedTuple):
    """The results that a chain passes to the next block, or to the end of the step.

    Attributes:
        x: the block's output [1, 1, hidden].
        next_linear: output of the next norm and linear layer: the next block's query, key and value, or the logits;
            None if the head is not in the chain.
    """

    x: Tensor
    next_linear: Tensor | None


class NormedLinear(NamedTuple):
    """A linear layer and the norm before it."""

    norm: RmsNorm
    linear: FusedQuantizedLinear


class ChainedLayers(NamedTuple):
    """The linear layers of a block."""

    qkv: NormedLinear
    out: FusedQuantizedLinear
    gate_up: NormedLinear
    down: FusedQuantizedLinear


class BlockChain:
    """The layers after a block's attention, up to the next block's query, key and value, or to the logits.

    Args:
        runner: shared by the chains of a model.
        layers: the block's.
        following: the layer that reads the block's output, if the chain serves it.
        prefetch: contiguous weights to bring into L2 meanwhile.
    """

    def __init__(
        self, runner: ChainRunner, layers: ChainedLayers, following: NormedLinear | None, prefetch: Sequence[Tensor]
    ) -> None:
        self._runner, self._layers, self._following, self._prefetch = runner, layers, following, prefetch

    def run(self, context: Tensor, x: Tensor) -> Carry:
        """The block's output and the next linear layer's.

        Args:
            context: the attention's result [1, 1, heads * head_dim] fp16.
            x: the block's input [1, 1, hidden] fp16.
        """
        y, next_linear, layers = torch.empty_like(x), None, self._layers
        products = [
            layers.out.chain_product(input=context, residual=x),
            layers.gate_up.linear.chain_product(norm=layers.gate_up.norm),
            layers.down.chain_product(residual=0, out=y),
        ]
        if self._following is not None:
            norm, linear = self._following
            next_linear = x.new_empty(1, 1, linear.facts.out_features)
            products.append(linear.chain_product(norm=norm, out=next_linear))
        self._runner.run(products, self._prefetch)
        return Carry(y, next_linear)


def block_chains(
    runner: ChainRunner, blocks: Sequence[ChainedLayers], head: NormedLinear | None
) -> Iterator[BlockChain]:
    """The chains of a model's blocks; `head` is the final norm and the head, if the chain serves them."""
    for layers, next_layers in zip_longest(blocks, blocks[1:]):
        # The weights that the launch after the next attention (or after the step's end) reads first.
        if next_layers is not None:
            yield BlockChain(runner, layers, next_layers.qkv, [_packed(next_layers.out)])
        else:
            yield BlockChain(runner, layers, head, [_packed(blocks[0].qkv.linear).view(-1)[: PREFETCH_BYTES // 4]])


def _packed(linear: FusedQuantizedLinear) -> Tensor:
    assert linear.packed is not None
    return linear.packed


def chain_runner(decoder: Decoder) -> ChainRunner | None:
    """The runner of a decoder's chains, whose weights are arranged; None if not all of its blocks can be chained.

    If the kernel cannot be compiled, a warning says so, and each linear layer stays a launch of its own.
    """
    blocks = [block for block in decoder.blocks if isinstance(block, Block)]
    if not blocks or not all(_block_chainable(block) for block in blocks):
        return None
    layers = [layer for b in blocks for layer in (b.attn.qkv, b.attn.out, b.mlp.gate, b.mlp.out)]
    if head_chainable(decoder):
        layers.append(decoder.head)
    try:
        return ChainRunner(rows=max(layer.out_features for layer in layers), device=decoder.device)
    except LogitLockError as error:
        warnings.warn(f"decode steps with int4 weights are slower than they could be: {error}", stacklevel=2)
        return None


def head_chainable(decoder: Decoder) -> bool:
    return _norm_chainable(decoder.final_norm) and chainable(decoder.head)


def _block_chainable(block: Block) -> bool:
    attn, mlp = block.attn, block.mlp
    if not mlp.spec.gated or mlp.spec.activation != "silu" or not mergeable(mlp.gate, mlp.up):
        return False
    # The kernel adds the residual to a linear layer's result, with no norm between.
    if block.attn_post_norm is not None:
        return False
    layers = (attn.qkv, attn.out, mlp.gate, mlp.out)
    return all(map(_norm_chainable, (block.attn_norm, block.mlp_norm))) and all(map(chainable, layers))


def _norm_chainable(norm: nn.Module) -> bool:
    return isinstance(norm, RmsNorm) and len(norm.weight) <= quantized_chain.MAX_NORM_COLUMNS


def chainable(linear: nn.Module) -> bool:
    """Whether `kernels.quantized_chain` serves a layer on its device."""
    return (
        isinstance(linear, PackedLinear)
        and chain_serves(
            linear.format,
            in_features=linear.in_features,
            out_features=linear.out_features,
            dtype=linear.scale.dtype,
        )
        and quantized_chain.on(linear.scale.device)
    )
