"""The decoder with its weights where they are, in fewer kernels: what `TorchEngine` runs with kernels on.

Nothing is described a second time but the order of a block's parts.  While a recorder is active, the reference's own
`forward` runs, with the products below in place of its `nn.Linear`, so that every tap of it can be seen.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from refmodels.model import Block, Decoder, Mlp, Past, activate
from refmodels.ops import Positions
from refmodels.recorder import active_recorder
from trt_runtime.torch_gpu.linear import Projection
from trt_runtime.torch_gpu.quantized_linear import QuantizedProjection, paired

if TYPE_CHECKING:
    from trt_runtime.torch_gpu.chain import BlockChain


class FusedBlock(nn.Module):
    """A block of the decoder; `block` is the reference's, with `Projection`s in it.

    Attributes:
        chain: does what follows the attention, for one token.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        mlp = block.mlp
        self.gate_up = _both(mlp) if mlp.spec.gated and mlp.spec.activation == "silu" else None
        self.chain: BlockChain | None = None

    def forward(self, x: Tensor, past: Past, positions: Positions) -> tuple[Tensor, Past]:
        block, mlp = self.block, self.block.mlp
        if active_recorder() is not None:
            watched: tuple[Tensor, Past] = block(x, past, positions)
            return watched
        chain = self.chain if math.prod(x.shape[:-1]) == 1 else None
        qkv = _after(block.attn_norm, block.attn.qkv, x)
        context, key, value = block.attn.attend(qkv, past, positions)
        if chain is not None:
            return chain.run(context, x), (key, value)
        x = block.attn.out(context, x)
        if self.gate_up is not None:
            act = _after(block.mlp_norm, self.gate_up, x)
        else:
            normed = block.mlp_norm(x)
            act = activate(mlp.gate(normed) if mlp.spec.gated else mlp.up(normed), mlp.spec.activation)
            act = act * mlp.up(normed) if mlp.spec.gated else act
        return mlp.out(act, x), (key, value)

    def products(self) -> list[nn.Module]:
        """In the order in which a decode step reads their weights."""
        attn, mlp = self.block.attn, self.block.mlp
        first = [self.gate_up] if self.gate_up is not None else [mlp.gate, mlp.up] if mlp.spec.gated else [mlp.up]
        return [attn.qkv, attn.out, *first, mlp.out]


class FusedDecoder(Decoder):
    """A decoder of `FusedBlock`s, with fewer kernels before and after them too."""

    def positions(
        self, cache_lengths: Tensor, attention_mask: Tensor, position_ids: Tensor, ntk_table: Tensor
    ) -> Positions:
        tables = [table for table in (self.rope_cos, self.logn) if table is not None]
        if not tables or not position_ids.is_cuda or position_ids.shape[1] != 1 or active_recorder() is not None:
            return super().positions(cache_lengths, attention_mask, position_ids, ntk_table)
        from trt_runtime.kernels.position_rows import position_rows
        from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute

        half = 0 if self.rope_cos is None else self.rope_cos.shape[1]
        cos, sin = (None if self.rope_cos is None else tables[0].new_empty(*position_ids.shape, half) for _ in range(2))
        query_scale = None if self.logn is None else self.logn.new_empty(position_ids.shape)
        rows = position_rows(
            tokens=position_ids.numel(),
            half=half,
            positions=self.table_positions,
            dtype=ELEMENT_TYPES[tables[0].dtype],
            position_ids=position_ids,
            ntk_table=ntk_table if self.spec.uses_ntk else None,
            cos_table=self.rope_cos,
            sin_table=self.rope_sin,
            logn=self.logn,
            cos=cos,
            sin=sin,
            query_scale=query_scale,
        )
        execute([rows])
        return Positions(cache_lengths, attention_mask.bool(), cos, sin, query_scale, self.alibi_slopes)

    def logits(self, x: Tensor, logit_index: Tensor) -> Tensor:
        if x.shape[1] != 1 or logit_index.shape[1] != 1 or active_recorder() is not None:
            return super().logits(x, logit_index)
        return _after(self.final_norm, self.head, x)


def _after(norm: nn.Module, product: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = product.after(norm, x) if isinstance(product, QuantizedProjection) else product(norm(x))
    return y


def _both(mlp: Mlp) -> Projection | QuantizedProjection | None:
    """One product for both, whose parameters `_put_together` has made neighbours; None if they are too different."""
    gate, up = mlp.gate, mlp.up
    if isinstance(gate, QuantizedProjection) and isinstance(up, QuantizedProjection):
        return QuantizedProjection(gate.linear, up.linear) if paired(gate.linear, up.linear) else None
    if not isinstance(gate, Projection) or not isinstance(up, Projection):
        return None
    weight, bias = mlp.gate.weight.data, mlp.gate.bias
    width, inputs = weight.shape
    return Projection(
        weight.as_strided((2 * width, inputs), (inputs, 1)),
        None if bias is None else bias.data.as_strided((2 * width,), (1,)),
        gated=True,
    )
