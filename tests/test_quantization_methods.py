"""Quantisation methods against their papers' properties, slow oracles, and the toys' real activations."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from functools import lru_cache

import numpy as np
import pytest
import torch
from conftest import CASES, case_source
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import refmodels
from export.quantization.awq import candidate_scale, search_clip, search_scale
from export.quantization.fold import BLOCK_SITES, TAPS, Site, can_fold, fold, readers, share, width
from export.quantization.gptq import Hessian, damped_root, gptq, layer_error, row_errors
from export.quantization.method import (
    InputObserver,
    MethodOptions,
    QuantizedLayers,
    _gptq,
    observed_sites,
    quantize_layers,
)
from export.quantization.observers import SKETCH_ERROR, MaxObserver, PercentileObserver, TokenSample
from export.quantization.smoothquant import smooth_scale
from refmodels.checkpoint import put_parameter
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from refmodels.quantization.arithmetic import quantize_weight, weight_scale
from refmodels.quantization.formats import LIMITS, LinearFormat, group_formats
from refmodels.toys.tasks import TASKS, examples

TOYS = ("chatglm2", "baichuan", "qwen", "gpt")
INT4 = LinearFormat(weight="int4", group=32)
FORMATS = {
    "int4 groups": INT4,
    "int4 zero points": dataclasses.replace(INT4, symmetric=False),
    "int4 rows": LinearFormat(weight="int4"),
    "int8 rows": LinearFormat(weight="int8"),
    "fp8 rows": LinearFormat(weight="fp8"),
}
by_format = pytest.mark.parametrize("linear", FORMATS.values(), ids=FORMATS.keys())


def token_batches(name: str, *, split: str = "train", seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Ids and mask of a few prompts of every task with their answers, padded on the right."""
    tokenizer = refmodels.load_tokenizer_for(refmodels.resolve(name))
    batches = []
    for task in TASKS:
        rows = examples(task, split=split, count=6, seed=seed)  # type: ignore[arg-type]
        ids = [tokenizer.encode(e.prompt) + tokenizer.encode(e.answer, add_special=False) for e in rows]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        batches.append((padded, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])))
    return batches


def logits_of(model: Decoder, ids: Tensor, mask: Tensor) -> Tensor:
    return model.step(ids, model.new_cache(batch=len(ids), capacity=ids.shape[1]), mask)


@lru_cache
def toy(name: str) -> tuple[Decoder, dict[str, Tensor]]:
    """A toy and the inputs [tokens, width] of all its linears, by tap."""
    model = refmodels.load(name)
    spec = model.spec
    taps = [f"blocks.{i}.{TAPS[site]}" for i in range(spec.layers) for site in BLOCK_SITES] + ["final_norm"]
    seen: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    with torch.no_grad():
        for ids, mask in token_batches(name):
            with refmodels.recording(refmodels.Recorder(taps)) as recorder:
                logits_of(model, ids, mask)
            assert recorder is not None
            for tap, tensor in recorder.tensors.items():
                seen[tap].append(tensor[mask.bool()])
    return model, {tap: torch.cat(parts) for tap, parts in seen.items()}


