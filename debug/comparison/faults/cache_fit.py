"""Faults of the KV cache that are read off what the engine wrote: where it is, what became of it on the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import Fit, Variants, fault
from debug.comparison.faults.parts import FORMATS, order_name
from debug.comparison.faults.rotation import join, split
from debug.comparison.faults.sampled import Several, listed, numbers_of
from debug.comparison.modules import Module
from refmodels.dtypes import torch_name

_FARTHEST = 64

Change = Callable[[Tensor], Tensor]
"""A change of new keys or values, [batch, kv_heads, tokens, head_dim]."""


def is_cache(m: Module) -> bool:
    return m.part in ("key", "value")


def _slots(m: Module) -> tuple[Tensor, Tensor]:
    """Row index [batch, 1] and slots [batch, tokens] of the new tokens."""
    lengths = m["cache_lengths"]
    steps = torch.arange(m["qkv"].shape[1], device=lengths.device)
    return torch.arange(len(lengths), device=lengths.device)[:, None], lengths[:, None] + steps


def _new(m: Module, cache: Tensor) -> Tensor:
    """The new slots of a cache, [batch, tokens, kv_heads, head_dim]."""
    rows, slots = _slots(m)
    new: Tensor = cache[rows, :, slots]
    return new


def _on_new(m: Module, change: Change) -> dict[str, Any]:
    """`change` of the new keys or values, in place."""

    def after(cache: Tensor) -> Tensor:
        rows, slots = _slots(m)
        changed = cache.clone()
        changed[rows, :, slots] = change(_new(m, cache).transpose(1, 2)).transpose(1, 2).to(cache.dtype)
        return changed

    return {"after": after}


def _placed(m: Module, slots: Tensor, engine: Tensor | None = None) -> dict[str, Any]:
    """The new tokens at other slots [batch, tokens]; those outside the cache are lost.

    engine: its cache, if earlier tokens may lie in slots that were not visible yet.
    """

    def after(cache: Tensor) -> Tensor:
        before = m[f"{m.part}_cache"].to(cache.dtype)
        new = _new(m, cache)
        moved: Tensor = before.clone()
        rows, _ = _slots(m)
        if engine is not None:
            _take_late(moved, engine, m["cache_lengths"].tolist())
        for token in range(slots.shape[1]):
            inside = (slots[:, token] >= 0) & (slots[:, token] < cache.shape[2])
            row = rows[inside, 0]
            moved[row, :, slots[inside, token]] = new[row, token]
        return moved

    return {"after": after}


def _take_late(cache: Tensor, engine: Tensor, lengths: list[int]) -> None:
    """Where a row's first slot was left out, its last tokens lie behind those that were captured before this step."""
    for row, length in enumerate(lengths):
        if length and not bool(cache[row, :, 0].any()):
            cache[row, :, length : engine.shape[2]] = engine[row, :, length : cache.shape[2]].to(cache.dtype)


@fault("cache written at the wrong slot", "attention")
def wrong_slot(m: Module, engine: Tensor) -> Variants:
    """Distances, and slots that do not depend on the length, found by where the engine has what was to be written."""
    if not is_cache(m):
        return
    _, slots = _slots(m)
    live = min(engine.shape[2], m["visible"].shape[1])
    new = _new(m, m())
    tokens = slots.shape[1]
    real = m.forward.inputs.new_mask.to(engine.device)
    last = real.float().cumsum(1).argmax(1)
    rows = torch.arange(len(new), device=engine.device)
    # [batch, slots]: how near each slot is to the row's last new token.
    off = (engine[:, :, :live] - new[rows, last][:, :, None]).square().sum((1, 3))
    nearest = off.argmin(1)
    shifts = (nearest - slots[rows, last]).tolist()
    for by in sorted({1, -1, *(s for s in shifts if 0 < abs(s) <= _FARTHEST)}, key=abs):
        yield f"{by:+d}", _placed(m, slots + by, engine if by > 0 else None)
        yield f"{by:+d}, at most to the first", _placed(m, (slots + by).clamp(min=0))
    constant = set(nearest.tolist())
    if len(constant) == 1 and tokens == 1:
        at = constant.pop()
        yield f"slot {at} in every step", _placed(m, torch.full_like(slots, at))
    longest = m["cache_lengths"].max()
    yield "that of the longest row", _placed(m, slots - m["cache_lengths"][:, None] + longest)
    ids = m.forward.inputs.position_ids
    if ids is not None and ids.shape == slots.shape:
        yield "the position of the token instead of its slot", _placed(m, ids.to(slots.device))
    yield "in reverse order", _on_new(m, lambda x: x.flip(2))


