"""The two operations that plugins replace, each defined once.

`fused_rms_norm` and `cached_attention` are `torch.library` custom ops (`refmodels::*`) whose eager body is the
reference mathematics.  The decoder calls these and nothing else for RMSNorm and attention, so the reference, the ONNX
function bodies, the plugins and their kernels all have this file to agree with.

Importing `trt_runtime.kernels.torch_host`, as `TorchEngine(kernels=True)` does, registers Triton kernels as the ops'
implementation for CUDA tensors; they run only inside its `use_kernels()`, everywhere else the bodies here do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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


class Positions(NamedTuple):
    """Where the tokens of a step are: the inputs of `cached_attention` that all layers share, described there."""

    cache_lengths: Tensor
    visible: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None
    query_scale: Tensor | None = None
    alibi_slopes: Tensor | None = None


def cached_attention(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    visible: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query_scale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    rotary_interleaved: bool = False,
    window: int = 0,
    arithmetic: str = "exact",
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Position encoding, cache write, masking, grouped-query attention: everything between two projections.

    Args:
        qkv: [batch, tokens, (heads + 2 * kv_heads) * head_dim], the fused projection, rows [query | key | value].
        key_cache, value_cache: [batch, kv_heads, capacity, head_dim], dtype of qkv, or int8 or float8_e4m3fn with
            `key_scale` and `value_scale`; **updated in place**.
        cache_lengths: [batch] int64; token s of row b goes to slot cache_lengths[b] + s, which must be < capacity.
        visible: [batch, slots] bool, slots >= max(cache_lengths) + tokens; False hides a slot (padding).
        cos, sin: [batch, tokens, rotary_dim / 2]; the first rotary_dim elements of query and key are rotated in the
            dtype of these tables and cast back.  Keys are cached rotated.
        query_scale: [batch, tokens], multiplies the rotated query, never the key (Qwen's logn).
        alibi_slopes: [heads]; adds slope * (key slot - query slot) to the scores.
        heads, kv_heads: query head h reads kv head h // (heads // kv_heads).
        scale: factor on query . key.
        rotary_interleaved: rotate pairs (0,1),(2,3).. instead of (i, i + rotary_dim/2).
        window: keys visible to a query, self included; 0 for all.
        arithmetic: "exact" keeps everything from rotation to context in fp32 (fp64 for fp64) and rounds once, and the
            cached key once.  The others repeat an upstream implementation in half precision: "sdpa"; "eager_multiply" /
            "eager_divide" (score rounded, then scaled by a product / quotient; softmax in the working dtype), the same
            with "_float32" (softmax in fp32), and "eager_upcast" (scores and softmax in fp32).  There ALiBi has
            upstream's absolute form, slope * key slot.
        key_scale, value_scale: [kv_heads], of a quantized cache (`refmodels.quantization.arithmetic.quantize_cache`):
            rotated keys and values are rounded to codes as they are written, and every query, also of the same step,
            sees code * scale.
    Returns:
        context [batch, tokens, heads * head_dim] in the dtype of qkv, and the two caches.  The context of a query that
        sees no key is 0 by definition.
    """
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _attention_body(
            qkv, key_cache, value_cache, cache_lengths, visible, cos, sin, query_scale, alibi_slopes,
            heads, kv_heads, scale, rotary_interleaved, window, arithmetic, key_scale, value_scale, in_place=False,
        )  # fmt: skip
    context: Tensor = torch.ops.refmodels.cached_attention(
        qkv, key_cache, value_cache, cache_lengths, visible, cos, sin, query_scale, alibi_slopes,
        heads, kv_heads, scale, rotary_interleaved, window, arithmetic, key_scale, value_scale,
    )  # fmt: skip
    return context, key_cache, value_cache


