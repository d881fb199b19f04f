"""The RMSNorm kernel against fp64 and against the op it replaces, on fresh random inputs.

The small cases run on the CPU as well, through Triton's interpreter (`test_interpreted` starts that process).

Tolerance.  The sum of squares adds in fp32 at most `depth` numbers one after another, all positive, so its relative
error is at most (depth + 2) * 2^-24 with the squares' own rounding; the mean and eps add 3 roundings; the root halves
all that.  rsqrt.approx is within 2^-22.9 (PTX manual), then one product, and a second with the weight: `float_error`.
Each rounding to the dtype of x is within its unit roundoff u: one if the weight multiplies in fp32, else two.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refmodels.ops import _rms_norm_body
from tests.support.gpu import CUDA, DEVICE, INTERPRETED, interpreted, needs_gpu, needs_kernels

pytest.importorskip("triton")

from trt_runtime.kernels import rms_norm, torch_host
from trt_runtime.kernels.launch import NormShape

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
PAD = 64
EPS = 1e-6


def float_error(shape: NormShape) -> float:
    launch = rms_norm.variants(shape)[0]
    threads = 32 * launch.warps
    depth = max(1, launch.constants["BLOCK"] // threads) + math.log2(threads)
    return (depth + 2 + 3) / 2 * 2.0**-24 + 2.0**-22.9 + 2 * 2.0**-24


def inputs(shape: NormShape, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of very different sizes, columns over many binades (e4m3 has subnormal codes), weights around 1."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.rows, shape.width, generator=g) * 2.0 ** torch.randint(-9, 1, (shape.width,), generator=g)
    x *= 2.0 ** torch.randint(-3, 8, (shape.rows, 1), generator=g)
    weight = 1 + 0.5 * torch.randn(shape.width, generator=g)
    return x.to(DTYPES[shape.dtype]).to(DEVICE), weight.to(DTYPES[shape.dtype]).to(DEVICE)


def run(shape: NormShape, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Through poisoned buffers with untouched memory before and after."""

    def poisoned(elements: int, dtype: torch.dtype) -> Tensor:
        return torch.full((elements + 2 * PAD,), 77 if dtype == torch.int8 else 7.0e4, device=DEVICE).to(dtype)

    y = poisoned(x.numel(), x.dtype)
    codes = poisoned(x.numel(), torch.int8) if shape.quantized else None
    scales = poisoned(shape.rows, torch.float32) if shape.quantized else None
    buffers = [b for b in (y, codes, scales) if b is not None]
    before = [b.clone() for b in buffers]
    inner = [b[PAD:-PAD] if b is not None else None for b in (y, codes, scales)]
    torch_host.execute(rms_norm.launches(shape, x=x, weight=weight, y=inner[0], quantized=inner[1], scales=inner[2]))
    for buffer, old in zip(buffers, before, strict=True):
        assert torch.equal(buffer[:PAD], old[:PAD]) and torch.equal(buffer[-PAD:], old[-PAD:]), "wrote outside"
    assert inner[0] is not None
    return inner[0].view_as(x), inner[1].view_as(x) if inner[1] is not None else None, inner[2]


def assert_close(y: Tensor, x: Tensor, weight: Tensor, shape: NormShape) -> None:
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + shape.eps).sqrt() * weight.double()
    u = ROUNDOFF[shape.dtype]
    allowed = (1 + float_error(shape)) * (1 + u) ** (1 if shape.weight_in_float else 2) - 1
    # Below the smallest normal number the spacing is absolute.
    tiny = torch.finfo(x.dtype).smallest_normal * u * (1 + weight.double().abs())
    error = (y.double() - expected).abs()
    assert torch.isfinite(y).all()
    assert (error <= allowed * expected.abs() + tiny).all(), (shape, (error / expected.abs()).max(), allowed)


def assert_bits_of_body(y: Tensor, x: Tensor, weight: Tensor, shape: NormShape) -> None:
    """Halves are the very bits of the eager body, except where two fp32 results straddle a rounding boundary."""
    body = _rms_norm_body(x, weight, shape.eps, shape.weight_in_float)
    apart = 2 * float_error(shape) / ROUNDOFF[shape.dtype]
    assert shape.dtype == "fp32" or (y != body).sum() <= apart * y.numel() + 3


