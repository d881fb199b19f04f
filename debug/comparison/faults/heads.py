"""Faults of what attention reads: which head, which slots, whose cache; and of single heads of the context."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import Fit, Variants, fault
from debug.comparison.faults.sampled import Sample, Several, is_context, listed, numbers_of, sample
from debug.comparison.modules import Module
from refmodels.quantization.arithmetic import dequantize_cache

_PAIRED = ("keys and values", "values", "keys")
_LAYERS = 32
"""Number of other layers whose caches are tried, the nearest first."""


def _only(what: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A change of what is read, for the key, the value or both."""

    def read(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return (
            change(key) if what in ("keys", "keys and values") else key,
            change(value) if what in ("values", "keys and values") else value,
        )

    return {"read": read}


@fault("query heads read other key and value heads", "attention")
def mapping(m: Module, engine: Tensor) -> Variants:
    """For every query head, the kv head that fits it best."""
    found = sample(m, engine) if is_context(m) and m["kv_heads"] > 1 else None
    if found is None:
        return
    right = torch.arange(m["heads"], device=engine.device) // found.group
    for what in _PAIRED:
        order = _mapping(found, what)
        if not torch.equal(order, right):
            words = f"{what} of heads {_spelled(order, right, m['kv_heads'])} instead of {_numbers(right)}"
            yield words, _only(what, lambda cache, order=order: cache[:, order])  # type: ignore[misc]


def _numbers(order: Tensor) -> str:
    return str(order.tolist())


def _spelled(order: Tensor, right: Tensor, kv_heads: int) -> str:
    for by in (1, -1):
        if torch.equal(order, (right + by) % kv_heads):
            return f"{_numbers(order)} (off by {'one' if by == 1 else 'minus one'})"
    if torch.equal(order, torch.arange(len(order), device=order.device) % kv_heads):
        return f"{_numbers(order)} (tiled)"
    return _numbers(order)


def _mapping(found: Sample, what: str) -> Tensor:
    heads, kv_heads = found.query.shape[1], found.key.shape[1]
    errors = []
    for g in range(kv_heads):
        scores, values = found.scores, found.values
        if what != "values":
            # The bias of ALiBi belongs to the query head and stays.
            own = (found.query[:, :, None] @ found.key.repeat_interleave(found.group, 1).transpose(-1, -2))[:, :, 0]
            other = (found.query[:, :, None] @ found.key[:, g, None].transpose(-1, -2))[:, :, 0]
            scores = scores + (other - own) * found.scale
        if what != "keys":
            values = found.value[:, g, None].expand(-1, heads, -1, -1)
        context = (found.weights(scores)[:, :, None] @ values)[:, :, 0]
        errors.append((context - found.engine).square().sum((0, 2)))
    return torch.stack(errors).argmin(0)


@fault("attention reads the wrong slots", "attention")
def slots_read(m: Module, _: Tensor) -> Variants:
    if not is_context(m):
        return
    lengths = m["cache_lengths"]
    live = m["visible"].shape[1]
    new = torch.arange(live, device=lengths.device) >= lengths[:, None]
    moves: dict[str, Callable[[Tensor], Tensor]] = {}
    for by in (1, 2, 3, 4):
        moves[f"shifted by +{by}: slot s reads slot s + {by}"] = partial(torch.roll, shifts=-by, dims=2)
        moves[f"shifted by -{by}: slot s reads slot s - {by}"] = partial(torch.roll, shifts=by, dims=2)
        if by < live:
            moves[f"shifted by +{by} with zeros behind"] = partial(_moved, by=by)
            moves[f"shifted by -{by} with zeros before"] = partial(_moved, by=-by)
    moves["in reverse order"] = lambda x: x.flip(2)
    moves["the new slots are still empty (stale cache)"] = lambda x: x.masked_fill(new[:, None, :, None], 0.0)
    moves["the last slot for all"] = lambda x: x[:, :, -1:].expand_as(x)
    for what, (detail, move) in itertools.product(_PAIRED, moves.items()):
        # Without differences among the keys the weights are equal, which has a plainer name.
        if what != "values" and detail == "the last slot for all":
            continue
        yield f"{what} {detail}", _only(what, move)


def _moved(x: Tensor, by: int) -> Tensor:
    """Slot s reads slot s + by, or zeros."""
    pad = (0, 0, 0, by) if by > 0 else (0, 0, -by, 0)
    kept = x[:, :, by:] if by > 0 else x[:, :, :by]
    return torch.nn.functional.pad(kept, pad)


@fault("attention reads another row's cache", "attention")
def rows_read(m: Module, _: Tensor) -> Variants:
    batch = len(m["qkv"])
    if is_context(m) and batch > 1:
        orders = [list(o) for o in itertools.islice(itertools.permutations(range(batch)), 1, 24)]
        orders += [[row] * batch for row in range(min(batch, 8))]
        for what, order in itertools.product(_PAIRED, orders):
            yield f"{what} of rows {order} of the batch", _only(what, lambda cache, order=order: cache[order])  # type: ignore[misc]


@fault("attention reads another layer's cache", "attention")
def layers_read(m: Module, _: Tensor) -> Variants:
    if not is_context(m) or m.layer is None:
        return
    for other in _near(m):
        caches = [_cache_of(m, other, part) for part in ("key", "value")]
        if any(c is None for c in caches):
            continue
        key, value = caches
        for what in _PAIRED:

            def read(own_key: Tensor, own_value: Tensor, what: str = what, k: Any = key, v: Any = value) -> Any:
                return own_key if what == "values" else k, own_value if what == "keys" else v

            yield f"{what} of layer {other}", {"read": read}


def _near(m: Module) -> Iterator[int]:
    own = m.layer or 0
    others = sorted((n for n in range(m.decoder.spec.layers) if n != own), key=lambda n: abs(n - own))
    yield from others[:_LAYERS]


def _cache_of(m: Module, layer: int, part: str) -> Tensor | None:
    """The live slots after the step, of the engine."""
    cache = m.forward.tensors.get(f"blocks.{layer}.{part}")
    live = m["visible"].shape[1]
    if cache is None or cache.shape[2] < live:
        return None
    scale = m[f"{part}_scale"]
    dtype = m["qkv"].dtype
    cache = cache[:, :, :live].to(m["qkv"].device)
    return cache.to(dtype) if scale is None else dequantize_cache(cache, scale, dtype)


@fault("key and value exchanged in attention", "attention")
def parts_read(m: Module, _: Tensor) -> Variants:
    if is_context(m):
        yield "", {"read": lambda key, value: (value, key)}
        yield "values read as keys too", {"read": lambda key, value: (value, value)}
        yield "keys read as values too", {"read": lambda key, value: (key, key)}


@fault("single heads of the context", "attention")
def head_factors(m: Module, engine: Tensor) -> Variants:
    if not is_context(m) or m["heads"] < 2:
        return
    real = m.forward.inputs.new_mask.to(engine.device)
    own, found = (t[real].unflatten(-1, (m["heads"], -1)) for t in (m().double(), engine))
    factors = (own * found).sum((0, 2)) / own.square().sum((0, 2)).clamp(min=1e-300)
    off = (factors - 1).abs() > 1e-3
    moved: list[int] = off.nonzero().flatten().tolist()

    def after(context: Tensor, factors: Tensor = factors) -> Tensor:
        scaled: Tensor = context.unflatten(-1, (len(factors), -1)) * factors[:, None]
        return scaled.flatten(2)

    if len(moved) == 1:
        head = moved[0]
        if abs(float(factors[head])) < 1e-3:
            zeroed = torch.ones_like(factors)
            zeroed[head] = 0.0
            yield f"head {head} missing (zero)", {"after": lambda c: after(c, zeroed)}

        def one(f: float) -> dict[str, Any]:
            scaled = torch.ones_like(factors)
            scaled[head] = f
            return {"after": lambda c: after(c, scaled)}

        yield (
            Fit(words=f"head {head} scaled by {{}}", value=float(factors[head]), changes=one),
            one(float(factors[head])),
        )
    each = Several(factors)

    def planted(value: float) -> dict[str, Any]:
        return {"after": lambda c: after(c, numbers_of(value, factors))}

    words = f"heads scaled by {listed(factors)}"
    yield Fit(words=words, value=each, numbers=len(factors), key="per head", changes=planted), planted(each)
