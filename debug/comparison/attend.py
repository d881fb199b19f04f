"""Attention in single steps, each of which a hypothesis can change: what is read and seen, scores, probabilities.

It is the mathematics of `refmodels.ops.cached_attention` in exact numerics, written out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from refmodels.attention import AttentionFacts, AttentionInputs
from refmodels.ops import cached_attention, rotate
from refmodels.quantization.arithmetic import dequantize_cache


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The factors of attention.

    query: [batch, heads, tokens, head_dim], rotated and scaled by logn.  key, value: [batch, kv_heads, slots,
    head_dim], the live slots after the step.  slot [slots], query_slot [batch, tokens, 1], visible [batch, 1, slots].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    slot: Tensor
    query_slot: Tensor
    visible: Tensor

    def causal(self, window: int) -> Tensor:
        """[batch, tokens, slots] bool: what each query should see."""
        seen = (self.slot <= self.query_slot) & self.visible
        return seen & (self.slot > self.query_slot - window) if window else seen


def parts_of(given: AttentionInputs, facts: AttentionFacts) -> Parts:
    """The caches of `given` are not changed."""
    qkv = given.qkv
    given = given._replace(key_cache=given.key_cache.clone(), value_cache=given.value_cache.clone())
    cached_attention(given, facts)
    batch, tokens, width = qkv.shape
    head_dim = width // (facts.heads + 2 * facts.kv_heads)
    query = qkv.view(batch, tokens, -1, head_dim)[:, :, : facts.heads]
    if given.cos is not None and given.sin is not None:
        query = rotate(query, given.cos, given.sin, facts.rotary_interleaved)
    if given.query_scale is not None:
        query = query * given.query_scale[:, :, None, None]
    live = given.visible.shape[1]
    caches = []
    for cache, scale in ((given.key_cache, given.key_scale), (given.value_cache, given.value_scale)):
        part = cache[:, :, :live]
        caches.append(part.to(qkv.dtype) if scale is None else dequantize_cache(part, scale, qkv.dtype))
    steps = torch.arange(tokens, device=qkv.device)
    return Parts(
        query=query.transpose(1, 2),
        key=caches[0],
        value=caches[1],
        slot=torch.arange(live, device=qkv.device),
        query_slot=(given.cache_lengths[:, None] + steps)[:, :, None],
        visible=given.visible[:, None],
    )


def attend(
    given: AttentionInputs,
    facts: AttentionFacts,
    *,
    read: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    seen: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    scores: Callable[[Tensor], Tensor] | None = None,
    weights: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The context [batch, tokens, heads * head_dim].

    Args:
        read: from the key and value of the live slots [batch, kv_heads, slots, head_dim] to what is read instead; with
            the number of query heads on axis 1, each head has its own.
        seen: from key slots [slots], query slots [batch, tokens, 1] and visible [batch, 1, slots] to what each query
            sees [batch, tokens, slots]; the window no longer counts.
        scores: of the scaled and biased scores [batch, heads, tokens, slots].
        weights: from those scores, -inf where hidden, and what is seen [batch, 1, tokens, slots] to the probabilities.
    """
    parts = parts_of(given, facts)
    key, value = (parts.key, parts.value) if read is None else read(parts.key, parts.value)
    shown = (parts.causal(facts.window) if seen is None else seen(parts.slot, parts.query_slot, parts.visible))[:, None]
    if key.shape[1] < facts.heads:
        key = key.repeat_interleave(facts.heads // key.shape[1], 1)
    if value.shape[1] < facts.heads:
        value = value.repeat_interleave(facts.heads // value.shape[1], 1)
    score = parts.query @ key.transpose(-1, -2) * facts.scale
    if given.alibi_slopes is not None:
        distance = parts.slot - parts.query_slot[:, None]
        score = score + given.alibi_slopes[:, None, None].to(score.dtype) * distance
    if scores is not None:
        score = scores(score)
    score = score.masked_fill(~shown, float("-inf"))
    found = (
        score.softmax(-1).masked_fill(~shown.any(-1, keepdim=True), 0.0) if weights is None else weights(score, shown)
    )
    return (found.to(value.dtype) @ value).transpose(1, 2).flatten(2)
