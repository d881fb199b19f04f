"""Faults of linear layers that are fitted: whose rows, which factors, a sparse or low-rank difference, noise.

With x the engine's own input and y its output, over all tokens of all forwards, y = x W' + b' says much about W'
even if x has fewer independent tokens than W has columns:

- a row of W' that is a row of some matrix of the checkpoint, times a factor, makes the same output;
- factors per input channel, y = (x * s) W, are the solution of (X'X * W'W) s = diag(X'YW), whose matrix has full rank
  long before X does (Schur's product theorem);
- the difference y - xW has the rank of W' - W, if this is low.

Only the last fit, that of the whole weight, needs more tokens than columns, and is left out without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import MANY, Fit, Variants, fault
from debug.comparison.faults.pairs import CLOSE, COLUMNS, LARGEST, ROWS, SMALL, Block, Pairs, regressed
from debug.comparison.faults.parts import input_name, order_name, output_name
from debug.comparison.modules import Module, float_weight, linear_of
from refmodels.quantization.linear import QuantizedLinear


def _set(argument: str, base: Tensor, where: Tensor, like: Tensor, value: float) -> dict[str, Any]:
    """`base` times `value` where the mask says so."""
    return {argument: torch.where(where, base * value, base).to(like)}


def _alike(values: Tensor, weights: Tensor, tolerance: float) -> float | None:
    """The common value of all entries, weighted; None: they differ."""
    mean = float((values * weights).sum() / weights.sum().clamp(min=1e-300))
    return mean if bool(((values - mean).abs() <= tolerance).all()) else None


@fault("weight wrong in some outputs", "linear")
def row_factors(m: Module, engine: Tensor) -> Variants:
    """Each output may have its own factor and constant; named if few numbers describe them."""
    p = Pairs(m, engine)
    if len(p.x) < 4:
        return
    centered, own = p.product - p.product.mean(0), p.y - p.y.mean(0)
    size = centered.square().sum(0)
    factor = (centered * own).sum(0) / size.clamp(min=1e-300)
    strong = size > (1e3 * p.noise).square()
    deviation = CLOSE * len(p.x) ** 0.5 * p.noise / size.sqrt().clamp(min=1e-300)
    changed = (factor - 1).abs() > deviation.clamp(min=1e-6)
    bias = p.bias if m["bias"] is None else m["bias"]
    like = m["weight"]
    if bool((strong & changed).any()):
        chosen = factor[changed & strong]
        spread = float(deviation[changed & strong].max())
        common = _alike(chosen, size[changed & strong].sqrt(), max(spread, 1e-3))
        whole = bool(changed[strong].all())
        words = "every row of the weight" if whole else output_name(m, changed)
        mask = torch.ones_like(changed) if whole else changed
        if common is not None and words is not None:
            change = partial(_set, "weight", p.weight, mask[:, None], like)
            if abs(common) < max(spread, 1e-6):
                yield f"{words}: zero", change(0.0)
                both = {**change(0.0), "bias": torch.where(mask, torch.zeros_like(bias), bias)}
                yield f"{words}: zero, and the bias", both
            else:
                if abs(common + 1) < max(spread, 1e-6):
                    yield f"{words}: sign reversed", change(-1.0)
                if m["bias"] is not None or not whole:
                    # Otherwise it is the output that is scaled.
                    detail = f"{words}: scaled by {{}}"
                    yield Fit(words=detail, value=common, changes=change), change(common)
                if not whole:
                    yield from _scaled_with_bias(m, words, p, mask, common)
        elif common is None:
            words = words or f"{int(changed.sum())} rows"
            scaled = (p.weight * torch.where(mask & strong, factor, 1.0)[:, None]).to(like)
            yield Fit(words=f"{words}: each row scaled by a factor of its own", numbers=MANY), {"weight": scaled}


def _scaled_with_bias(m: Module, words: str, p: Pairs, mask: Tensor, value: float) -> Variants:
    def change(value: float) -> dict[str, Any]:
        found = _set("weight", p.weight, mask[:, None], m["weight"], value)
        return found if m["bias"] is None else {**found, **_set("bias", m["bias"], mask, m["bias"], value)}

    yield Fit(words=f"{words}: scaled by {{}}, with the bias", value=value, changes=change), change(value)


@fault("bias wrong", "linear")
def bias_values(m: Module, engine: Tensor) -> Variants:
    p = Pairs(m, engine)
    constant = (p.y - p.product).mean(0)
    like = m["weight"]
    if m["bias"] is not None:
        bias = p.bias
        size = float(bias.square().sum())
        if size:
            factor = float((constant * bias).sum()) / size
            words = "scaled by {}"

            def scaled(f: float) -> dict[str, Any]:
                return {"bias": (bias * f).to(like)}

            if abs(factor + 1) < 1e-2:
                yield "sign reversed", scaled(-1.0)
            if abs(factor - round(factor)) < 1e-2 and round(factor) > 2:
                yield f"added {round(factor)} times", scaled(float(round(factor)))
            yield Fit(words=words, value=factor, changes=scaled), scaled(factor)
        for detail, order in _orders(len(bias), m):
            yield f"its entries {detail}", {"bias": m["bias"][order]}
        wrong = p.wrong(p.product + bias)
        if (words_ := output_name(m, wrong)) is not None:
            yield f"{words_}: missing", {"bias": torch.where(wrong, torch.zeros_like(m["bias"]), m["bias"])}
        for name, other in m.decoder.named_parameters():
            if name.endswith("bias") and other.shape == bias.shape and other is not m["bias"] and not other.is_meta:
                yield f"that of {name.removesuffix('.bias')}", {"bias": other.to(m["bias"])}
    if len(p.x) >= 8:
        known = p.bias + constant - p.bias
        yield Fit(words="other values", numbers=MANY), {"bias": known.to(like)}


def _orders(n: int, m: Module) -> Iterator[tuple[str, Tensor]]:
    """Permutations of n things that layout mistakes make, with their names."""
    own = torch.arange(n)
    yield "in reverse order", own.flip(0)
    for shift in (1, -1, 2, -2):
        if n > 4:
            yield f"shifted by {shift:+d}", own.roll(shift)
    if n % 2 == 0:
        yield "halves exchanged", own.roll(n // 2)
        yield "neighbours exchanged", own.view(-1, 2).flip(1).flatten()
        yield "even ones first", torch.cat([own[::2], own[1::2]])
        yield "halves interleaved", torch.cat([own[::2], own[1::2]]).argsort()
    dim = m.decoder.spec.attention.head_dim
    if n % dim == 0 and n > dim:
        heads = own.view(-1, dim)
        yield "heads in reverse order", heads.flip(0).flatten()
        yield "reversed within each head", heads.flip(1).flatten()
        yield "[head_dim, heads] instead of [heads, head_dim]", heads.t().flatten()
        yield "[heads, head_dim] instead of [head_dim, heads]", own.view(dim, -1).t().flatten()
        for shift in (1, -1):
            yield f"heads shifted by {shift:+d}", heads.roll(shift, 0).flatten()
            yield f"shifted by {shift:+d} within each head", heads.roll(shift, 1).flatten()


@fault("input channels in the wrong order", "linear")
def input_order(m: Module, engine: Tensor) -> Variants:
    rows, columns = m["weight"].shape
    if rows * columns > LARGEST:
        return
    block = Block(m, engine, m["weight"].double())
    for detail, order in _orders(columns, m):
        if rows * columns <= SMALL or block.promising(m["weight"][block.rows][:, order].double()):
            yield detail, {"weight": m["weight"][:, order]}
    shift = _shift(m, engine)
    if shift is not None:
        yield f"shifted by {shift:+d}", {"weight": m["weight"].roll(-shift, 1)}
    found = _recovered_columns(m, engine)
    if found is not None:
        words = order_name(found)
        detail = words or "another order"
        yield Fit(words=detail, numbers=0 if words else MANY), {"weight": m["weight"][:, found]}


def _shift(m: Module, engine: Tensor) -> int | None:
    """The shift of the input's channels that reproduces a few outputs best."""
    p = Pairs(m, engine)
    columns = p.weight.shape[1]
    if columns > COLUMNS:
        return None
    y, weight = (p.y - p.bias)[:, :16], p.weight[:16]
    left = [float((y - p.x.roll(s, 1) @ weight.t()).norm()) for s in range(3, columns - 2)]
    if not left or min(left) > 0.5 * float((y - p.product[:, :16]).norm()):
        return None
    shift = left.index(min(left)) + 3
    return shift if shift <= columns // 2 else shift - columns


