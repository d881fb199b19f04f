"""A few queries of a wrong attention module, on which its scores, masks and heads are fitted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from debug.comparison.attend import Parts, parts_of
from debug.comparison.modules import Module
from refmodels.attention import ATTENTION_INPUTS, AttentionFacts, AttentionInputs

_NUMBERS = 1 << 23
"""Largest number of elements in [queries, heads, slots, head_dim]: 64 MB in fp64."""
_MOST = 24
_WRONG = 1e-3
"""A token whose error is below this part of the largest teaches little."""


class Several(float):
    """Several fitted numbers in place of one: what a `Fit` found in one forward is planted in the others."""

    numbers: Tensor

    def __new__(cls, numbers: Tensor) -> Several:
        made = super().__new__(cls, float(numbers.flatten()[0]))
        made.numbers = numbers
        return made


def numbers_of(value: float, otherwise: Tensor) -> Tensor:
    return value.numbers if isinstance(value, Several) else otherwise


def listed(numbers: Tensor) -> str:
    """The first few of them."""
    first = ", ".join(f"{x:.4g}" for x in numbers[:8].tolist())
    return f"[{first}, …]" if len(numbers) > 8 else f"[{first}]"


def is_context(m: Module) -> bool:
    return m.part == "attn.context"


def parts(m: Module) -> Parts:
    given = AttentionInputs(**{row.name: m[row.name] for row in ATTENTION_INPUTS})
    facts = {name: m[name] for name in AttentionFacts.__dataclass_fields__}
    return parts_of(given, AttentionFacts(**facts))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Queries that the engine computes wrongly.

    row, token [queries]: where they are.  scores [queries, heads, slots]: scaled and biased.  query [queries, heads,
    head_dim].  key, value [queries, kv_heads, slots, head_dim].  shown, visible [queries, slots].  slot [queries]: the
    query's own.  engine [queries, heads, head_dim]: its context.
    """

    row: Tensor
    token: Tensor
    scores: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    shown: Tensor
    visible: Tensor
    slot: Tensor
    engine: Tensor
    scale: float

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @cached_property
    def values(self) -> Tensor:
        """[queries, heads, slots, head_dim]: the value head of each query head."""
        return self.value.repeat_interleave(self.group, 1)

    def weights(self, scores: Tensor) -> Tensor:
        shown = self.shown[:, None]
        masked = scores.masked_fill(~shown, float("-inf"))
        return masked.softmax(-1).masked_fill(~shown.any(-1, keepdim=True), 0.0)

    def context(self, weights: Tensor) -> Tensor:
        return (weights[:, :, None] @ self.values)[:, :, 0]

    def error(self, scores: Tensor) -> float:
        return float((self.context(self.weights(scores)) - self.engine).norm())

    def errors(self, scores: Tensor, axis: int) -> Tensor:
        """Per query (axis 0) or per head (axis 1)."""
        off = (self.context(self.weights(scores)) - self.engine).square().sum(-1)
        return off.sum(1 - axis)


def sample(m: Module, engine: Tensor) -> Sample | None:
    """None: there is no real query."""
    made = parts(m)
    heads, kv_heads = m["heads"], m["kv_heads"]
    real = m.forward.inputs.new_mask.to(engine.device)
    off = (m() - engine).norm(dim=-1) * real
    wrong = ((off > _WRONG * off.max()) & real).nonzero() if float(off.max()) > 0 else real.nonzero()
    if not len(wrong):
        return None
    slots, dim = made.key.shape[2:]
    most = max(4, min(_MOST, _NUMBERS // (heads * slots * dim)))
    # The last ones of each row see the most keys.
    index = torch.linspace(0, len(wrong) - 1, min(most, len(wrong)), device=wrong.device).round().long()
    row, token = wrong[index].unbind(1)
    query = made.query[row, :, token]
    key, value = made.key[row], made.value[row]
    slot = made.query_slot[row, token, 0]
    scores = (query[:, :, None] @ key.repeat_interleave(heads // kv_heads, 1).transpose(-1, -2))[:, :, 0] * m["scale"]
    if m["alibi_slopes"] is not None:
        scores = scores + m["alibi_slopes"][:, None].to(scores) * (made.slot - slot[:, None])[:, None]
    right = made.causal(m["window"])[row, token]
    seen = right
    if m["seen"] is not None:
        # A mask may be the same for all tokens, or for all rows.
        masked = m["seen"](made.slot, made.query_slot, made.visible)
        seen = masked.expand(*made.query_slot.shape[:2], masked.shape[-1])[row, token]
    return Sample(
        row=row,
        token=token,
        scores=scores,
        query=query,
        key=key,
        value=value,
        shown=seen,
        visible=made.visible[row, 0],
        slot=slot,
        engine=engine[row, token].unflatten(-1, (heads, -1)),
        scale=m["scale"],
    )


def least(f: Callable[[Tensor], Tensor], count: int, low: float, high: float, device: torch.device) -> Tensor:
    """The places [count] of the smallest f, each on its own, on a logarithmic scale; f: [count] to [count]."""
    points = 24
    ends = math.log(low), math.log(high)
    grid = torch.linspace(*ends, points + 1, dtype=torch.float64, device=device)
    values = torch.stack([f(x.exp().expand(count)) for x in grid])
    best = values.argmin(0)
    a, b = grid[(best - 1).clamp(min=0)], grid[(best + 1).clamp(max=points)]
    golden = (math.sqrt(5) - 1) / 2
    x, y = b - golden * (b - a), a + golden * (b - a)
    fx, fy = f(x.exp()), f(y.exp())
    for _ in range(36):
        left = fx < fy
        a, b = torch.where(left, a, x), torch.where(left, y, b)
        tried = torch.where(left, b - golden * (b - a), a + golden * (b - a))
        value = f(tried.exp())
        x, y = torch.where(left, tried, y), torch.where(left, x, tried)
        fx, fy = torch.where(left, value, fy), torch.where(left, fx, value)
    return ((a + b) / 2).exp()
