"""Wrong attention is named from what the engine read and wrote: rotation, mask, scores, heads, cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from debug.comparison.faults.rotation import join, rope_spec, split
from debug.comparison.faults.rotation_fit import tables, usual_frequencies
from debug.comparison.modules import Module
from refmodels.ops import rotate
from tests.support.planted import Change, run

KEY, VALUE, CONTEXT = "blocks.1.key", "blocks.1.value", "blocks.1.attn.context"


@dataclass(frozen=True)
class Kind:
    """name: words of the right name."""

    name: str
    tap: str
    change: Change
    case: str = "chatglm2"
    steps: tuple[int, ...] | None = None


def rope(**facts: float) -> Change:
    return lambda m: m(**m.rope(dataclasses.replace(rope_spec(m), **facts)))  # type: ignore[arg-type]


def frequencies(change: Callable[[Tensor], Tensor], scale: float = 1.0) -> Change:
    return lambda m: m(**tables(m, change(usual_frequencies(m)), scale=scale))


def places(change: Callable[[Tensor], Tensor]) -> Change:
    def moved(m: Module) -> Tensor:
        ids = m.forward.inputs.position_ids
        assert ids is not None
        return m(**tables(m, usual_frequencies(m), places=change(ids)))

    return moved


def llama3(frequency: Tensor) -> Tensor:
    share = torch.linspace(1.0, 0.125, len(frequency), dtype=frequency.dtype)
    return frequency * share


def seen(mask: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Change:
    return lambda m: m(seen=mask)


def scores(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda m: m(scores=change)


def softmax(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda m: m(weights=lambda s, shown: change(s.softmax(-1).nan_to_num(nan=0.0)))


def sunk(m: Module) -> Tensor:
    return m(weights=lambda s, shown: s.exp().nan_to_num(nan=0.0) / (s.exp().sum(-1, keepdim=True) + 0.7))


def written(change: Callable[[Tensor], Tensor]) -> Change:
    def changed(m: Module) -> Tensor:
        cache, start = m().clone(), m["cache_lengths"]
        for row, first in enumerate(start.tolist()):
            stop = first + m["qkv"].shape[1]
            cache[row, :, first:stop] = change(cache[row, :, first:stop])
        return cache

    return changed


def other_slot(m: Module) -> Tensor:
    right, before = m(), m[f"{m.part}_cache"]
    moved: Tensor = before.clone()
    for row, first in enumerate(m["cache_lengths"].tolist()):
        moved[row, :, max(0, first - 3) : first - 3 + m["qkv"].shape[1]] = right[row, :, first:][
            :, max(0, 3 - first) : m["qkv"].shape[1]
        ]
    return moved


def values_rotated(m: Module) -> Tensor:
    query, key, value = split(m)
    return m(qkv=join(query, key, rotate(value, m["cos"], m["sin"], m["rotary_interleaved"])))


KINDS = {
    "theta": Kind("theta: 12345 instead", KEY, rope(theta=12345.0)),
    "theta, other model": Kind("theta: 777 instead", KEY, rope(theta=777.0), "qwen2"),
    "linear scaling": Kind("divided by 1.5", KEY, rope(position_divisor=1.5), "qwen2"),
    "llama3": Kind("frequencies scaled unequally", KEY, frequencies(llama3), "qwen2"),
    "attention factor": Kind("cos and sin scaled: by 1.2", KEY, frequencies(lambda f: f, 1.2)),
    "offset": Kind("positions off: by +5", KEY, places(lambda p: p + 5)),
    "restart": Kind("positions off: restarted at 0", KEY, places(lambda p: p * 0), steps=(1, 2, 3)),
    "values rotated": Kind("rope applied to the values", VALUE, values_rotated, "qwen2"),
    "strict": Kind("causal mask: strict", CONTEXT, seen(lambda k, q, v: (k < q) & v)),
    "one ahead": Kind("causal mask: one ahead", CONTEXT, seen(lambda k, q, v: (k <= q + 1) & v)),
    "five ahead": Kind("causal mask: 5 ahead", CONTEXT, seen(lambda k, q, v: (k <= q + 5) & v)),
    "top-left": Kind(
        "top-left",
        CONTEXT,
        lambda m: m(seen=lambda k, q, v: (k <= q - m["cache_lengths"][:, None, None]) & v),
        steps=(1, 2, 3),
    ),
    "window": Kind("sliding window: 6 instead", CONTEXT, lambda m: m(window=6)),
    "first hidden": Kind("slots hidden: the first 9", CONTEXT, seen(lambda k, q, v: (k <= q) & v & (k >= 9))),
    "padding of a row": Kind(
        "padding mask: that of another row", CONTEXT, lambda m: m(visible=m["visible"][[1, 2, 0]])
    ),
    "soft cap": Kind("soft-capped: tanh at 0.8", CONTEXT, scores(lambda s: 0.8 * torch.tanh(s / 0.8))),
    "sink": Kind("attention sink", CONTEXT, sunk),
    "queries": Kind(
        "over the queries", CONTEXT, lambda m: m(weights=lambda s, shown: s.softmax(-2).nan_to_num(nan=0.0))
    ),
    "uniform": Kind("softmax: uniform", CONTEXT, scores(torch.zeros_like)),
    "4 bits": Kind("quantized to 4 bits", CONTEXT, softmax(lambda w: (w * 15).round() / 15)),
    "finite mask": Kind(
        "mask value: -3 added",
        CONTEXT,
        lambda m: m(seen=lambda k, q, v: (k <= q) | (k > q) | v, scores=lambda s: s + -3.0 * ~right(m)),
    ),
    "kv heads": Kind("off by one", CONTEXT, lambda m: m(read=lambda k, v: (k.roll(-1, 1), v.roll(-1, 1)))),
    "values of a row": Kind("another row's cache: values", CONTEXT, lambda m: m(read=lambda k, v: (k, v[[1, 2, 0]]))),
    "another layer": Kind(
        "another layer's cache: values of layer 0", CONTEXT, lambda m: m(read=lambda k, v: (k, layer0(m)))
    ),
    "one head": Kind("head 2 missing", CONTEXT, lambda m: without(m, 2)),
    "logn": Kind("logn scaling", CONTEXT, lambda m: m(query_scale=logn(m, 7))),
    "slot - 3": Kind("wrong slot: -3", KEY, other_slot, steps=(1, 2, 3)),
    "key scaled": Kind("scaled by 1.37", KEY, written(lambda x: x * 1.37)),
    "channels": Kind("channels permuted: in reverse", VALUE, written(lambda x: x.flip(-1))),
    "fp8": Kind("float8_e4m3fn", VALUE, written(lambda x: x.float().to(torch.float8_e4m3fn).double())),
    "int8": Kind("int8 in steps", VALUE, written(lambda x: (x / 0.02).round().clamp(-128, 127) * 0.02)),
    "layer": Kind(
        "another layer's tokens: those of layer 0",
        VALUE,
        lambda m: m(qkv=m.forward.tensors["blocks.0.attn.qkv"].double()),
    ),
}
"""By what is wrong."""


def right(m: Module) -> Tensor:
    slot = torch.arange(m["visible"].shape[1])
    query = m["cache_lengths"][:, None, None] + torch.arange(m["qkv"].shape[1])[:, None]
    shown: Tensor = ((slot <= query) & m["visible"][:, None])[:, None]
    return shown


def layer0(m: Module) -> Tensor:
    value = m.forward.tensors["blocks.0.value"]
    return value[:, :, : m["visible"].shape[1]].double()


def without(m: Module, head: int) -> Tensor:
    context = m().unflatten(-1, (m["heads"], -1)).clone()
    context[:, :, head] = 0.0
    flat: Tensor = context.flatten(2)
    return flat


def logn(m: Module, length: int) -> Tensor:
    ids = m.forward.inputs.position_ids
    assert ids is not None
    return ((ids + 1).double().log() / torch.tensor(float(length)).double().log()).clamp(min=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("what", KINDS)
def test_the_first_name_is_the_right_one(what: str) -> None:
    kind = KINDS[what]
    assert kind.name in run(kind.case).first(kind.tap, kind.change, steps=kind.steps)


def noise(size: float) -> Callable[[Tensor], Tensor]:
    return lambda s: s + size * torch.randn(s.shape, generator=torch.Generator().manual_seed(1), dtype=s.dtype)


NEAR = {
    "noise on the scores": (CONTEXT, scores(noise(0.3))),
    "noise on the angles": (KEY, places(lambda p: p + 0.3 * torch.sin(7.0 * p.double()))),
    "noise on the keys": (KEY, written(noise(0.3))),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", NEAR)
def test_what_no_simple_fact_explains_stays_unknown(what: str) -> None:
    tap, change = NEAR[what]
    assert run("chatglm2").first(tap, change) == "unknown"