def _recovered_columns(m: Module, engine: Tensor) -> Tensor | None:
    """Which column of the weight stands in the place of each.

    With at least as many outputs as inputs, the output gives the input back, and with it the order of its channels;
    otherwise a regression gives the weight and the order of its columns.
    """
    right = m["weight"].double()
    if right.shape[1] > COLUMNS:
        return None
    if len(right) >= right.shape[1]:
        p = Pairs(m, engine)
        used = torch.linalg.lstsq(right, (p.y - p.bias).t()).solution.t()
        # Column c of the weight was multiplied with the channel that looks like used[:, c].
        return _matches(p.x, used)
    found = regressed(m, engine)
    return None if found is None else _matches(found[0], right)


def _matches(left: Tensor, right: Tensor) -> Tensor | None:
    """The permutation that takes the columns of `right` to those of `left`, unless it is none, or the identity."""
    size = left.norm(dim=0)[:, None] * right.norm(dim=0)
    alike = (left.t() @ right) / size.clamp(min=1e-300)
    order = alike.argmax(1)
    own = torch.arange(len(order), device=order.device)
    whole = torch.equal(order.sort().values, own) and not torch.equal(order, own)
    return order if whole and float(alike.amax(1).min()) > 0.99 else None


@fault("input channels missing or scaled", "linear")
def column_factors(m: Module, engine: Tensor) -> Variants:
    p = Pairs(m, engine)
    columns = p.weight.shape[1]
    if columns > COLUMNS or isinstance(linear_of(m.decoder, m.tap), QuantizedLinear):
        return
    for with_bias in (True, False) if m["bias"] is not None else (True,):
        y = p.y - p.bias if with_bias else p.y - p.y.mean(0)
        x = p.x if with_bias else p.x - p.x.mean(0)
        matrix = (x.t() @ x) * (p.weight.t() @ p.weight)
        right = torch.einsum("tk,to,ok->k", x, y, p.weight)
        try:
            factors = torch.linalg.solve(matrix, right)
        except RuntimeError:  # singular
            return
        if not bool(torch.isfinite(factors).all()):
            return
        yield from _described_columns(m, p, factors)


