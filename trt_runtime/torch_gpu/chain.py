"""A decode step of one token in two launches a block, where `kernels.quantized_chain` serves the model.

One is the attention; the other is all that lies between it and the next block's attention, or the end of the step.
"""

from __future__ import annotations

import warnings
from itertools import zip_longest
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from refmodels.errors import LogitLockError
from refmodels.model import Decoder, RmsNorm
from trt_runtime.kernels.quantized_chain import MAX_NORM_COLUMNS, ChainRunner
from trt_runtime.torch_gpu.fused import FusedBlock
from trt_runtime.torch_gpu.quantized_linear import AHEAD_BYTES, QuantizedProjection


class _Normed(NamedTuple):
    """A product, and the norm before it."""

    norm: RmsNorm
    product: QuantizedProjection


class _Parts(NamedTuple):
    """What of a block is chained."""

    block: FusedBlock
    qkv: _Normed
    out: QuantizedProjection
    gate_up: _Normed
    down: QuantizedProjection


class BlockChain:
    """What follows the attention of a block, up to the query, key and value of the next one, or to the logits.

    Args:
        runner: shared by the chains of a model.
        following: what reads the block's output, if it is one of the chain; its `made` is then there.
        ahead: contiguous weights to be brought into L2 meanwhile; or None.
    """

    def __init__(self, runner: ChainRunner, parts: _Parts, following: _Normed | None, ahead: Tensor | None) -> None:
        self._runner, self._ahead = runner, [] if ahead is None else [ahead]
        self._parts, self._following = parts, following

    def run(self, context: Tensor, x: Tensor) -> Tensor:
        """The block's output [1, 1, hidden].

        Args:
            context: the attention's, x: the block's input; [1, 1, hidden] fp16.
        """
        y, parts = torch.empty_like(x), self._parts
        products = [
            parts.out.product(input=context, residual=x),
            parts.gate_up.product.product(norm=parts.gate_up.norm),
            parts.down.product(residual=0, out=y),
        ]
        if self._following is not None:
            norm, product = self._following
            product.made = x.new_empty(1, 1, product.linear.out_features)
            products.append(product.product(norm=norm, out=product.made))
        self._runner.run(products, self._ahead)
        return y


def chain_blocks(decoder: Decoder) -> None:
    """Give the blocks of a `fused_decoder` their chains, if all of them can have one.

    Where the kernel cannot be made, a warning says so, and products stay launches of their own.
    """
    blocks = [block for block in decoder.blocks if isinstance(block, FusedBlock)]
    found = [parts for block in blocks if (parts := _parts(block)) is not None]
    if not found or len(found) < len(decoder.blocks):
        return
    head = _normed(decoder.final_norm, decoder.head)
    alone = [found[0].qkv.product, *([head.product] if head is not None else [])]
    products = [*(product for p in found for product in (p.qkv.product, p.out, p.gate_up.product, p.down)), *alone]
    rows = max(product.linear.out_features for product in products)
    try:
        runner = ChainRunner(rows=rows, device=decoder.device)
    except LogitLockError as error:
        warnings.warn(f"decode steps with int4 weights are slower than they could be: {error}", stacklevel=2)
        return
    for parts, following in zip_longest(found, found[1:]):
        # While the next attention runs, or one step ends and the next begins: what the launch after it reads first.
        ahead = following.out.packed if following is not None else _start_of(found[0].qkv.product)
        parts.block.chain = BlockChain(runner, parts, head if following is None else following.qkv, ahead)
    for product in alone:
        product.runner = runner


def _parts(block: FusedBlock) -> _Parts | None:
    """None if the block cannot be chained."""
    inner = block.block
    qkv, gate_up = _normed(inner.attn_norm, inner.attn.qkv), _normed(inner.mlp_norm, block.gate_up)
    out, down = inner.attn.out, inner.mlp.out
    if qkv is None or gate_up is None or not _chainable(out) or not _chainable(down):
        return None
    return _Parts(block, qkv, out, gate_up, down)


def _normed(norm: nn.Module, product: object) -> _Normed | None:
    if not isinstance(norm, RmsNorm) or len(norm.weight) > MAX_NORM_COLUMNS or not _chainable(product):
        return None
    return _Normed(norm, product)


def _start_of(product: QuantizedProjection) -> Tensor | None:
    return None if product.packed is None else product.packed.view(-1)[: AHEAD_BYTES // 4]


def _chainable(product: object) -> TypeGuard[QuantizedProjection]:
    return isinstance(product, QuantizedProjection) and product.chainable