def assert_quantized(y: Tensor, codes: Tensor | None, scales: Tensor | None, shape: NormShape) -> None:
    """Bit for bit what the module's docstring defines, in torch."""
    assert codes is not None and scales is not None and shape.quantized is not None
    limit = torch.tensor(rms_norm.LIMITS[shape.quantized], device=y.device)
    amax = y.float().abs().amax(-1, keepdim=True).clamp_min(2.0**-96)
    scaled = (y.float() * (limit / amax)).clamp(-limit, limit)
    if shape.quantized == "int8":
        expected = scaled.round().to(torch.int8)
    else:
        expected = scaled.to(torch.float8_e4m3fn).view(torch.int8)
    assert torch.equal(codes, expected)
    assert torch.equal(scales, (amax / limit).flatten())
    assert shape.rows * shape.width < 50 or codes.unique().numel() > 20


def shape_of(**more: Any) -> NormShape:
    return NormShape(**{"rows": 3, "width": 100, "eps": EPS, "weight_in_float": False, "dtype": "fp16"} | more)


# The interpreter truncates to bf16 where GPUs round.
SMALL = [
    shape_of(rows=rows, width=width, dtype=dtype, weight_in_float=in_float, quantized=quantized)
    for rows, width, dtype, in_float, quantized in [
        (1, 1, "fp16", False, None),
        (5, 100, "fp16", True, None),
        (2, 257, "fp32", False, None),
        (3, 64, "fp32", True, "int8"),
        (3, 100, "fp16", False, "int8"),
        (4, 1000, "fp16", False, "fp8"),
        (2, 128, "fp32", True, "fp8"),
    ]
]


@needs_kernels
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small(shape: NormShape) -> None:
    x, weight = inputs(shape, seed=11)
    y, codes, scales = run(shape, x, weight)
    assert_close(y, x, weight, shape)
    assert_bits_of_body(y, x, weight, shape)
    if shape.quantized:
        assert_quantized(y, codes, scales, shape)


@needs_kernels
@pytest.mark.parametrize("quantized", ["int8", "fp8"])
def test_small_halves_round_to_even(quantized: str) -> None:
    """Rows of ones give y = weight, and its largest element makes the scale 1: every value between two codes."""
    limit = rms_norm.LIMITS[quantized]
    codes = torch.arange(-127, 128, dtype=torch.int8)
    if quantized == "fp8":
        codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
        codes = torch.cat([-codes.float(), codes.float()]).to(torch.float8_e4m3fn)
    values = codes.float().sort().values
    weight = torch.cat([values, (values[1:] + values[:-1]) / 2]).to(DEVICE)
    assert weight.max() == limit
    shape = shape_of(rows=2, width=len(weight), dtype="fp32", quantized=quantized)
    x = torch.ones(2, len(weight), device=DEVICE)
    y, coded, scales = run(replace(shape, eps=0.0), x, weight)
    assert torch.equal(y[1], weight) and scales is not None and torch.equal(scales, torch.ones_like(scales))
    assert_quantized(y, coded, scales, shape)


@needs_kernels
@pytest.mark.parametrize("quantized", [None, "int8", "fp8"])
def test_small_rows_of_zeros_nan_and_infinity(quantized: str | None) -> None:
    shape = shape_of(rows=6, quantized=quantized)
    x, weight = inputs(shape, seed=12)
    x[1], x[2, 7], x[3, 5], x[4] = 0, math.nan, math.inf, -65504
    y, codes, scales = run(shape, x, weight)
    body = _rms_norm_body(x, weight, shape.eps, shape.weight_in_float)
    assert torch.isnan(y[2]).all() and torch.isnan(y[3, 5]) and not y[1].any()
    assert torch.equal(torch.isnan(y), torch.isnan(body))
    for row in (0, 1, 4, 5):
        torch.testing.assert_close(y[row], body[row], rtol=2 * 2.0**-10, atol=0)
    if quantized:
        assert codes is not None and scales is not None
        assert torch.isnan(scales[[2, 3]]).all()
        kind = torch.int8 if quantized == "int8" else torch.float8_e4m3fn
        assert not codes[1].view(kind).float().any() and 0 < scales[1] < 1e-25
        clean = [0, 1, 4, 5]
        limit = rms_norm.LIMITS[quantized]
        back = codes[clean].view(kind).float() * scales[clean, None]
        # Half a step of int8; half a step of 3 mantissa bits, or of the subnormal 2^-9.
        step = scales[clean, None] * (0.5 if quantized == "int8" else 2.0**-10)
        step = step + (0 if quantized == "int8" else 2.0**-4) * y[clean].float().abs()
        assert ((back - y[clean].float()).abs() <= step * (1 + 2.0**-20)).all()
        assert (codes[clean].view(kind).float().abs().amax(1)[[0, 2, 3]] == limit).all()


