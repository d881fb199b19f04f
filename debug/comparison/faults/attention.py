"""Faults of scores, masks, heads and the cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import ESTIMATED, Variants, fault
from debug.comparison.faults.rotation import join, split
from debug.comparison.modules import Module
from refmodels.positions import alibi_slopes, logn_table

# Scores and masks


def _is_context(m: Module) -> bool:
    return m.part == "attn.context"


@fault("wrong attention scale", "attention")
def attention_scale(m: Module, engine: Tensor) -> Variants:
    if not _is_context(m):
        return
    right, head_dim = m["scale"], m.decoder.spec.attention.head_dim
    hidden = m.decoder.spec.hidden_size
    known = {
        "missing": 1.0,
        "applied twice": right * right,
        "1/d instead of 1/sqrt(d)": 1.0 / head_dim,
        "sqrt of the hidden size": hidden**-0.5,
        "layer factor missing": m.decoder.spec.attention.scale,
        "layer factor applied": m.decoder.spec.attention.scale / ((m.layer or 0) + 1),
        "doubled": 2 * right,
        "halved": right / 2,
    }
    for detail, scale in known.items():
        if not math.isclose(scale, right):
            yield f"{detail}: {scale:.4g} instead of {right:.4g}", {"scale": scale}
    estimate = _minimize(lambda s: _distance(m(scale=right * s), engine), 0.25, 4.0)
    if abs(estimate - 1) > 1e-4:
        yield f"{right * estimate:.4g} instead of {right:.4g} {ESTIMATED}", {"scale": right * estimate}


@fault("causal mask missing", "attention")
def causal_missing(m: Module, _: Tensor) -> Variants:
    if _is_context(m) and m["qkv"].shape[1] > 1:
        yield "", {"causal": False}


@fault("padding mask ignored", "attention")
def padding_ignored(m: Module, _: Tensor) -> Variants:
    if _is_context(m) and not bool(m["visible"].all()):
        yield "", {"visible": torch.ones_like(m["visible"])}


@fault("sliding window", "attention")
def window(m: Module, _: Tensor) -> Variants:
    if _is_context(m):
        right = m["window"]
        if right:
            yield "missing", {"window": 0}
        widths = (right + 1, right - 1, right * 2, right // 2) if right else ()
        other = m.decoder.spec.attention.window
        for width in {*widths, other or 0} - {0, right}:
            yield f"{width} instead of {right or 'all'}", {"window": width}


@fault("ALiBi slopes or form", "attention")
def alibi(m: Module, engine: Tensor) -> Variants:
    if _is_context(m) and m["alibi_slopes"] is not None:
        slopes: Tensor = m["alibi_slopes"]
        heads = len(slopes)
        yield "missing", {"alibi_slopes": torch.zeros_like(slopes)}
        yield "sign reversed", {"alibi_slopes": -slopes}
        yield "in reverse order", {"alibi_slopes": slopes.flip(0)}
        for name, values in (
            ("of one geometric series", [2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)]),
            ("of the next power of two", alibi_slopes(2 ** math.ceil(math.log2(heads)))[:heads]),
            ("sorted", sorted(slopes.tolist(), reverse=True)),
        ):  # fmt: skip
            if not torch.allclose(made := torch.tensor(values).to(slopes), slopes):
                yield name, {"alibi_slopes": made}
        for factor in (0.5, 2.0, 1.0 / m["scale"], m["scale"]):
            yield f"x {factor:.4g}", {"alibi_slopes": slopes * factor}
        factor = _minimize(lambda f: _distance(m(alibi_slopes=slopes * f), engine), 0.1, 10.0)
        yield f"x {factor:.4g} {ESTIMATED}", {"alibi_slopes": slopes * factor}


@fault("logn scaling missing or wrong", "attention")
def logn(m: Module, _: Tensor) -> Variants:
    if _is_context(m) and (length := m.decoder.spec.attention.logn_seq_length) is not None:
        scale: Tensor = m["query_scale"]
        yield "missing", {"query_scale": torch.ones_like(scale)}
        yield "applied twice", {"query_scale": scale * scale}
        ids = m.forward.inputs.position_ids
        assert ids is not None
        table = logn_table(int(ids.max()) + 2, length).to(scale)
        for shift in (1, -1):
            yield f"positions off by {shift:+d}", {"query_scale": table[(ids.to(scale.device) + shift).clamp(min=0)]}
        last = int(ids.max())
        yield "of the last position for every token", {"query_scale": torch.full_like(scale, float(table[last]))}
        natural = torch.where(scale > 1, scale * math.log(length), scale)
        yield "natural logarithm", {"query_scale": natural}


@fault("grouped heads tiled instead of contiguous", "attention")
def gqa_tiled(m: Module, _: Tensor) -> Variants:
    heads, kv_heads = m["heads"], m["kv_heads"]
    if _is_context(m) and 1 < kv_heads < heads:
        # Query head h reads kv head h % kv_heads: move each head to where the contiguous rule gives it this kv head.
        order = torch.arange(heads).view(-1, kv_heads).t().flatten()
        query, key, value = split(m)

        def restore(context: Tensor) -> Tensor:
            by_head = context.view(*context.shape[:2], heads, -1)
            return by_head[:, :, order.argsort()].flatten(2)

        yield "", {"qkv": join(query[:, :, order], key, value), "after": restore}


@fault("heads reshaped in the wrong order", "attention")
def head_order(m: Module, _: Tensor) -> Variants:
    if _is_context(m):
        heads = m["heads"]

        def by_head(context: Tensor) -> Tensor:
            batch, tokens, width = context.shape
            return context.view(batch, tokens, heads, -1).transpose(1, 2).reshape(batch, tokens, width)

        def interleaved(context: Tensor) -> Tensor:
            turned: Tensor = context.unflatten(-1, (heads, -1)).transpose(-1, -2).flatten(-2)
            return turned

        yield "[heads, tokens] read as [tokens, heads]", {"after": by_head}
        yield "[head_dim, heads] instead of [heads, head_dim]", {"after": interleaved}


# The cache


def _cache(m: Module) -> str:
    return "value_cache" if m.part == "value" else "key_cache"


@fault("cache not updated", "attention")
def cache_stale(m: Module, _: Tensor) -> Variants:
    if m.part != "attn.context":
        before: Tensor = m[_cache(m)]
        yield "", {"after": lambda cache: before}


@fault("cache rows of the batch exchanged", "attention")
def cache_rows(m: Module, _: Tensor) -> Variants:
    batch = len(m["qkv"])
    if m.part != "attn.context" and batch > 1:
        for order in itertools.islice(itertools.permutations(range(batch)), 1, 24):
            yield f"{list(order)}", {"after": lambda cache, order=order: cache[list(order)]}


@fault("key and value caches exchanged", "attention")
def cache_exchanged(m: Module, _: Tensor) -> Variants:
    other = {"key": "value", "value": "key"}.get(m.part)
    if other is not None:
        yield "", {"part": other}


@fault("query, key and value in the wrong order", "attention")
def qkv_parts(m: Module, _: Tensor) -> Variants:
    if m["heads"] == m["kv_heads"]:
        parts = split(m)
        for order in itertools.permutations(range(3)):
            if order != (0, 1, 2):
                yield "".join("qkv"[i] for i in order), {"qkv": join(*(parts[i] for i in order))}


# Faults of a single number


def _distance(actual: Tensor, engine: Tensor) -> float:
    return float((actual - engine).norm())


def _minimize(f: Callable[[float], float], low: float, high: float, steps: int = 44) -> float:
    """Golden-section search for the factor with the smallest f, on a logarithmic scale."""
    golden = (math.sqrt(5) - 1) / 2
    a, b = math.log(low), math.log(high)
    x, y = b - golden * (b - a), a + golden * (b - a)
    fx, fy = f(math.exp(x)), f(math.exp(y))
    for _ in range(steps):
        if fx < fy:
            b, y, fy = y, x, fx
            x = b - golden * (b - a)
            fx = f(math.exp(x))
        else:
            a, x, fx = x, y, fy
            y = a + golden * (b - a)
            fy = f(math.exp(y))
    return math.exp((a + b) / 2)
