"""Emulated half precision against torch's own half precision: rounding, overflow, and what must not be rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

import refmodels
from export.bundle import export_model
from refmodels.errors import LogitLockError
from tests.support.checkpoints import read_case, write_model
from tests.support.goldens import needs_opset_24
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.onnxruntime.graph_edits import inline_and_type, promote
from trt_runtime.onnxruntime.half_precision import HALF_TYPES, compute_in_float
from trt_runtime.torch_gpu.engine import TorchEngine

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Elements are bound by address: numpy has no bf16.
ELEMENT = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16, torch.int64: 7}
ULP = {"fp16": 2.0**-10, "bf16": 2.0**-7}


def small_graph(precision: str) -> ir.Model:
    name = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    element = {"fp16": 10, "bf16": 16}[precision]
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["": 24, "local": 1]>
        small ({name}[2, 8] x, {name}[2, 8] y, {name}[1, 1, 4, 8] past, int64[1] start)
          => ({name}[2, 8] linear, {name}[2, 8] product, {name}[2, 8] called, {name}[1, 1, 4, 8] present)
        <{name}[8, 8] weight, {name}[8] bias>
        {{
          bare = MatMul (x, weight)
          linear = Add (bare, bias)
          sum = Add (linear, y)
          product = Mul (sum, y)
          called = local.Halve (product)
          four = Constant <value_ints = [1, 1, 2, 8]> ()
          update = Reshape (sum, four)
          present = TensorScatter <axis = 2> (past, update, start)
        }}
        <domain: "local", opset_import: ["": 24]>
        Halve (a) => (b) {{
          wide = Cast <to = 1> (a)
          third = Constant <value_float = 0.3333333> ()
          scaled = Mul (wide, third)
          again = Mul (scaled, scaled)
          b = Cast <to = {element}> (again)
        }}
        """
    )
    del model.graph.initializer[:]
    random = torch.Generator().manual_seed(0)
    for tensor_name, shape in (("weight", (8, 8)), ("bias", (8,))):
        values = torch.randn(shape, generator=random).to(DTYPES[precision])
        model.graph.initializer.append(
            onnx.helper.make_tensor(tensor_name, element, shape, values.view(torch.uint8).numpy().tobytes(), raw=True)
        )
    return ir.from_proto(model)


