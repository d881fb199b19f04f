"""AWQ and SmoothQuant against their papers' properties, and all methods on whole toys."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from export.quantization.awq import candidate_scale, search_clip, search_scale
from export.quantization.fold import BLOCK_SITES, can_fold, input_tap, readers
from export.quantization.gptq import damped_root, gptq, row_errors
from export.quantization.method import (
    InputObserver,
    MethodOptions,
    QuantizedLayers,
    _gptq,
    observed_sites,
    quantize_layers,
)
from export.quantization.observers import PercentileObserver
from export.quantization.smoothquant import smooth_scale
from refmodels.checkpoints.load import put_parameter
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from refmodels.quantization.arithmetic import quantize_weight, weight_scale
from refmodels.quantization.formats import LIMITS, LinearFormat, group_formats
from tests.support.gpu import needs_gpu
from tests.support.observed_toys import (
    FORMATS,
    INT4,
    TOYS,
    by_format,
    hessian_of,
    logits_of,
    made_layer,
    token_batches,
    toy,
)

# --- AWQ ---


@pytest.mark.slow
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
            for chunk in inputs[prefix + input_tap(spec, site)].split(300):
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
    """Mean KL from the float toy to the quantized one, in fp64, over all tokens of held-out data."""
    total = tokens = 0.0
    for ids, mask in token_batches(name, split="held_out"):
        expected, found = (logits_of(m, ids, mask)[mask.bool()].double().log_softmax(-1) for m in (toy(name)[0], made))
        total += float((expected.exp() * (expected - found)).sum())
        tokens += len(expected)
    return total / tokens


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        x = inputs[f"blocks.2.{input_tap(model.spec, site)}"]
        folded = x / result.folded[site] if site in result.folded else x
        for leaf in readers(model.spec, site):
            assert result.input_scales[leaf] == pytest.approx(float(folded.abs().max()) / 127, rel=1e-6)
    cut, _ = quantized(name, static, MethodOptions(method="smoothquant", percentile=90.0))
    assert cut.blocks[2].attn.qkv.input_scale < made.blocks[2].attn.qkv.input_scale


@pytest.mark.slow
def test_a_mixed_block_keeps_what_is_not_quantized() -> None:
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
        x = inputs[f"blocks.0.{input_tap(model.spec, site)}"]  # type: ignore[arg-type]
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
    with pytest.raises(LogitLockError, match="percentile 0 of quantization"):
        MethodOptions(percentile=0)


@needs_gpu
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
