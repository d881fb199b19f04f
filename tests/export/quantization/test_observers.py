"""Observers of activations, and folding scales into the layer that produces an input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import refmodels
from export.quantization.fold import BLOCK_SITES, Site, can_fold, fold, share, width
from export.quantization.gptq import Hessian
from export.quantization.observers import SKETCH_ERROR, MaxObserver, PercentileObserver, TokenSample
from refmodels.checkpoints.load import put_parameter
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from tests.support.goldens import CASES, case_source
from tests.support.marks import quick_first
from tests.support.observed_toys import (
    logits_of,
    toy,
)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("case", quick_first(CASES, 3))
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


@pytest.mark.slow
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