def run(model: ir.Model, feeds: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    io = session.io_binding()
    for binder, tensors in ((io.bind_input, feeds), (io.bind_output, outputs)):
        for name, tensor in tensors.items():
            binder(name, "cpu", 0, ELEMENT[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    session.run_with_iobinding(io)


@needs_opset_24
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("rounded", [True, False])
def test_small_graph(precision: str, rounded: bool) -> None:
    dtype = DTYPES[precision]
    model = inline_and_type(small_graph(precision))
    weight, bias = (_values(model, name, dtype) for name in ("weight", "bias"))
    compute_in_float(model, HALF_TYPES[precision], rounded=rounded)
    random = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, 8, generator=random).to(dtype) for _ in range(2))
    past = torch.randn(1, 1, 4, 8, generator=random).to(dtype)
    start = torch.tensor([1])
    result = dtype if rounded else torch.float32
    out = {name: torch.empty(2, 8, dtype=result) for name in ("linear", "product", "called")}
    out["present"] = past.clone()
    feeds = {"x": x, "y": y, "past": out["present"], "start": start}
    run(model, feeds, out)

    def stored(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).float() if rounded else tensor

    linear = stored(x.float() @ weight.float() + bias.float())
    total = stored(linear + y.float())
    product = stored(total * y.float())
    called = stored((product * 0.3333333) ** 2)
    for name, expected in (("linear", linear), ("product", product), ("called", called)):
        assert torch.allclose(out[name].float(), expected, rtol=1e-6 if not rounded else 0, atol=1e-6), name
    cache = past.clone()
    cache[0, 0, 1:3] = total.to(dtype)
    assert torch.equal(out["present"], cache), "the cache is stored in the half type and nothing else in it changed"


def _values(model: ir.Model, name: str, dtype: torch.dtype) -> Tensor:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return torch.frombuffer(bytearray(tensor.tobytes()), dtype=dtype).reshape(tuple(tensor.shape.numpy()))


def test_promote_refuses_unknown_names_and_keeps_outputs() -> None:
    model = small_graph("fp16")
    promote(model, ["sum", "linear", "sum"])
    assert [o.name for o in model.graph.outputs] == ["linear", "product", "called", "present", "sum"]
    with pytest.raises(LogitLockError, match="no value 'nothing'"):
        promote(model, ["nothing"])


def engines(case: str, precision: str, folder: Path, *, plant: bool = False) -> tuple[TorchEngine, OnnxRuntimeEngine]:
    """torch in the half type and the emulating engine; `plant` makes layer 1's MLP overflow fp16."""
    config, tensors, variant = read_case(case)
    if plant:
        for name in tensors:
            if "layers.1.mlp.gate_proj" in name or "layers.1.mlp.up_proj" in name:
                tensors[name] = tensors[name] * 600
    source = refmodels.resolve(write_model(folder / "hf", config, tensors), variant=variant)
    export_model(source, precision=precision, output=folder / "bundle")  # type: ignore[arg-type]
    model = refmodels.load(source, dtype=DTYPES[precision])
    return TorchEngine(model), OnnxRuntimeEngine(folder / "bundle", emulate_rounding=True, threads=1)


def logits_of(engine: Any, steps: int = 4) -> Tensor:
    """Logits of a prompt and of some teacher-forced steps: [2, 12 + steps, vocab]."""
    ids = torch.randint(0, engine.spec.vocab_size, (2, 12 + steps), generator=torch.Generator().manual_seed(0))
    cache = engine.new_cache(batch=2, capacity=12 + steps)
    parts = [engine.prefill(ids[:, :12], cache)]
    parts += [engine.decode(ids[:, 12 + s], cache) for s in range(steps)]
    logits = torch.cat(parts, 1)
    assert logits.dtype == engine.dtype
    return logits.float()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("case", ["chatglm2", "baichuan2_13b", "qwen_ntk", "qwen2", "gpt2", "starcoder2_sliding"])
def test_emulation_is_within_two_ulp_of_torch(case: str, precision: str, tmp_path: Path) -> None:
    reference, engine = engines(case, precision, tmp_path)
    expected, got = logits_of(reference), logits_of(engine)
    ulp = ULP[precision] * 2.0 ** float(expected.abs().max().log2().floor())
    assert (got - expected).abs().max() <= 2 * ulp
    plain = OnnxRuntimeEngine(engine.bundle, threads=1)
    ids = torch.arange(12)[None]
    unrounded = plain.prefill(ids, plain.new_cache(batch=1, capacity=12))
    emulated = engine.prefill(ids, engine.new_cache(batch=1, capacity=12))
    assert unrounded.dtype == torch.float32 and not torch.equal(unrounded, emulated.float())


@pytest.mark.slow
def test_planted_overflow_is_reproduced(tmp_path: Path) -> None:
    reference, engine = engines("qwen2", "fp16", tmp_path, plant=True)
    expected, got = logits_of(reference, steps=0), logits_of(engine, steps=0)
    broken = ~expected.isfinite().all(-1)
    assert int(broken.sum()) > 0, "the planted weights overflow fp16"
    assert torch.equal(~got.isfinite().all(-1), broken)
    plain = OnnxRuntimeEngine(engine.bundle, threads=1)
    ids = torch.randint(0, engine.spec.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    assert plain.prefill(ids, plain.new_cache(batch=2, capacity=12)).isfinite().all(), "without emulation it is hidden"


@pytest.mark.slow
def test_the_arithmetic_is_said(tmp_path: Path) -> None:
    reference, engine = engines("qwen2_b1", "bf16", tmp_path)
    assert engine.arithmetic == "ONNX Runtime on the CPU, every node computed in float32 and rounded to bfloat16"
    assert "nothing between nodes is rounded" in OnnxRuntimeEngine(engine.bundle).arithmetic
    assert reference.arithmetic == "PyTorch in bfloat16, exact numerics"
    export_model(reference_source(tmp_path), precision="fp32", output=tmp_path / "fp32")
    single = OnnxRuntimeEngine(tmp_path / "fp32", emulate_rounding=True)
    assert single.arithmetic == "ONNX Runtime on the CPU in float32" and not single.emulate_rounding


def reference_source(folder: Path) -> refmodels.ModelSource:
    return refmodels.resolve(folder / "hf")
