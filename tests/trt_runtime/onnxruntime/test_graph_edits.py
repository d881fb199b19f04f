"""Inserting nodes into a graph, and replacing others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from trt_runtime.onnxruntime.graph_edits import emit, initializer, replace


@pytest.fixture
def graph() -> ir.Graph:
    """y = Relu(Neg(x))."""
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    negative = ir.Node("", "Neg", [x], num_outputs=1, name="negative")
    positive = ir.Node("", "Relu", negative.outputs, num_outputs=1, name="positive")
    for node, name in ((negative, "n"), (positive, "y")):
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, x.shape, x.type
    return ir.Graph([x], positive.outputs, nodes=[negative, positive], name="graph")


def test_a_node_stands_where_it_is_put(graph: ir.Graph) -> None:
    negative, positive = graph
    emit("Abs", [graph.inputs[0]], "first", before=negative)
    emit("Exp", negative.outputs, "second", after=negative)
    emit("Log", negative.outputs, "third", before=positive)
    assert [node.name for node in graph] == ["first", "negative", "second", "third", "positive"]
    for beside in ({}, {"before": negative, "after": negative}):
        with pytest.raises(AssertionError):
            emit("Abs", [graph.inputs[0]], "nowhere", **beside)


def test_what_a_node_is_made_of(graph: ir.Graph) -> None:
    x, first = graph.inputs[0], graph[0]
    result = emit("Op", [x, None], "made", before=first, domain="ours", axis=1, perm=[1, 0])
    node = result.producer()
    assert node is not None and result.name == node.name == "made" and result.type is None
    assert (node.domain, node.op_type, list(node.inputs)) == ("ours", "Op", [x, None])
    assert node.attributes["axis"].as_int() == 1 and list(node.attributes["perm"].as_ints()) == [1, 0]


def test_one_initializer_of_a_name(graph: ir.Graph) -> None:
    first = initializer(graph[0], "c", ir.Tensor(np.zeros((2, 3), np.int8), name="c"))
    assert initializer(graph[1], "c", ir.Tensor(np.ones(1, np.float32), name="c")) is first
    assert graph.initializers["c"] is first and first.dtype == ir.DataType.INT8
    assert first.shape is not None and list(first.shape) == [2, 3]


def test_a_result_takes_the_place_and_the_name(graph: ir.Graph) -> None:
    negative, positive = graph
    x = graph.inputs[0]
    replace(negative, emit("Abs", [x], "other", before=negative))
    replace(positive, emit("Exp", [graph[0].outputs[0]], "last", before=positive))
    assert [(node.op_type, node.outputs[0].name) for node in graph] == [("Abs", "n"), ("Exp", "y")]
    assert graph.outputs[0] is graph[1].outputs[0] and graph[1].inputs[0] is graph[0].outputs[0]
    assert graph.outputs[0].type == x.type and graph.outputs[0].shape == x.shape
