"""Faults of the attention mask: which slots a query sees."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import Fit, Variants, fault
from debug.comparison.faults.sampled import Sample, is_context, sample
from debug.comparison.modules import Module

Seen = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(key slots [slots], query slots [batch, tokens, 1], visible [batch, 1, slots]) to [batch, tokens, slots] bool."""
_AHEAD = {1: "one ahead: each token also sees the next", 2: "two ahead", 3: "three ahead"}


def _masks(m: Module) -> dict[str, Seen]:
    lengths = m["cache_lengths"][:, None, None]
    window = m["window"]

    def inside(slot: Tensor, query: Tensor) -> Tensor:
        return slot > query - window if window else slot >= 0

    return {
        "strict: no token sees itself": lambda k, q, v: (k < q) & v & inside(k, q),
        "aligned top-left: in decode the queries see the first slots only": lambda k, q, v: (k <= q - lengths) & v,
        "the past without the new tokens": lambda k, q, v: (k < lengths) & v & inside(k, q),
        "the new tokens without the past": lambda k, q, v: (k >= lengths) & (k <= q) & v,
        "each token sees only itself": lambda k, q, v: k == q,
        "reversed: each token sees itself and what follows": lambda k, q, v: (k >= q) & v,
        "the newest slot for all new tokens": lambda k, q, v: (k <= q.amax(1, keepdim=True)) & v & inside(k, q),
        "right without the window for the past only": lambda k, q, v: (k <= q) & v & ((k < lengths) | inside(k, q)),
    }


@fault("causal mask", "attention")
def causal(m: Module, engine: Tensor) -> Variants:
    """Every mask, and if some query then sees no key, also its average over all slots instead of 0."""
    if not is_context(m):
        return
    for detail, seen in _masks(m).items():
        yield from _with_blind(m, detail, seen)
    found = sample(m, engine)
    if found is None:
        return
    by = _shift(m, found)
    if by:
        window = m["window"]

        def shifted(k: Tensor, q: Tensor, v: Tensor) -> Tensor:
            return (k <= q + by) & v & ((k > q - window) if window else (k >= 0))

        words = _AHEAD.get(by, f"{by} ahead" if by > 0 else f"{-by} behind: the last {-by} tokens are not seen")
        if by != -1:
            yield from _with_blind(m, words, shifted)


def _with_blind(m: Module, detail: str, seen: Seen) -> Variants:
    yield detail, {"seen": seen}
    if m["qkv"].shape[1] > 1 or "past" in detail:
        yield f"{detail}; who sees nothing gets the mean of all slots", {"seen": seen, "weights": _uniform_if_blind}


def _uniform_if_blind(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1)


@fault("padding mask", "attention")
def padding(m: Module, _: Tensor) -> Variants:
    visible: Tensor = m["visible"]
    if not is_context(m) or bool(visible.all()):
        return
    batch, slots = visible.shape
    made = {"reversed: the pads on the other side": visible.flip(1), "inverted: only the pads are seen": ~visible}
    for order in itertools.islice(itertools.permutations(range(batch)), 1, 24 if batch > 1 else 1):
        made[f"that of another row of the batch, rows {list(order)}"] = visible[list(order)]
    for row in range(batch if batch > 1 else 0):
        made[f"that of row {row} of the batch for all"] = visible[row].expand(batch, -1)
    for by in (1, -1, 2, -2):
        made[f"moved by {by:+d} slots"] = visible.roll(by, 1)
    new = torch.arange(slots, device=visible.device) >= m["cache_lengths"][:, None]
    made["ignored for the cached tokens"] = visible | ~new
    for detail, mask in made.items():
        if not torch.equal(mask, visible):
            yield from _with_blind(m, detail, _masked_by(m, mask))


def _masked_by(m: Module, mask: Tensor) -> Seen:
    window = m["window"]
    return lambda k, q, v: (k <= q) & mask[:, None] & ((k > q - window) if window else (k >= 0))


# Where the visible slots begin and end, as numbers


