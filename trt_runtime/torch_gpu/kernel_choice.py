"""The choice of the kernel that runs a linear layer on a number of rows: one pure function, and the facts it uses.

A row is one token of one sequence.  The numbers were measured on an H200 with the shapes of Qwen-7B
(benchmarks/gpu_quantized.py), unless their docstring says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch

from refmodels.quantization.formats import EightBit, LinearFormat
from trt_runtime.kernels import quantized_chain, quantized_linear
from trt_runtime.kernels.rms_norm import MAX_WIDTH
from trt_runtime.kernels.torch_host import ELEMENT_TYPES

SLICED_ROWS = 64
"""Maximum number of rows for `kernels.quantized_linear.gemv`, `MAX_TOKENS` of them per launch; for more, the weight
is dequantized once and cuBLAS multiplies.  By estimate: reading the quantized weights four times moves 2 bytes per
weight, dequantizing and reading the result 4.5.  Four launches were measured (a step of Qwen-7B in int4 at 64 rows:
11 ms), dequantizing at 64 rows was not."""

MANY_ROWS = 65
"""Rows from which on a GEMM of quantized inputs and weights is faster by `kernels.quantized_gemm_hopper`, or, on GPUs
that it does not serve, one of fp8 by cuBLAS."""

CUBLAS_ROWS = 1024
"""Rows from which on cuBLAS multiplies fp8 no slower than `kernels.quantized_gemm_hopper`: a tie."""

HOPPER = 90
"""The compute capability that `kernels.quantized_gemm_hopper` is written for."""

Storage = Literal["float", "packed", "quantized", "reference"]
"""The weights that a layer's kernels read: floats; int4, int8 or fp8 weights packed by `kernels.packing`; int8 or fp8
weights as in the checkpoint, for inputs that are quantized too; or none: only the reference's arithmetic serves."""


class Kernel(Enum):
    """The implementation of a GEMM.  Those of `trt_runtime.kernels` also apply bias, silu(gate) * up and residual."""

    REFERENCE = "the module of the reference model, by torch"
    CUBLAS = "cuBLAS (on the CPU: torch's GEMM)"
    GEMV = "kernels.linear.gemv"
    CHAIN = "kernels.quantized_chain, with only this layer in the chain"
    PACKED_GEMV = "kernels.quantized_linear.gemv, in slices of MAX_TOKENS rows"
    DEQUANTIZE = "kernels.quantized_linear.dequantize, then cuBLAS"
    QUANTIZED_GEMM = "kernels.quantized_gemm"
    HOPPER_GEMM = "kernels.quantized_gemm_hopper"
    FP8_CUBLAS = "cuBLAS on fp8 operands"

    @property
    def reads_quantized_input(self) -> bool:
        return self in (Kernel.QUANTIZED_GEMM, Kernel.HOPPER_GEMM, Kernel.FP8_CUBLAS)


@dataclass(frozen=True, kw_only=True)
class LinearFacts:
    """The facts of a linear layer that decide which kernel runs it.

    Attributes:
        storage: the weights that its kernels read.
        in_features, out_features: of the layer; of gate and up as one layer, `out_features` of either.
        dtype: dtype of input and output.
        capability: compute capability of the GPU, 90 for 9.0; None: on the CPU.
        input: type to which a "quantized" layer quantizes its input.
        has_chain_runner: whether `kernels.quantized_chain` is set up for the layer.
    """

    storage: Storage
    in_features: int
    out_features: int
    dtype: torch.dtype
    capability: int | None
    input: EightBit | None = None
    has_chain_runner: bool = False


def choose(rows: int, layer: LinearFacts) -> Kernel:
    """The kernel that multiplies `rows` rows with the layer's weight."""
    if layer.storage == "float":
        aligned = layer.in_features * layer.dtype.itemsize % 16 == 0
        return Kernel.GEMV if rows == 1 and aligned and layer.capability is not None else Kernel.CUBLAS
    if layer.storage == "packed":
        if rows == 1 and layer.has_chain_runner:
            return Kernel.CHAIN
        return Kernel.PACKED_GEMV if 0 < rows <= SLICED_ROWS else Kernel.DEQUANTIZE
    if layer.storage == "quantized" and rows > 0:
        hopper = layer.capability == HOPPER
        if layer.input == "fp8" and rows >= (CUBLAS_ROWS if hopper else MANY_ROWS) and layer.out_features % 16 == 0:
            return Kernel.FP8_CUBLAS
        return Kernel.HOPPER_GEMM if hopper and rows >= MANY_ROWS else Kernel.QUANTIZED_GEMM
    return Kernel.REFERENCE


def storage_for(linear: LinearFormat, *, in_features: int, dtype: torch.dtype) -> Storage:
    """The storage that the kernels read for a quantized layer on a GPU.

    Args:
        dtype: the working dtype, which the layer's scales have.
    """
    if linear.input is None:
        kind = ELEMENT_TYPES.get(dtype)
        served = kind is not None and quantized_linear.serves(k=in_features, group=linear.group, dtype=kind)
        return "packed" if served else "reference"
    served = (
        linear.group is None
        and linear.symmetric
        and linear.input_scale in ("tensor", "token")
        and dtype in (torch.float16, torch.bfloat16)
        and in_features % 16 == 0
        and in_features <= MAX_WIDTH
    )
    return "quantized" if served else "reference"


def chain_serves(linear: LinearFormat, *, in_features: int, out_features: int, dtype: torch.dtype) -> bool:
    """Whether `kernels.quantized_chain` multiplies with such a weight, once it is packed."""
    plain = linear.weight == "int4" and linear.symmetric and not linear.reordered and not linear.pre_quant_scale
    sizes = quantized_chain.serves(rows=out_features, columns=in_features, group=linear.group)
    return plain and linear.input is None and dtype == torch.float16 and sizes


def capability_of(device: torch.device) -> int | None:
    """A GPU's compute capability as `LinearFacts` has it."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
