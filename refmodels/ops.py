"""The two operations that plugins replace, each defined once.

`fused_rms_norm` and `cached_attention` are `torch.library` custom ops (`refmodels::*`) whose eager body is the
reference mathematics.  The decoder calls these and nothing else for RMSNorm and attention, so the reference, the ONNX
function bodies, the plugins and their kernels all have this file to agree with.

Importing `trt_runtime.kernels.torch_host`, as `TorchEngine(kernels=True)` does, registers Triton kernels as the ops'
implementation for CUDA tensors; they run only inside its `use_kernels()`, everywhere else the bodies here do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refmodels.attention import AttentionFacts, AttentionInputs, from_torch, to_torch, torch_schema
from refmodels.dtypes import wide_dtype
from refmodels.quantization.arithmetic import dequantize_cache, quantize_cache


def fused_rms_norm(x: Tensor, weight: Tensor, *, eps: float, weight_in_float: bool) -> Tensor:
    """x / rms(x) * weight over the last axis (Zhang & Sennrich, arXiv:1910.07467).

    Args:
        x: [..., hidden], any float dtype; mean and product are fp32 (fp64 for fp64).
        weight: [hidden], dtype of x.
        eps: added to the mean of squares.
        weight_in_float: multiply by the weight before casting back (ChatGLM2) instead of after.
    Returns: tensor like x.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _rms_norm_body(x, weight, eps, weight_in_float)
    result: Tensor = torch.ops.refmodels.fused_rms_norm(x, weight, eps, weight_in_float)
    return result