def _ranges(found: Sample) -> tuple[Tensor, Tensor]:
    """Sums of exp(score) * value [queries, heads, slots + 1, head_dim], and of exp(score), over the first slots."""
    visible = found.visible[:, None]
    scores = found.scores.masked_fill(~visible, float("-inf"))
    strength = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(nan=0.0)
    products = torch.nn.functional.pad((strength[..., None] * found.values).cumsum(2), (0, 0, 1, 0))
    return products, torch.nn.functional.pad(strength.cumsum(2), (1, 0))


def _errors(found: Sample, sums: tuple[Tensor, Tensor], start: Tensor, stop: Tensor) -> Tensor:
    """Squared error [queries] if each query sees the slots from `start` to before `stop`, [queries] both."""
    products, strengths = sums
    last = strengths.shape[2] - 1
    start, stop = start.clamp(0, last), stop.clamp(0, last)
    each = torch.arange(len(start), device=start.device)
    context = products[each, :, stop] - products[each, :, start]
    total = (strengths[each, :, stop] - strengths[each, :, start])[..., None]
    context = torch.where(total > 0, context / total.clamp(min=1e-300), torch.zeros_like(context))
    return (context - found.engine).square().sum((1, 2))


def _best(errors: dict[int, float]) -> int:
    return min(errors, key=lambda n: errors[n])


def _shift(m: Module, found: Sample) -> int:
    """How many slots after its own the last one is that a query sees."""
    sums, window = _ranges(found), m["window"]
    start = (found.slot + 1 - window) if window else torch.zeros_like(found.slot)
    last = sums[1].shape[2]
    span = range(-min(last, 64), min(last, 64))
    return _best({by: float(_errors(found, sums, start, found.slot + 1 + by).sum()) for by in span})


@fault("sliding window", "attention")
def window_width(m: Module, engine: Tensor) -> Variants:
    found = sample(m, engine) if is_context(m) else None
    if found is None:
        return
    right, slots = m["window"], found.shown.shape[1]
    sums = _ranges(found)
    stop = found.slot + 1
    width = _best({w: float(_errors(found, sums, stop - w, stop).sum()) for w in range(1, slots + 1)})
    if width != right:
        words = f"{width} instead of {right or 'all'}"
        changes: Callable[[float], dict[str, Any]] = lambda w: {"window": max(1, round(w))}  # noqa: E731
        yield Fit(words=words, value=float(width), changes=changes, key="width"), {"window": width}


@fault("slots hidden", "attention")
def first_hidden(m: Module, engine: Tensor) -> Variants:
    """Old slots that are no longer seen, or a single one."""
    found = sample(m, engine) if is_context(m) else None
    if found is None:
        return
    slots = found.shown.shape[1]
    sums = _ranges(found)
    stop = found.slot + 1
    first = _best({n: float(_errors(found, sums, torch.full_like(stop, n), stop).sum()) for n in range(slots)})
    if first:
        yield (
            Fit(
                words=f"the first {first} are not seen",
                value=float(first),
                changes=partial(_hidden, m, _from_slot),
                key="first",
            ),
            {"seen": _from_slot(m, first)},
        )
    one = _missing(found)
    yield (
        Fit(words=f"slot {one} is not seen", value=float(one), changes=partial(_hidden, m, _without), key="one"),
        {"seen": _without(m, one)},
    )


def _hidden(m: Module, make: Callable[[Module, float], Seen], slot: float) -> dict[str, Any]:
    return {"seen": make(m, slot)}


def _from_slot(m: Module, first: float) -> Seen:
    window = m["window"]
    return lambda k, q, v: (k <= q) & v & (k >= round(first)) & ((k > q - window) if window else (k >= 0))


def _without(m: Module, slot: float) -> Seen:
    window = m["window"]
    return lambda k, q, v: (k <= q) & v & (k != round(slot)) & ((k > q - window) if window else (k >= 0))


def _missing(found: Sample) -> int:
    """The slot whose absence explains the most."""
    weights = found.weights(found.scores)
    context = found.context(weights)
    errors: Tensor = torch.zeros(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    for slot in range(weights.shape[-1]):
        weight = weights[..., slot, None]
        rest = (context - weight * found.values[:, :, slot]) / (1 - weight).clamp(min=1e-12)
        errors[slot] = (rest - found.engine).square().sum()
    return int(errors.argmin())
