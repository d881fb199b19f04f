"""The lower bounds of the noise floor hold for correct engines that sum or round in other places than PyTorch."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from debug.comparison.bounds import lower_bound, sigmoid_bound
from debug.comparison.compare import MULTIPLE
from tests.support.goldens import case_source


def test_lower_bound() -> None:
    spec = case_source("qwen").spec
    assert lower_bound(spec, "blocks.0.resid_mid", torch.float32, slots=20) == 2**-24
    assert lower_bound(spec, "blocks.1.mlp.out", torch.float32, slots=20) == 2**-24 * (96 / 6) ** 0.5
    assert lower_bound(spec, "logits", torch.float16, slots=20) == 2**-11
    assert lower_bound(spec, "embed", torch.float64, slots=20) == 2**-53
    assert lower_bound(spec, "final_norm", torch.float16, slots=20) == 2**-11


@pytest.mark.parametrize("outlier", [0, 1])
def test_lower_bound_of_a_norm_holds_for_any_order_of_its_sum(outlier: int) -> None:
    """A large model's norm, whose squares are added one after the other in fp32, as ONNX Runtime may do it."""
    source = case_source("qwen")
    width, tokens = 4096, 500
    spec = dataclasses.replace(source.spec, hidden_size=width)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    if outlier:
        # Up to a hundred times the others, as measured (docs/numerics.md).
        x[:, 3] = 50 + torch.arange(tokens) / 10
    squares = x.numpy() ** 2
    off = abs(squares.cumsum(1)[:, -1] / squares.astype("float64").sum(1) - 1) / 2
    bound = lower_bound(spec, "final_norm", torch.float32, slots=20)
    # Several units are no fault, and the bound is the standard deviation of the worst case.
    assert off.max() > (MULTIPLE if outlier else 2) * 2**-24
    assert off.max() < MULTIPLE / 2 * bound
    assert (off**2).mean() ** 0.5 < bound


def test_bound_of_a_sigmoid_holds_for_onnxruntime() -> None:
    """Gates and values as in block 22 of a published model: the products are small where the gate is negative."""
    spec = case_source("qwen").spec
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(200, 512, generator=generator) - 8
    up = torch.randn(200, 512, generator=generator) * 5
    result = torch.from_numpy(_onnxruntime_silu(gate.numpy())) * up
    right = torch.nn.functional.silu(gate.double()) * up.double()
    off = (result - right).norm(dim=-1) / right.norm(dim=-1)
    reads = spec.taps["blocks.0.mlp.act"].reads
    tensors = {"blocks.0.mlp.act": result, **dict(zip(reads, (gate, up), strict=True))}
    bound = sigmoid_bound(spec, "blocks.0.mlp.act", tensors, torch.float32)
    assert bound is not None and off.max() > MULTIPLE * 2**-24
    assert float((off / bound).max()) < MULTIPLE / 2
    # A sigmoid in half precision is not excused by it.
    coarse = torch.sigmoid(gate).half().float() * gate * up
    assert float(((coarse - right).norm(dim=-1) / right.norm(dim=-1) / bound).max()) > MULTIPLE
    assert sigmoid_bound(spec, "blocks.0.mlp.up", tensors, torch.float32) is None
    assert sigmoid_bound(spec, "blocks.0.mlp.act", {"blocks.0.mlp.act": result}, torch.float32) is None
    gelu = dataclasses.replace(spec, mlp=dataclasses.replace(spec.mlp, activation="gelu"))
    assert sigmoid_bound(gelu, "blocks.0.mlp.act", tensors, torch.float32) is None


def _onnxruntime_silu(x: np.ndarray) -> np.ndarray:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ("x", "y")]
    nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    graph = helper.make_graph(nodes, "silu", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found
