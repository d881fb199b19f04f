"""Quantized weights as the kernels take them, and the check of a GEMM of quantized values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refmodels.quantization.arithmetic import (
    QuantizedWeight,
    coded_product,
    quantize_static,
    quantize_tokens,
    quantize_weight,
)
from refmodels.quantization.formats import Code, LinearFormat
from tests.support.gpu import DEVICE
from trt_runtime.kernels import packing, quantized_gemm
from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute


class Weights:
    """One or two quantized weights [n, k], as the reference and as the kernels have them."""

    def __init__(self, linear: LinearFormat, n: int, k: int, dtype: torch.dtype, *, gated: bool, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.parts: list[QuantizedWeight] = []
        for _ in range(1 + gated):
            # Asymmetric formats need weights that are not.
            weight = torch.randn(n, k, generator=g) * k**-0.5 + (0 if linear.symmetric else 0.4 * k**-0.5)
            made = quantize_weight(weight, linear)
            scale = made.scale.to(dtype).to(DEVICE)
            zero = made.zero.to(DEVICE) if made.zero is not None else None
            self.parts.append(QuantizedWeight(codes=made.codes.to(DEVICE), scale=scale, zero=zero))
        code: Code = linear.weight
        self.arguments: dict[str, Any] = {
            "weight": torch.cat([packing.pack(p.codes, code) for p in self.parts]),
            "scale": torch.cat([packing.by_tile(p.scale) for p in self.parts]),
            "offset": None
            if linear.symmetric
            else torch.cat([packing.offsets(p.zero, code, dtype) for p in self.parts if p.zero is not None]),
            "n": n,
            "k": k,
            "dtype": ELEMENT_TYPES[dtype],
            "code": code,
            "group": linear.group,
        }

    def exact(self) -> Tensor:
        """(code - zero) * scale in fp64, of all parts."""
        return torch.cat([p.dequantized(torch.float64) for p in self.parts])


def one_gemm(**given: Any) -> None:
    execute([quantized_gemm.gemm(**given)])


def check_gemm(
    code: Any,
    n: int,
    k: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    gated: bool,
    static: bool,
    run: Callable[..., None] = one_gemm,
) -> None:
    linear = LinearFormat(weight=code, input=code, input_scale="tensor" if static else "token")
    weights = Weights(linear, n, k, dtype, gated=gated)
    g = torch.Generator().manual_seed(tokens)
    x, bias, residual = (
        torch.randn(*shape, generator=g).to(dtype).to(DEVICE)
        for shape in ((tokens, k), (n * (1 + gated),), (tokens, n))
    )
    one = torch.tensor(0.02 if code == "int8" else 0.006, dtype=dtype, device=DEVICE)
    codes, scales = (quantize_static(x, one, code), one) if static else quantize_tokens(x, code)
    out = torch.full((tokens, n), float("nan"), dtype=dtype, device=DEVICE)
    run(
        n=n,
        k=k,
        tokens=tokens,
        dtype=ELEMENT_TYPES[dtype],
        code=code,
        x=codes,
        input_scale=scales.flatten() if not static else one,
        weight=torch.cat([p.codes.view(torch.int8) for p in weights.parts]).view(weights.parts[0].codes.dtype),
        scale=torch.cat([p.scale.flatten() for p in weights.parts]),
        out=out,
        bias=bias,
        residual=residual,
        static=static,
        gated=gated,
    )
    ys = [coded_product(codes, scales, p.codes, p.scale, dtype) for p in weights.parts]
    ys = [y + b for y, b in zip(ys, bias.split(n), strict=True)]
    y = (F.silu(ys[0]) * ys[1] if gated else ys[0]) + residual
    # int8: the same exact sums, rounded the same way, but for exp of silu.  fp8: Hopper keeps 14 bits of a sum.
    differ = (out != y).double().mean()
    assert code == "fp8" or float(differ) <= (0.02 if gated else 0), (n, k, tokens, gated, static)
    bound = torch.finfo(dtype).eps if code == "int8" else torch.finfo(dtype).eps + 2.0**-11
    assert float((out.double() - y.double()).norm() / y.double().norm()) <= bound
