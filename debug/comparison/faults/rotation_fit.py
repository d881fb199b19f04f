"""The rotation that an engine applied to its keys, recovered from the keys before and after it.

Every pair of elements is a complex number, which the rotation multiplies by m * exp(i * position * frequency).  The
angle of each pair and token follows from all heads together, the frequency of each pair from all tokens, and the
position of each token from all pairs.  From these: theta as a number, a factor on all positions, an offset, factors per
frequency (YaRN, llama3), a scale of the tables.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import Fit, Variants, fault
from debug.comparison.faults.rotation import has_rope, join, rope_spec, split, turn_query
from debug.comparison.faults.sampled import Several, numbers_of
from debug.comparison.modules import Module
from refmodels.ops import rotate

_TOKENS = 256
_GRID = 8
"""Points per turn of the farthest token, when a frequency is searched."""
_POSITIONS = 4
"""Points per position, when a token's position is searched."""
_FLAT = 1e-4


@dataclass(frozen=True, kw_only=True)
class Turned:
    """right [tokens, pairs]: weights; factor [tokens, pairs] complex: the engine's key over the key before rotation.

    row, position [tokens].  usual [pairs]: the right frequencies, radians per position.
    """

    weight: Tensor
    factor: Tensor
    row: Tensor
    position: Tensor
    usual: Tensor


def _pairs(x: Tensor, pairs: int, interleaved: bool) -> Tensor:
    """Complex [..., pairs] from the first 2 * pairs elements of [..., head_dim]."""
    x = x[..., : 2 * pairs].double()
    if interleaved:
        return torch.complex(x[..., 0::2].contiguous(), x[..., 1::2].contiguous())
    return torch.complex(x[..., :pairs].contiguous(), x[..., pairs:].contiguous())


def usual_frequencies(m: Module) -> Tensor:
    rope = rope_spec(m)
    index = torch.arange(0, rope.dim, 2, dtype=torch.float64, device=m["qkv"].device)
    return (1.0 / rope.theta ** (index / rope.dim)) / rope.position_divisor


def turned(m: Module, engine: Tensor) -> Turned | None:
    """None: there are no keys to look at."""
    ids = m.forward.inputs.position_ids
    if m.part != "key" or m["cos"] is None or ids is None:
        return None
    lengths = m["cache_lengths"]
    slots = lengths[:, None] + torch.arange(m["qkv"].shape[1], device=lengths.device)
    if int(slots.max()) >= engine.shape[2]:
        return None
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    real = m.forward.inputs.new_mask.to(slots.device)
    written = engine[rows, :, slots][real]
    pairs = m["cos"].shape[-1]
    before, after = (_pairs(t, pairs, m["rotary_interleaved"]) for t in (split(m)[1][real], written))
    weight = before.abs().square().sum(1)
    factor = (before.conj() * after).sum(1) / weight.clamp(min=1e-300)
    usual = usual_frequencies(m)
    if len(usual) != pairs:
        return None
    row = rows.expand_as(slots)[real]
    return Turned(weight=weight, factor=factor, row=row, position=ids.to(slots.device)[real].double(), usual=usual)


def frequencies(found: Turned) -> Tensor:
    """[pairs] the frequency with which each pair turns best, between no turn and one radian per position and a bit."""
    keep = torch.linspace(0, len(found.position) - 1, min(_TOKENS, len(found.position))).round().long()
    position, weighted = found.position[keep], (found.factor * found.weight)[keep]
    span = max(1.0, float(position.max() - position.min()))
    count = int(span * _GRID) + 64
    grid = torch.linspace(0.0, 1.2, count, dtype=torch.float64, device=position.device)
    best = torch.zeros_like(found.usual)
    turns = torch.polar(torch.ones_like(grid[:, None] * position), -grid[:, None] * position)
    along = (turns @ weighted).real
    best = grid[along.argmax(0)]
    return _refined(best, position, weighted)


def _refined(frequency: Tensor, position: Tensor, weighted: Tensor) -> Tensor:
    """Newton's method on sum of weight * cos(angle - frequency * position)."""
    for _ in range(12):
        left = weighted * torch.polar(torch.ones_like(weighted.real), -position[:, None] * frequency)
        slope = (position[:, None] * left.imag).sum(0)
        curve = -(position[:, None].square() * left.real).sum(0)
        step = torch.where(curve < 0, -slope / curve, torch.zeros_like(slope))
        frequency = frequency + step.clamp(-0.1, 0.1)
    return frequency


