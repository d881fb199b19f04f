"""Faults of norms beyond a wrong number: the statistic, another norm's weight and bias, wrong entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import MANY, Fit, Variants, fault
from debug.comparison.faults.parts import index_name, real_rows
from debug.comparison.modules import Module
from refmodels.dtypes import unit_roundoff

_CLOSE = 8.0
"""Roundings that a fitted weight may be off."""


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _square(x: Tensor) -> Tensor:
    return _mean(x.square())


def _variance(x: Tensor, correction: int = 0) -> Tensor:
    return x.var(-1, keepdim=True, correction=correction)


STATISTICS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mean of magnitudes": lambda x, eps: x / (_mean(x.abs()) + eps),
    "largest magnitude": lambda x, eps: x / (x.abs().amax(-1, keepdim=True) + eps),
    "sum of squares instead of their mean": lambda x, eps: x / (x.square().sum(-1, keepdim=True) + eps).sqrt(),
    "no square root": lambda x, eps: x / (_square(x) + eps),
    "epsilon outside of the square root": lambda x, eps: x / (_square(x).sqrt() + eps),
    "epsilon as the least mean square": lambda x, eps: x / _square(x).clamp(min=eps).sqrt(),
    "epsilon as the least root mean square": lambda x, eps: x / _square(x).sqrt().clamp(min=eps),
    "standard deviation, mean not subtracted": lambda x, eps: x / (_variance(x) + eps).sqrt(),
    "mean subtracted, root mean square of the input": lambda x, eps: (x - _mean(x)) / (_square(x) + eps).sqrt(),
    "mean subtracted, not divided": lambda x, eps: x - _mean(x),
    "variance over n - 1": lambda x, eps: (x - _mean(x)) / (_variance(x, 1) + eps).sqrt(),
    "variance not rooted": lambda x, eps: (x - _mean(x)) / (_variance(x) + eps),
    "epsilon outside of the standard deviation": lambda x, eps: (x - _mean(x)) / (_variance(x).sqrt() + eps),
    "multiplied instead of divided": lambda x, eps: x * (_square(x) + eps).sqrt(),
    "applied twice": lambda x, eps: _twice(x, eps),
    "halves normalized separately": lambda x, eps: _grouped(x, eps, 2),
    "squares rounded to float16": lambda x, eps: x / (_square(x).half().double() + eps).sqrt(),
}


def _twice(x: Tensor, eps: float) -> Tensor:
    once = x / (_square(x) + eps).sqrt()
    return once / (_square(once) + eps).sqrt()


def _grouped(x: Tensor, eps: float, groups: int) -> Tensor:
    parts = x.unflatten(-1, (groups, -1))
    normed: Tensor = (parts / (_square(parts) + eps).sqrt()).flatten(-2)
    return normed


@fault("norm with another statistic", "norm", rare=True)
def statistic(m: Module, _: Tensor) -> Variants:
    for name, function in STATISTICS.items():
        yield name, {"statistic": function}
    heads = m.decoder.spec.attention.heads
    if m["x"].shape[-1] % heads == 0:
        yield "per head", {"statistic": partial(_grouped, groups=heads)}


@fault("norm weight missing or wrong", "norm")
def other_norm(m: Module, _: Tensor) -> Variants:
    """The weight and the bias of another norm, together."""
    if m["bias"] is None:
        return
    for name, module in m.decoder.named_modules():
        if not name.endswith("norm") or not isinstance(module, torch.nn.LayerNorm) or module.weight is m["weight"]:
            continue
        if not module.weight.is_meta:
            yield f"weight and bias of {name}", {"weight": module.weight, "bias": module.bias}
            yield f"only the bias is that of {name}", {"bias": module.bias}


@fault("norm weight wrong", "norm")
def entries(m: Module, engine: Tensor) -> Variants:
    """Each channel's weight and bias, by regression on the normalized input."""
    weight: Tensor = m["weight"].double()
    unit = m(weight=torch.ones_like(m["weight"]), bias=None)
    # Heads that are normalized one by one are rows of their own.
    x, y = (t.reshape(-1, len(weight)) for t in (real_rows(m, unit), real_rows(m, engine)))
    biased = m["bias"] is not None
    bias = m["bias"].double() if biased else torch.zeros_like(weight)
    if len(x) < 4:
        return
    like = m["weight"]
    for change, how in ((weight.flip(0), "in reverse order"), (weight.roll(1, 0), "shifted by +1"),
                          (weight.roll(-1, 0), "shifted by -1"), (weight.square(), "applied twice"),
                          (weight.abs(), "without its signs"), (-weight, "sign reversed"),
                          (1 / weight, "divided by"), (weight.exp(), "exponential of it")):  # fmt: skip
        yield how, {"weight": change.to(like)}
        if biased and how in ("in reverse order", "shifted by +1", "shifted by -1"):
            order = {"in reverse order": bias.flip(0), "shifted by +1": bias.roll(1), "shifted by -1": bias.roll(-1)}
            yield f"{how}, with the bias", {"weight": change.to(like), "bias": order[how].to(like)}
    size = x.square().sum(0).clamp(min=1e-300)
    fitted = (x * (y - bias)).sum(0) / size
    yield from _numbers(m, weight, fitted, like)
    noise = _CLOSE * unit_roundoff(m.forward.tensors[m.tap].dtype) * y.square().mean(0).sqrt()
    wrong = (y - x * weight - bias).square().mean(0).sqrt() > noise.clamp(min=1e-300)
    if (words := index_name(wrong, "channel")) is not None:
        part = torch.where(wrong, fitted, weight)
        ratio = (fitted / weight)[wrong]
        if bool((part[wrong].abs() < 1e-2 * weight[wrong].abs()).all()):
            yield f"{words}: zero", {"weight": torch.where(wrong, torch.zeros_like(weight), weight).to(like)}
        if float((ratio - ratio.mean()).abs().max()) < 1e-2:
            scaled = partial(_scaled, weight, wrong, like)
            yield (
                Fit(words=f"{words}: scaled by {{}}", value=float(ratio.mean()), changes=scaled),
                scaled(float(ratio.mean())),
            )
        yield Fit(words=f"{words}: other values", numbers=2 * int(wrong.sum())), {"weight": part.to(like)}
    yield Fit(words="other values", numbers=MANY), {"weight": fitted.to(like)}
    center, own = x - x.mean(0), y - y.mean(0)
    both = (center * own).sum(0) / center.square().sum(0).clamp(min=1e-300)
    constant = y.mean(0) - both * x.mean(0)
    yield (
        Fit(words="other values, and another bias", numbers=2 * MANY),
        {"weight": both.to(like), "bias": constant.to(like)},
    )


