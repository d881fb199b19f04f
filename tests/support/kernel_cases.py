"""Models, shapes and tensors for the tests of the kernels' hosts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import refmodels
from refmodels.attention import AttentionFacts, AttentionInputs, inputs_of
from refmodels.spec import ModelSpec
from refmodels.toys import TOYS, toy_path
from trt_runtime.kernels.launch import KERNEL_INPUTS, AttentionShape, NormShape, shape_flags

SPECS = {name: refmodels.resolve(toy_path(name)).spec for name in TOYS}
SPEC = SPECS["chatglm2"]
MEMORY = "context", "workspace", "counters"
ADDRESSES: dict[str, Any] = {
    name: 4096 * (i + 1) for i, name in enumerate((*(row.name for row in KERNEL_INPUTS), *MEMORY))
}


def attention_shape(spec: ModelSpec, layer: int = 0, **sizes: int) -> AttentionShape:
    a = spec.attention
    return AttentionShape(
        **({"batch": 2, "tokens": 1, "slots": 40, "capacity": 64} | sizes),
        heads=a.heads,
        kv_heads=a.kv_heads,
        head_dim=a.head_dim,
        scale=spec.scale(layer),
        dtype="fp16",
        rotary_dim=spec.rope.dim if spec.rope else 0,
        rotary_interleaved=bool(spec.rope and spec.rope.interleaved),
        window=spec.window(layer),
        **shape_flags([row.name for row in inputs_of(spec)]),
    )


def norm_shape(spec: ModelSpec, rows: int = 3, **more: Any) -> NormShape:
    return NormShape(
        rows=rows,
        width=spec.hidden_size,
        eps=spec.norm.eps,
        weight_in_float=spec.norm.weight_in_float,
        dtype="fp16",
        **more,
    )


def changed(spec: ModelSpec, heads: int, kv_heads: int, head_dim: int, **attention: Any) -> ModelSpec:
    return replace(
        spec,
        hidden_size=heads * head_dim,
        max_positions=32768,
        layers=3,
        attention=replace(spec.attention, heads=heads, kv_heads=kv_heads, head_dim=head_dim, **attention),
    )


def tensors(shape: AttentionShape, *, device: str = "cuda", seed: int = 0) -> AttentionInputs:
    """The op's tensors, with caches half full."""
    g = torch.Generator().manual_seed(seed)
    dtype = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}[shape.dtype]

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(dtype).to(device)

    lengths = torch.randint(1, shape.slots - shape.tokens + 1, (shape.batch,), generator=g)
    angle = torch.randn(shape.batch, shape.tokens, shape.rotary_dim // 2, generator=g).to(device)
    cache = (shape.batch, shape.kv_heads, shape.capacity, shape.head_dim)
    return AttentionInputs(
        randn(shape.batch, shape.tokens, (shape.heads + 2 * shape.kv_heads) * shape.head_dim),
        randn(*cache),
        randn(*cache),
        lengths.to(device),
        (torch.rand(shape.batch, shape.slots, generator=g) < 0.9).to(device),
        angle.cos() if shape.rotary_dim else None,
        angle.sin() if shape.rotary_dim else None,
        torch.rand(shape.batch, shape.tokens, generator=g).to(device) if shape.has_query_scale else None,
        torch.rand(shape.heads, generator=g).to(device) if shape.has_alibi else None,
    )


def copied(inputs: AttentionInputs) -> AttentionInputs:
    return AttentionInputs(*(tensor if tensor is None else tensor.clone() for tensor in inputs))  # type: ignore[arg-type]


def facts_of(shape: AttentionShape, arithmetic: str = "exact") -> AttentionFacts:
    return AttentionFacts(shape.heads, shape.kv_heads, shape.scale, shape.rotary_interleaved, shape.window, arithmetic)
