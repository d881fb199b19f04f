"""Faults of a linear layer's weight that are fitted: elements, pruning, clamping, a low-rank difference, noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import MANY, Fit, Variants, fault
from debug.comparison.faults.pairs import CLOSE, LARGEST, ROWS, SMALL, Block, Pairs, regressed
from debug.comparison.faults.parts import output_name
from debug.comparison.modules import Module


@fault("weight differs", "linear", first=True)
def weight_difference(m: Module, engine: Tensor) -> Variants:
    """A single element, a single column, a low rank, or everywhere."""
    if m["weight"].numel() > LARGEST:
        return
    p = Pairs(m, engine)
    off = p.y - p.product - p.bias
    wrong = p.wrong(p.product + p.bias)
    if len(p.x) < 8 or not bool(wrong.any()):
        return
    like = m["weight"]
    if int(wrong.sum()) <= 4:
        yield from _elements(p, off, wrong, like)
    yield from _directions(p, off, like)
    yield from _thresholds(m, engine, p, like)
    yield from _low_rank(m, p, off)
    found = regressed(m, engine)
    if found is not None:
        weight, bias = found
        size = float((weight - p.weight).norm() / p.weight.norm())
        where = "" if bool(wrong.all()) else f" in {output_name(m, wrong) or f'{int(wrong.sum())} rows'}"
        noise = f"by {size:.2g} of its size{where}, in no known pattern (noise, or an unknown rounding)"
        words = noise if size < 0.5 else f"other weights{where}, in no known pattern"
        change = {"weight": weight.to(like), **({} if m["bias"] is None else {"bias": bias.to(like)})}
        yield Fit(words=words, numbers=2 * MANY, key="everywhere"), change


def _elements(p: Pairs, off: Tensor, wrong: Tensor, like: Tensor) -> Variants:
    """Up to four outputs, each wrong by one input channel."""
    rows = wrong.nonzero().flatten()
    alike = (p.x.t() @ off[:, rows]).abs() / p.x.norm(dim=0).clamp(min=1e-300)[:, None]
    best = alike.argmax(0)
    delta = (p.x[:, best] * off[:, rows]).sum(0) / p.x[:, best].square().sum(0).clamp(min=1e-300)
    changed = p.weight.clone()
    changed[rows, best] += delta
    if len(rows) == 1:
        row, column = int(rows[0]), int(best[0])

        def one(value: float) -> dict[str, Any]:
            changed = p.weight.clone()
            changed[row, column] = value
            return {"weight": changed.to(like)}

        right, now = float(p.weight[row, column]), float(changed[row, column])
        yield Fit(words=f"element [{row}, {column}] is {{}} instead of {right:.5g}", value=now, changes=one), one(now)
    else:
        named = ", ".join(f"[{r}, {c}]" for r, c in zip(rows.tolist(), best.tolist(), strict=True))
        yield Fit(words=f"elements {named}", numbers=2 * len(rows)), {"weight": changed.to(like)}


def _directions(p: Pairs, off: Tensor, like: Tensor) -> Variants:
    """A multiple of a known matrix is added."""
    known: dict[str, Callable[[], Tensor]] = {
        "{} added to every weight": lambda: torch.ones_like(p.weight),
        "every magnitude reduced by {}": lambda: -p.weight.sign(),
    }
    if p.weight.shape[0] == p.weight.shape[1]:
        known["{} times the unit matrix added"] = lambda: torch.eye(len(p.weight)).to(p.weight)
        known["{} times its transpose added"] = lambda: p.weight.t()
    for words, made in known.items():
        direction = made()
        push = p.x @ direction.t()
        amount = float((push * off).sum() / push.square().sum().clamp(min=1e-300))
        change = partial(_added, p.weight, direction, like)
        yield Fit(words=words, value=amount, changes=change), change(amount)
    # A wrong column is an error along one input channel: the same for all outputs but for a factor.
    alike = (p.x.t() @ off).norm(dim=1) / p.x.norm(dim=0).clamp(min=1e-300)
    column = int(alike.argmax())
    delta = (p.x[:, column] @ off) / p.x[:, column].square().sum().clamp(min=1e-300)
    changed = p.weight.clone()
    changed[:, column] += delta
    yield Fit(words=f"other values in column {column}", numbers=MANY), {"weight": changed.to(like)}


def _thresholds(m: Module, engine: Tensor, p: Pairs, like: Tensor) -> Variants:
    """Weights below a threshold pruned, or above one clamped."""
    block = Block(m, engine, p.weight)
    part, small = p.weight[block.rows], p.weight.numel() <= SMALL
    # Of a large weight, every n-th element tells roughly where the threshold is.
    sample = p.weight.abs().flatten()[:: max(1, p.weight.numel() // SMALL)].sort().values
    for share in (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9):
        limit = float(sample[max(0, int(share * len(sample)) - 1)])
        if small or block.promising(torch.where(part.abs() <= limit, 0.0, part)):
            if not small:
                limit = float(p.weight.abs().flatten().kthvalue(int(share * p.weight.numel())).values)
            pruned = torch.where(p.weight.abs() <= limit, 0.0, p.weight)
            yield f"the smallest {share:.0%} of its elements set to zero", {"weight": pruned.to(like)}
    if p.weight.shape[1] % 4 == 0:
        kept = (part.unflatten(1, (-1, 4)).abs().argsort(-1).argsort(-1) >= 2).flatten(1)
        if small or block.promising(part * kept):
            kept = (p.weight.unflatten(1, (-1, 4)).abs().argsort(-1).argsort(-1) >= 2).flatten(1)
            yield "pruned 2:4", {"weight": (p.weight * kept).to(like)}
    for quantile in (0.5, 0.75, 0.9, 0.95, 0.99, 0.999):
        limit = float(sample[int(quantile * len(sample)) - 1])
        if block.promising(part.clamp(-limit, limit)):
            clamp = partial(_clamped, p.weight, like)
            best = _least(lambda c: block.left(part.clamp(-c, c)), limit)
            yield Fit(words="clamped at {}", value=best, changes=clamp, least=0.0), clamp(best)
            break


def _added(weight: Tensor, direction: Tensor, like: Tensor, amount: float) -> dict[str, Any]:
    return {"weight": (weight + amount * direction).to(like)}


def _clamped(weight: Tensor, like: Tensor, limit: float) -> dict[str, Any]:
    return {"weight": weight.clamp(-limit, limit).to(like)}


def _least(f: Callable[[float], float], near: float) -> float:
    """The minimum of f around a number, by golden section over a factor of four."""
    golden = (5**0.5 - 1) / 2
    a, b = near / 4, near * 4
    for _ in range(48):
        x, y = b - golden * (b - a), a + golden * (b - a)
        a, b = (a, y) if f(x) < f(y) else (x, b)
    return (a + b) / 2


def _low_rank(m: Module, p: Pairs, off: Tensor) -> Variants:
    """An unmerged LoRA adapter, or one merged that should not be: a difference of low rank."""
    tokens, outputs = off.shape
    most = min(tokens, outputs, p.weight.shape[1])
    if outputs > ROWS:
        return
    left, values, right = torch.linalg.svd(off, full_matrices=False)
    noise = float(p.noise.norm()) * tokens**0.5 / min(tokens, outputs) ** 0.5
    rank = int((values > CLOSE * noise).sum())
    if not 0 < rank <= most // 4:
        return
    output = p.product + p.bias + (left[:, :rank] * values[:rank]) @ right[:rank]
    # The weight itself is known only along the tokens: the shortest difference that has this effect.
    delta = torch.linalg.lstsq(p.x, (left[:, :rank] * values[:rank]) @ right[:rank], driver="gelsd").solution.t()
    if not bool(torch.isfinite(output).all()):
        return
    words = f"by a matrix of rank {rank} (a LoRA adapter not merged, or merged twice?)"
    yield Fit(words=words, numbers=MANY + rank, key="low rank"), {"weight": (p.weight + delta).to(m["weight"])}