@fault("cache holds another layer's tokens", "attention")
def other_layer(m: Module, _: Tensor) -> Variants:
    if not is_cache(m) or m.layer is None:
        return
    for layer in range(m.decoder.spec.layers):
        qkv = m.forward.tensors.get(f"blocks.{layer}.attn.qkv")
        if layer != m.layer and qkv is not None:
            yield f"those of layer {layer}", {"qkv": qkv.to(m["qkv"])}


@fault("cache not updated", "attention")
def not_written(m: Module, _: Tensor) -> Variants:
    if is_cache(m):
        yield "zeros are written", _on_new(m, torch.zeros_like)
        if m["qkv"].shape[1] > 1:
            yield "only the first new token is written", _on_new(m, partial(_keep, first=True))
            yield "only the last new token is written", _on_new(m, partial(_keep, first=False))


def _keep(x: Tensor, first: bool) -> Tensor:
    kept = torch.zeros_like(x)
    at = 0 if first else -1
    kept[:, :, at] = x[:, :, at]
    return kept


@fault("key and value caches exchanged", "attention")
def exchanged(m: Module, _: Tensor) -> Variants:
    if is_cache(m):
        query, key, value = split(m)
        if m["cos"] is not None:
            yield "before the rotation", {"qkv": join(query, value, key)}
        if m["heads"] == m["kv_heads"]:
            yield "the query is written", {"qkv": join(query, query, query)}


def _rows(m: Module, engine: Tensor) -> tuple[Tensor, Tensor] | None:
    """The right new tokens and those that the engine wrote, [real tokens, kv_heads, head_dim]."""
    real = m.forward.inputs.new_mask.to(engine.device)
    _, slots = _slots(m)
    if not is_cache(m) or int(slots.max()) >= engine.shape[2]:
        return None
    return _new(m, m().double())[real], _new(m, engine)[real]


@fault("written to the cache scaled or permuted", "attention")
def written(m: Module, engine: Tensor) -> Variants:
    found = _rows(m, engine)
    if found is None:
        return
    right, wrong = found
    one = float((right * wrong).sum() / right.square().sum().clamp(min=1e-300))
    scaled: Callable[[float], dict[str, Any]] = lambda f: _on_new(m, lambda x: x * f)  # noqa: E731
    yield Fit(words="scaled by {}", value=one, changes=scaled), scaled(one)
    heads = right.shape[1]
    if heads > 1:
        factors = (right * wrong).sum((0, 2)) / right.square().sum((0, 2)).clamp(min=1e-300)
        off = ((factors - 1).abs() > 1e-3).nonzero().flatten().tolist()
        each = factors[:, None, None]
        if len(off) == 1:
            at = off[0]
            zero = abs(float(factors[at])) < 1e-3
            words = f"head {at} is zero" if zero else f"head {at} scaled by {float(factors[at]):.4g}"
            alone = torch.ones_like(each)
            alone[at] = 0.0 if zero else factors[at]
            yield Fit(words=words, numbers=1 if zero else 2, key="one head"), _on_new(m, lambda x: x * alone)

        def by_head(value: float) -> dict[str, Any]:
            return _on_new(m, lambda x: x * numbers_of(value, each))

        words = f"heads scaled by {listed(factors)}"
        yield Fit(words=words, value=Several(each), numbers=heads, key="per head", changes=by_head), by_head(0.0)
        for order in itertools.islice(itertools.permutations(range(heads)), 1, 24):
            yield f"heads in the order {list(order)}", _on_new(m, lambda x, order=order: x[:, list(order)])  # type: ignore[misc]
    yield from _channels(m, right.flatten(0, 1), wrong.flatten(0, 1))


