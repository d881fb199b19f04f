"""Error metrics against values computed another way."""

from __future__ import annotations

import math

import pytest
import torch

from debug.comparison.metrics import compare, json_number, kl_divergence, nonfinite_count, top_margin, ulp

ALL = torch.ones(1, 2, dtype=torch.bool)


def test_known_numbers() -> None:
    expected = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    actual = torch.tensor([[[3.0, 4.5], [0.0, 2.0]]])
    stats = compare(actual, expected, ALL, torch.float32)
    assert stats.max_abs == 0.5
    assert stats.rel_l2 == pytest.approx(0.5 / math.sqrt(29), rel=1e-12)
    assert stats.cosine == pytest.approx((9 + 18 + 4) / math.sqrt(29 * (9 + 4.5**2 + 4)), rel=1e-12)
    assert stats.snr_db == pytest.approx(20 * math.log10(math.sqrt(29) / 0.5), rel=1e-12)
    assert stats.ulp == 0.5 / (4 * torch.finfo(torch.float32).eps)
    assert stats.token_rel.tolist() == pytest.approx([0.5 / 5, 0.0])
    assert stats.token_of.tolist() == [[0, 0], [0, 1]]
    assert stats.nonfinite == 0


def test_equal_tensors() -> None:
    x = torch.randn(1, 2, 5)
    stats = compare(x, x.double(), ALL, torch.float32)
    assert (stats.max_abs, stats.rel_l2, stats.ulp, stats.snr_db) == (0.0, 0.0, 0.0, math.inf)
    assert stats.cosine == pytest.approx(1.0)
    zero = compare(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5), ALL, torch.float32)
    assert (zero.rel_l2, zero.cosine) == (0.0, 1.0)


def test_only_real_positions_count() -> None:
    expected = torch.randn(2, 3, 4, 2)
    actual = expected.clone()
    actual[0, 0] = float("nan")
    actual[1, 2] += 7.0
    real = torch.tensor([[False, True, True], [True, True, False]])
    stats = compare(actual, expected, real, torch.float16)
    assert (stats.max_abs, stats.nonfinite) == (0.0, 0)
    assert stats.token_of.tolist() == [[0, 1], [0, 2], [1, 0], [1, 1]]
    real[1, 2] = True
    assert compare(actual, expected, real, torch.float16).max_abs == pytest.approx(7.0, rel=1e-6)
    nothing = compare(actual, expected, torch.zeros_like(real), torch.float16)
    assert (nothing.max_abs, nothing.rel_l2) == (0.0, 0.0)


def test_nonfinite_is_counted_and_never_hidden() -> None:
    expected = torch.ones(1, 2, 3)
    actual = torch.tensor([[[1.0, math.inf, 1.0], [math.nan, 1.0, -math.inf]]])
    stats = compare(actual, expected, ALL, torch.float32)
    assert stats.nonfinite == nonfinite_count(actual) == 3
    assert not math.isfinite(stats.max_abs) and not math.isfinite(stats.rel_l2)
    assert json_number(stats.max_abs) is None and json_number(2.5) == 2.5 and json_number(math.inf) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    x = (torch.randn(2000).abs() * torch.logspace(-9, 4, 2000)).to(dtype)
    x = x[x > 0]
    # torch has no nextafter for half types: add one to the bit pattern instead.
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    following = (x.view(bits) + 1).view(dtype)
    assert torch.equal(ulp(dtype, x), following.double() - x.double())


def test_float64_keeps_small_differences() -> None:
    expected = torch.full((1, 2, 8), 1e4, dtype=torch.float64)
    assert compare(expected + 1e-9, expected, ALL, torch.float64).max_abs == pytest.approx(1e-9, rel=1e-2)


def test_kl_and_margin() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
    expected = float((p * (p / q).log()).sum())
    assert float(kl_divergence(p.log() + 3.0, q.log() - 5.0)) == pytest.approx(expected, rel=1e-6)
    logits = torch.randn(4, 7, 50)
    assert torch.equal(kl_divergence(logits, logits), torch.zeros(4, 7, dtype=torch.float64))
    # Of nearly equal distributions the plain sum of p log(p/q) is rounding noise; this is half the squared distance.
    nudged = logits.double()
    nudged[..., 0] += 1e-6
    probability = logits.double().softmax(-1)[..., 0]
    second_order = 0.5e-12 * probability * (1 - probability)
    assert torch.allclose(kl_divergence(logits.double(), nudged), second_order, rtol=1e-3, atol=1e-20)
    assert float(kl_divergence(torch.tensor([0.0, -math.inf]), torch.tensor([0.0, 0.0]))) == pytest.approx(math.log(2))
    assert float(top_margin(torch.tensor([1.0, 5.0, 3.5]))) == 1.5
