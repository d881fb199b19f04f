"""Linear layers of the fused decoder: the interface, and the implementation for float weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trt_runtime.kernels import linear as kernels
from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute
from trt_runtime.torch_gpu.kernel_choice import Kernel, LinearFacts, capability_of, choose
from trt_runtime.torch_gpu.weight_storage import adjacent_view

PREFETCH_BYTES = 8 * 2**20
"""Bytes that one layer prefetches into L2 for the next two: by measurement, on an H200."""


class FusedLinear(nn.Module, ABC):
    """A linear layer, or an MLP's gate and up merged into one, with what comes before and after its GEMM.

    Attributes:
        merged: it is gate and up: silu(gate(x)) * up(x) instead of linear(x).
        prefetch: contiguous pieces of later layers' weights that a step of one row brings into L2.
    """

    merged: bool
    prefetch: tuple[Tensor, ...] = ()

    @abstractmethod
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual + linear(x) [..., out] of x [..., in].  **The residual's memory is reused** where that spares a
        kernel."""

    def forward_normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """forward(norm(x)), in one kernel where there is one."""
        y: Tensor = self(norm(x))
        return y

    @property
    @abstractmethod
    def decode_weight(self) -> Tensor | None:
        """The weights that a step of one row reads, which the layer before may prefetch; None if there are none to
        prefetch."""

    @property
    def can_prefetch(self) -> bool:
        """Whether its kernel for one row uses `prefetch`."""
        return False


class FusedFloatLinear(FusedLinear):
    """A layer with float weights.

    Args:
        weight: [out, in], or [2 * out, in] of gate and up.
        bias: [out] or [2 * out], or None.
        merged: see `FusedLinear`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, merged: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.merged = weight, bias, merged
        self.facts = LinearFacts(
            storage="float",
            in_features=weight.shape[1],
            out_features=len(weight) // (2 if merged else 1),
            dtype=weight.dtype,
            capability=capability_of(weight.device),
        )

    @staticmethod
    def of_gate_and_up(gate: FusedFloatLinear, up: FusedFloatLinear) -> FusedFloatLinear:
        """Both as one, whose parameters are adjacent in memory: see `weight_storage.make_adjacent`."""
        bias = None if gate.bias is None or up.bias is None else adjacent_view(gate.bias, up.bias)
        return FusedFloatLinear(adjacent_view(gate.weight, up.weight), bias, merged=True)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = math.prod(x.shape[:-1])
        if choose(rows, self.facts) is Kernel.GEMV:
            return self._gemv(x, residual)
        if residual is not None and self.bias is None and not self.merged:
            residual.view(rows, -1).addmm_(x.reshape(rows, -1), self.weight.T)
            return residual
        y = F.linear(x, self.weight, self.bias)
        y = silu_and_multiply(y) if self.merged else y
        return y if residual is None else residual + y

    @property
    def decode_weight(self) -> Tensor | None:
        return self.weight

    def _gemv(self, x: Tensor, residual: Tensor | None) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.facts.out_features)
        gemv = kernels.gemv(
            n=out.shape[-1],
            k=x.shape[-1],
            dtype=ELEMENT_TYPES[x.dtype],
            x=x.contiguous(),
            weight=self.weight,
            bias=self.bias,
            residual=residual,
            out=out,
            gated=self.merged,
        )
        execute([gemv])
        return out


def silu_and_multiply(x: Tensor) -> Tensor:
    """silu of the first half of the last axis times the second half."""
    if not x.is_cuda:
        first, second = x.chunk(2, -1)
        return F.silu(first) * second
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    execute([kernels.gate(rows=math.prod(x.shape[:-1]), n=out.shape[-1], dtype=ELEMENT_TYPES[x.dtype], x=x, out=out)])
    return out


def plan_prefetch(layers: Sequence[FusedLinear]) -> None:
    """Tell the layers, in the order of execution, what to prefetch of the next ones' weights.

    In a decode step of one row the memory is idle between two GEMVs and during attention; weights requested by then
    come from L2 afterwards.
    """
    asked = [0] * len(layers)
    for i, layer in enumerate(layers):
        if not layer.can_prefetch:
            continue
        room, pieces = PREFETCH_BYTES, []
        for j in range(i + 1, min(i + 3, len(layers))):
            weight = layers[j].decode_weight
            if weight is None or not weight.is_contiguous():
                continue
            take = min(room, weight.nbytes - asked[j]) // 16 * 16
            if take > 0:
                words = weight.detach().view(-1).view(torch.int32)
                pieces.append(words[asked[j] // 4 : (asked[j] + take) // 4])
                asked[j] += take
                room -= take
        layer.prefetch = tuple(pieces)