def _rms_norm_body(x: Tensor, weight: Tensor, eps: float, weight_in_float: bool) -> Tensor:
    wide = x.to(wide_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight_in_float:
        return (normed * weight).to(x.dtype)
    return normed.to(x.dtype) * weight


def cached_attention(inputs: AttentionInputs, facts: AttentionFacts) -> tuple[Tensor, Tensor, Tensor]:
    """Position encoding, cache write, masking, grouped-query attention: everything between two projections.

    Args:
        inputs: tensors, shapes and dtypes as in `refmodels.attention.ATTENTION_INPUTS`; the caches are **updated in
            place**, and cos and sin rotate in their own dtype, after which keys are cast back and cached rotated.
        facts: what is fixed in the layer.
    Returns:
        context [batch, tokens, heads * head_dim] in the dtype of qkv, and the two caches.  The context of a query that
        sees no key is 0 by definition.
    """
    if torch.is_grad_enabled() and inputs.qkv.requires_grad:
        return attention_body(inputs, facts, in_place=False)
    context: Tensor = torch.ops.refmodels.cached_attention(*to_torch(inputs, facts))
    return context, inputs.key_cache, inputs.value_cache


def attention_body(inputs: AttentionInputs, facts: AttentionFacts, *, in_place: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`cached_attention` itself, for tensors of any device; `in_place` False updates copies of the caches."""
    qkv, key_cache, value_cache, cos, sin = inputs.qkv, inputs.key_cache, inputs.value_cache, inputs.cos, inputs.sin
    heads, kv_heads, scale, arithmetic = facts.heads, facts.kv_heads, facts.scale, facts.arithmetic
    batch, tokens, width = qkv.shape
    head_dim = width // (heads + 2 * kv_heads)
    dtype = qkv.dtype
    exact = arithmetic == "exact"
    query, key, value = torch.split(qkv.view(batch, tokens, -1, head_dim), [heads, kv_heads, kv_heads], 2)
    if exact:
        query = query.to(wide_dtype(dtype))
    if cos is not None and sin is not None:
        query = rotate(query, cos, sin, facts.rotary_interleaved)
        key = rotate(key, cos, sin, facts.rotary_interleaved)
    if inputs.query_scale is not None:
        query = query * inputs.query_scale[:, :, None, None]

    slots = inputs.cache_lengths[:, None] + torch.arange(tokens, device=qkv.device)
    where = (torch.arange(batch, device=qkv.device)[:, None], slice(None), slots)
    if not in_place:
        key_cache, value_cache = key_cache.clone(), value_cache.clone()
    _store(key_cache, where, key, inputs.key_scale)
    _store(value_cache, where, value, inputs.value_scale)

    live = inputs.visible.shape[1]
    key_slot = torch.arange(live, device=qkv.device)
    seen = (key_slot <= slots[:, :, None]) & inputs.visible[:, None, :]
    if facts.window:
        seen &= key_slot > slots[:, :, None] - facts.window
    seen = seen[:, None]

    query = query.transpose(1, 2)
    group = heads // kv_heads
    keys = _live(key_cache, live, inputs.key_scale, query.dtype)
    values = _live(value_cache, live, inputs.value_scale, query.dtype)
    if group > 1:
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    if arithmetic == "sdpa":
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale)
    else:
        upcast = torch.float32 if arithmetic == "eager_upcast" else query.dtype
        scores = query.to(upcast) @ keys.to(upcast).transpose(-1, -2)
        # x / sqrt(d) and x * (1 / sqrt(d)) round differently where sqrt(d) is no power of two.
        scores = scores / (1.0 / scale) if "divide" in arithmetic else scores * scale
        if inputs.alibi_slopes is not None:
            distance = key_slot - slots[:, None, :, None] if exact else key_slot
            scores = scores + (inputs.alibi_slopes[:, None, None] * distance).to(scores.dtype)
        scores = scores.masked_fill(~seen, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32) if "float32" in arithmetic else scores.softmax(-1)
        weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        context = weights.to(query.dtype) @ values
    return context.transpose(1, 2).reshape(batch, tokens, -1).to(dtype), key_cache, value_cache


def _store(cache: Tensor, where: Any, new: Tensor, scale: Tensor | None) -> None:
    if scale is None:
        cache[where] = new
        return
    codes = quantize_cache(new, scale, "int8" if cache.dtype == torch.int8 else "fp8")
    # As bytes: torch cannot put float8 elements at indices.
    cache.view(torch.int8)[where] = codes.view(torch.int8)


def _live(cache: Tensor, slots: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    cached = cache[:, :, :slots]
    return cached.to(dtype) if scale is None else dequantize_cache(cached, scale, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] elements of every head.

    Args:
        x: [batch, tokens, heads, head_dim]; cos, sin: [batch, tokens, rotary_dim / 2].
    Returns: tensor like x; the rotation itself runs in the promoted dtype of x and the tables.
    """
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotary_dim = 2 * cos.shape[-1]
    rotary, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = rotary.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def _fake_attention(*arguments: Any) -> Tensor:
    (qkv, *_), facts = from_torch(*arguments)
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[-1] // (facts.heads + 2 * facts.kv_heads) * facts.heads))


# Not through the torch.library.custom_op decorator: its first call imports torch._dynamo, 0.7 s in every command.
_LIBRARY = torch.library.Library("refmodels", "DEF")
_LIBRARY.define("fused_rms_norm(Tensor x, Tensor weight, float eps, bool weight_in_float) -> Tensor")
_LIBRARY.define(torch_schema("cached_attention"))
_LIBRARY.impl("fused_rms_norm", _rms_norm_body, "CompositeExplicitAutograd")
_LIBRARY.impl(
    "cached_attention",
    lambda *arguments: attention_body(*from_torch(*arguments), in_place=True)[0],
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "refmodels::fused_rms_norm", lambda x, weight, eps, weight_in_float: torch.empty_like(x), lib=_LIBRARY
)
torch.library.register_fake("refmodels::cached_attention", _fake_attention, lib=_LIBRARY)


def split_qkv(qkv: Tensor, query: int, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of qkv [batch, tokens, query + 2 * key], of these widths."""
    queries, keys, values = qkv.split([query, key, key], -1)
    return queries, keys, values


def join_qkv(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The inverse of `split_qkv`."""
    return torch.cat((query, key, value), -1)


def by_head(x: Tensor, head_dim: int) -> Tensor:
    """[batch, tokens, heads, head_dim] from x [batch, tokens, heads * head_dim]."""
    heads: Tensor = x.unflatten(-1, (-1, head_dim))
    return heads


def heads_in_a_row(x: Tensor) -> Tensor:
    """The inverse of `by_head`."""
    return x.flatten(2)


def rope_rows(position_ids: Tensor, ntk_table: Tensor, positions: int) -> Tensor:
    """Rows of the stacked NTK tables: [batch, tokens] from position_ids [batch, tokens] and ntk_table [batch]."""
    return position_ids + ntk_table[:, None] * positions


def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, n]]: [batch, n, hidden] from x [batch, tokens, hidden] and index [batch, n] int64."""
    # Not torch.take_along_dim: torch.export fixes its sizes.
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))
