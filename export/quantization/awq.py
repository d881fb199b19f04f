"""AWQ: scale up the weights that meet large activations before rounding, and clip groups where that helps.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978.
Scaling: s = mean|x|^alpha, or mean|x|^alpha / mean|w|^(1 - alpha) as in the authors' later code, alpha from a grid, by
the output error of all linears that read the input.  Clipping: the largest weight of a group shrinks, by the error of
the group's share of the output.  The authors measure the first error behind the attention or the MLP; we measure it at
the linears' outputs, which needs no forward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refmodels.errors import LogitLockError
from refmodels.quantization.arithmetic import quantize_weight, weight_scale
from refmodels.quantization.formats import LinearFormat

_ROWS = 1024
"""Rows of a weight clipped at a time: bounds the temporaries."""


@dataclass(frozen=True, kw_only=True)
class AwqScale:
    """The result of a search.

    scale: [in]: quantize W * scale and x / scale.  alpha: its exponent.  by_weight: divided by mean|w|^(1 - alpha);
    otherwise, at alpha 0, it is 1: round to nearest.
    error, nearest_error: squared output error of the linears over that of the outputs themselves, with this scale and
    with none; error <= nearest_error.
    """

    scale: Tensor
    alpha: float
    by_weight: bool
    error: float
    nearest_error: float


def search_scale(
    weights: Sequence[Tensor],
    x: Tensor,
    formats: Sequence[LinearFormat | None],
    *,
    magnitude: Tensor | None = None,
    share: Callable[[Tensor], Tensor] | None = None,
    grid: int = 20,
) -> AwqScale:
    """Find the scale of an input that is best for all linears that read it.

    Args:
        weights: each [out, in].
        x: a sample of inputs, [tokens, in], wide (fp32, or fp64).
        formats: of the weights; None: not quantized, without error.
        magnitude: mean |x| of all inputs, [in], where more than the sample is known.
        share: makes statistics [in] equal where channels must share a scale (`fold.share`).
        grid: alpha is 0, 1 / grid, ..., 1.
    Raises:
        LogitLockError: no weight is quantized, shapes do not fit, or inputs are quantized.
    """
    _check(weights, x, formats)
    if grid < 1:
        raise LogitLockError(f"a grid of {grid} steps: it needs at least 1")
    magnitude = x.abs().mean(0) if magnitude is None else magnitude.to(x.dtype)
    sample = _compact(x)
    quantized = [(w.to(x.dtype), f) for w, f in zip(weights, formats, strict=True) if f is not None]
    size = _weight_size(quantized)
    if share is not None:
        magnitude, size = share(magnitude), share(size)
    whole = sum(_energy(weight, sample) for weight, _ in quantized)
    found: tuple[float, float, bool, Tensor] | None = None
    nearest = 0.0
    for by_weight, step in itertools.product((False, True), range(grid + 1)):
        scale = candidate_scale(magnitude, step / grid, size if by_weight else None)
        error = 0.0
        for weight, linear in quantized:
            scaled = weight * scale
            rounded = quantize_weight(scaled, linear).dequantized()
            error += _energy(rounded / scale - weight, sample)
        nearest = error if found is None else nearest
        if found is None or error < found[0]:
            found = error, step / grid, by_weight, scale
    assert found is not None
    error, alpha, by_weight, scale = found
    whole = whole or 1.0
    return AwqScale(scale=scale, alpha=alpha, by_weight=by_weight, error=error / whole, nearest_error=nearest / whole)


def candidate_scale(magnitude: Tensor, alpha: float, weight_size: Tensor | None = None) -> Tensor:
    """mean|x|^alpha (/ weight_size^(1 - alpha)), its largest and smallest value at equal ratios from 1, [in].

    1 where the input was always zero.
    """
    alive = magnitude > 0
    # The bounds are those of the authors' code: they limit the range of scales, for the sake of fp16.
    scale = magnitude.pow(alpha)
    if weight_size is not None:
        scale = scale / (weight_size.pow(1 - alpha) + 1e-4)
    scale = scale.clamp(min=1e-4)
    if not bool(alive.any()):
        return torch.ones_like(magnitude)
    least, most = scale[alive].aminmax()
    return (scale / (least * most).sqrt()).where(alive, scale.new_ones(()))


def _weight_size(weights: Sequence[tuple[Tensor, LinearFormat]]) -> Tensor:
    """Mean over rows of |w| in units of the largest of its group, [in]."""
    total, rows = torch.zeros_like(weights[0][0][0]), 0
    for weight, linear in weights:
        grouped = weight.abs().unflatten(1, (linear.groups(weight.shape[1]), -1))
        total += (grouped / (grouped.amax(2, keepdim=True) + 1e-6)).flatten(1).sum(0)
        rows += len(weight)
    return total / rows


def search_clip(
    weight: Tensor,
    x: Tensor,
    linear: LinearFormat,
    *,
    grid: int = 20,
    least: float = 0.5,
) -> tuple[Tensor, Tensor | None]:
    """Scales (and zero points) of a weight whose groups are clipped where it lowers the output error.

    Every group of every row tries its largest magnitude times 1, 1 - 1 / grid, ..., down to `least`, and keeps the one
    with the smallest error of the group's own share of the output (as the authors do).  Errors of a row's groups can
    add up worse than apart: a row keeps its clips only if they lower the error of the row.

    Args:
        weight: [out, in], scaled already; x: [tokens, in], divided already, wide.
    Returns: scale [out, groups] wide, zero [out, groups] int8 or None, for `quantize_weight` and `gptq`.
    Raises:
        LogitLockError: as `search_scale`; `least` not in (0, 1].
    """
    _check([weight], x, [linear])
    if grid < 1 or not 0 < least <= 1:
        raise LogitLockError(f"a clipping search over {grid} steps down to {least:g}: 1 or more, and in (0, 1]")
    groups = linear.groups(weight.shape[1])
    sample = _compact(x)
    # [groups, group, group]: the inner products of the channels of each group.
    gram = torch.einsum("tgi,tgj->gij", *[sample.unflatten(1, (groups, -1))] * 2)
    parts = [_clip_rows(rows.to(x.dtype), sample, gram, linear, grid, least) for rows in weight.split(_ROWS)]
    zeros = [zero for _, zero in parts if zero is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None


def _clip_rows(
    weight: Tensor,
    sample: Tensor,
    gram: Tensor,
    linear: LinearFormat,
    grid: int,
    least: float,
) -> tuple[Tensor, Tensor | None]:
    groups = len(gram)
    amax = weight.unflatten(1, (groups, -1)).abs().amax(2, keepdim=True)
    first_scale, first_zero = weight_scale(weight, linear)
    best = torch.full_like(amax[:, :, 0], float("inf"))
    best_scale, best_zero = first_scale.clone(), None if first_zero is None else first_zero.clone()
    for step in range(int(grid * (1 - least)) + 1):
        limit = amax * (1 - step / grid)
        clipped = weight.unflatten(1, (groups, -1)).clamp(-limit, limit).flatten(1)
        scale, zero = weight_scale(clipped, linear)
        difference = (_rounded(weight, linear, scale, zero) - weight).unflatten(1, (groups, -1))
        error = (torch.einsum("ogi,gij->ogj", difference, gram) * difference).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    whole = [
        (_rounded(weight, linear, scale, zero) - weight).matmul(sample.t()).square().sum(1, keepdim=True)
        for scale, zero in ((first_scale, first_zero), (best_scale, best_zero))
    ]
    kept = whole[1] < whole[0]
    zero = None if first_zero is None or best_zero is None else torch.where(kept, best_zero, first_zero)
    return torch.where(kept, best_scale, first_scale), zero


def _rounded(weight: Tensor, linear: LinearFormat, scale: Tensor, zero: Tensor | None) -> Tensor:
    return quantize_weight(weight, linear, scale=scale, zero=zero).dequantized()


def _compact(x: Tensor) -> Tensor:
    """Rows with the same inner products of columns as x: at most as many as columns."""
    return x if len(x) <= x.shape[1] else torch.linalg.qr(x, mode="r").R


def _energy(weight: Tensor, sample: Tensor) -> float:
    """Sum of squares of the outputs [tokens, out] of a weight (or of its error)."""
    return float((sample @ weight.t()).square().sum(dtype=torch.float64))


def _check(weights: Sequence[Tensor], x: Tensor, formats: Sequence[LinearFormat | None]) -> None:
    if not any(linear is not None for linear in formats):
        raise LogitLockError("AWQ has nothing to search for: none of the weights is to be quantized")
    if x.ndim != 2 or not len(x) or any(weight.shape[1] != x.shape[1] for weight in weights):
        raise LogitLockError(f"a sample of inputs of shape {list(x.shape)} does not fit weights [out, in]")
    if any(linear is not None and (linear.input is not None or linear.reordered) for linear in formats):
        raise LogitLockError("AWQ is for weights alone, in the order of their columns; inputs stay floats")
