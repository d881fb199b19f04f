"""The one table of dtypes agrees with onnx, ONNX Runtime, safetensors and TensorRT, and there is no second table."""

from __future__ import annotations

import ast
import json
import re

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save

from refmodels.dtypes import BY_ONNX, BY_ONNXRUNTIME, BY_TORCH, DTYPE_TABLE, DTYPES, DType, torch_name, unit_roundoff
from tests.support.paths import ROOT

PACKAGES = ("refmodels", "trt_runtime", "export", "debug")
ONNX_NAMES = {
    "fp64": "DOUBLE", "fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16", "fp8": "FLOAT8E4M3FN",
    "int4": "INT4", "int8": "INT8", "uint8": "UINT8", "int32": "INT32", "int64": "INT64", "bool": "BOOL",
}  # fmt: skip
OTHER_TABLES = {
    ("debug/comparison/faults/generic.py", "_LOWER"): "the narrower dtypes of each: a relation, no second name",
    ("trt_runtime/onnxruntime/integer_kernels.py", "_BITS"): "bits of a code",
    ("trt_runtime/onnxruntime/integer_kernels.py", "_XOR"): "the sign bits of a byte of codes",
}
_SPELLED = re.compile(
    r"torch\.(b?float|u?int|bool|half)\w*$|(onnx\.)?TensorProto\.[A-Z]\w*$|ir\.DataType\.\w+$"
    r"|trt\.(b?float|u?int|bool|fp\d)\w*$|'tensor\(.*\)'$|'(BF16|F16|F32|F64|I8|I32|I64)'$"
)


@pytest.mark.parametrize("dtype", DTYPE_TABLE.values(), ids=DTYPE_TABLE)
def test_numbers_and_names_are_those_of_the_libraries(dtype: DType) -> None:
    assert DTYPE_TABLE[dtype.name] is dtype
    assert dtype.onnx == onnx.TensorProto.DataType.Value(ONNX_NAMES[dtype.name]) == ir.DataType[ONNX_NAMES[dtype.name]]
    held = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}.get(dtype.name)
    numpy = np.dtype(np.int8) if dtype.name == "int4" else onnx.helper.tensor_dtype_to_np_dtype(dtype.onnx)
    assert torch_name(dtype.torch) == (held or numpy.name)
    assert dtype.torch.itemsize == numpy.itemsize
    if dtype.safetensors is not None:
        header = save({"x": torch.zeros(1, dtype=dtype.torch)})[8:]
        assert json.loads(header[: header.index(b"}}") + 2])["x"]["dtype"] == dtype.safetensors


@pytest.mark.parametrize("dtype", DTYPE_TABLE.values(), ids=DTYPE_TABLE)
def test_onnxruntime_spells_the_type_so(dtype: DType) -> None:
    number = onnx.TensorProto.FLOAT
    x, y = (onnx.helper.make_tensor_value_info(*named, [1]) for named in (("x", dtype.onnx), ("y", number)))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Cast", ["x"], ["y"], to=number)], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == dtype.onnxruntime


def test_tensorrt_has_the_types() -> None:
    api = pytest.importorskip("trt_runtime.tensorrt.api")
    for dtype in DTYPE_TABLE.values():
        if dtype.tensorrt is not None:
            assert api.tensorrt_type(dtype.name) == getattr(api.trt.DataType, dtype.tensorrt)
    named = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "fp8", "int4": "int4", "int8": "int8"}
    for name in (*named, "uint8", "int32", "int64", "bool"):
        assert api.tensorrt_type(name) == getattr(api.trt, named.get(name, name))
    with pytest.raises(AssertionError, match="TensorRT has no fp64"):
        api.tensorrt_type("fp64")


def test_look_ups_find_every_record() -> None:
    assert list(BY_ONNX.values()) == list(BY_ONNXRUNTIME.values()) == list(DTYPE_TABLE.values())
    # torch holds int4 as int8, which stands for itself.
    assert list(BY_TORCH.values()) == [d for d in DTYPE_TABLE.values() if d.name != "int4"]
    assert all(BY_TORCH[torch_type].name == name for name, torch_type in DTYPES.items())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_unit_roundoff_is_the_largest_relative_error(dtype: torch.dtype) -> None:
    unit = unit_roundoff(dtype)
    one = torch.ones((), dtype=torch.float64)
    # 1 + unit lies half way to the next number and goes to the even one, 1; the next wider number goes up.
    if dtype != torch.float64:
        assert (one + unit).to(dtype) == 1
        assert (one + unit * (1 + 2**-10)).to(dtype) == 1 + 2 * unit
    assert unit == 2.0 ** -{"fp64": 53, "fp32": 24, "fp16": 11, "bf16": 8}[BY_TORCH[dtype].name]


def _tables(tree: ast.AST) -> list[tuple[str, str]]:
    """Assigned dictionaries that give two dtypes a name or a number: the variable and the text."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        for part in ast.walk(node.value):
            pairs = zip(part.keys, part.values, strict=True) if isinstance(part, ast.Dict) else ()
            spelled = [p for p in pairs if any(e is not None and _SPELLED.match(ast.unparse(e)) for e in p)]
            if len(spelled) > 1:
                found.append((ast.unparse(target), ast.unparse(part)))
    return found


@pytest.mark.slow
def test_no_second_table_of_dtypes() -> None:
    files = [f for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py")) if f.name != "dtypes.py"]
    named = {
        (file.relative_to(ROOT).as_posix(), variable): text
        for file in files
        for variable, text in _tables(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert named.keys() == OTHER_TABLES.keys(), "a fact of a dtype belongs into refmodels/dtypes.py"
    assert not [f for f in files if 'removeprefix("torch.")' in f.read_text(encoding="utf-8").replace("'", '"')]


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("T = {torch.float32: 1, torch.float16: 10}", 1),
        ("T: Mapping[str, int] = {'fp32': onnx.TensorProto.FLOAT, 'fp16': onnx.TensorProto.FLOAT16}", 1),
        ("T = {'a': {'tensor(float)': torch.float32, 'tensor(bool)': torch.bool}}", 1),
        ("T = {trt.float32: 'fp32', trt.bfloat16: 'bf16'}", 1),
        ("T = {'out': torch.float32, 'x': 1}", 0),
    ],
)
def test_the_check_of_tables_sees(code: str, count: int) -> None:
    assert len(_tables(ast.parse(code))) == count
