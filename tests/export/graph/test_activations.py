"""Activations that upstream writes out are rounded in the graph where torch rounds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

import refmodels
from export.bundle import export_model
from export.graph.functions import make_functions
from refmodels.dtypes import DTYPE_TABLE, DTYPES
from refmodels.model import activate
from tests.support.checkpoints import read_case, write_model
from tests.support.goldens import source_of
from tests.support.graph_runs import to_numpy, to_torch
from tests.support.marks import quick_first
from trt_runtime.open import open_engine


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("activation", "op_type"), [("gelu_new", "GeluNew"), ("gelu_fast", "GeluFast"), ("quick_gelu", "QuickGelu")]
)
def test_the_body_is_the_activation(activation: Any, op_type: str, precision: Any) -> None:
    spec = source_of("gpt2_b1").spec
    spec = replace(spec, mlp=replace(spec.mlp, activation=activation))
    function = make_functions(spec, precision=precision, numerics="upstream")[op_type]
    x = torch.linspace(-6, 6, 2001).to(DTYPES[precision])
    kind = DTYPE_TABLE[precision].onnx
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x"], ["y"], domain=function.domain)],
        "g",
        [helper.make_tensor_value_info("x", kind, [None])],
        [helper.make_tensor_value_info("y", kind, [None])],
    )
    opsets = [*function.opset_import, helper.make_opsetid(function.domain, 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets)
    got = to_torch(ReferenceEvaluator(model).run(None, {"x": to_numpy(x)})[0])
    expected = activate(x, activation, stepwise=True)
    # tanh and the exponential of two libraries differ by a unit in the last place, in few places.
    different = got != expected
    assert float((got - expected).abs().max()) <= torch.finfo(x.dtype).eps * 8
    assert precision == "fp32" or float(different.double().mean()) <= 0.01


@pytest.mark.parametrize("numerics", quick_first(["exact", "upstream"]))
@pytest.mark.parametrize("activation", quick_first(["gelu_fast", "quick_gelu"]))
def test_an_exported_model_computes_it(activation: str, numerics: Any, tmp_path: Path) -> None:
    config, tensors, _ = read_case("gpt2_b1")
    folder = write_model(tmp_path / "m", config | {"activation_function": activation}, tensors)
    engine = open_engine(export_model(str(folder), precision="fp32", numerics=numerics, output=tmp_path / "b"))
    decoder = refmodels.load(folder, numerics=numerics)
    ids = torch.arange(12)[None]
    expected = decoder.step(ids, decoder.new_cache(batch=1, capacity=12))
    got = engine.prefill(ids, engine.new_cache(batch=1, capacity=12), torch.ones_like(ids))
    assert (got - expected).abs().max() <= 1e-5
