"""GPTQ: round column by column, and correct the columns not yet rounded for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323.
With H = 2/n X^T X of the inputs X [n, in], the output error of a layer is tr((W - Q) H (W - Q)^T).  Rounding column i
costs e = (w_i - q_i) / U_ii, and the best change of the columns after it is -e U_i,: where U^T U = H^-1, U upper.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from export.quantization.observers import tokens_of
from refmodels.errors import LogitLockError
from refmodels.quantization.arithmetic import QuantizedWeight, dequantize, to_codes, weight_scale
from refmodels.quantization.formats import CODE_TYPES, Code, LinearFormat


class Hessian:
    """H = 2/n X^T X of a layer's inputs, streaming: [width, width], fp32 (fp64 for fp64 inputs).

    Attributes:
        tokens: n.
    """

    def __init__(self, name: str, width: int) -> None:
        self.name, self.width, self.tokens = name, width, 0
        # The mean so far, not the sum: `matrix` returns it without a copy.
        self._mean: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """x: [..., width].  Raises LogitLockError: another width, NaN or infinity; the layer is named."""
        tokens = tokens_of(x, self.name, self.width)
        before, self.tokens = self.tokens, self.tokens + len(tokens)
        if self._mean is None:
            self._mean = tokens.new_zeros(self.width, self.width)
        if self.tokens:
            self._mean.addmm_(tokens.t(), tokens, beta=before / self.tokens, alpha=2 / self.tokens)

    def merge(self, other: Hessian) -> None:
        """Raises LogitLockError: of another layer or width."""
        if (other.name, other.width) != (self.name, self.width):
            raise LogitLockError(f"Hessians of {self.name} and {other.name} cannot be merged")
        if other._mean is None or not other.tokens:
            return
        before, self.tokens = self.tokens, self.tokens + other.tokens
        theirs = other._mean * (other.tokens / self.tokens)
        self._mean = (
            theirs if self._mean is None else self._mean * (before / self.tokens) + theirs.to(self._mean.device)
        )

    @property
    def matrix(self) -> Tensor:
        """Not a copy.  Raises LogitLockError: no token was observed."""
        if self._mean is None or not self.tokens:
            raise LogitLockError(f"the input of {self.name} was never observed; GPTQ needs at least one token")
        return self._mean


@dataclass(frozen=True, kw_only=True)
class GptqResult:
    """error: tr((W - Q) H (W - Q)^T); relative_error: that over tr(W H W^T)."""

    weight: QuantizedWeight
    error: float
    relative_error: float


def layer_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T): the layer's squared output error, summed over outputs, twice the mean over tokens.

    Args:
        weight, quantized: [out, in], floats; hessian: [in, in].
    """
    return float(row_errors(weight, quantized, hessian).sum())


