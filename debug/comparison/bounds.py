"""Lower bounds of the noise floor: what any correct engine may be off, whatever the reference in its dtype is."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from refmodels.dtypes import unit_roundoff, wide_dtype
from refmodels.spec import ModelSpec


def lower_bound(spec: ModelSpec, tap: str, dtype: torch.dtype, *, slots: int) -> float:
    """The relative error that any engine of this dtype may have in a tap, whatever the floor is.

    This is one rounding to the dtype and, for a matrix product that sums K terms one after the other in fp32 (fp64 for
    fp64), the error of these sums: a random walk of K roundings gives sqrt(K / 6) units of them.  The floor's own BLAS
    may sum in blocks and be several times better, but this does not make the engine wrong.

    A norm sums K squares.  They have one sign, so that a partial sum may be as large as the whole: after the outlier
    channel of a large model all of them are.  K roundings of at most one unit, uniformly distributed, then give
    sqrt(K / 3) units, and the square root halves a relative error: sqrt(K / 12).  All entries of the token share this
    error, so it does not average out over them.
    """
    facts = spec.taps[tap]
    terms = max((slots if count == "slots" else count for count in facts.sums), default=0)
    unit, sum_unit = unit_roundoff(dtype), unit_roundoff(wide_dtype(dtype))
    return float(max(unit, sum_unit * math.sqrt(terms / (12 if facts.kind == "norm" else 6))))


def sigmoid_bound(spec: ModelSpec, tap: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor | None:
    """The relative error, [batch, tokens], that the sigmoid within an activation may have; None for other taps.

    PyTorch divides by 1 + exp(-x), so that even a tiny sigmoid has a small relative error.  ONNX Runtime computes
    1/2 + r (MLAS, logistic.cpp): r and the sum are rounded by up to half a unit of 1 each, together sqrt(1 / 6) units,
    however small the sigmoid is.  Times the input, and the gated values, that is an absolute error in every element; it
    counts where a large gate is negative, so that the product is small.

    Args:
        tensors: the engine's, by tap; those that the activation reads are needed.
    """
    made = spec.taps[tap]
    if made.kind != "activation" or spec.mlp.activation not in ("silu", "quick_gelu"):
        return None
    if any(name not in tensors for name in made.reads):
        return None
    product = math.prod((tensors[name].double() for name in made.reads), start=torch.ones((), dtype=torch.float64))
    size = tensors[tap].double().norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    unit = unit_roundoff(wide_dtype(dtype))
    found: Tensor = unit * math.sqrt(1 / 6) * product.norm(dim=-1) / size
    return found
