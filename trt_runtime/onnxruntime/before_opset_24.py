"""Running bundles on ONNX Runtime releases without opset 24 (the last one for Python 3.10 is 1.23).

The only op of a bundle that needs opset 24 is TensorScatter, the cache write.  ScatterElements does the same with
explicit indices, also in place when its input and output are bound to one buffer.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from trt_runtime.onnxruntime.graph_edits import emit, replace

_OPSET = 23
_IR_VERSION = 11


def has_tensor_scatter() -> bool:
    """Whether the installed ONNX Runtime can run the graph as it is."""
    return any(kernel.op_name == "TensorScatter" for kernel in ort_state.get_all_opkernel_def())


def without_tensor_scatter(model: ir.Model) -> ir.Model:
    """The graph in opset 23, functions inlined, cache writes by ScatterElements."""
    model = passes.InlinePass()(model).model
    indices: ir.Value | None = None
    for node in list(model.graph):
        if node.op_type != "TensorScatter":
            continue
        past, update, lengths = node.inputs
        assert past is not None and update is not None and lengths is not None
        if indices is None:
            # Every layer writes the same shape to the same slots, so one tensor of indices serves all.
            indices = _indices(node, update, lengths)
        replace(node, emit("ScatterElements", [past, indices, update], f"{node.name}", before=node, axis=2))
    model.opset_imports[""] = _OPSET
    model.ir_version = _IR_VERSION
    return model


def _indices(before: ir.Node, update: ir.Value, lengths: ir.Value) -> ir.Value:
    """lengths[b] + s for every element of an update [B, kv_heads, S, head_dim]; int64, the shape of the update."""
    put = partial(emit, before=before)

    def constant(name: str, value: int | list[int]) -> ir.Value:
        if isinstance(value, int):
            return put("Constant", [], f"cache_slots.{name}", value_int=value)
        return put("Constant", [], f"cache_slots.{name}", value_ints=value)

    shape = put("Shape", [update], "cache_slots.shape")
    tokens = put("Gather", [shape, constant("token_axis", 2)], "cache_slots.tokens", axis=0)
    steps = put("Range", [constant("first", 0), tokens, constant("step", 1)], "cache_slots.steps")
    column = put("Unsqueeze", [lengths, constant("column_axis", [1])], "cache_slots.column")
    slots = put("Add", [column, steps], "cache_slots.of_rows")
    slots = put("Unsqueeze", [slots, constant("outer_axes", [1, 3])], "cache_slots.one_head")
    return put("Expand", [slots, shape], "cache_slots")
