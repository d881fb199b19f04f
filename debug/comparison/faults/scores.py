"""Faults of scores and probabilities: what becomes of query . key before it weighs the values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import Fit, Variants, fault
from debug.comparison.faults.numbers import minimize, soft_cap
from debug.comparison.faults.sampled import Several, is_context, least, listed, numbers_of, parts, sample
from debug.comparison.modules import Module
from refmodels.dtypes import torch_name
from refmodels.positions import alibi_slopes

_SAME = 1e-4
"""Factors nearer to 1 than this are noise."""
_TOP = 1e-9


@fault("scores soft-capped", "attention")
def score_cap(m: Module, engine: Tensor) -> Variants:
    found = sample(m, engine) if is_context(m) else None
    if found is None:
        return
    shown = found.scores[found.shown[:, None].expand_as(found.scores)]
    largest = float(shown.abs().max()) if len(shown) else 0.0
    if largest <= 0:
        return
    cap = minimize(lambda c: found.error(soft_cap(found.scores, c)), 0.02 * largest, 50 * largest)
    changes: Callable[[float], dict[str, Any]] = lambda c: {"scores": partial(soft_cap, cap=c)}  # noqa: E731
    yield Fit(words="tanh at {}", value=cap, changes=changes, least=1e-6), changes(cap)


@fault("attention sink", "attention")
def sink(m: Module, engine: Tensor) -> Variants:
    """The sum of probabilities is below 1: exp(logit) stands in the denominator besides the keys."""
    found = sample(m, engine) if is_context(m) else None
    if found is None:
        return
    yield "softmax with 1 added to its denominator (softmax off by one)", {"weights": partial(_sunk, logits=0.0)}
    right = found.context(found.weights(found.scores))
    factor = (right * found.engine).sum(-1) / right.square().sum(-1).clamp(min=1e-300)
    total = found.scores.masked_fill(~found.shown[:, None], float("-inf")).logsumexp(-1)
    inside = (factor > _TOP) & (factor < 1 - _TOP) & torch.isfinite(total)
    logits = (total + torch.log((1 - factor) / factor)).masked_fill(~inside, float("nan"))
    one = float(logits.nanmedian())
    if not math.isfinite(one):
        return
    changes: Callable[[float], dict[str, Any]] = lambda b: {"weights": partial(_sunk, logits=b)}  # noqa: E731
    yield Fit(words="a logit of {} in every head", value=one, changes=changes), changes(one)
    heads = logits.nanmedian(0).values.nan_to_num(nan=float("-inf"))
    if len(heads) > 1:
        words = f"logits per head {listed(heads)}"
        each = Several(heads)

        def sunk(value: float) -> dict[str, Any]:
            return {"weights": partial(_sunk, logits=numbers_of(value, heads)[:, None, None])}

        yield Fit(words=words, value=each, numbers=len(heads), key="per head", changes=sunk), sunk(each)


def _sunk(scores: Tensor, seen: Tensor, logits: Tensor | float) -> Tensor:
    total = scores.logsumexp(-1, keepdim=True)
    bottom = torch.logaddexp(total, torch.as_tensor(logits, dtype=scores.dtype, device=scores.device).expand_as(total))
    return (scores - bottom).exp().masked_fill(~seen, 0.0)


@fault("softmax", "attention")
def softmax(m: Module, _: Tensor) -> Variants:
    if not is_context(m):
        return

    def over(axis: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda scores, seen: scores.softmax(axis).nan_to_num(nan=0.0)

    def plain(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda scores, seen: change(scores.masked_fill(~seen, 0.0)).masked_fill(~seen, 0.0)

    yield "over the queries instead of the keys", {"weights": over(-2)}
    yield "over the heads instead of the keys", {"weights": over(1)}
    yield "missing: scores used as probabilities", {"weights": plain(lambda s: s)}
    yield "not normalized: exponentials used as probabilities", {"weights": plain(torch.exp)}
    yield "replaced by ReLU", {"weights": plain(torch.relu)}
    yield "replaced by a sigmoid", {"weights": plain(torch.sigmoid)}
    yield "applied twice", {"weights": lambda s, seen: _shown_softmax(_shown_softmax(s, seen), seen)}
    yield "replaced by its largest element", {"weights": lambda s, seen: _largest(s)}
    yield "uniform: all visible tokens count alike, queries do not matter", {"scores": torch.zeros_like}


def _shown_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(nan=0.0)


def _largest(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)


@fault("mask value", "attention")
def mask_value(m: Module, engine: Tensor) -> Variants:
    if not is_context(m):
        return
    always: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda k, q, v: torch.ones_like(k + q, dtype=torch.bool) | v  # noqa: E731
    right = _right_mask(m)

    def hidden(value: float, *, added: bool) -> dict[str, Any]:
        def scores(s: Tensor) -> Tensor:
            return torch.where(right, s, (s if added else 0.0) + value)

        return {"seen": always, "scores": scores}

    yield "hidden scores are 0 instead of -inf", hidden(0.0, added=False)
    whole = _alone(always, right)
    yield "masked after the softmax, not normalized again", {"seen": always, "weights": whole}
    if m["scores"] is not None or m["seen"] is not None:
        return
    for added, words in ((True, "{} added to hidden scores instead of -inf"), (False, "hidden scores are {}")):

        def error(size: float, added: bool = added) -> float:
            return float((m(**hidden(-size, added=added)) - engine).norm())

        value = -minimize(error, 0.1, 1e3)
        changes = partial(hidden, added=added)
        yield Fit(words=words, value=value, changes=changes, most=0.0), changes(value)


def _right_mask(m: Module) -> Tensor:
    return parts(m).causal(m["window"])[:, None]


def _alone(seen: Any, right: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, _: scores.softmax(-1) * right


@fault("probabilities or scores rounded", "attention", small=False, rare=True)
def rounded(m: Module, _: Tensor) -> Variants:
    if not is_context(m):
        return
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        yield f"probabilities in {torch_name(dtype)}", {"weights": _grid(partial(_cast, dtype=dtype))}
        if dtype.itemsize == 2:
            yield f"scores in {torch_name(dtype)}", {"scores": partial(_cast, dtype=dtype)}
    for bits in range(8, 0, -1):
        for levels in (2**bits - 1, 2**bits):
            detail = f"probabilities quantized to {bits} bits, {levels} steps up to 1"
            yield detail, {"weights": _grid(partial(_in_steps, count=levels))}


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.float().to(dtype).to(x)


def _in_steps(x: Tensor, count: int) -> Tensor:
    steps: Tensor = (x * count).round() / count
    return steps


def _grid(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, seen: change(_shown_softmax(scores, seen))


# Numbers per head and per token


@fault("attention scale per head", "attention", rare=True)
def head_scales(m: Module, engine: Tensor) -> Variants:
    found = sample(m, engine) if is_context(m) and m["alibi_slopes"] is None else None
    if found is None or m["heads"] < 2:
        return
    factors = least(lambda f: found.errors(found.scores * f[:, None], 1), m["heads"], 0.05, 20.0, engine.device)
    each = Several(factors)

    def planted(value: float) -> dict[str, Any]:
        return {"scores": lambda s: s * numbers_of(value, factors)[:, None, None]}

    words = f"factors {listed(factors)}"
    yield Fit(words=words, value=each, numbers=m["heads"], key="per head", changes=planted), planted(each)


@fault("ALiBi slopes", "attention", rare=True)
def fitted_slopes(m: Module, engine: Tensor) -> Variants:
    found = sample(m, engine) if is_context(m) and m["alibi_slopes"] is not None else None
    if found is None:
        return
    right: Tensor = m["alibi_slopes"]
    distance = (torch.arange(found.shown.shape[1], device=engine.device) - found.slot[:, None])[:, None]
    plain = found.scores - right[:, None].to(found.scores) * distance

    def errors(slope: Tensor) -> Tensor:
        return found.errors(plain + slope[:, None] * distance, 1)

    up = least(errors, len(right), 1e-4, 10.0, engine.device)
    down = least(lambda f: errors(-f), len(right), 1e-4, 10.0, engine.device)
    fitted = torch.where(errors(up) <= errors(-down), up, -down)
    each = Several(fitted)

    def planted(value: float) -> dict[str, Any]:
        return {"alibi_slopes": numbers_of(value, fitted).to(right.dtype)}

    words = f"per head {listed(fitted)}"
    yield Fit(words=words, value=each, numbers=len(right), key="per head", changes=planted), planted(each)


@fault("ALiBi added to a model without", "attention", rare=True)
def alibi_added(m: Module, engine: Tensor) -> Variants:
    if is_context(m) and m["alibi_slopes"] is None:
        usual = torch.tensor(alibi_slopes(m["heads"]), dtype=m["qkv"].dtype, device=engine.device)
        yield "the usual slopes", {"alibi_slopes": usual}


@fault("logn scaling missing or wrong", "attention")
def logn_length(m: Module, engine: Tensor) -> Variants:
    """Queries scaled by position: log(position + 1) / log(length) beyond the length."""
    found = sample(m, engine) if is_context(m) else None
    if found is None or m["alibi_slopes"] is not None:
        return
    places = _places(m)
    own = torch.ones_like(places, dtype=engine.dtype) if m["query_scale"] is None else m["query_scale"].to(engine)
    factor = least(lambda f: found.errors(found.scores * f[:, None, None], 0), len(found.row), 0.2, 5.0, engine.device)
    scales = factor * own[found.row, found.token]
    position = places[found.row, found.token]
    there = ((scales - 1).abs() > _SAME) & (position > 0)
    if bool(there.any()):
        # Beyond the length the factor is log(p + 1) / log(length).
        length = float(((position[there] + 1).double().log() / scales[there]).exp().median())
        if 1.5 < length < 1e7:
            changes: Callable[[float], dict[str, Any]] = lambda n: {"query_scale": _logn(places, n).to(engine)}  # noqa: E731
            had = m.decoder.spec.attention.logn_seq_length
            words = f"length {{}} instead of {had}" if had else "applied to a model without it, length {}"
            yield Fit(words=words, value=length, changes=changes, least=1.01), changes(length)
    one = float(scales.median())
    if m["query_scale"] is not None and abs(one - 1) > _SAME and len(scales) > 1:
        constant: Callable[[float], dict[str, Any]] = lambda f: {"query_scale": torch.full_like(own, f)}  # noqa: E731
        yield Fit(words="{} for every token", value=one, changes=constant, least=1e-6), constant(one)


def _places(m: Module) -> Tensor:
    ids = m.forward.inputs.position_ids
    if ids is not None:
        return ids.to(m["qkv"].device)
    steps = torch.arange(m["qkv"].shape[1], device=m["qkv"].device)
    slots: Tensor = m["cache_lengths"][:, None] + steps
    return slots


def _logn(places: Tensor, length: float) -> Tensor:
    ratio = (places + 1).double().log() / math.log(length)
    return torch.where(places + 1 > length, ratio, torch.ones_like(ratio))