def _attention_body(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    visible: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    rotary_interleaved: bool,
    window: int,
    arithmetic: str,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    head_dim = width // (heads + 2 * kv_heads)
    dtype = qkv.dtype
    exact = arithmetic == "exact"
    query, key, value = torch.split(qkv.view(batch, tokens, -1, head_dim), [heads, kv_heads, kv_heads], 2)
    if exact:
        query = query.to(wide_dtype(dtype))
    if cos is not None and sin is not None:
        query = rotate(query, cos, sin, rotary_interleaved)
        key = rotate(key, cos, sin, rotary_interleaved)
    if query_scale is not None:
        query = query * query_scale[:, :, None, None]

    slots = cache_lengths[:, None] + torch.arange(tokens, device=qkv.device)
    where = (torch.arange(batch, device=qkv.device)[:, None], slice(None), slots)
    if not in_place:
        key_cache, value_cache = key_cache.clone(), value_cache.clone()
    _store(key_cache, where, key, key_scale)
    _store(value_cache, where, value, value_scale)

    live = visible.shape[1]
    key_slot = torch.arange(live, device=qkv.device)
    seen = (key_slot <= slots[:, :, None]) & visible[:, None, :]
    if window:
        seen &= key_slot > slots[:, :, None] - window
    seen = seen[:, None]

    query = query.transpose(1, 2)
    group = heads // kv_heads
    keys = _live(key_cache, live, key_scale, query.dtype)
    values = _live(value_cache, live, value_scale, query.dtype)
    if group > 1:
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    if arithmetic == "sdpa":
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale)
    else:
        upcast = torch.float32 if arithmetic == "eager_upcast" else query.dtype
        scores = query.to(upcast) @ keys.to(upcast).transpose(-1, -2)
        # x / sqrt(d) and x * (1 / sqrt(d)) round differently where sqrt(d) is no power of two.
        scores = scores / (1.0 / scale) if "divide" in arithmetic else scores * scale
        if alibi_slopes is not None:
            distance = key_slot - slots[:, None, :, None] if exact else key_slot
            scores = scores + (alibi_slopes[:, None, None] * distance).to(scores.dtype)
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


def _fake_attention(qkv: Tensor, *rest: Tensor | float | str | None) -> Tensor:
    heads, kv_heads = rest[8], rest[9]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[-1] // (heads + 2 * kv_heads) * heads))


# Not through the torch.library.custom_op decorator: its first call imports torch._dynamo, 0.7 s in every command.
_LIBRARY = torch.library.Library("refmodels", "DEF")
_LIBRARY.define("fused_rms_norm(Tensor x, Tensor weight, float eps, bool weight_in_float) -> Tensor")
_LIBRARY.define(
    "cached_attention(Tensor qkv, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_lengths, Tensor visible, "
    "Tensor? cos, Tensor? sin, Tensor? query_scale, Tensor? alibi_slopes, int heads, int kv_heads, float scale, "
    "bool rotary_interleaved, int window, str arithmetic, Tensor? key_scale=None, Tensor? value_scale=None) -> Tensor"
)
_LIBRARY.impl("fused_rms_norm", _rms_norm_body, "CompositeExplicitAutograd")
_LIBRARY.impl(
    "cached_attention", lambda *inputs: _attention_body(*inputs, in_place=True)[0], "CompositeExplicitAutograd"
)
torch.library.register_fake(
    "refmodels::fused_rms_norm", lambda x, weight, eps, weight_in_float: torch.empty_like(x), lib=_LIBRARY
)
torch.library.register_fake("refmodels::cached_attention", _fake_attention, lib=_LIBRARY)


def rope_rows(position_ids: Tensor, ntk_table: Tensor, positions: int) -> Tensor:
    """Rows of the stacked NTK tables: [batch, tokens] from position_ids [batch, tokens] and ntk_table [batch]."""
    return position_ids + ntk_table[:, None] * positions


def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, n]]: [batch, n, hidden] from x [batch, tokens, hidden] and index [batch, n] int64."""
    # Not torch.take_along_dim: torch.export fixes its sizes.
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))