def positions(found: Turned) -> Tensor:
    """[tokens] the position at which each key was turned, if the frequencies are right; fractions are possible."""
    top = float(found.position.max())
    # Beyond what the slowest pair tells, positions repeat.
    low, high = -(top + 9), 2 * top + 18
    grid = torch.arange(low, high, 1 / _POSITIONS, dtype=torch.float64, device=found.position.device)
    turns = torch.polar(torch.ones(len(grid), len(found.usual), dtype=torch.float64), -grid[:, None] * found.usual)
    weighted = found.factor * found.weight
    # The nearest to the right one of those that fit equally well.
    fit = (weighted @ turns.t()).real
    start = grid[
        (fit / fit.amax(1, keepdim=True).clamp(min=1e-300) - 1e-9 * (grid - found.position[:, None]).abs()).argmax(1)
    ]
    for _ in range(12):
        left = weighted * torch.polar(torch.ones_like(weighted.real), -start[:, None] * found.usual)
        slope = (found.usual * left.imag).sum(1)
        curve = -(found.usual.square() * left.real).sum(1)
        start = start + torch.where(curve < 0, -slope / curve, torch.zeros_like(slope)).clamp(-0.5, 0.5)
    return start


def tables(m: Module, frequency: Tensor, *, scale: float = 1.0, places: Tensor | None = None) -> dict[str, Any]:
    """cos and sin [batch, tokens, pairs] of other frequencies or positions [batch, tokens]."""
    ids = m.forward.inputs.position_ids
    assert ids is not None
    angle = (ids if places is None else places).to(frequency)[..., None] * frequency
    return {"cos": (angle.cos() * scale).to(m["cos"]), "sin": (angle.sin() * scale).to(m["cos"])}


# Frequencies


@fault("wrong rope theta", "attention")
def theta(m: Module, engine: Tensor) -> Variants:
    """log(frequency) is linear in the pair's index: its slope is theta."""
    found = turned(m, engine)
    if found is None:
        return
    rope = rope_spec(m)
    changes: Callable[[float], dict[str, Any]] = lambda t: m.rope(dataclasses.replace(rope, theta=t))  # noqa: E731
    words = f"{{}} instead of {rope.theta:g}"
    if len(found.position) < 4:
        # Too few for a fit; what another forward told holds here too.
        yield Fit(words=words, value=rope.theta, changes=changes, least=1.001), {}
        return
    fitted, index = frequencies(found), torch.arange(len(found.usual), dtype=torch.float64, device=engine.device)
    good = (fitted > 1e-3 * fitted.max()) & (index > 0)
    if not bool(good.any()):
        return
    exponents = -2 * index / rope.dim
    log = float(((fitted[good] * rope.position_divisor).log() / exponents[good]).median())
    span = float(found.position.max())
    # By least squares on the angles, which weigh each pair as it deserves.
    log = _minimum(lambda x: _left(found, (x * exponents).exp() / rope.position_divisor), log, 0.5 / max(span, 1.0))
    if not 0.1 < log < 40:
        return
    value = math.exp(log)
    yield Fit(words=words, value=value, changes=changes, least=1.001), changes(value)


def _left(found: Turned, frequency: Tensor, position: Tensor | None = None) -> float:
    """Weighted error of the factors, whose size is free."""
    place = found.position if position is None else position
    weighted = found.factor * found.weight
    along = (weighted * torch.polar(torch.ones_like(found.weight), -place[:, None] * frequency)).real.sum()
    return -float(along)


def _minimum(f: Callable[[float], float], start: float, step: float) -> float:
    """A local minimum near `start`, by halving steps."""
    best, value = start, f(start)
    for _ in range(120):
        for tried in (best + step, best - step):
            new = f(tried)
            if new < value:
                best, value = tried, new
                break
        else:
            step /= 2
        if step < 1e-13 * max(1.0, abs(best)):
            break
    return best


