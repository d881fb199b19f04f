"""A decode step of one token in two launches a block, where `kernels.quantized_chain` serves the model.

One is the attention; the other is all that lies between it and the next block's attention.
"""

from __future__ import annotations

import warnings
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from refmodels.errors import LogitLockError
from refmodels.model import Decoder, RmsNorm
from trt_runtime.kernels.quantized_chain import MAX_NORM_COLUMNS, ChainRunner
from trt_runtime.quantized_projection import AHEAD_BYTES, QuantizedProjection

if TYPE_CHECKING:
    from trt_runtime.fused import FusedBlock


class _Parts(NamedTuple):
    """What of a block is chained."""

    block: FusedBlock
    attn_norm: RmsNorm
    qkv: QuantizedProjection
    out: QuantizedProjection
    mlp_norm: RmsNorm
    gate_up: QuantizedProjection
    down: QuantizedProjection


class BlockChain:
    """What follows the attention of a block, up to the query, key and value of the next one.

    Args:
        runner: shared by the chains of a model.
        parts: of the block; following: of the next one, None after the last.
        ahead: contiguous weights to be brought into L2 meanwhile; or None.
    """

    def __init__(self, runner: ChainRunner, parts: _Parts, following: _Parts | None, ahead: Tensor | None) -> None:
        self._runner, self._ahead = runner, [] if ahead is None else [ahead]
        self._parts, self._following = parts, following

    def run(self, context: Tensor, x: Tensor) -> Tensor:
        """The block's output [1, 1, hidden]; the next block finds its `qkv` made.

        Args:
            context: the attention's, x: the block's input; [1, 1, hidden] fp16.
        """
        y, parts, following = torch.empty_like(x), self._parts, self._following
        products = [
            parts.out.product(input=context, residual=x),
            parts.gate_up.product(norm=parts.mlp_norm),
            parts.down.product(residual=0, out=y),
        ]
        if following is not None:
            qkv = following.block.qkv = x.new_empty(1, 1, following.qkv.linear.out_features)
            products.append(following.qkv.product(norm=following.attn_norm, out=qkv))
        self._runner.run(products, self._ahead)
        return y


def chain_blocks(decoder: Decoder) -> None:
    """Give the blocks of a `fused_decoder` their chains, if all of them can have one.

    Where the kernel cannot be made, a warning says so, and products stay launches of their own.
    """
    from trt_runtime.fused import FusedBlock

    blocks = [block for block in decoder.blocks if isinstance(block, FusedBlock)]
    found = [parts for block in blocks if (parts := _parts(block)) is not None]
    if not found or len(found) < len(decoder.blocks):
        return
    alone = [product for product in (found[0].qkv, decoder.head) if _chainable(product)]
    products = [*(product for p in found for product in (p.qkv, p.out, p.gate_up, p.down)), *alone]
    rows = max(product.linear.out_features for product in products)
    try:
        runner = ChainRunner(rows=rows, device=decoder.device)
    except LogitLockError as error:
        warnings.warn(f"decode steps with int4 weights are slower than they could be: {error}", stacklevel=2)
        return
    for parts, following in zip_longest(found, found[1:]):
        # While the next attention, or the last norm, runs: what the launch after it reads first.
        ahead = following.out.packed if following is not None else _start_of(decoder.head)
        parts.block.chain = BlockChain(runner, parts, following, ahead)
    for product in alone:
        product.runner = runner


def _parts(block: FusedBlock) -> _Parts | None:
    """None if the block cannot be chained."""
    inner = block.block
    first, second = inner.attn_norm, inner.mlp_norm
    qkv, out, gate_up, down = inner.attn.qkv, inner.attn.out, block.gate_up, inner.mlp.out
    if not isinstance(first, RmsNorm) or not isinstance(second, RmsNorm):
        return None
    if inner.spec.hidden_size > MAX_NORM_COLUMNS or not all(_chainable(p) for p in (qkv, out, gate_up, down)):
        return None
    return _Parts(block, first, qkv, out, second, gate_up, down)  # type: ignore[arg-type]


def _start_of(head: nn.Module) -> Tensor | None:
    return head.packed.view(-1)[: AHEAD_BYTES // 4] if _chainable(head) and head.packed is not None else None


def _chainable(product: object) -> TypeGuard[QuantizedProjection]:
    return isinstance(product, QuantizedProjection) and product.chainable
