"""SmoothQuant: divide outlier channels of activations by a scale, and multiply their weights by it.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438.  s_j = max|X_j|^alpha / max|W_j|^(1 - alpha): alpha 0 leaves all the range to the activations, 1 all
of it to the weights, 0.5 makes them equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from refmodels.errors import LogitLockError

LEAST = 1e-5
"""Smallest max|W_j| that counts: below it the scale would follow rounding noise."""


def smooth_scale(weights: Sequence[Tensor], channel_max: Tensor, *, alpha: float = 0.5) -> Tensor:
    """s [in] for the weights that share an input: quantize W * s and x / s.

    Channels whose input was always zero keep scale 1: they may be used in other data.

    Args:
        weights: each [out, in].
        channel_max: max |x| of every channel, [in], made equal where channels share a scale (`fold.share`).
        alpha: migration strength in [0, 1].
    Raises:
        LogitLockError: alpha is out of range, or there are no weights.
    """
    if not 0 <= alpha <= 1:
        raise LogitLockError(f"SmoothQuant's alpha must be in [0, 1], not {alpha:g}")
    weight_max = input_max(weights).to(channel_max.dtype)
    scale = channel_max**alpha / weight_max.clamp(min=LEAST) ** (1 - alpha)
    return scale.where(channel_max > 0, scale.new_ones(())).clamp(min=LEAST)


def input_max(weights: Sequence[Tensor]) -> Tensor:
    """max |W_j| over the rows of all weights that share an input, [in].  Raises LogitLockError: no weights."""
    if not weights:
        raise LogitLockError("no weights share this input")
    largest = weights[0].abs().amax(0)
    for weight in weights[1:]:
        largest = largest.maximum(weight.abs().amax(0))
    return largest