def linears_of(model: Decoder, inputs: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """(name, weight, its inputs) of every linear of a toy."""
    found = []
    for name in model.spec.linears:
        block, _, part = name.rpartition("attn." if "attn." in name else "mlp.")
        part = name.removeprefix(block)
        site: Site = "mlp.up" if part == "mlp.gate" else part  # type: ignore[assignment]
        found.append((name, model.get_submodule(name).weight.detach(), inputs[block + TAPS[site]]))
    return found


def hessian_of(x: Tensor) -> Tensor:
    return x.t() @ x * (2 / len(x))


def made_layer(seed: int, rows: int = 24, columns: int = 64, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight, and correlated inputs whose channels differ in size by e^2."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64) / columns**0.5
    sizes = torch.randn(columns, generator=g, dtype=torch.float64).exp()
    x = torch.randn(tokens, columns, generator=g, dtype=torch.float64) @ mix * sizes
    return torch.randn(rows, columns, generator=g, dtype=torch.float64), x


# --- observers ---


@given(
    seed=st.integers(0, 10**6),
    percent=st.floats(50, 100),
    cuts=st.lists(st.integers(0, 200), max_size=4),
    spread=st.floats(0, 3),
)
@settings(max_examples=30)
def test_observers_stream_and_merge_to_what_one_look_sees(
    seed: int, percent: float, cuts: list[int], spread: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 6, generator=g) * (spread * torch.randn(6, generator=g)).exp()
    maxima, percentiles = [MaxObserver("l", 6) for _ in range(2)], [PercentileObserver("l", 6) for _ in range(2)]
    edges = sorted([0, *cuts, 200])
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        maxima[i % 2].observe(x[start:stop].view(1, -1, 6))
        percentiles[i % 2].observe(x[start:stop])
    maxima[0].merge(maxima[1])
    percentiles[0].merge(percentiles[1])
    assert torch.equal(maxima[0].channel, x.abs().amax(0)) and maxima[0].tensor == x.abs().max()
    assert torch.allclose(maxima[0].mean, x.abs().mean(0), rtol=1e-6) and maxima[0].tokens == 200
    divisor = torch.rand(6, generator=g) + 0.5
    for values, found in (
        (x, percentiles[0].percentile(percent)),
        (x / divisor, percentiles[0].percentile(percent, divisor=divisor)),
    ):
        exact = np.percentile(values.abs().double().numpy(), percent, method="inverted_cdf")
        # The bound of the sketch, and fp32 logarithms at its edges.
        assert found[0] == pytest.approx(exact, rel=SKETCH_ERROR * 1.01)
    by_channel = percentiles[0].percentile(percent, groups=6)
    exact = np.percentile(x.abs().double().numpy(), percent, axis=0, method="inverted_cdf")
    assert np.allclose(by_channel.numpy(), exact, rtol=SKETCH_ERROR * 1.01)
    assert torch.equal(percentiles[0].percentile(100, groups=6), x.abs().amax(0))


def test_percentiles_ignore_what_the_maximum_does_not() -> None:
    x = torch.cat((torch.linspace(-1, 1, 9999), torch.tensor([1e4])))[:, None]
    observer = PercentileObserver("l", 1, per_channel=False)
    observer.observe(x)
    assert observer.percentile(100) == 1e4 and observer.percentile(99.9)[0] == pytest.approx(1, rel=0.02)
    edges = PercentileObserver("l", 3)
    edges.observe(torch.tensor([[0, 1e30, 1e-30], [0, 2e30, 2e-30]]))
    assert edges.percentile(50, groups=3).tolist() == pytest.approx([0, 2e30, 2e-30], rel=1e-6, abs=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_name_their_layer(bad: float) -> None:
    x = torch.ones(2, 3, 4)
    x[1, 2, 3] = bad
    observers = (
        MaxObserver("blocks.7.mlp.up", 4),
        PercentileObserver("blocks.7.mlp.up", 4),
        TokenSample("blocks.7.mlp.up", 4, size=2),
        Hessian("blocks.7.mlp.up", 4),
    )
    for observer in observers:
        with pytest.raises(LogitLockError, match=r"blocks\.7\.mlp\.up.*(NaN|infinity)"):
            observer.observe(x)
        with pytest.raises(LogitLockError, match=r"blocks\.7\.mlp\.up.*5 channels"):
            observer.observe(torch.ones(2, 5))
        with pytest.raises(LogitLockError, match=r"other|merged"):
            observer.merge(type(observer)("other", 4, **({"size": 2} if isinstance(observer, TokenSample) else {})))
    with pytest.raises(LogitLockError, match=r"blocks\.7\.mlp\.up was never observed"):
        _ = observers[0].channel


def test_a_sample_of_tokens_is_bounded_uniform_and_does_not_alias() -> None:
    counts = torch.zeros(100)
    for seed in range(200):
        one, other = (TokenSample("l", 1, size=10, seed=2 * seed + i) for i in range(2))
        x = torch.arange(100.0)[:, None]
        for part in x[:70].split(7):
            one.observe(part)
        other.observe(x[70:])
        one.merge(other)
        kept = one.tokens.flatten().long()
        assert len(kept) == 10 == len(kept.unique())
        counts[kept] += 1
    # 200 draws of 10 of 100: 20 +- 4.2 each.
    assert counts.min() > 20 - 5 * 4.3 and counts.max() < 20 + 5 * 4.3 and abs(counts[:70].mean() - 20) < 1
    small = TokenSample("l", 1, size=500)
    small.observe(x)
    x.zero_()
    assert torch.equal(small.tokens.flatten(), torch.arange(100.0))


# --- folding ---


def random_scales(model: Decoder, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """All parameters after folding random scales at every site that has a place for one."""
    spec, g = model.spec, torch.Generator().manual_seed(1)
    changed = dict(parameters)
    for prefix in [*(f"blocks.{i}." for i in range(spec.layers)), ""]:
        sites: tuple[Site, ...] = BLOCK_SITES if prefix else ("head",)
        for site in sites:
            if can_fold(spec, site):
                scale = share(spec, site, torch.rand(width(spec, site), generator=g, dtype=torch.float64) * 4 + 0.1)
                part = {n.removeprefix(prefix): p for n, p in changed.items() if n.startswith(prefix)}
                new = fold(spec, site, scale, part)
                assert new and all(not torch.equal(value, part[name]) for name, value in new.items())
                changed |= {prefix + name: value for name, value in new.items()}
    return changed


@pytest.mark.parametrize("case", CASES)
def test_a_folded_model_is_the_same_function(case: str) -> None:
    model = refmodels.load(case_source(case), dtype=torch.float64)
    spec = model.spec
    ids = torch.arange(9)[None] * 7 % spec.vocab_size
    with refmodels.recording(refmodels.Recorder()) as before:
        expected = logits_of(model, ids, torch.ones_like(ids))
    for name, value in random_scales(model, dict(model.named_parameters())).items():
        put_parameter(model, name, value)
    if spec.tied_head:
        model.head.weight = model.embed.weight
    with refmodels.recording(refmodels.Recorder()) as after:
        folded = logits_of(model, ids, torch.ones_like(ids))
    # A scale's quotient and product round once each; a few hundred of them add up over the layers.
    assert (folded - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert before is not None and after is not None
    assert not torch.allclose(before.tensors["blocks.0.attn_norm"], after.tensors["blocks.0.attn_norm"])


def test_channels_that_share_a_scale_take_the_largest_statistic() -> None:
    spec = toy("chatglm2")[0].spec  # 4 heads of 32 on 2 kv heads
    statistic = torch.arange(128.0)
    shared = share(spec, "attn.out", statistic).view(4, 32)
    assert torch.equal(shared[0], statistic[32:64]) and torch.equal(shared[1], statistic[32:64])
    assert torch.equal(shared[2:], statistic[96:].expand(2, -1))
    assert share(spec, "attn.qkv", statistic) is statistic


def test_folding_refuses_what_would_change_the_function() -> None:
    gpt, glm = toy("gpt")[0], toy("chatglm2")[0]
    block = {n.removeprefix("blocks.0."): p for n, p in gpt.named_parameters() if n.startswith("blocks.0.")}
    assert not can_fold(gpt.spec, "mlp.out") and not can_fold(gpt.spec, "head")
    with pytest.raises(LogitLockError, match=r"input of mlp\.out .* cannot be folded"):
        fold(gpt.spec, "mlp.out", torch.ones(width(gpt.spec, "mlp.out")), block)
    with pytest.raises(LogitLockError, match="not positive and finite"):
        fold(gpt.spec, "attn.qkv", torch.zeros(128), block)
    with pytest.raises(LogitLockError, match="has 128 channels"):
        fold(gpt.spec, "attn.qkv", torch.ones(64), block)
    with pytest.raises(LogitLockError, match=r"must share the scales of attn\.out"):
        fold(glm.spec, "attn.out", torch.arange(1.0, 129), block)


# --- GPTQ ---


def slow_gptq(weight: Tensor, hessian: Tensor, linear: LinearFormat, damping: float, order: list[int]) -> Tensor:
    """Dequantised weight by Optimal Brain Quantization in a given order of columns.

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
@pytest.mark.parametrize("act_order", [False, True])
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
        ({"linear": LinearFormat(weight="int4", group=48)}, "64 input columns are no multiple of the group size 48"),
        ({"damping": 0.0}, "must be positive"),
        ({"hessian": hessian[:10]}, "Hessian of shape"),
        ({"weight": weight * float("nan")}, "holds NaN"),
    ):
        with pytest.raises(LogitLockError, match=message):
            gptq(**{"weight": weight, "hessian": hessian, "linear": INT4} | changes)


# --- AWQ ---


@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(FORMATS)), outliers=st.integers(0, 3))
@settings(max_examples=15)
def test_awq_never_loses_to_rounding(seed: int, name: str, outliers: int) -> None:
    linear = FORMATS[name]
    weights, xs = zip(*(made_layer(seed + i, tokens=50 + 100 * i) for i in range(2)), strict=True)
    x = xs[1].clone()
    x[:, :outliers] *= 50
    found = search_scale(weights, x, [linear, linear])

    def error(scale: Tensor) -> float:
        change = [quantize_weight(w * scale, linear).dequantized() / scale - w for w in weights]
        return sum(float((x @ d.t()).square().sum()) for d in change)

    whole = sum(float((x @ w.t()).square().sum()) for w in weights)
    group = linear.group or 64
    sizes = torch.cat([w.abs().unflatten(1, (-1, group)) for w in weights])
    size = (sizes / sizes.amax(2, keepdim=True)).flatten(1).mean(0)
    grid = [error(candidate_scale(x.abs().mean(0), step / 20, w)) for w in (None, size) for step in range(21)]
    assert found.error == pytest.approx(min(grid) / whole, rel=1e-4)
    assert found.nearest_error == pytest.approx(grid[0] / whole, rel=1e-6)
    assert error(found.scale) == pytest.approx(min(grid), rel=1e-4) and found.error <= found.nearest_error
    for weight in weights:
        folded, divided = weight * found.scale, x / found.scale
        scale, zero = search_clip(folded, divided, linear)
        clipped, plain = (
            (divided @ (quantize_weight(folded, linear, **given).dequantized() - folded).t()).square().sum(0)
            for given in ({"scale": scale, "zero": zero}, {})
        )
        assert bool((clipped <= plain * (1 + 1e-9)).all())


def test_awq_protects_the_channels_that_carry_the_input() -> None:
    for seed in range(3):
        weight, x = made_layer(seed, columns=128)
        x[:, [3, 40]] *= 100
        found = search_scale([weight], x, [INT4])
        assert found.alpha > 0 and found.error < 0.5 * found.nearest_error
        assert found.scale[[3, 40]].min() > found.scale.median()
        scale, _ = search_clip(weight, x, INT4)
        assert bool((scale <= weight_scale(weight, INT4)[0] * (1 + 1e-12)).all())


def test_clipping_finds_a_weight_that_stretches_its_group() -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.rand(4, 32, generator=g) - 0.5, torch.randn(200, 32, generator=g)
    weight[0, 5], x[:, 5] = 1.0, 0.0  # large, but it meets no input
    scale, _ = search_clip(weight, x, INT4)
    assert scale[0, 0] <= 0.55 / LIMITS["int4"]


def test_awq_without_a_choice() -> None:
    weight, x = made_layer(8)
    dead = x.clone()
    dead[:, :5] = 0
    assert bool((search_scale([weight], dead, [INT4]).scale[:5] == 1).all())
    assert bool((candidate_scale(torch.zeros(4), 0.5) == 1).all())
    # A weight that stays float has no say, but is scaled with the others.
    assert torch.equal(search_scale([weight, weight], x, [INT4, None]).scale, search_scale([weight], x, [INT4]).scale)
    with pytest.raises(LogitLockError, match="none of the weights"):
        search_scale([weight], x, [None])
    with pytest.raises(LogitLockError, match="inputs stay floats"):
        search_scale([weight], x, [LinearFormat(weight="int8", input="int8")])
    with pytest.raises(LogitLockError, match="does not fit"):
        search_scale([weight], x[:, :7], [INT4])


# --- SmoothQuant ---


@given(seed=st.integers(0, 10**6), alpha=st.floats(0, 1))
@settings(max_examples=20)
def test_smoothquant_moves_the_share_alpha_of_the_range(seed: int, alpha: float) -> None:
    (one, x), (other, _) = made_layer(seed), made_layer(seed + 1, rows=7)
    channel_max = x.abs().amax(0)
    scale = smooth_scale([one, other], channel_max, alpha=alpha)
    weight_max = torch.maximum(one.abs().amax(0), other.abs().amax(0))
    input_after, weight_after = channel_max / scale, weight_max * scale
    # Ranges after it: (max|X| max|W|)^(1 - alpha) and its counterpart; products stay.
    assert torch.allclose(input_after, (channel_max * weight_max) ** (1 - alpha))
    assert torch.allclose(weight_after, (channel_max * weight_max) ** alpha)
    if alpha == 0.5:
        assert torch.allclose(input_after, weight_after)
    x[:, 3] = 0
    assert smooth_scale([one], x.abs().amax(0), alpha=alpha)[3] == 1
    with pytest.raises(LogitLockError, match="alpha"):
        smooth_scale([one], channel_max, alpha=1.5)


# --- a block ---


def quantized(name: str, linear: LinearFormat, options: MethodOptions) -> tuple[Decoder, dict[str, QuantizedLayers]]:
    """A toy with all its linears in one format, and what was found for every block ('' is the head)."""
    model, inputs = toy(name)
    spec = model.spec
    parameters = dict(model.named_parameters())
    made = Decoder(dataclasses.replace(spec, quantization=group_formats(dict.fromkeys(spec.linears, linear))))
    results = {}
    for prefix in [*(f"blocks.{i}." for i in range(spec.layers)), ""]:
        formats = {n.removeprefix(prefix): linear for n in spec.linears if n.startswith(prefix or "head")}
        part = {
            n.removeprefix(prefix): p for n, p in parameters.items() if n.startswith(prefix or ("head.", "final_norm."))
        }
        observers = {}
        for site in observed_sites(spec, formats, options):
            observers[site] = InputObserver(f"{prefix}{site}", spec, site, formats, options)
            for chunk in inputs[prefix + TAPS[site]].split(300):
                observers[site].observe(chunk)
        results[prefix] = result = quantize_layers(spec, part, observers, formats, options)
        assert set(result.weights) == set(formats)
        for leaf in part:
            parameters.pop(prefix + leaf, None)
        parameters |= {prefix + leaf: value for leaf, value in result.parameters.items()}
        for leaf, weight in result.weights.items():
            parameters |= {f"{prefix}{leaf}.weight": weight.codes, f"{prefix}{leaf}.scale": weight.scale}
            if weight.zero is not None:
                parameters[f"{prefix}{leaf}.zero"] = weight.zero
        parameters |= {f"{prefix}{leaf}.input_scale": scale for leaf, scale in result.input_scales.items()}
    for leaf, value in parameters.items():
        put_parameter(made, leaf, value)
    if spec.tied_head:
        made.head.weight = made.embed.weight
    return made.eval(), results


def divergence(name: str, made: Decoder) -> float:
    """Mean KL from the float toy to the quantised one, in fp64, over all tokens of held-out data."""
    total = tokens = 0.0
    for ids, mask in token_batches(name, split="held_out"):
        expected, found = (logits_of(m, ids, mask)[mask.bool()].double().log_softmax(-1) for m in (toy(name)[0], made))
        total += float((expected.exp() * (expected - found)).sum())
        tokens += len(expected)
    return total / tokens


@pytest.mark.parametrize("name", TOYS)
def test_methods_bring_a_whole_toy_nearer_than_rounding(name: str) -> None:
    kl = {}
    for label, options in (
        ("rtn", MethodOptions()),
        ("awq", MethodOptions(method="awq")),
        ("gptq", MethodOptions(method="gptq", act_order=True)),
    ):
        made, results = quantized(name, INT4, options)
        kl[label] = divergence(name, made)
        reports = {prefix + leaf: r for prefix, result in results.items() for leaf, r in result.reports.items()}
        assert set(reports) == set(made.spec.linears)
        for layer, report in reports.items():
            if label == "rtn":
                assert report.error is None and report.nearest_error is None
            else:
                assert report.error is not None and report.nearest_error is not None
                # AWQ chooses for gate and up together.
                assert report.error < report.nearest_error * (1 if label == "gptq" else 1.05), f"{label} of {layer}"
    assert kl["awq"] < kl["rtn"] and kl["gptq"] < kl["rtn"], kl


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("name", TOYS)
def test_gptq_with_clipped_scales_has_less_error(name: str, group: int | None) -> None:
    """In every layer: rows that clipping makes worse stay as they are."""
    linear = dataclasses.replace(INT4, group=group)
    errors = []
    for clip in (None, True):
        _, results = quantized(name, linear, MethodOptions(method="gptq", clip=clip))
        reports = [report for result in results.values() for report in result.reports.values()]
        errors.append([report.error for report in reports if report.error is not None])
    ratios = [clipped / plain for plain, clipped in zip(*errors, strict=True)]
    assert ratios and max(ratios) < 1, ratios
    assert statistics.median(ratios) < (0.92 if group is None else 0.98), ratios


@pytest.mark.parametrize("linear", [INT4, FORMATS["int4 zero points"], LinearFormat(weight="fp8")])
def test_clipped_gptq_takes_the_better_of_every_row(linear: LinearFormat) -> None:
    weight, x = made_layer(8)
    weight, hessian = weight.float(), hessian_of(x.float())
    options = MethodOptions(method="gptq", clip=True)
    found = _gptq(weight, hessian, linear, options)
    root = damped_root(hessian, options.damping)
    assert torch.allclose(root.t() @ root, hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64), rtol=1e-4)
    scale, zero = search_clip(weight, root, linear)
    parts = [gptq(weight, hessian, linear).weight, gptq(weight, hessian, linear, scale=scale, zero=zero).weight]
    errors = [row_errors(weight, part.dequantized(), hessian) for part in parts]
    assert torch.equal(row_errors(weight, found.dequantized(), hessian), torch.minimum(*errors))
    assert (found.zero is None) == linear.symmetric
    if linear.weight == "int4":
        coded = dataclasses.replace(linear, input="int8", input_scale="group")
        assert torch.equal(_gptq(weight, hessian, coded, options).codes, found.codes)


@pytest.mark.parametrize("name", ["qwen", "gpt"])
def test_smoothquant_folds_and_static_scales_follow(name: str) -> None:
    static = LinearFormat(weight="int8", input="int8", input_scale="tensor")
    model, inputs = toy(name)
    made, results = quantized(name, static, MethodOptions(method="smoothquant"))
    plain, _ = quantized(name, static, MethodOptions())
    assert divergence(name, made) < divergence(name, plain)
    result = results["blocks.2."]
    assert set(result.folded) == {site for site in BLOCK_SITES if can_fold(model.spec, site)}
    for site in BLOCK_SITES:
        x = inputs[f"blocks.2.{TAPS[site]}"]
        folded = x / result.folded[site] if site in result.folded else x
        for leaf in readers(model.spec, site):
            assert result.input_scales[leaf] == pytest.approx(float(folded.abs().max()) / 127, rel=1e-6)
    cut, _ = quantized(name, static, MethodOptions(method="smoothquant", percentile=90.0))
    assert cut.blocks[2].attn.qkv.input_scale < made.blocks[2].attn.qkv.input_scale


def test_a_mixed_block_keeps_what_is_not_quantised() -> None:
    model, inputs = toy("chatglm2")
    part = {n.removeprefix("blocks.0."): p for n, p in model.named_parameters() if n.startswith("blocks.0.")}
    before = {n: p.clone() for n, p in part.items()}
    formats = {"mlp.up": INT4, "attn.out": INT4, "mlp.gate": None}
    options = MethodOptions(method="awq")
    assert observed_sites(model.spec, formats, options) == ("attn.out", "mlp.up")
    with pytest.raises(LogitLockError, match=r"attn\.out: its input was not observed"):
        quantize_layers(model.spec, part, {}, formats, options)
    observers = {}
    for site in ("attn.out", "mlp.up"):
        observers[site] = InputObserver(f"blocks.0.{site}", model.spec, site, formats, options)  # type: ignore[arg-type]
        twin = InputObserver(f"blocks.0.{site}", model.spec, site, formats, options)  # type: ignore[arg-type]
        x = inputs[f"blocks.0.{TAPS[site]}"]  # type: ignore[index]
        observers[site].observe(x[:100])
        twin.observe(x[100:])
        observers[site].merge(twin)
    result = quantize_layers(model.spec, part, observers, formats, options)  # type: ignore[arg-type]
    assert all(torch.equal(part[n], before[n]) for n in part), "the given parameters are not altered"
    assert set(result.weights) == {"mlp.up", "attn.out"}
    assert set(result.parameters) == set(part) - {"mlp.up.weight", "attn.out.weight"}
    divisor = result.folded["mlp.up"]
    gate = part["mlp.gate.weight"] * divisor
    assert torch.equal(result.parameters["mlp.gate.weight"], gate)
    sample = observers["mlp.up"].sample
    assert sample is not None
    scale, _ = search_clip(part["mlp.up.weight"] * divisor, sample.tokens / divisor, INT4)
    assert torch.equal(result.weights["mlp.up"].scale, scale)
    with pytest.raises(LogitLockError, match="percentile 0 of quantisation"):
        MethodOptions(percentile=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@by_format
def test_methods_find_the_same_on_a_gpu(linear: LinearFormat) -> None:
    weight, x = made_layer(9, rows=96, columns=256, tokens=600)
    for act_order in (False, True):
        cpu = gptq(weight, hessian_of(x), linear, act_order=act_order)
        gpu = gptq(weight.cuda(), hessian_of(x).cuda(), linear, act_order=act_order)
        assert torch.equal(gpu.weight.codes.float().cpu(), cpu.weight.codes.float())
    found = search_scale([weight.cuda()], x.cuda(), [linear])
    assert found.alpha == search_scale([weight], x, [linear]).alpha
    scale, _ = search_clip(weight.cuda(), x.cuda(), linear)
    # Zero points of groups clipped at both ends are ties.
    same = torch.isclose(scale.cpu(), search_clip(weight, x, linear)[0])
    assert same.double().mean() > (1 - 1e-9 if linear.symmetric else 0.97)
    observer, other = PercentileObserver("l", 256), PercentileObserver("l", 256)
    observer.observe(x.cuda())
    other.observe(x)
    assert torch.allclose(observer.percentile(99, groups=256).cpu(), other.percentile(99, groups=256), rtol=0.021)
