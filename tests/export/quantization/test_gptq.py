"""GPTQ against its paper's properties, a slow oracle, and the toys' real activations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from export.quantization.awq import search_clip
from export.quantization.gptq import Hessian, gptq, layer_error
from refmodels.errors import LogitLockError
from refmodels.quantization.arithmetic import quantize_weight, weight_scale
from refmodels.quantization.formats import LinearFormat
from tests.support.marks import quick_first
from tests.support.observed_toys import (
    FORMATS,
    INT4,
    TOYS,
    by_format,
    hessian_of,
    linears_of,
    made_layer,
    toy,
)


def slow_gptq(weight: Tensor, hessian: Tensor, linear: LinearFormat, damping: float, order: list[int]) -> Tensor:
    """Dequantized weight by Optimal Brain Quantization in a given order of columns.

    The inverse Hessian of the columns left is updated by Gaussian elimination (equation 3 of the paper), with no
    Cholesky factor, no blocks and no permuted matrices.  Groups have the scale of the original weight where the order
    is not that of the columns.
    """
    inverse = (hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))).inverse()
    group = linear.group or weight.shape[1]
    work, found = weight.clone(), torch.zeros_like(weight)
    static = order != sorted(order)
    one = dataclasses.replace(linear, group=None)
    for i in order:
        start = i // group * group
        if static or i % group == 0:
            scale, zero = weight_scale((weight if static else work)[:, start : start + group], one)
        found[:, i : i + 1] = quantize_weight(work[:, i : i + 1], one, scale=scale, zero=zero).dequantized()
        work -= (work[:, i : i + 1] - found[:, i : i + 1]) / inverse[i, i] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    return found


@by_format
@pytest.mark.parametrize("act_order", quick_first([False, True]))
def test_gptq_is_optimal_brain_quantization_in_a_fixed_order(linear: LinearFormat, act_order: bool) -> None:
    weight, x = made_layer(1)
    hessian = hessian_of(x)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(64))
    expected = slow_gptq(weight, hessian, linear, 0.02, order)
    result = gptq(weight, hessian, linear, act_order=act_order, damping=0.02, block=64)
    assert torch.allclose(result.weight.dequantized(), expected, rtol=1e-9, atol=0)
    assert result.error == pytest.approx(float((x @ (weight - expected).t()).square().sum() * 2 / len(x)), rel=1e-9)
    for block in (1, 7, 32, 48, 1000):
        other = gptq(weight, hessian, linear, act_order=act_order, damping=0.02, block=block).weight
        assert torch.equal(other.codes.float(), result.weight.codes.float()), f"block {block}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "linear"),
    [*((name, INT4) for name in TOYS), ("gpt", FORMATS["int4 zero points"]), ("chatglm2", FORMATS["int8 rows"])],
)
def test_gptq_beats_rounding_on_every_layer_of_the_toys(name: str, linear: LinearFormat) -> None:
    model, inputs = toy(name)
    for layer, weight, x in linears_of(model, inputs):
        hessian = hessian_of(x)
        nearest = layer_error(weight, quantize_weight(weight, linear).dequantized(), hessian)
        for act_order in (False, True):
            result = gptq(weight, hessian, linear, act_order=act_order)
            assert result.error < nearest, f"{layer}, act_order {act_order}"
            assert result.error == pytest.approx(layer_error(weight, result.weight.dequantized(), hessian))


def test_act_order_helps_where_few_channels_carry_the_input() -> None:
    ratios = []
    for seed in range(5):
        weight, x = made_layer(seed, columns=128)
        x[:, [70, 100, 127]] *= 30  # at the end, where the plain order has nothing left to make up with
        plain, ordered = (gptq(weight, hessian_of(x), INT4, act_order=order).error for order in (False, True))
        ratios.append(ordered / plain)
    assert max(ratios) < 0.75, ratios


def test_damping_goes_from_gptq_to_rounding() -> None:
    weight, x = made_layer(3)
    x = x[:40]  # fewer tokens than channels: singular without damping
    hessian = hessian_of(x)
    linear = FORMATS["int4 rows"]
    nearest = quantize_weight(weight, linear)
    errors = [gptq(weight, hessian, linear, damping=damping).error for damping in (0.01, 1, 100)]
    assert errors == sorted(errors)
    assert torch.equal(gptq(weight, hessian, linear, damping=1e9).weight.codes, nearest.codes)
    with pytest.raises(LogitLockError, match="not positive definite with damping 1e-300"):
        gptq(weight, hessian, linear, damping=1e-300)


def test_channels_without_input_are_rounded_and_move_nothing() -> None:
    weight, x = made_layer(4)
    dead = torch.tensor([0, 5, 63])
    x[:, dead] = 0
    alive = torch.ones(64, dtype=torch.bool).index_fill(0, dead, False)
    scale, _ = weight_scale(weight, linear := FORMATS["int4 rows"])
    damping = 0.01
    for act_order in (False, True):
        whole = gptq(weight, hessian_of(x), linear, act_order=act_order, damping=damping).weight
        assert torch.equal(whole.codes[:, dead], quantize_weight(weight, linear).codes[:, dead])
        # The mean of the diagonal, and so the damping, counts dead channels.
        rest = gptq(
            weight[:, alive],
            hessian_of(x[:, alive]),
            linear,
            act_order=act_order,
            damping=damping * 61 / 64,
            scale=scale,
        ).weight
        assert torch.equal(whole.codes[:, alive], rest.codes)
    silent = gptq(weight, torch.zeros(64, 64, dtype=torch.float64), linear)
    assert torch.equal(silent.weight.codes, quantize_weight(weight, linear).codes) and silent.relative_error == 0


def test_hessians_stream_and_merge() -> None:
    _, x = made_layer(5)
    parts = [Hessian("l", 64) for _ in range(2)]
    for i, chunk in enumerate(x.split(37)):
        parts[i % 2].observe(chunk.view(1, -1, 64))
    parts[0].merge(parts[1])
    assert parts[0].tokens == 400
    assert torch.allclose(parts[0].matrix, hessian_of(x), rtol=1e-12, atol=1e-12)
    half = Hessian("l", 64)
    half.observe(x.half())
    assert half.matrix.dtype == torch.float32


def test_gptq_keeps_to_given_scales() -> None:
    weight, x = made_layer(6)
    weight = weight.float()
    for linear in (INT4, FORMATS["int4 zero points"]):
        scale, zero = search_clip(weight, x.float(), linear)
        given = gptq(weight, hessian_of(x.float()), linear, scale=scale, zero=zero).weight
        assert torch.equal(given.scale, scale)
        assert (given.zero is None) == linear.symmetric


def test_gptq_refuses_bad_arguments() -> None:
    weight, x = made_layer(7)
    hessian = hessian_of(x)
    for changes, message in (
        ({"linear": dataclasses.replace(INT4, reordered=True)}, "static groups"),
        ({"linear": LinearFormat(weight="int4", group=48)}, "64 input columns are not a multiple of the group size 48"),
        ({"damping": 0.0}, "must be positive"),
        ({"hessian": hessian[:10]}, "Hessian of shape"),
        ({"weight": weight * float("nan")}, "holds NaN"),
    ):
        with pytest.raises(LogitLockError, match=message):
            gptq(**{"weight": weight, "hessian": hessian, "linear": INT4} | changes)