def _scaled(weight: Tensor, wrong: Tensor, like: Tensor, factor: float) -> dict[str, Any]:
    return {"weight": torch.where(wrong, weight * factor, weight).to(like)}


def _numbers(m: Module, weight: Tensor, fitted: Tensor, like: Tensor) -> Variants:
    """One number: a factor of the weight without the bias, a constant added to it, or an exponent."""
    factor = float((fitted * weight).sum() / weight.square().sum().clamp(min=1e-300))
    changes = partial(_scaled, weight, torch.ones_like(weight, dtype=torch.bool), like)
    if m["bias"] is not None:
        yield Fit(words="scaled by {}, but not the bias", value=factor, changes=changes), changes(factor)
    more = float((fitted - weight).mean())

    def plus(number: float) -> dict[str, Any]:
        return {"weight": (weight + number).to(like)}

    yield Fit(words="{} added", value=more, changes=plus), plus(more)


@fault("norm bias wrong", "norm")
def bias_wrong(m: Module, engine: Tensor) -> Variants:
    x, y = (t.reshape(-1, len(m["weight"])) for t in (real_rows(m, m(bias=None)), real_rows(m, engine)))
    constant = (y - x).mean(0)
    like = m["weight"]
    if m["bias"] is not None:
        bias = m["bias"].double()
        factor = float((constant * bias).sum() / bias.square().sum().clamp(min=1e-300))

        def scaled(number: float) -> dict[str, Any]:
            return {"bias": (bias * number).to(like)}

        yield "added twice", scaled(2.0)
        yield "subtracted", scaled(-1.0)
        yield Fit(words="scaled by {}", value=factor, changes=scaled), scaled(factor)
        yield "in reverse order", {"bias": bias.flip(0).to(like)}
        yield "added before the weight is applied", {"bias": (bias * m["weight"].double()).to(like)}
    yield Fit(words="other values", numbers=MANY), {"bias": constant.to(like)}
