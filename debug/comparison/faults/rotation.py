"""Faults of the rotary position embedding."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import Variants, fault
from debug.comparison.modules import Module
from refmodels.dtypes import torch_name
from refmodels.ops import rotate
from refmodels.positions import inverse_frequencies, ntk_alpha
from refmodels.spec import RopeSpec


def has_rope(m: Module) -> bool:
    return m["cos"] is not None and m.part != "value"


def rope_spec(m: Module) -> RopeSpec:
    rope = m.decoder.spec.rope
    assert rope is not None
    return rope


@fault("rope not applied", "attention")
def rope_missing(m: Module, _: Tensor) -> Variants:
    if has_rope(m):
        yield "", {"cos": None, "sin": None}
        if m.part == "attn.context":
            yield "to the query", {"qkv": turn_query(m, m["cos"], -m["sin"])}


@fault("rope applied twice", "attention")
def rope_twice(m: Module, _: Tensor) -> Variants:
    if has_rope(m):
        cos, sin = m["cos"], m["sin"]
        yield "", {"cos": cos * cos - sin * sin, "sin": 2 * sin * cos}
        if m.part == "attn.context":
            yield "to the query", {"qkv": turn_query(m, cos, sin)}


@fault("rope turned the wrong way", "attention")
def rope_inverse(m: Module, _: Tensor) -> Variants:
    if has_rope(m):
        yield "", {"sin": -m["sin"]}


@fault("rope layout: interleaved and half-split exchanged", "attention")
def rope_layout(m: Module, _: Tensor) -> Variants:
    if has_rope(m):
        yield "", {"rotary_interleaved": not m["rotary_interleaved"]}


@fault("wrong rope theta", "attention")
def rope_theta(m: Module, _: Tensor) -> Variants:
    if has_rope(m):
        rope = rope_spec(m)
        for theta in (1e3, 1e4, 1e5, 2.5e5, 5e5, 1e6, 5e6, 1e7, rope.theta * 2, rope.theta / 2):
            if theta != rope.theta:
                yield f"{theta:g} instead of {rope.theta:g}", m.rope(dataclasses.replace(rope, theta=theta))


@fault("wrong rotary dim", "attention")
def rope_dim(m: Module, _: Tensor) -> Variants:
    if has_rope(m):
        rope, head_dim = rope_spec(m), m.decoder.spec.attention.head_dim
        for dim in sorted({head_dim, head_dim // 2, head_dim // 4, 2 * rope.dim, rope.dim // 2}):
            if dim != rope.dim and 2 < dim <= head_dim and dim % 2 == 0:
                yield f"{dim} instead of {rope.dim}", m.rope(dataclasses.replace(rope, dim=dim))
                # The frequencies of the right dim, on more or fewer elements.
                cos, sin = (t[..., : dim // 2] for t in (m["cos"], m["sin"]))
                if cos.shape[-1] == dim // 2:
                    yield f"{dim} instead of {rope.dim}, same frequencies", {"cos": cos, "sin": sin}


@fault("positions off", "attention")
def positions_shifted(m: Module, _: Tensor) -> Variants:
    if has_rope(m):
        rope = rope_spec(m)
        for shift in (1, -1, 2, -2):
            yield f"by {shift:+d}", m.rope(rope, shift=shift)
        yield "by the left padding (slots counted)", m.rope(rope, shift=padding_before(m))
        yield "by the left padding (tokens counted)", m.rope(rope, shift=-padding_before(m))
        if m.forward.step:
            ids = m.forward.inputs.position_ids
            assert ids is not None
            yield "restarted at 0 in decode", m.rope(rope, shift=-ids.to(m.decoder.device))


@fault("rope table in half precision", "attention", small=True)
def rope_half(m: Module, _: Tensor) -> Variants:
    if has_rope(m):
        for dtype in (torch.float16, torch.bfloat16):
            name = torch_name(dtype)
            yield f"{name} cos and sin", {k: m[k].to(dtype).to(m[k].dtype) for k in ("cos", "sin")}
            yield f"{name} frequencies", _half_angles(m, dtype, torch.float32)
            yield f"{name} angles", _half_angles(m, dtype, dtype)


@fault("position interpolation missing or applied", "attention")
def rope_interpolation(m: Module, _: Tensor) -> Variants:
    if has_rope(m):
        rope = rope_spec(m)
        for divisor in (1.0, 2.0, 4.0, 8.0):
            if divisor != rope.position_divisor:
                detail = f"positions divided by {divisor:g} instead of {rope.position_divisor:g}"
                yield detail, m.rope(dataclasses.replace(rope, position_divisor=divisor))


@fault("rope scaling missing or wrong", "attention")
def rope_scaling(m: Module, _: Tensor) -> Variants:
    if has_rope(m) and (scaling := rope_spec(m).scaling) is not None:
        rope = rope_spec(m)

        def changed(**facts: Any) -> dict[str, Tensor]:
            return m.rope(dataclasses.replace(rope, scaling=dataclasses.replace(scaling, **facts)))

        yield f"no {scaling.kind}", m.rope(dataclasses.replace(rope, scaling=None))
        if scaling.kind != "linear":
            yield f"linear instead of {scaling.kind}", changed(kind="linear", attention_factor=1.0)
        if scaling.attention_factor != 1.0:
            yield f"cos and sin without the factor {scaling.attention_factor:.6g}", changed(attention_factor=1.0)
        for times in (0.25, 0.5, 2.0, 4.0):
            factor = scaling.factor * times
            yield f"factor {factor:g} instead of {scaling.factor:g}", changed(factor=factor)
            original = int(scaling.original_positions * times)
            if scaling.kind in ("yarn", "llama3") and original:
                detail = f"original length {original} instead of {scaling.original_positions}"
                yield detail, changed(original_positions=original)


@fault("dynamic NTK missing or recomputed", "attention")
def ntk(m: Module, _: Tensor) -> Variants:
    if has_rope(m) and (length := rope_spec(m).ntk_seq_length) is not None:
        plan, rope = m.forward.inputs, rope_spec(m)
        rows = len(plan.input_ids)
        yield "missing", m.rope(rope, alpha=torch.ones(rows))
        now = int(plan.cache_lengths.max()) + plan.input_ids.shape[1]
        yield "recomputed from the longest row", m.rope(rope, alpha=torch.full((rows,), ntk_alpha(now, length)))
        live = (plan.cache_lengths + plan.input_ids.shape[1]).tolist()
        yield "recomputed at this length", m.rope(rope, alpha=torch.tensor([ntk_alpha(n, length) for n in live]))
        for factor in (0.5, 2.0):
            yield f"alpha x {factor:g}", m.rope(rope, alpha=_alpha(m) * factor)


def _alpha(m: Module) -> Tensor:
    table = m.forward.inputs.ntk_table
    assert table is not None
    return 2.0 ** (table + 1) - 1


def padding_before(m: Module) -> Tensor:
    """Hidden slots before each new token: [batch, tokens]."""
    plan = m.forward.inputs
    hidden = (plan.attention_mask == 0).cumsum(1)
    slots = plan.cache_lengths[:, None] + torch.arange(plan.input_ids.shape[1])
    return hidden.gather(1, slots).to(m.decoder.device)


def _half_angles(m: Module, dtype: torch.dtype, angles: torch.dtype) -> dict[str, Tensor]:
    """The rotation with frequencies in `dtype` and their products with positions in `angles`."""
    rope, ids = rope_spec(m), m.forward.inputs.position_ids
    assert ids is not None
    frequency = inverse_frequencies(rope, rope.theta, torch.float64).to(dtype).to(angles)
    angle = ((ids.double() / rope.position_divisor).to(angles)[..., None] * frequency).to(m["cos"])
    factor = 1.0 if rope.scaling is None else rope.scaling.attention_factor
    return {
        name: (turn(angle) * factor).to(dtype).to(m["cos"]) for name, turn in (("cos", torch.cos), ("sin", torch.sin))
    }


def head_counts(m: Module) -> list[int]:
    return [m["heads"], m["kv_heads"], m["kv_heads"]]


def split(m: Module) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value: [batch, tokens, heads, head_dim]."""
    qkv = m["qkv"]
    query, key, value = qkv.view(*qkv.shape[:2], sum(head_counts(m)), -1).split(head_counts(m), 2)
    return query, key, value


def join(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 2).flatten(2)


def turn_query(m: Module, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = split(m)
    return join(rotate(query, cos, sin, m["rotary_interleaved"]).to(query.dtype), key, value)
