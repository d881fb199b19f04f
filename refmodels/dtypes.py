"""Every dtype that a tensor of ours may have, and what torch and each file format or runtime calls it.

A dtype has a short name here ("fp16"): that of options, bundles and kernels.  `DTYPE_TABLE` holds the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class DType:
    """One dtype.

    Attributes:
        name: ours.
        torch: of a torch tensor that holds it.  int4 lies in int8, one element per byte, until it is packed.
        onnx: its number in the enum TensorProto.DataType of onnx.proto; onnx_ir's DataType has the same.
        onnxruntime: how ONNX Runtime spells the type of an input or output.
        safetensors: its name in a safetensors header; None: the format has no such dtype.
        tensorrt: the member of tensorrt.DataType; None: TensorRT has none.
    """

    name: str
    torch: torch.dtype
    onnx: int
    onnxruntime: str
    safetensors: str | None
    tensorrt: str | None


DTYPE_TABLE: Mapping[str, DType] = {
    name: DType(name=name, torch=held, onnx=onnx, onnxruntime=f"tensor({ort})", safetensors=stored, tensorrt=trt)
    for name, held, onnx, ort, stored, trt in (
        ("fp64", torch.float64, 11, "double", "F64", None),
        ("fp32", torch.float32, 1, "float", "F32", "FLOAT"),
        ("fp16", torch.float16, 10, "float16", "F16", "HALF"),
        ("bf16", torch.bfloat16, 16, "bfloat16", "BF16", "BF16"),
        ("fp8", torch.float8_e4m3fn, 17, "float8e4m3fn", "F8_E4M3", "FP8"),
        ("int4", torch.int8, 22, "int4", None, "INT4"),
        ("int8", torch.int8, 3, "int8", "I8", "INT8"),
        ("uint8", torch.uint8, 2, "uint8", "U8", "UINT8"),
        ("int32", torch.int32, 6, "int32", "I32", "INT32"),
        ("int64", torch.int64, 7, "int64", "I64", "INT64"),
        ("bool", torch.bool, 9, "bool", "BOOL", "BOOL"),
    )
}
"""By our short names; fp8 is e4m3fn."""

DTYPES: Mapping[str, torch.dtype] = {name: DTYPE_TABLE[name].torch for name in ("fp64", "fp32", "fp16", "bf16")}
"""The dtypes in which a model may compute, by short name."""

BY_TORCH: Mapping[torch.dtype, DType] = {d.torch: d for d in DTYPE_TABLE.values() if d.name != "int4"}
"""Never int4, which torch holds as int8."""
BY_ONNX: Mapping[int, DType] = {d.onnx: d for d in DTYPE_TABLE.values()}
BY_ONNXRUNTIME: Mapping[str, DType] = {d.onnxruntime: d for d in DTYPE_TABLE.values()}


def torch_name(dtype: torch.dtype) -> str:
    """'float16' of torch.float16, for messages; also of dtypes that are not in the table."""
    return str(dtype).removeprefix("torch.")


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding a number to a float dtype: half the distance from 1 to the next one."""
    return torch.finfo(dtype).eps / 2


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of tables and reductions for a model in `dtype`: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