def _channels(m: Module, right: Tensor, wrong: Tensor) -> Variants:
    """Channels scaled or permuted; right, wrong: [tokens * kv_heads, head_dim]."""
    dim = right.shape[1]
    factors = Several((right * wrong).sum(0) / right.square().sum(0).clamp(min=1e-300))

    def scaled(value: float) -> dict[str, Any]:
        return _on_new(m, lambda x: x * numbers_of(value, factors.numbers))

    words = f"channels scaled by {listed(factors.numbers)}"
    yield Fit(words=words, value=factors, numbers=dim, key="per channel", changes=scaled), scaled(factors)
    order = Several(torch.cdist(wrong.t(), right.t()).argmin(1))

    def permuted(value: float) -> dict[str, Any]:
        return _on_new(m, lambda x: x[..., numbers_of(value, order.numbers)])

    named = order_name(order.numbers.cpu())
    words = f"channels permuted{'' if named is None else ': ' + named}"
    numbers = dim if named is None else 1
    yield Fit(words=words, value=order, numbers=numbers, key="permuted", changes=permuted), permuted(order)


@fault("cache stored in a narrower type", "attention", rare=True)
def narrow(m: Module, engine: Tensor) -> Variants:
    """The narrowest first; the type's own scale, if there is one, is that of the engine's largest number."""
    found = _rows(m, engine)
    if found is None:
        return
    _, wrong = found
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        yield dtype, _on_new(m, FORMATS[dtype])
        for bits in (3, 2):
            if (dtype, bits) in (("float8_e4m3fn", 3), ("float8_e5m2", 2)):
                yield f"{dtype} without its range", _on_new(m, partial(_mantissa, bits=bits))
    step = _step(wrong)
    rounding: Callable[[float], dict[str, Any]] = lambda step: _on_new(m, lambda x: _stepped(x, step))  # noqa: E731
    yield Fit(words="int8 in steps of {}, one scale for all", value=step, changes=rounding, least=1e-12), rounding(step)
    for span, axes in (("head", (0, 2, 3)), ("token and head", (3,)), ("channel", (0, 1, 2))):
        yield f"int8, a scale per {span}", _on_new(m, partial(_scaled, axes=axes))
    for dtype in ("bfloat16", "float16"):
        if getattr(torch, dtype) != engine.dtype:
            yield torch_name(getattr(torch, dtype)), _on_new(m, FORMATS[dtype])


def _mantissa(x: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.round(mantissa * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent)


def _step(wrong: Tensor) -> float:
    """The distance of the grid on which the engine's numbers lie."""
    levels = wrong.flatten().abs().unique()
    gaps = levels.diff()
    gaps = gaps[gaps > float(levels.max()) * 1e-4]
    if not len(gaps):
        return 1.0
    step = gaps.min()
    for _ in range(2):
        # All levels together tell the step better than the nearest two.
        count = (wrong / step).round()
        step = (count * wrong).sum() / count.square().sum().clamp(min=1e-300)
    return max(float(step), 1e-12)


def _stepped(x: Tensor, step: float | Tensor) -> Tensor:
    steps: Tensor = (x / step).round().clamp(-128, 127) * step
    return steps


def _scaled(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """x [batch, kv_heads, tokens, head_dim] rounded to int8 with a scale of max / 127 over `axes`."""
    return _stepped(x, x.abs().amax(axes, keepdim=True).clamp(min=1e-12) / 127.0)
