"""The choice of a linear layer's kernel: every boundary of the one function that makes it, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from refmodels.quantization.formats import LinearFormat
from trt_runtime.kernels import quantized_linear
from trt_runtime.kernels.rms_norm import MAX_WIDTH
from trt_runtime.torch_gpu.kernel_choice import (
    CUBLAS_ROWS,
    MANY_ROWS,
    SLICED_ROWS,
    Kernel,
    LinearFacts,
    chain_serves,
    choose,
    storage_for,
)

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FLOAT = LinearFacts(storage="float", in_features=4096, out_features=4096, dtype=FP16, capability=90)
PACKED = replace(FLOAT, storage="packed")
CHAINED = replace(PACKED, has_chain_runner=True)
INT8 = replace(FLOAT, storage="quantized", input="int8")
FP8 = replace(INT8, input="fp8")
OLDER = {"capability": 89}

K = Kernel
CASES: list[tuple[LinearFacts, dict[int, Kernel]]] = [
    (FLOAT, {0: K.CUBLAS, 1: K.GEMV, 2: K.CUBLAS, 10_000: K.CUBLAS}),
    (replace(FLOAT, capability=None), {1: K.CUBLAS}),
    (replace(FLOAT, capability=80), {1: K.GEMV, 2: K.CUBLAS}),
    # Rows of 16 bytes, which depends on the dtype.
    (replace(FLOAT, in_features=4), {1: K.CUBLAS}),
    (replace(FLOAT, in_features=4, dtype=FP32), {1: K.GEMV}),
    (replace(FLOAT, in_features=2, dtype=FP32), {1: K.CUBLAS}),
    (replace(FLOAT, in_features=8, dtype=BF16), {1: K.GEMV}),
    (PACKED, {0: K.DEQUANTIZE, 1: K.PACKED_GEMV, 16: K.PACKED_GEMV, 17: K.PACKED_GEMV}),
    (PACKED, {64: K.PACKED_GEMV, 65: K.DEQUANTIZE, 5000: K.DEQUANTIZE}),
    (replace(PACKED, capability=80), {1: K.PACKED_GEMV, 64: K.PACKED_GEMV, 65: K.DEQUANTIZE}),
    (CHAINED, {0: K.DEQUANTIZE, 1: K.CHAIN, 2: K.PACKED_GEMV, 64: K.PACKED_GEMV, 65: K.DEQUANTIZE}),
    (INT8, {0: K.REFERENCE, 1: K.QUANTIZED_GEMM, 64: K.QUANTIZED_GEMM, 65: K.HOPPER_GEMM}),
    (INT8, {1023: K.HOPPER_GEMM, 1024: K.HOPPER_GEMM, 9000: K.HOPPER_GEMM}),
    (replace(INT8, **OLDER), {1: K.QUANTIZED_GEMM, 64: K.QUANTIZED_GEMM, 65: K.QUANTIZED_GEMM, 1024: K.QUANTIZED_GEMM}),
    (replace(INT8, capability=100), {65: K.QUANTIZED_GEMM}),
    (FP8, {0: K.REFERENCE, 1: K.QUANTIZED_GEMM, 64: K.QUANTIZED_GEMM, 65: K.HOPPER_GEMM}),
    (FP8, {1023: K.HOPPER_GEMM, 1024: K.FP8_CUBLAS, 9000: K.FP8_CUBLAS}),
    (replace(FP8, **OLDER), {1: K.QUANTIZED_GEMM, 64: K.QUANTIZED_GEMM, 65: K.FP8_CUBLAS, 1024: K.FP8_CUBLAS}),
    # cuBLAS wants whole vectors of outputs.
    (replace(FP8, out_features=1000), {1023: K.HOPPER_GEMM, 1024: K.HOPPER_GEMM}),
    (replace(FP8, out_features=1008), {1024: K.FP8_CUBLAS}),
    (replace(FP8, out_features=1000, **OLDER), {65: K.QUANTIZED_GEMM, 1024: K.QUANTIZED_GEMM}),
    (replace(FLOAT, storage="reference"), {0: K.REFERENCE, 1: K.REFERENCE, 1024: K.REFERENCE}),
]


@pytest.mark.parametrize(("layer", "expected"), CASES)
def test_the_kernel_for_rows(layer: LinearFacts, expected: dict[int, Kernel]) -> None:
    assert {rows: choose(rows, layer) for rows in expected} == expected


def test_the_cases_stand_on_both_sides_of_every_boundary() -> None:
    assert (SLICED_ROWS, MANY_ROWS, CUBLAS_ROWS) == (64, 65, 1024)
    assert {kernel for _, expected in CASES for kernel in expected.values()} == set(Kernel)
    # What is cut into slices is cut into whole ones.
    assert SLICED_ROWS % quantized_linear.MAX_TOKENS == 0


def test_kernels_that_read_quantized_inputs() -> None:
    assert {kernel for kernel in Kernel if kernel.reads_quantized_input} == {
        Kernel.QUANTIZED_GEMM,
        Kernel.HOPPER_GEMM,
        Kernel.FP8_CUBLAS,
    }


INT4 = LinearFormat(weight="int4", group=128)
W8A8 = LinearFormat(weight="int8", input="int8")


@pytest.mark.parametrize(
    ("linear", "in_features", "dtype", "storage"),
    [
        (INT4, 4096, FP16, "packed"),
        (INT4, 4096, BF16, "packed"),
        (INT4, 4096, FP32, "reference"),
        (INT4, 4096, torch.float64, "reference"),
        (LinearFormat(weight="fp8"), 8, FP16, "packed"),
        (LinearFormat(weight="fp8"), 12, FP16, "reference"),
        (LinearFormat(weight="int8", group=24), 48, FP16, "reference"),
        (LinearFormat(weight="int8", group=48), 48, FP16, "packed"),
        (LinearFormat(weight="int4", group=16, symmetric=False), 48, FP16, "packed"),
        (W8A8, 4096, FP16, "quantized"),
        (W8A8, 4096, FP32, "reference"),
        (W8A8, 4096 + 8, FP16, "reference"),
        (W8A8, MAX_WIDTH, BF16, "quantized"),
        (W8A8, MAX_WIDTH + 16, BF16, "reference"),
        (replace(W8A8, input_scale="tensor"), 4096, FP16, "quantized"),
        (LinearFormat(weight="int8", input="int8", input_scale="group", group=32), 4096, FP16, "reference"),
        (LinearFormat(weight="fp8", input="fp8"), 4096, FP16, "quantized"),
    ],
)
def test_what_the_kernels_read(linear: LinearFormat, in_features: int, dtype: torch.dtype, storage: str) -> None:
    assert storage_for(linear, in_features=in_features, dtype=dtype) == storage


@pytest.mark.parametrize(
    ("linear", "out_features", "dtype", "served"),
    [
        (INT4, 64, FP16, True),
        (INT4, 64, BF16, False),
        (INT4, 24, FP16, False),
        (replace(INT4, group=64), 64, FP16, False),
        (replace(INT4, symmetric=False), 64, FP16, False),
        (replace(INT4, reordered=True), 64, FP16, False),
        (replace(INT4, pre_quant_scale=True), 64, FP16, False),
        (LinearFormat(weight="int8", group=128), 64, FP16, False),
        (LinearFormat(weight="int4", group=128, input="int8", input_scale="group"), 64, FP16, False),
    ],
)
def test_what_the_chain_serves(linear: LinearFormat, out_features: int, dtype: torch.dtype, served: bool) -> None:
    assert chain_serves(linear, in_features=4096, out_features=out_features, dtype=dtype) == served