def _described_columns(m: Module, p: Pairs, factors: Tensor) -> Variants:
    like, columns = m["weight"], len(factors)
    for tolerance in (1e-4, 3e-3, 0.03):
        zero, one = factors.abs() < tolerance, (factors - 1).abs() < tolerance
        if bool((zero | one).all()) and bool(zero.any()):
            words = input_name(m, zero)
            change = {"weight": torch.where(zero, torch.zeros_like(p.weight), p.weight).to(like)}
            if words is not None:
                kept = "half of a sum over two ranks: all-reduce missing" if "half" in words else "zero"
                yield f"{words}: {kept}", change
            else:
                yield Fit(words=f"{int(zero.sum())} of {columns} input channels: zero", numbers=MANY), change
            return
        rest = ~one
        if bool(rest.any()) and not bool(rest.all()):
            common = _alike(factors[rest], torch.ones_like(factors[rest]), tolerance)
            words = input_name(m, rest)
            if common is not None and words is not None:
                set_ = partial(_set, "weight", p.weight, rest[None], like)
                if abs(common + 1) < tolerance:
                    yield f"{words}: sign reversed", set_(-1.0)
                yield Fit(words=f"{words}: scaled by {{}}", value=common, changes=set_), set_(common)
                return
    if len(p.x) * len(p.weight) > 4 * columns:
        words = "each input channel scaled by a factor of its own"
        yield Fit(words=words, numbers=MANY), {"weight": (p.weight * factors).to(like)}