def row_errors(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """The same of every output alone, [out] fp64."""
    difference = weight.to(hessian.dtype) - quantized.to(hessian.dtype)
    return ((difference @ hessian) * difference).sum(1, dtype=torch.float64)


def damped_root(hessian: Tensor, damping: float) -> Tensor:
    """X [in, in] in the dtype of H, with X^T X the damped H: replaces the inputs where only inner products matter.

    Raises:
        LogitLockError: not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(_damped(hessian, damping))
    if bool(failed):
        raise _not_definite(damping)
    root: Tensor = lower.t().to(hessian.dtype)
    return root


def gptq(
    weight: Tensor,
    hessian: Tensor,
    linear: LinearFormat,
    *,
    act_order: bool = False,
    damping: float = 0.01,
    block: int = 128,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> GptqResult:
    """Quantize a weight so that its output error on the inputs that made the Hessian is small.

    The scale of a group comes from its columns as they are when rounding reaches them, corrections included, as in the
    paper.  With `act_order` columns are rounded by descending H_ii, and the scales of all groups come from the
    original weight ("static groups"): each column keeps its place and its group, so that the checkpoint needs no order
    of columns and kernels need no gather.  Scales that follow the order would form groups of scattered columns.

    Columns whose input was always zero have no influence on the error; they are rounded to nearest.

    Args:
        weight: [out, in], any float dtype; the loop runs in fp32 (fp64 for fp64), factorization in fp64.
        hessian: [in, in], as `Hessian.matrix`, on the device of the weight.
        act_order: the activation order heuristic of the authors' code, with static groups.
        damping: multiple of the mean of diag(H) that is added to the diagonal.
        block: columns between updates of the rest of the weight ("lazy batch updates").
        scale, zero: [out, groups], given instead of computed (a clipped scale, for example).
    Returns: the weight; its error and the error relative to tr(W H W^T), with the undamped H.
    Raises:
        LogitLockError: the Hessian has another shape, the format is reordered, the weight is not finite, damping is
            not positive, or groups do not divide the columns.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise LogitLockError(f"a weight with {columns} columns and a Hessian of shape {list(hessian.shape)}")
    if linear.reordered:
        raise LogitLockError("GPTQ leaves codes in their columns (static groups): its format must not be reordered")
    if damping <= 0 or block < 1:
        raise LogitLockError(f"damping {damping} and block {block} must be positive")
    if not bool(torch.isfinite(weight).all()):
        raise LogitLockError("a weight to be quantized holds NaN or infinity")
    wide = torch.float64 if torch.float64 in (weight.dtype, hessian.dtype) else torch.float32
    original = weight.to(wide)
    group = columns // linear.groups(columns)
    if scale is None and (act_order or group == columns):
        scale, zero = weight_scale(original, linear)
    elif scale is None:
        # A group must not straddle blocks: its columns are up to date when its first one is reached.
        block = block if block % group == 0 or group % block == 0 else group
    static = scale is not None
    if scale is None:
        scale = original.new_empty(len(original), columns // group)
        zero = None if linear.symmetric else torch.empty_like(scale, dtype=torch.int8)
    scale = scale.to(wide)

    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    factor = _inverse_factor(hessian, damping, order, wide)
    state = original.clone() if order is None else original[:, order]
    groups = torch.arange(columns) // group
    group_of = (groups if order is None else groups[order.cpu()]).tolist()
    codes = torch.empty_like(state, dtype=CODE_TYPES[linear.weight])
    group_format = dataclasses.replace(linear, group=None, input=None)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, inverse = state[:, start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        for i in range(stop - start):
            c = start + i
            g = slice(group_of[c], group_of[c] + 1)
            if not static and c % group == 0:
                found, offset = weight_scale(state[:, c : c + group], group_format)
                scale[:, g] = found
                if zero is not None and offset is not None:
                    zero[:, g] = offset
            column, offset = part[:, i : i + 1], None if zero is None else zero[:, g]
            codes[:, c : c + 1] = code = _nearest(column, scale[:, g], offset, linear.weight)
            errors[:, i : i + 1] = error = (column - dequantize(code, scale[:, g], offset)) / inverse[i, i]
            part[:, i:] -= error * inverse[i, i:]
        state[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)

    if order is not None:
        # As bytes: float8 cannot be indexed everywhere.
        codes = codes.view(torch.int8)[:, order.argsort()].view(codes.dtype)
    result = QuantizedWeight(codes=codes, scale=scale, zero=zero)
    total = layer_error(original, result.dequantized(), hessian)
    whole = layer_error(original, torch.zeros_like(original), hessian)
    return GptqResult(weight=result, error=total, relative_error=total / whole if whole else 0.0)


def _nearest(column: Tensor, scale: Tensor, zero: Tensor | None, code: Code) -> Tensor:
    """As `quantize_weight`, but without its check for NaN, which costs one synchronization per column on a GPU."""
    steps = column / scale
    return to_codes(steps if zero is None else steps.round() + zero, code)


def _inverse_factor(hessian: Tensor, damping: float, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    """U, upper triangular, with U^T U = (H + damping * mean(diag H) I)^-1; [in, in] of `dtype`, columns in `order`.

    With J the reversal of rows, J H J = L L^T gives H = (J L J)(J L J)^T, and U = (J L J)^-1 = J L^-1 J: one
    factorization and one triangular inverse, in fp64, where the authors' code takes an inverse and two factorizations.
    Both happen in place: matrices of this size are most of GPTQ's memory.
    """
    arranged = hessian if order is None else hessian[order][:, order]
    # Transposed, which changes nothing, because LAPACK wants columns in a row.
    lower = _damped(arranged.flip(0, 1), damping).mT
    failed = torch.empty((), dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if bool(failed):
        raise _not_definite(damping)
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).mT
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.to(dtype).flip(0, 1).contiguous()


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) I, fp64."""
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    mean = diagonal.mean() if bool(diagonal.any()) else diagonal.new_ones(())
    # A channel that was always zero has no other entry in its row: it is rounded to nearest and moves no other column.
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    return damped


def _not_definite(damping: float) -> LogitLockError:
    return LogitLockError(
        f"the Hessian is not positive definite with damping {damping:g}; use more damping or more calibration data"
    )