@fault("position interpolation missing or applied", "attention")
def divisor(m: Module, engine: Tensor) -> Variants:
    """All frequencies are divided by one number, or all positions multiplied by it."""
    found = turned(m, engine)
    if found is None:
        return
    rope = rope_spec(m)
    words = f"positions divided by {{}} instead of {rope.position_divisor:g}"
    changes: Callable[[float], dict[str, Any]] = lambda d: tables(m, found.usual * rope.position_divisor / d)  # noqa: E731
    if len(found.position) < 4:
        yield Fit(words=words, value=rope.position_divisor, changes=changes, least=1e-6), {}
        return
    fitted = frequencies(found)
    ratio = float((found.usual / fitted.clamp(min=1e-9))[: max(1, len(fitted) // 2)].median())
    ratio = _minimum(lambda r: _left(found, found.usual / r) if r > 0 else math.inf, ratio, 1e-3 * ratio)
    if not 1e-3 < ratio < 1e3:
        return
    value = ratio * rope.position_divisor
    yield Fit(words=words, value=value, changes=changes, least=1e-6), changes(value)


@fault("rope frequencies scaled unequally, as YaRN or llama3 scaling does", "attention")
def scaled(m: Module, engine: Tensor) -> Variants:
    """A factor per frequency, and one scale of the tables (YaRN's attention factor)."""
    found = turned(m, engine)
    if found is None:
        return
    few = len(found.position) < 8
    fitted = found.usual if few else frequencies(found)
    ratio = fitted / found.usual
    along = (found.factor * torch.polar(torch.ones_like(found.weight), -found.position[:, None] * fitted)).real
    scale = float((along * found.weight).sum() / found.weight.sum())
    pairs = len(fitted)
    ends = f"x {float(ratio[0]):.4g} (fastest) to x {float(ratio[-1]):.4g} (slowest)"
    one, both = Several(fitted), Several(torch.cat([fitted, fitted.new_tensor([scale])]))

    def planted(value: float) -> dict[str, Any]:
        given = numbers_of(value, fitted)
        return tables(m, given[:pairs], scale=float(given[pairs]) if len(given) > pairs else 1.0)

    yield Fit(words=ends, value=one, numbers=pairs, key="frequencies", changes=planted), planted(one)
    if abs(scale - 1) > _FLAT or few:
        words = f"{ends}, and cos and sin x {scale:.4g}"
        yield Fit(words=words, value=both, numbers=pairs + 1, key="and scaled", changes=planted), planted(both)


@fault("cos and sin scaled", "attention")
def magnitude(m: Module, engine: Tensor) -> Variants:
    found = turned(m, engine)
    if found is None:
        return
    along = (found.factor * torch.polar(torch.ones_like(found.weight), -found.position[:, None] * found.usual)).real
    scale = float((along * found.weight).sum() / found.weight.sum())
    changes: Callable[[float], dict[str, Any]] = lambda s: {"cos": m["cos"] * s, "sin": m["sin"] * s}  # noqa: E731
    yield Fit(words="by {}", value=scale, changes=changes), changes(scale)


# Positions


@fault("positions off", "attention")
def offset(m: Module, engine: Tensor) -> Variants:
    found, ids = turned(m, engine), m.forward.inputs.position_ids
    if found is None or ids is None:
        return
    ids = ids.to(engine.device)
    place = positions(found)
    off = place - found.position
    one = float(off.median())

    def moved(by: float) -> dict[str, Any]:
        return tables(m, found.usual, places=ids + by)

    if abs(one) > 1e-2:
        near = round(one)
        if abs(one - near) < 0.02:
            yield Fit(words=f"by {near:+d}", value=float(near), changes=moved, key="by"), moved(float(near))
        else:
            yield Fit(words="by {}", value=one, changes=moved), moved(one)
    batch = len(ids)
    if batch > 1:
        each = torch.stack(
            [off[found.row == r].median() if bool((found.row == r).any()) else off.new_zeros(()) for r in range(batch)]
        )
        rounded = each.round()
        if bool((each - rounded).abs().max() < 0.1) and not torch.equal(rounded, rounded[:1].expand_as(rounded)):
            by_row = ids + rounded[:, None]
            words = f"by {[int(x) for x in rounded.tolist()]} in the rows of the batch"
            yield Fit(words=words, numbers=batch, key="rows"), tables(m, found.usual, places=by_row)
    now = place.round()
    for start in (0, 1):
        steps = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        yield f"restarted at {start} in every forward", tables(m, found.usual, places=steps + start)
    yield "the same for all tokens: 1", tables(m, found.usual, places=torch.ones_like(ids))
    yield "the slots of the tokens", tables(m, found.usual, places=_slots(m))
    yield "in reverse order", tables(m, found.usual, places=ids.flip(1))
    lengths = m["cache_lengths"][:, None].expand_as(ids)
    yield "the first new slot for all new tokens", tables(m, found.usual, places=lengths)
    yield "the position of the longest row", tables(m, found.usual, places=ids.amax(0, keepdim=True).expand_as(ids))
    largest = int(ids.max())
    if len(now) > 4 and bool((now < found.position).any()):
        most = int(now.max())
        if 0 < most < largest:
            changes: Callable[[float], dict[str, Any]]
            changes = lambda n: tables(m, found.usual, places=ids.clamp(max=round(n)))  # noqa: E731
            yield Fit(words=f"clamped to at most {most}", value=most, changes=changes, key="clamped"), changes(most)
            changes = lambda n: tables(m, found.usual, places=ids % round(n))  # noqa: E731
            yield Fit(words=f"modulo {most + 1}", value=most + 1, changes=changes, key="modulo"), changes(most + 1)


def _slots(m: Module) -> Tensor:
    lengths = m["cache_lengths"]
    slots: Tensor = lengths[:, None] + torch.arange(m["qkv"].shape[1], device=lengths.device)
    return slots


@fault("positions grow by another number per token", "attention")
def growth(m: Module, engine: Tensor) -> Variants:
    """From one token to the next, or per decode step, with an offset: position = a * right + b."""
    found, ids = turned(m, engine), m.forward.inputs.position_ids
    if found is None or ids is None:
        return
    place = positions(found)
    centred = found.position - found.position.mean()
    slope = float((centred * place).sum() / centred.square().sum().clamp(min=1e-300))
    both = Several(torch.tensor([slope, float((place - slope * found.position).median())]))

    def planted(value: float) -> dict[str, Any]:
        grown, start = numbers_of(value, both.numbers).tolist()
        return tables(m, found.usual, places=ids.to(found.usual.device) * grown + start)

    words = f"{slope:.4g} per token, from {float(both.numbers[1]):.4g}"
    yield Fit(words=words, value=both, numbers=2, key="growth", changes=planted), planted(both)


# Other pairs, other parts


@fault("rope applied to the values too", "attention")
def values_turned(m: Module, _: Tensor) -> Variants:
    if m["cos"] is not None and m.part == "value":
        query, key, value = split(m)
        turn = rotate(value, m["cos"], m["sin"], m["rotary_interleaved"]).to(value.dtype)
        yield "", {"qkv": join(query, key, turn)}


@fault("rope of the query alone", "attention")
def query_turned(m: Module, _: Tensor) -> Variants:
    """The keys are right; the query is turned by something else."""
    if m["cos"] is None or m.part != "attn.context":
        return
    ids, usual = m.forward.inputs.position_ids, usual_frequencies(m)
    if ids is None or len(usual) != m["cos"].shape[-1]:
        return
    query, key, value = split(m)
    for by in (1, -1, 2, -2):
        angle = torch.full(ids.shape, float(by), device=usual.device, dtype=torch.float64)[..., None] * usual
        yield f"positions off by {by:+d}", {"qkv": turn_query(m, angle.cos().to(m["cos"]), angle.sin().to(m["cos"]))}
    cos, sin, interleaved = m["cos"], m["sin"], m["rotary_interleaved"]
    back = rotate(rotate(query, cos, sin, not interleaved).to(query.dtype), cos, -sin, interleaved).to(query.dtype)
    yield "layout interleaved and half-split exchanged", {"qkv": join(back, key, value)}
    twice = turn_query(m, cos * cos - sin * sin, -2 * sin * cos)
    yield "turned the wrong way", {"qkv": twice}


@fault("rope turned some pairs only", "attention")
def some_pairs(m: Module, engine: Tensor) -> Variants:
    found = turned(m, engine)
    if found is None:
        return
    still = ((found.factor - 1).abs().square() * found.weight).sum(0) / found.weight.sum(0).clamp(min=1e-300) < 1e-6
    move = float(found.position.max() - found.position.min())
    could = found.usual * move > 0.1
    moved = int((~still).sum())
    mask = Several((~(still & could)).to(found.usual))

    def planted(value: float) -> dict[str, Any]:
        return tables(m, found.usual * numbers_of(value, mask.numbers))

    words = f"{moved} of {len(still)}"
    yield Fit(words=words, value=mask, numbers=2, key="pairs", changes=planted), planted(mask)


@fault("rope layout", "attention", rare=True)
def layouts(m: Module, _: Tensor) -> Variants:
    """Element orders of other converters: the halves exchanged, sin and cos exchanged, a sign."""
    if not has_rope(m):
        return
    cos, sin = m["cos"], m["sin"]
    yield "cos and sin exchanged", {"cos": sin, "sin": cos}
    yield "frequencies in reverse order", {"cos": cos.flip(-1), "sin": sin.flip(-1)}
    yield "cos negative", {"cos": -cos}
    yield "cos and sin negative", {"cos": -cos, "sin": -sin}
    yield "without its cosine", {"cos": torch.zeros_like(cos)}
    yield "without its sine", {"sin": torch.zeros_like(sin)}
    every = [torch.cat([t, t], -1)[..., ::2] for t in (cos, sin)]
    yield "tables of every second pair", {"cos": every[0], "sin": every[1]}
