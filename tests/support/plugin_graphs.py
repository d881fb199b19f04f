"""Graphs with plugin nodes: whole models of golden cases with random weights."""

from __future__ import annotations

import onnx
import torch
from onnx import TensorProto

from export.graph.trace import build_graph
from refmodels.checkpoints.load import empty_decoder
from refmodels.dtypes import BY_TORCH, DTYPES
from tests.support.goldens import case_source
from trt_runtime.bundle import Precision

CAPACITY = 32
BATCH, TOKENS = 4, 8
# NTK and logn; ALiBi; interleaved partial rope and grouped heads; sliding window; learned positions and one kv head;
# norms of heads.
CASES: tuple[tuple[str, Precision], ...] = (
    ("qwen_ntk", "fp16"),
    ("baichuan_13b", "fp32"),
    ("chatglm2", "bf16"),
    ("starcoder2_sliding", "fp16"),
    ("gpt_bigcode", "fp32"),
    ("qwen3_yarn_b1", "bf16"),
)


def graph_of(case: str, precision: Precision) -> onnx.ModelProto:
    """The whole model of a golden case with random weights and a fixed cache capacity."""
    spec = case_source(case).spec
    graph = build_graph(spec, precision=precision, max_positions=CAPACITY)
    shapes = {name: p.shape for name, p in empty_decoder(spec).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = dict(graph.tables)
    for name, layout in graph.parameters.items():
        weight = 0.02 * torch.randn(tuple(shapes[name]), generator=generator)
        tensors[name] = (weight.T if layout == "transposed" else weight).to(DTYPES[precision])
    for name, tensor in tensors.items():
        kind = BY_TORCH[tensor.dtype].onnx
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        initializer = TensorProto(name=name, data_type=kind, dims=tensor.shape, raw_data=raw)
        graph.model.graph.initializer.append(initializer)
    values = graph.model.graph
    for value in (*values.input, *values.output, *values.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == "capacity":
                axis.dim_value = CAPACITY
    return graph.model


def nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]
