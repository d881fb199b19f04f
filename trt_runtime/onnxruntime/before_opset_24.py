"""Running bundles on ONNX Runtime releases without opset 24 (the last one for Python 3.10 is 1.23).

The only op of a bundle that needs opset 24 is TensorScatter, the cache write.  ScatterElements says the same with
explicit indices, and is done in place as well when its input and output are bound to one buffer.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

_OPSET = 23
_IR_VERSION = 11


def has_tensor_scatter() -> bool:
    """Whether the ONNX Runtime that is installed can run the graph as it is."""
    return any(kernel.op_name == "TensorScatter" for kernel in ort_state.get_all_opkernel_def())


def without_tensor_scatter(model: ir.Model) -> ir.Model:
    """The graph in opset 23, functions inlined, cache writes by ScatterElements."""
    model = passes.InlinePass()(model).model
    graph = model.graph
    indices: ir.Value | None = None
    for node in list(graph):
        if node.op_type != "TensorScatter":
            continue
        past, update, lengths = node.inputs
        assert past is not None and update is not None and lengths is not None
        if indices is None:
            # Every layer writes the same shape to the same slots, so one tensor of indices serves all.
            indices = _indices(graph, node, update, lengths)
        output = node.outputs[0]
        write = ir.Node("", "ScatterElements", [past, indices, update], [ir.AttrInt64("axis", 2)], num_outputs=1)
        write.name = node.name
        result = write.outputs[0]
        result.name, result.shape, result.type = output.name, output.shape, output.type
        graph.insert_before(node, write)
        ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    model.opset_imports[""] = _OPSET
    model.ir_version = _IR_VERSION
    return model


def _indices(graph: ir.Graph, before: ir.Node, update: ir.Value, lengths: ir.Value) -> ir.Value:
    """lengths[b] + s for every element of an update [B, kv_heads, S, head_dim]; int64, the shape of the update."""
    number = 0

    def emit(op: str, inputs: list[ir.Value], *attributes: ir.Attr) -> ir.Value:
        nonlocal number
        node = ir.Node("", op, inputs, attributes, num_outputs=1, name=f"cache_slots.{number}")
        node.outputs[0].name = f"cache_slots.{number}"
        number += 1
        graph.insert_before(before, node)
        return node.outputs[0]

    def constant(value: int | list[int]) -> ir.Value:
        attribute = ir.AttrInt64("value_int", value) if isinstance(value, int) else ir.AttrInt64s("value_ints", value)
        return emit("Constant", [], attribute)

    shape = emit("Shape", [update])
    tokens = emit("Gather", [shape, constant(2)], ir.AttrInt64("axis", 0))
    steps = emit("Range", [constant(0), tokens, constant(1)])
    column = emit("Unsqueeze", [lengths, constant([1])])
    slots = emit("Unsqueeze", [emit("Add", [column, steps]), constant([1, 3])])
    return emit("Expand", [slots, shape])
