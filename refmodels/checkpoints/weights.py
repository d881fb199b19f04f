"""How checkpoint tensors become parameters, described as data that can be checked, inverted and streamed.

A `WeightMap` lists, for each parameter of `Decoder`, the checkpoint tensors (or rows of them) that are stacked to form
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refmodels.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one checkpoint tensor.

    Attributes:
        name: the tensor's name upstream.
        shape: the shape it must have in the checkpoint.
        rows: [start, stop) of the first axis, if several parameters share a tensor; None takes all rows.
        transposed: stored [in, out] (GPT-2's Conv1D).
        interleaved_heads: the number of heads, if rows are grouped by head, (query, key, value) of each head together;
            they are regrouped into all queries, all keys, all values.  0: rows are not interleaved.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False
    interleaved_heads: int = 0

    def read(self, tensor: Tensor) -> Tensor:
        """The rows that this part contributes, from the whole checkpoint tensor; views where possible."""
        if self.transposed:
            tensor = tensor.t() if tensor.ndim == 2 else tensor
        if self.interleaved_heads:
            tensor = _regroup(tensor, (self.interleaved_heads, 3))
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    def of_rows(self, tensor: Tensor) -> Tensor:
        """As `read`, from a tensor [out, ...] that is not transposed: quantized values, scales."""
        return replace(self, transposed=False).read(tensor)

    @property
    def row_count(self) -> int:
        if self.rows is not None:
            return self.rows[1] - self.rows[0]
        return self.shape[-1] if self.transposed else self.shape[0]


def _regroup(tensor: Tensor, groups: tuple[int, int]) -> Tensor:
    """Swap the two outer levels of the first axis."""
    return tensor.reshape(*groups, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


WeightMap = Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Module names of a checkpoint; those of a block are relative to `block`, which contains `{i}`.

    `qkv`: one fused module, or query and [key | value], or query, key and value.  `gate` and `up` may name one fused
    module, [gate | up].  `query_norm` and `key_norm` are the norms of heads, `attn_post_norm` and `mlp_post_norm` those
    of what is added to the residual stream, in models that have them.  `conv1d`: linears are stored [in, out].
    `fused_by_head`: see `Part.interleaved_heads`.
    """

    embed: str
    block: str
    attn_norm: str
    qkv: tuple[str, ...]
    attn_out: str
    mlp_norm: str
    up: str
    mlp_out: str
    final_norm: str
    head: str
    gate: str | None = None
    position_embed: str | None = None
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    attn_post_norm: str = "post_self_attn_layernorm"
    mlp_post_norm: str = "post_mlp_layernorm"
    conv1d: bool = False
    fused_by_head: bool = False


def weight_map(spec: ModelSpec, layout: Layout) -> WeightMap:
    """The checkpoint tensors of every parameter of `Decoder(spec)`; a tied head is the embedding and has no entry."""
    h, ffn, a = spec.hidden_size, spec.mlp.width, spec.attention
    query, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    table: dict[str, tuple[Part, ...]] = {}

    def linear(parameter: str, parts: list[Part], *, bias: bool) -> None:
        if layout.conv1d:
            parts = [replace(part, shape=part.shape[::-1], transposed=True) for part in parts]
        table[f"{parameter}.weight"] = tuple(replace(part, name=f"{part.name}.weight") for part in parts)
        if bias:
            shapes = [(part.shape[-1 if part.transposed else 0],) for part in parts]
            table[f"{parameter}.bias"] = tuple(
                replace(part, name=f"{part.name}.bias", shape=shape) for part, shape in zip(parts, shapes, strict=True)
            )

    def norm(parameter: str, name: str, width: int = h) -> None:
        for suffix in ("weight", "bias") if spec.norm.kind == "layer" else ("weight",):
            table[f"{parameter}.{suffix}"] = (Part(name=f"{name}.{suffix}", shape=(width,)),)

    table["embed.weight"] = (Part(name=f"{layout.embed}.weight", shape=(spec.vocab_size, h)),)
    if layout.position_embed is not None:
        table["position_embed.weight"] = (Part(name=f"{layout.position_embed}.weight", shape=(spec.max_positions, h)),)
    for i in range(spec.layers):
        ours, theirs = f"blocks.{i}", layout.block.format(i=i)
        rows = {1: (spec.qkv_width,), 2: (query, 2 * kv), 3: (query, kv, kv)}[len(layout.qkv)]
        by_head = a.heads if layout.fused_by_head else 0
        qkv = [
            Part(name=f"{theirs}.{name}", shape=(count, h), interleaved_heads=by_head)
            for name, count in zip(layout.qkv, rows, strict=True)
        ]
        norm(f"{ours}.attn_norm", f"{theirs}.{layout.attn_norm}")
        linear(f"{ours}.attn.qkv", qkv, bias=a.qkv_bias)
        if a.head_norms:
            norm(f"{ours}.attn.query_norm", f"{theirs}.{layout.query_norm}", a.head_dim)
            norm(f"{ours}.attn.key_norm", f"{theirs}.{layout.key_norm}", a.head_dim)
        linear(f"{ours}.attn.out", [Part(name=f"{theirs}.{layout.attn_out}", shape=(h, query))], bias=a.out_bias)
        norm(f"{ours}.mlp_norm", f"{theirs}.{layout.mlp_norm}")
        up = Part(name=f"{theirs}.{layout.up}", shape=(ffn, h))
        if layout.gate is not None:
            gate = replace(up, name=f"{theirs}.{layout.gate}")
            if layout.gate == layout.up:
                gate = replace(gate, shape=(2 * ffn, h), rows=(0, ffn))
                up = replace(gate, rows=(ffn, 2 * ffn))
            linear(f"{ours}.mlp.gate", [gate], bias=spec.mlp.bias)
        linear(f"{ours}.mlp.up", [up], bias=spec.mlp.bias)
        linear(f"{ours}.mlp.out", [Part(name=f"{theirs}.{layout.mlp_out}", shape=(h, ffn))], bias=spec.mlp.bias)
        if spec.sandwich_norms:
            norm(f"{ours}.attn_post_norm", f"{theirs}.{layout.attn_post_norm}")
            norm(f"{ours}.mlp_post_norm", f"{theirs}.{layout.mlp_post_norm}")
    norm("final_norm", layout.final_norm)
    if not spec.tied_head:
        table["head.weight"] = (Part(name=f"{layout.head}.weight", shape=(spec.vocab_size, h)),)
    return table


def to_checkpoint(weights: WeightMap, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of loading: tensors by their upstream names, from parameters by name.

    Parameters that share a checkpoint tensor (fused gate and up) are joined again; tensors are new copies.
    """
    result: dict[str, Tensor] = {}
    for parameter, parts in weights.items():
        start = 0
        for part in parts:
            piece = parameters[parameter].detach()[start : start + part.row_count]
            start += part.row_count
            if part.rows is not None:
                whole = result.setdefault(part.name, torch.empty(part.shape, dtype=piece.dtype))
                whole[part.rows[0] : part.rows[1]] = piece
                continue
            if part.interleaved_heads:
                piece = _regroup(piece, (3, part.interleaved_heads))
            if part.transposed and piece.ndim == 2:
                piece = piece.t()
            result[part.name] = piece.clone(memory_format=torch.contiguous_format)
    return result
