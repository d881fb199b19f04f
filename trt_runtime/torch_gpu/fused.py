"""Decoder with fused layers, sharing weights with the reference: `TorchEngine` runs it with `kernels=True`.

It repeats nothing of the reference but the order of a block's parts.  While a recorder is active, the reference's own
`forward` runs, with fused layers instead of its linear ones, so that every tap can be recorded.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from refmodels.attention import Positions
from refmodels.checkpoints.load import on_meta_device
from refmodels.model import Block, Decoder, Mlp, Past, RmsNorm, activate
from refmodels.positions import PositionTables
from refmodels.quantization.linear import QuantizedLinear
from refmodels.recorder import active_recorder
from trt_runtime.kernels.position_rows import position_rows
from trt_runtime.kernels.quantized_chain import ChainRunner
from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute
from trt_runtime.torch_gpu.chain import (
    BlockChain,
    Carry,
    ChainedLayers,
    NormedLinear,
    block_chains,
    head_chainable,
)
from trt_runtime.torch_gpu.linear import FusedFloatLinear, FusedLinear, plan_prefetch
from trt_runtime.torch_gpu.quantized_linear import FusedQuantizedLinear
from trt_runtime.torch_gpu.weight_storage import mergeable


class FusedBlock(nn.Module):
    """A block of the decoder.

    Args:
        block: the reference's, with fused layers in it.

    Attributes:
        gate_up: the MLP's gate and up merged, if they can be.
        chain: runs the layers after the attention, for one row.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.qkv, self.out, self.down = _fused(block.attn.qkv), _fused(block.attn.out), _fused(block.mlp.out)
        self.gate_up = merged_gate_up(block.mlp)
        self.chain: BlockChain | None = None

    def forward(self, x: Tensor | Carry, past: Past, positions: Positions) -> tuple[Tensor | Carry, Past]:
        """As `Block.forward`, but takes and returns a `Carry` instead of x where chains run."""
        block = self.block
        if active_recorder() is not None:
            watched: tuple[Tensor, Past] = block(x, past, positions)
            return watched
        hidden, qkv = x if isinstance(x, Carry) else (x, None)
        if qkv is None:
            qkv = self.qkv.forward_normed(block.attn_norm, hidden)
        context, key, value = block.attn.attend(qkv, past, positions)
        if self.chain is not None and math.prod(hidden.shape[:-1]) == 1:
            return self.chain.run(context, hidden), (key, value)
        hidden = _added(self.out, context, block.attn_post_norm, hidden)
        return _added(self.down, self._activated(hidden), block.mlp_post_norm, hidden), (key, value)

    def _activated(self, x: Tensor) -> Tensor:
        """The input of the MLP's last linear layer."""
        block, mlp = self.block, self.block.mlp
        if self.gate_up is not None:
            return self.gate_up.forward_normed(block.mlp_norm, x)
        normed = block.mlp_norm(x)
        if mlp.spec.gated:
            up: Tensor = mlp.up(normed)
            return activate(mlp.gate(normed), mlp.spec.activation) * up
        return activate(mlp.up(normed), mlp.spec.activation)

    def linear_layers(self) -> list[FusedLinear]:
        """In the order in which a decode step reads their weights."""
        mlp = self.block.mlp
        separate = [mlp.gate, mlp.up] if mlp.spec.gated else [mlp.up]
        before = [self.gate_up] if self.gate_up is not None else [_fused(linear) for linear in separate]
        return [self.qkv, self.out, *before, self.down]

    def chained_layers(self) -> ChainedLayers:
        """For a block whose decoder has a `chain_runner`."""
        return ChainedLayers(
            qkv=_normed(self.block.attn_norm, self.qkv),
            out=_quantized(self.out),
            gate_up=_normed(self.block.mlp_norm, self.gate_up),
            down=_quantized(self.down),
        )


