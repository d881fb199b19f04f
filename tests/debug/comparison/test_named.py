"""The diagnosis says what is wrong with single modules, also in ways that no list holds, and nothing about the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from debug.comparison.intervals import described, interval, roundest
from debug.comparison.modules import Module
from debug.comparison.regions import region
from debug.comparison.repeats import repeats_of
from debug.comparison.results import Culprit, Diagnosis
from tests.support.planted import Change, run

QKV, OUT, UP, NORM, ACT, MID = (
    f"blocks.1.{p}" for p in ("attn.qkv", "mlp.out", "mlp.up", "mlp_norm", "mlp.act", "resid_mid")
)


@dataclass(frozen=True)
class Kind:
    """name: words of the right name.  case: the model.  exact: the engine's output has no other rounding."""

    name: str
    tap: str
    change: Change
    case: str = "chatglm2"
    steps: tuple[int, ...] | None = None
    exact: bool = False
    half: bool = True


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def weight(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda m: m(weight=change(m["weight"]))


def rows(order: Callable[[int], Tensor]) -> Change:
    def changed(m: Module) -> Tensor:
        index = order(len(m["weight"]))
        return m(weight=m["weight"][index], bias=None if m["bias"] is None else m["bias"][index])

    return changed


def exchanged(one: int, two: int) -> Callable[[int], Tensor]:
    def order(n: int) -> Tensor:
        index = torch.arange(n)
        index[one], index[two] = two, one
        return index

    return order


def one_element(w: Tensor) -> Tensor:
    w = w.clone()
    w[9, 11] = 3.25
    return w


def pruned(w: Tensor) -> Tensor:
    smallest = w.abs().flatten().kthvalue(int(0.3 * w.numel())).values
    return torch.where(w.abs() <= smallest, 0.0, w)


def qkv_exchanged_without_bias(m: Module) -> Tensor:
    a = m.decoder.spec.attention
    query, key, value = torch.arange(len(m["weight"])).split(
        [n * a.head_dim for n in (a.heads, a.kv_heads, a.kv_heads)]
    )
    return m(weight=m["weight"][torch.cat([key, query, value])], bias=None)


def quantized(bits: int, group: int, *, limit: int, asymmetric: bool = False, scale_row: int = 0) -> Change:
    """A weight after quantization and back, each group with its own scale; scale_row: that of a later row."""

    def made(w: Tensor) -> Tensor:
        x = w.unflatten(1, (-1, group or w.shape[1]))
        if asymmetric:
            low, high = x.amin(2, keepdim=True).clamp(max=0), x.amax(2, keepdim=True).clamp(min=0)
            scale = (high - low) / (2**bits - 1)
            zero = (-low / scale).round()
            return (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero).mul(scale).flatten(1)
        scale = x.abs().amax(2, keepdim=True) / limit
        steps = (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (steps * scale.roll(scale_row, 0)).flatten(1)

    return weight(made)


def dynamic_int8(m: Module) -> Tensor:
    scale = m["input"].abs().amax(-1, keepdim=True) / 127
    return m(input=(m["input"] / scale).round() * scale)


def other(name: str) -> Change:
    return lambda m: m(weight=m.decoder.get_submodule(name).weight, bias=m.decoder.get_submodule(name).bias)


def head_of(name: str) -> Change:
    """One head of another layer's projection."""

    def changed(m: Module) -> Tensor:
        source = m.decoder.get_submodule(name)
        own, bias = m["weight"].clone(), m["bias"].clone()
        own[16:32], bias[16:32] = source.weight[16:32], source.bias[16:32]
        return m(weight=own, bias=bias)

    return changed


def taps(**read: str) -> Change:
    return lambda m: m(**{argument: m.forward.tensors[tap].double() for argument, tap in read.items()})


def activated(function: Callable[[Tensor], Tensor]) -> Change:
    return lambda m: m(function=function)


LINEAR = [
    Kind("order: kqv; bias missing", QKV, qkv_exchanged_without_bias),
    Kind("shifted by", QKV, rows(lambda n: torch.arange(n).roll(1))),
    Kind("in reverse order", QKV, rows(lambda n: torch.arange(n).flip(0))),
    Kind("in reverse order", OUT, weight(lambda w: w.flip(1))),
    Kind("shifted by", UP, weight(lambda w: w.roll(5, 1))),
    Kind("3 and 40 exchanged", UP, rows(exchanged(3, 40))),
    Kind("input channels in the wrong order: another order", UP, weight(lambda w: w[:, random(w.shape[1]).argsort()])),
    Kind("row 5: zero", UP, weight(lambda w: w.index_fill(0, torch.tensor(5), 0.0))),
    Kind("query head 1: zero", QKV, weight(lambda w: w.index_fill(0, torch.arange(16, 32), 0.0))),
    Kind("query head 0: scaled by 1.5", QKV, weight(lambda w: torch.cat([w[:16] * 1.5, w[16:]]))),
    Kind("input channel 7: zero", OUT, weight(lambda w: w.index_fill(1, torch.tensor([7]), 0.0))),
    Kind("all-reduce missing", OUT, weight(lambda w: w.index_fill(1, torch.arange(w.shape[1] // 2, w.shape[1]), 0.0))),
    Kind("every row of the weight: scaled by 0.9", QKV, weight(lambda w: 0.9 * w)),
    Kind("element [9, 11] is", UP, weight(one_element)),
    Kind("query head 1: rows 16 to 31 of blocks.0.attn.qkv", QKV, head_of("blocks.0.attn.qkv")),
    Kind("those of blocks.0.attn.qkv", QKV, other("blocks.0.attn.qkv")),
    Kind("a matrix of rank 4", UP, weight(lambda w: w + 0.3 * random(len(w), 4) @ random(4, w.shape[1]) / 8)),
    Kind("the smallest 30% of its elements", OUT, weight(pruned)),
    Kind("clamped at", OUT, weight(lambda w: w.clamp(-1.5 * w.std(), 1.5 * w.std()))),
    Kind("0.01", OUT, weight(lambda w: w + 0.01)),
    Kind("added 3 times", QKV, lambda m: m(bias=3 * m["bias"])),
    Kind("bias wrong: other values", QKV, lambda m: m(bias=m["bias"] + random(len(m["bias"])))),
    Kind("each row scaled by a factor of its own", OUT, weight(lambda w: w * (2 + random(len(w), 1).tanh()))),
    Kind("each input channel scaled", OUT, weight(lambda w: w * (2 + random(1, w.shape[1]).tanh()))),
    Kind("blocks.0.mlp.act as the input", OUT, taps(input="blocks.0.mlp.act")),
    Kind("int4, groups of 32, symmetric, scale = max/7", OUT, quantized(4, 32, limit=7), half=False),
    Kind("int4, groups of 32, symmetric, scale = max/8", OUT, quantized(4, 32, limit=8), half=False),
    Kind("int4, one scale per row, asymmetric", OUT, quantized(4, 0, limit=0, asymmetric=True), half=False),
    Kind("scales of the row before", OUT, quantized(8, 0, limit=127, scale_row=1), half=False),
    Kind("weight rounded: to bfloat16", QKV, weight(lambda w: w.bfloat16().double()), half=False),
    Kind("weight rounded: to float8_e4m3fn", QKV, weight(lambda w: w.float().to(torch.float8_e4m3fn).double())),
    Kind("int8, one scale per token", QKV, dynamic_int8),
]  # fmt: skip

POINTWISE = [
    Kind("wrong epsilon: 0.003", NORM, lambda m: m(eps=3e-3), half=False),
    Kind("in decode only", NORM, lambda m: m(eps=3e-2), steps=(1, 2, 3)),
    Kind("mean of magnitudes", NORM, lambda m: m(statistic=lambda x, e: x / (x.abs().mean(-1, keepdim=True) + e))),
    Kind("sum of squares", NORM, lambda m: m(statistic=lambda x, e: x / (x.square().sum(-1, keepdim=True) + e).sqrt())),
    Kind("0.3", NORM, lambda m: m(weight=m["weight"] + 0.3)),
    Kind("channel 5: zero", NORM, lambda m: m(weight=m["weight"].index_fill(0, torch.tensor(5), 0.0))),
    Kind("weight and bias of blocks.0.attn_norm", NORM, other("blocks.0.attn_norm"), case="gpt2"),
    Kind("blocks.0 as the input", NORM, taps(x="blocks.0")),
    Kind("mish", ACT, activated(F.mish)),
    Kind("x sigmoid(1.3", ACT, activated(lambda x: x * torch.sigmoid(1.3 * x))),
    Kind("leaky relu with slope 0.2", ACT, activated(lambda x: F.leaky_relu(x, 0.2))),
    Kind("clamped at 1", ACT, lambda m: m(function=lambda x: m["function"](x.clamp(-1, 1)))),
    Kind("up clamped at 0.5", ACT, lambda m: m(up=m["up"].clamp(-0.5, 0.5))),
    Kind("embed as the residual", MID, taps(x="embed")),
    Kind("residual scaled by 0.8 and branch by 1.3", MID, lambda m: m(x_factor=0.8, branch_factor=1.3)),
    Kind("branch subtracted", MID, lambda m: m(branch_factor=-1.0)),
    Kind("the sum normalized by blocks.1.mlp_norm", MID, lambda m: m.decoder.blocks[1].mlp_norm(m())),  # type: ignore[operator]
    Kind("ids off by +3", "embed", lambda m: m(ids=m["ids"] + 3)),
    Kind("row 1 of the token table added", "embed", lambda m: m(table=m["table"] + m["table"][1])),
    Kind("by +5", "embed", lambda m: m(positions=m["positions"] + 5), case="gpt2"),
    Kind("positions scaled by 0.5", "embed", lambda m: m(position_factor=0.5), case="gpt2"),
    Kind("output scaled by 2", UP, lambda m: m() * torch.tensor([1.0, 2.0, 1.0])[:, None, None]),
    Kind("in row 1 of the batch only", UP, lambda m: m() * torch.tensor([1.0, 2.0, 1.0])[:, None, None]),
    Kind("in the prefill only", OUT, lambda m: m() * 0.8, steps=(0,)),
    Kind("output clamped at 0.1", OUT, lambda m: m().clamp(-0.1, 0.1)),
    Kind("output soft-capped at 0.5", "logits", lambda m: 0.5 * torch.tanh(m() / 0.5)),
    Kind("output scaled by 0.7", "logits", lambda m: m() * 0.7),
    Kind("output rounded to float8_e4m3fn", OUT, lambda m: m().float().to(torch.float8_e4m3fn).double(), exact=True),
    Kind("new entries", "blocks.1.key", lambda m: m(**{n: m[n].flip(0) for n in ("qkv", "cos", "sin")})),
]

UNKNOWN = [
    Kind("", UP, lambda m: m() + 0.05 * m().square()),
    Kind("", OUT, lambda m: m().sign() * m().abs() ** 0.9),
    Kind("", ACT, lambda m: m() * (1 + 0.1 * torch.sin(7 * m["up"]))),
    Kind("", NORM, lambda m: m() + 0.02 * m().roll(1, -1) * m()),
    Kind("", MID, lambda m: m() + 0.01 * m().square()),
    Kind("", "embed", lambda m: m() * (1 + 0.1 * random(*m().shape))),
    Kind("", "blocks.1.attn.context", lambda m: m() + 0.1 * m().square()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("kind", [*LINEAR, *POINTWISE], ids=lambda k: f"{k.tap}: {k.name}")
def test_a_fault_is_named(kind: Kind, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    if dtype != torch.float32 and not kind.half:
        pytest.skip("within the noise of half precision, or its quantizer starts from rounded weights")
    assert kind.name in run(kind.case, dtype).first(kind.tap, kind.change, steps=kind.steps, exact=kind.exact)


@pytest.mark.parametrize("kind", UNKNOWN, ids=lambda k: k.tap)
def test_what_no_fault_explains_stays_unknown(kind: Kind) -> None:
    assert run(kind.case).first(kind.tap, kind.change) == "unknown"


def test_a_number_in_half_precision_has_an_interval() -> None:
    found = run("chatglm2", torch.float16).named(OUT, lambda m: m() * 0.8)[0]
    assert found.low is not None and found.high is not None and found.value is not None
    assert found.low < 0.8 < found.high and f"({found.low:.3g}"[:5] in found.fault, found


def test_equally_good_explanations_say_what_would_tell_them_apart() -> None:
    """In fp16 both forms of GELU are within the noise of one another."""
    first, second = run("chatglm2", torch.float16).named(ACT, lambda m: m(function=F.gelu))[:2]
    assert {first.fault, second.fault} == {"wrong activation: gelu (exact)", "wrong activation: gelu (tanh)"}
    assert not first.note and "the fp32 bundle" in second.note


def test_an_exact_fault_precedes_a_fit_that_holds_it() -> None:
    faults = [d.fault for d in run("chatglm2").named(NORM, lambda m: m(weight=m["weight"] + 1))]
    assert faults[0] == "norm weight missing or wrong: 1 added"


def test_the_interval_is_where_it_explains() -> None:
    low, high = interval(lambda x: 2.9 <= x <= 3.3, 3.0, float("-inf"), float("inf"))
    assert 2.9 <= low <= 2.92 and 3.28 <= high <= 3.3
    assert interval(lambda x: x < 3.3, 3.0, 2.5, float("inf"))[0] == 2.5
    assert roundest(12344.9, 12344.2, 12345.6) == 12345.0
    assert described(1.0, 0.2, 5.0, half=True) == "between 0.2 and 5"


def test_regions_are_the_simplest() -> None:
    place = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 2], [1, 1, 2]])
    true = torch.tensor([1, 1, 1, 1, 1]).bool()
    assert region(place, true, ~true) == ("", 0)
    assert region(place, place[:, 0] == 1, place[:, 0] == 0) == ("in decode only", 1)
    assert region(place, place[:, 1] == 1, place[:, 1] == 0) == ("in row 1 of the batch only", 2)
    assert region(place, torch.tensor([1, 0, 0, 0, 1]).bool(), torch.tensor([0, 1, 1, 1, 0]).bool()) is None


def test_one_fault_in_many_layers_is_said_once() -> None:
    def culprit(layer: int, fault: str, value: float) -> Culprit:
        words = "wrong epsilon: {}"
        found = Diagnosis(
            fault=fault, local_before=1.0, local_after=0.0, ratio_after=0.0,
            words=words, value=value, low=value * 0.9, high=value * 1.1,
        )  # fmt: skip
        return Culprit(
            tap=f"blocks.{layer}.mlp_norm", phase="prefill", step=0, kind="local", local=1.0, floor=0.0, ratio=9.0,
            worst=(0, 0), occurrences=1, diagnosis=[found],
        )  # fmt: skip

    names = [f"blocks.{i}.mlp_norm" for i in range(6)]
    culprits = [culprit(i, "wrong epsilon: 0.01", 0.01 + i * 1e-4) for i in range(4)] + [culprit(5, "other", 0.5)]
    (found,) = repeats_of(culprits, names)
    assert found.layers == [0, 1, 2, 3] and found.without == [4, 5]
    assert found.text == "in layers 0 to 3 (not in 4, 5), mlp_norm: wrong epsilon: 0.01"
    (found,) = repeats_of(culprits[:4], names[:4])
    assert found.text.startswith("in all 4 layers, mlp_norm")