@fault("rows of the weight in the wrong place", "linear")
def row_sources(m: Module, engine: Tensor) -> Variants:
    """Look up each wrong output among the rows of every matrix of this width."""
    p = Pairs(m, engine)
    outputs = len(p.weight)
    if outputs > ROWS or len(p.x) < 4:
        return
    wrong = p.wrong(p.product + p.bias)
    if not bool(wrong.any()):
        return
    own = _lookup(p, p.weight, p.bias, wrong)
    if own is not None:
        order, factor = own
        full = torch.arange(outputs)
        full[wrong] = order[wrong]
        words = order_name(full) or _moved(m, full)
        if bool((factor == 1).all()):
            change = {"weight": m["weight"][full], "bias": None if m["bias"] is None else m["bias"][full]}
            yield Fit(words=words or "another order", numbers=0 if words else MANY), change
    own = _lookup(p, p.weight, p.bias, wrong, same_bias=True) if m["bias"] is not None else None
    if own is not None:
        full = torch.arange(outputs)
        full[wrong] = own[0][wrong]
        words = order_name(full) or _moved(m, full)
        change = {"weight": m["weight"][full]}
        yield Fit(words=f"{words or 'another order'}, but not the bias", numbers=0 if words else MANY), change
    for name, module in m.decoder.named_modules():
        if not isinstance(module, torch.nn.Linear | QuantizedLinear) or module is linear_of(m.decoder, m.tap):
            continue
        if module.weight.is_meta or module.weight.shape[1] != p.weight.shape[1] or len(module.weight) > ROWS:
            continue
        weight = float_weight(module, m["weight"].dtype).double()
        bias = torch.zeros(len(weight), dtype=torch.float64) if module.bias is None else module.bias.double()
        for own_bias in (False, True) if m["bias"] is not None else (False,):
            found = _lookup(p, weight, p.bias if own_bias else bias.to(p.x), wrong, same_bias=own_bias)
            if found is None:
                continue
            order, factor = found
            words = output_name(m, wrong) or ("all rows" if bool(wrong.all()) else None)
            rows = _run_name(order[wrong])
            if words is None or rows is None or not bool((factor == 1).all()):
                continue
            made = p.weight.clone()
            made[wrong] = weight[order[wrong]]
            change = {"weight": made.to(m["weight"])}
            if m["bias"] is not None and not own_bias:
                taken = p.bias.clone()
                taken[wrong] = bias.to(taken)[order[wrong]]
                change["bias"] = taken.to(m["bias"])
            yield f"{words}: {rows} of {name}", change


def _lookup(
    p: Pairs, weight: Tensor, bias: Tensor, wrong: Tensor, *, same_bias: bool = False
) -> tuple[Tensor, Tensor] | None:
    """For each wrong output the row of `weight` that makes it, and its factor (1, or -1); None: not all have one."""
    made = p.x @ weight.t()
    y = p.y - p.bias if same_bias else p.y
    if not same_bias:
        made = made + bias
    norms = made.square().sum(0)
    # |y - v|^2 of every pair, without a third axis.
    distance = y[:, wrong].square().sum(0)[:, None] + norms - 2 * y[:, wrong].t() @ made
    best = distance.argmin(1)
    off = (y[:, wrong] - made[:, best]).square().mean(0).sqrt()
    if not bool((off <= CLOSE * p.noise[wrong].clamp(min=1e-300)).all()):
        return None
    order = torch.zeros(len(wrong), dtype=torch.int64, device=best.device)
    order[wrong] = best
    return order, torch.ones(len(wrong))


def _moved(m: Module, order: Tensor) -> str | None:
    """Words for a permutation of a part of the rows: "value: in reverse order", "head 1 is head 0"."""
    own = torch.arange(len(order))
    changed = order != own
    words = output_name(m, changed)
    sources = _run_name(order[changed])
    if words is not None and sources is not None:
        return f"{words}: {sources}"
    first, last = int(changed.nonzero().min()), int(changed.nonzero().max()) + 1
    inner = order[first:last] - first
    if bool((inner >= 0).all()) and bool((inner < len(inner)).all()) and last - first < len(order):
        described = order_name(inner)
        return None if described is None else f"rows {first} to {last - 1}: {described}"
    if m.part == "attn.qkv":
        a = m.decoder.spec.attention
        heads = order.view(-1, a.head_dim)
        within = heads[:, :1] - heads[:, :1] % a.head_dim
        if bool((heads - within == heads[:1] - within[:1]).all()) and bool((within.flatten() % a.head_dim == 0).all()):
            described = order_name(heads[0] - within[0])
            if described is not None and torch.equal(within.flatten(), own[:: a.head_dim]):
                return f"{described} within each head"
    return None


def _run_name(rows: Tensor) -> str | None:
    """Consecutive rows in words."""
    first, last = int(rows[0]), int(rows[-1])
    if len(rows) == 1:
        return f"row {first}"
    if torch.equal(rows, torch.arange(first, first + len(rows), device=rows.device)):
        return f"rows {first} to {last}"
    if torch.equal(rows, torch.arange(first, first - len(rows), -1, device=rows.device)):
        return f"rows {first} down to {last}"
    return f"row {first} in all" if len(set(rows.tolist())) == 1 else None