class FusedDecoder(Decoder):
    """A decoder of `FusedBlock`s, with fewer kernels before and after them too.

    Args:
        decoder: the reference, whose weights `weight_storage.arrange_weights` has arranged.  Its parameters, and the
            position tables that it has, are shared; later tables are each model's own.
        runner: from `chain.chain_runner`.
    """

    def __init__(self, decoder: Decoder, *, runner: ChainRunner | None = None) -> None:
        with on_meta_device():
            super().__init__(decoder.spec, numerics=decoder.numerics)
        head_in_chain = runner is not None and head_chainable(decoder)
        # No chain of a block runs these: the first has none before it, and prompts need the head alone.
        chains_of_one = {"blocks.0.attn.qkv", "head"} if head_in_chain else {"blocks.0.attn.qkv"}
        for name, module in decoder.named_modules():
            owner, _, leaf = name.rpartition(".")
            if isinstance(module, nn.Linear | QuantizedLinear):
                fused = fused_linear(module, runner if name in chains_of_one else None)
                setattr(self.get_submodule(owner), leaf, fused)
            else:
                for leaf, parameter in module.named_parameters(recurse=False):
                    setattr(self.get_submodule(name), leaf, parameter)
        if decoder.table_positions:
            self._share_tables(decoder)
        blocks = [FusedBlock(block) for block in self.blocks if isinstance(block, Block)]
        self.blocks = nn.ModuleList(blocks)
        if runner is not None:
            head = _normed(self.final_norm, self.head) if head_in_chain else None
            chains = block_chains(runner, [block.chained_layers() for block in blocks], head)
            for block, chain in zip(blocks, chains, strict=True):
                block.chain = chain
        plan_prefetch([*(layer for block in blocks for layer in block.linear_layers()), _fused(self.head)])
        self.eval()

    def _share_tables(self, decoder: Decoder) -> None:
        self.use_tables(
            PositionTables(
                positions=decoder.table_positions,
                rope_cos=decoder.rope_cos,
                rope_sin=decoder.rope_sin,
                logn=decoder.logn,
                alibi_slopes=decoder.alibi_slopes,
            )
        )
        self._tables_key = decoder._tables_key

    def positions(
        self, cache_lengths: Tensor, attention_mask: Tensor, position_ids: Tensor, ntk_table: Tensor
    ) -> Positions:
        tables = [table for table in (self.rope_cos, self.logn) if table is not None]
        if not tables or not position_ids.is_cuda or position_ids.shape[1] != 1 or active_recorder() is not None:
            return super().positions(cache_lengths, attention_mask, position_ids, ntk_table)
        half = 0 if self.rope_cos is None else self.rope_cos.shape[1]
        cos, sin = (None if self.rope_cos is None else tables[0].new_empty(*position_ids.shape, half) for _ in range(2))
        query_scale = None if self.logn is None else self.logn.new_empty(position_ids.shape)
        made = {"cos": cos, "sin": sin, "query_scale": query_scale}
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
            **made,
        )
        execute([rows])
        visible = attention_mask.bool()
        return {**made, "cache_lengths": cache_lengths, "visible": visible, "alibi_slopes": self.alibi_slopes}

    def logits(self, x: Tensor | Carry, logit_index: Tensor) -> Tensor:
        """As `Decoder.logits`; the last block's chain may have made them."""
        hidden, logits = x if isinstance(x, Carry) else (x, None)
        if hidden.shape[1] != 1 or logit_index.shape[1] != 1 or active_recorder() is not None:
            return super().logits(hidden, logit_index)
        return _fused(self.head).forward_normed(self.final_norm, hidden) if logits is None else logits


def fused_linear(linear: nn.Linear | QuantizedLinear, runner: ChainRunner | None) -> FusedLinear:
    if isinstance(linear, QuantizedLinear):
        return FusedQuantizedLinear(linear, runner=runner)
    return FusedFloatLinear(linear.weight, linear.bias)


def merged_gate_up(mlp: Mlp) -> FusedLinear | None:
    """Gate and up of an MLP of fused layers as one, if kernels can compute them so."""
    if not mlp.spec.gated or mlp.spec.activation != "silu":
        return None
    gate, up = _fused(mlp.gate), _fused(mlp.up)
    if isinstance(gate, FusedFloatLinear) and isinstance(up, FusedFloatLinear):
        return FusedFloatLinear.of_gate_and_up(gate, up)
    if isinstance(gate, FusedQuantizedLinear) and isinstance(up, FusedQuantizedLinear):
        return FusedQuantizedLinear(gate.linear, up.linear) if mergeable(gate.linear, up.linear) else None
    return None


def _added(linear: FusedLinear, x: Tensor, norm: nn.Module | None, residual: Tensor) -> Tensor:
    """residual + linear(x), in one kernel where there is one; or the result normalized before it is added."""
    if norm is None:
        summed: Tensor = linear(x, residual=residual)
        return summed
    normed: Tensor = norm(linear(x))
    return residual + normed


def _fused(linear: nn.Module) -> FusedLinear:
    assert isinstance(linear, FusedLinear)
    return linear


def _quantized(linear: FusedLinear | None) -> FusedQuantizedLinear:
    assert isinstance(linear, FusedQuantizedLinear)
    return linear


def _normed(norm: nn.Module, linear: nn.Module | None) -> NormedLinear:
    assert isinstance(norm, RmsNorm) and isinstance(linear, FusedQuantizedLinear)
    return NormedLinear(norm, linear)
