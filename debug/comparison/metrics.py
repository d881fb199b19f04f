"""Distances between two tensors that should be the same, all in float64 and over real positions only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ErrorStats:
    """The distance of `actual` from `expected` over the real tokens of one tensor.

    max_abs: largest absolute difference.  rel_l2: |actual - expected| / |expected| over everything.  cosine: of the
    two tensors as vectors.  ulp: the largest difference in units in the last place of the dtype at the largest expected
    magnitude of its token.  snr_db: 20 log10(1 / rel_l2).  nonfinite: NaN and Inf in `actual`; the others are NaN then.
    token_rel: [tokens] rel_l2 of each real token, the unit in which verdicts are made; token_of: [tokens, 2] row and
    position of each.
    """

    max_abs: float
    rel_l2: float
    cosine: float
    ulp: float
    snr_db: float
    nonfinite: int
    token_rel: Tensor
    token_of: Tensor


def ulp(dtype: torch.dtype, magnitude: Tensor) -> Tensor:
    """Spacing of `dtype` at `magnitude` (float64, like magnitude); never below the spacing of its subnormals."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(magnitude.double().abs().clamp(min=info.smallest_normal)))
    return torch.exp2(exponent) * info.eps


def nonfinite_count(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


@dataclass(frozen=True)
class TokenErrors:
    """The data of `ErrorStats`, per token: all [tokens] float64, except token_of [tokens, 2] (row, position).

    Keeping tokens separate lets one pass over a tensor of many steps give the numbers of each step.
    """

    token_of: Tensor
    off: Tensor  # squared L2 norm of actual - expected
    expected: Tensor  # squared L2 norms
    actual: Tensor
    product: Tensor
    max_abs: Tensor
    ulp: Tensor
    nonfinite: Tensor
    tiny: float

    @property
    def rel(self) -> Tensor:
        """Relative L2 error of each token."""
        # A token that is all zero has no scale: below the smallest normal number, errors count as absolute.
        return self.off.sqrt() / self.expected.sqrt().clamp(min=self.tiny)

    def only(self, keep: Tensor, *, first: int) -> TokenErrors:
        """A selection of the tokens ([tokens] bool), with positions counted from `first`."""
        return TokenErrors(
            self.token_of[keep] - torch.tensor([0, first]),
            self.off[keep],
            self.expected[keep],
            self.actual[keep],
            self.product[keep],
            self.max_abs[keep],
            self.ulp[keep],
            self.nonfinite[keep],
            self.tiny,
        )

    def stats(self) -> ErrorStats:
        if not len(self.off):
            return ErrorStats(
                max_abs=0.0, rel_l2=0.0, cosine=1.0, ulp=0.0, snr_db=float("inf"), nonfinite=0,
                token_rel=self.rel, token_of=self.token_of,
            )  # fmt: skip
        rel = float(self.off.sum().sqrt() / self.expected.sum().sqrt().clamp(min=self.tiny))
        size = float(self.actual.sum().sqrt() * self.expected.sum().sqrt())
        return ErrorStats(
            max_abs=float(self.max_abs.max()),
            rel_l2=rel,
            cosine=float(self.product.sum()) / size if size else float(rel == 0.0),
            ulp=float(self.ulp.max()),
            snr_db=float("inf") if rel == 0.0 else float(-20.0 * torch.log10(torch.tensor(rel, dtype=torch.float64))),
            nonfinite=int(self.nonfinite.sum()),
            token_rel=self.rel,
            token_of=self.token_of,
        )


def token_errors(actual: Tensor, expected: Tensor, real: Tensor, dtype: torch.dtype) -> TokenErrors:
    """Compare two tensors of one shape, token by token.

    Args:
        actual, expected: [batch, tokens, ...], any float dtype.
        real: [batch, tokens] bool; other tokens are left out.
        dtype: the dtype whose units in the last place are counted.
    """
    return row_errors(rows_of(actual, real), rows_of(expected, real), real.nonzero(), dtype)


def rows_of(tensor: Tensor, real: Tensor) -> Tensor:
    """The real tokens as rows: float64 [tokens, width] from [batch, tokens, ...]."""
    return tensor[real].flatten(1).double()


def row_errors(actual: Tensor, expected: Tensor, token_of: Tensor, dtype: torch.dtype) -> TokenErrors:
    """`token_errors` of rows that `rows_of` made; token_of: [tokens, 2]."""
    difference = actual - expected
    infinity = float("inf")
    # A norm over an empty axis has no maximum.
    some = bool(actual.shape[1])
    largest = torch.linalg.vector_norm(difference, infinity, dim=1) if some else actual.new_zeros(len(actual))
    size = torch.linalg.vector_norm(expected, infinity, dim=1) if some else actual.new_ones(len(actual))
    nonfinite = torch.zeros(len(actual), dtype=torch.float64, device=actual.device)
    spoiled = ~torch.isfinite(largest)
    if bool(spoiled.any()):
        nonfinite[spoiled] = (~torch.isfinite(actual[spoiled])).sum(1).double()
    return TokenErrors(
        token_of,
        torch.linalg.vector_norm(difference, dim=1).square(),
        torch.linalg.vector_norm(expected, dim=1).square(),
        torch.linalg.vector_norm(actual, dim=1).square(),
        torch.linalg.vecdot(actual, expected),
        largest,
        largest / ulp(dtype, size),
        nonfinite,
        torch.finfo(dtype).smallest_normal,
    )


def compare(actual: Tensor, expected: Tensor, real: Tensor, dtype: torch.dtype) -> ErrorStats:
    """`token_errors` summed up over all real tokens."""
    return token_errors(actual, expected, real, dtype).stats()


def kl_divergence(expected_logits: Tensor, actual_logits: Tensor) -> Tensor:
    """KL(expected || actual) in nats over the last axis, in float64; [...] from [..., vocab]."""
    p = torch.log_softmax(expected_logits.double(), -1)
    q = torch.log_softmax(actual_logits.double(), -1)
    gap = q - p
    # Adding sum(q - p) = 0 makes every term positive and second order in the gap: no cancellation for close logits.
    return torch.where(p.exp() > 0, p.exp() * (torch.expm1(gap) - gap), q.exp()).sum(-1)


def top_margin(logits: Tensor) -> Tensor:
    """Gap between the largest and the second largest logit, float64 [...] from [..., vocab]."""
    best = logits.double().topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def json_number(value: float) -> float | None:
    """The value, or None for NaN and infinities, which JSON does not have."""
    return value if value == value and abs(value) != float("inf") else None
