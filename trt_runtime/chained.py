"""A decode step of one token in two launches a block, where `kernels.quantized_chain` serves the model.

One is the attention; the other is all that lies between it and the next block's attention.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from refmodels.errors import LogitLockError
from refmodels.model import Decoder, RmsNorm
from trt_runtime.kernels.quantized_chain import MAX_NORM_COLUMNS, ChainRunner
from trt_runtime.quantized_projection import AHEAD_BYTES, QuantizedProjection

if TYPE_CHECKING:
    from trt_runtime.fused import FusedBlock


class BlockChain:
    """What follows the attention of a block, up to the query, key and value of the next one.

    Args:
        runner: shared by the chains of a model.
        out, gate_up, down: the block's products; norm: the one before `gate_up`.
        following: the next block's norm and product of query, key and value; None after the last block.
        ahead: contiguous weights to be brought into L2 meanwhile; or None.
    """

    def __init__(
        self,
        runner: ChainRunner,
        *,
        out: QuantizedProjection,
        norm: RmsNorm,
        gate_up: QuantizedProjection,
        down: QuantizedProjection,
        following: tuple[RmsNorm, QuantizedProjection] | None,
        ahead: Tensor | None,
    ) -> None:
        self._runner, self._ahead = runner, [] if ahead is None else [ahead]
        self._out, self._norm, self._gate_up, self._down, self._following = out, norm, gate_up, down, following

    def run(self, context: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The block's output [1, 1, hidden] and the next block's query, key and value.

        Args:
            context: the attention's, x: the block's input; [1, 1, hidden] fp16.
        """
        y, qkv = torch.empty_like(x), None
        products = [
            self._out.product(input=context, residual=x),
            self._gate_up.product(norm=self._norm),
            self._down.product(residual=0, out=y),
        ]
        if self._following is not None:
            norm, product = self._following
            qkv = x.new_empty(1, 1, product.linear.out_features)
            products.append(product.product(norm=norm, out=qkv))
        self._runner.run(products, self._ahead)
        return y, qkv


def chain_blocks(decoder: Decoder) -> None:
    """Give the blocks of a `fused_decoder` their chains, if all of them can have one.

    Where the kernel cannot be made, a warning says so, and products stay launches of their own.
    """
    from trt_runtime.fused import FusedBlock

    blocks = [block for block in decoder.blocks if isinstance(block, FusedBlock)]
    found = [parts for block in blocks if (parts := _parts(block)) is not None]
    if not found or len(found) < len(decoder.blocks):
        return
    alone = [product for product in (found[0][2], decoder.head) if _chainable(product)]
    products = [*(product for parts in found for product in parts[2:]), *alone]
    rows = max(product.linear.out_features for product in products)
    try:
        runner = ChainRunner(rows=rows, device=decoder.device)
    except LogitLockError as error:
        warnings.warn(f"decode steps with int4 weights are slower than they could be: {error}", stacklevel=2)
        return
    for i, (block, (_, norm, _, out, gate_up, down)) in enumerate(zip(blocks, found, strict=True)):
        following = (found[i + 1][0], found[i + 1][2]) if i + 1 < len(found) else None
        # While the next attention, or the last norm, runs: what the launch after it reads first.
        ahead = found[i + 1][3].packed if following is not None else _start_of(decoder.head)
        block.chain = BlockChain(
            runner, out=out, norm=norm, gate_up=gate_up, down=down, following=following, ahead=ahead
        )
        block.following = [blocks[i + 1]] if following is not None else []
    for product in alone:
        product.runner = runner


_Parts = tuple[RmsNorm, RmsNorm, QuantizedProjection, QuantizedProjection, QuantizedProjection, QuantizedProjection]


def _parts(block: FusedBlock) -> _Parts | None:
    """attn_norm, mlp_norm, qkv, out, gate_up, down of a block that can be chained."""
    inner = block.block
    first, second = inner.attn_norm, inner.mlp_norm
    qkv, out, gate_up, down = inner.attn.qkv, inner.attn.out, block.gate_up, inner.mlp.out
    if not isinstance(first, RmsNorm) or not isinstance(second, RmsNorm):
        return None
    if inner.spec.hidden_size > MAX_NORM_COLUMNS or not all(_chainable(p) for p in (qkv, out, gate_up, down)):
        return None
    return first, second, qkv, out, gate_up, down  # type: ignore[return-value]


def _start_of(head: nn.Module) -> Tensor | None:
    return head.packed.view(-1)[: AHEAD_BYTES // 4] if _chainable(head) and head.packed is not None else None


def _chainable(product: object) -> TypeGuard[QuantizedProjection]:
    return isinstance(product, QuantizedProjection) and product.chainable
