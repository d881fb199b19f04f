"""A linear layer with what follows its product, as one or two kernels."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Module):
    """An `nn.Linear`, or two that read the same input, with what follows the product.

    forward(x [..., in], residual) gives residual + (x @ weight.T + bias) [..., out].  **The residual's memory is
    reused** where that spares a kernel.  `gated`: weight and bias hold two products of equal width, and silu of the
    first times the second takes the place of the product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.gated = weight, bias, gated

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = math.prod(x.shape[:-1])
        if x.is_cuda and rows == 1 and x.shape[-1] * x.element_size() % 16 == 0:
            return self._gemv(x, residual)
        if residual is not None and self.bias is None and not self.gated:
            residual.view(rows, -1).addmm_(x.reshape(rows, -1), self.weight.T)
            return residual
        y = F.linear(x, self.weight, self.bias)
        y = gated(y) if self.gated else y
        return y if residual is None else residual + y

    def _gemv(self, x: Tensor, residual: Tensor | None) -> Tensor:
        from trt_runtime.kernels import linear
        from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute

        out = x.new_empty(*x.shape[:-1], len(self.weight) // (2 if self.gated else 1))
        gemv = linear.gemv(
            n=out.shape[-1],
            k=x.shape[-1],
            dtype=ELEMENT_TYPES[x.dtype],
            x=x.contiguous(),
            weight=self.weight,
            bias=self.bias,
            residual=residual,
            out=out,
            gated=self.gated,
        )
        execute([gemv])
        return out


def gated(x: Tensor) -> Tensor:
    """silu of the first half of the last axis times the second half."""
    if not x.is_cuda:
        first, second = x.chunk(2, -1)
        return F.silu(first) * second
    from trt_runtime.kernels import linear
    from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute

    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    execute([linear.gate(rows=math.prod(x.shape[:-1]), n=out.shape[-1], dtype=ELEMENT_TYPES[x.dtype], x=x, out=out)])
    return out