@needs_kernels
def test_small_public_calls() -> None:
    x, weight = inputs(shape_of(rows=12), seed=13)
    stack = x.view(3, 4, 100)
    body = _rms_norm_body(stack, weight, EPS, False)
    y = torch_host.rms_norm_rows(stack.transpose(0, 1), weight, eps=EPS, weight_in_float=False)
    torch.testing.assert_close(y, body.transpose(0, 1), rtol=2 * 2.0**-10, atol=2.0**-24)
    columns = stack.transpose(1, 2).contiguous().transpose(1, 2)
    strided = torch_host.rms_norm_rows(columns, weight, eps=EPS, weight_in_float=False)
    assert strided.is_contiguous() and torch.equal(strided, y.transpose(0, 1))
    shifted = torch.cat([weight[:1], weight])[1:]
    assert shifted.data_ptr() % 16 and torch_host._packed(shifted).data_ptr() % 16 == 0
    again, codes, scales = torch_host.quantized_rms_norm(stack, shifted, eps=EPS, weight_in_float=False, kind="fp8")
    assert torch.equal(again, y.transpose(0, 1)) and codes.dtype == torch.float8_e4m3fn
    assert codes.shape == stack.shape and scales.shape == (3, 4, 1)
    torch.testing.assert_close(codes.float() * scales, again.float(), rtol=2.0**-4, atol=float(scales.max()) * 2.0**-10)
    empty = torch_host.rms_norm_rows(stack[:0], weight, eps=EPS, weight_in_float=False)
    assert empty.shape == (0, 4, 100)


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="the GPU runs the small cases itself")
def test_interpreted() -> None:
    assert f"{len(SMALL) + 6} passed" in interpreted(__file__, "test_small")


WIDTHS = [1, 7, 128, 1000, 2048, 4095, 4096, 5120, 5121, 8192, 13696, 16384, 32768]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, dtype: str) -> None:
    """Against fp64 and, for halves, nearly everywhere the very bits of the eager body."""
    in_float = width % 3 == 0
    for rows in (1, 2, 17, 300):
        shape = shape_of(rows=rows, width=width, dtype=dtype, weight_in_float=in_float)
        x, weight = inputs(shape, seed=rows)
        y = run(shape, x, weight)[0]
        assert_close(y, x, weight, shape)
        assert_bits_of_body(y, x, weight, shape)


@needs_gpu
@pytest.mark.parametrize("quantized", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [100, 4096, 5120])
def test_quantized(width: int, dtype: str, quantized: str) -> None:
    for rows in (1, 33):
        shape = shape_of(rows=rows, width=width, dtype=dtype, quantized=quantized)
        x, weight = inputs(shape, seed=rows)
        y, codes, scales = run(shape, x, weight)
        assert_close(y, x, weight, shape)
        assert_quantized(y, codes, scales, shape)


@needs_gpu
def test_what_the_kernel_ahead_writes_is_seen() -> None:
    """A chain in a graph, where each launch starts while the one ahead runs, on fewer blocks than fill the GPU."""
    shape = shape_of(rows=200, width=4096, dtype="bf16")
    x, weight = inputs(shape, seed=14)
    steps = [x]
    for _ in range(20):
        steps.append(torch_host.rms_norm_rows(steps[-1], weight, eps=EPS, weight_in_float=False))
        torch.cuda.synchronize()
    chain = [x, *(torch.full_like(x, torch.nan) for _ in steps[1:])]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for a, b in itertools.pairwise(chain):
            torch_host.execute(rms_norm.launches(shape, x=a, weight=weight, y=b))
    graph.replay()
    assert all(map(torch.equal, chain, steps))
