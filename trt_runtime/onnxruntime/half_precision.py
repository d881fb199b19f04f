"""Emulation of half precision on a CPU: a rewrite of a bundle's graph that leaves its weights where they are.

ONNX Runtime has no bf16 arithmetic on the CPU and computes fp16 graphs in fp32, which hides overflow and rounding of
the real engine.  `compute_in_float` rewrites the graph so that every node computes in fp32 and, if asked, rounds
each result to the half type by an explicit Cast; ONNX Runtime never removes such a pair of casts.
"""

from __future__ import annotations

import functools

import onnx_ir as ir
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from refmodels.dtypes import BY_ONNX, DTYPE_TABLE
from trt_runtime.onnxruntime.graph_edits import emit

HALF_TYPES = {name: ir.DataType(DTYPE_TABLE[name].onnx) for name in ("fp16", "bf16")}
_FLOAT = ir.DataType.FLOAT
_MOVES = frozenset((
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape",
    "ScatterElements", "ScatterND", "Shape", "Size", "Slice", "Split", "Squeeze", "TensorScatter", "Tile", "Transpose",
    "Unsqueeze",
))  # fmt: skip
"""Ops that only copy elements: they round nothing, so they may stay in the half type."""


def compute_in_float(model: ir.Model, half: ir.DataType, *, rounded: bool) -> None:
    """Make every node that computes with `half` compute in fp32; inputs, weights and caches keep their dtype.

    Args:
        model: without functions, with dtypes (`inline_and_type`); changed in place.
        half: FLOAT16 or BFLOAT16.
        rounded: round every result to `half`, as an engine does that stores each tensor in `half`; values then keep
            their name and dtype.  Otherwise results stay fp32 under their names, and only the values written to the
            caches are rounded.
    """
    _Widening(model.graph, half, rounded=rounded).run()


class _Widening:
    """Makes nodes that compute in half precision compute in fp32, one after the other."""

    def __init__(self, graph: ir.Graph, half: ir.DataType, *, rounded: bool) -> None:
        self.graph, self.half, self.rounded = graph, half, rounded
        self.movable = (_MOVES & _ops_with_kernel(half)) | {"Constant", "ConstantOfShape"}
        self.first = graph[0]
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for node in list(self.graph):
            if node.op_type == "Cast":
                self._cast_node(node)
            elif node.op_type == "TensorScatter":
                self._write_cache(node)
            elif self._computes(node):
                self._widen(node)

    def _computes(self, node: ir.Node) -> bool:
        if not any(v is not None and v.dtype == self.half for v in (*node.inputs, *node.outputs)):
            return False
        return node.op_type not in self.movable or any(v is not None and v.dtype == _FLOAT for v in node.inputs)

    def _write_cache(self, node: ir.Node) -> None:
        update = node.inputs[1]
        if update is not None and update.dtype == _FLOAT and node.outputs[0].dtype == self.half:
            node.replace_input_with(1, self._cast(update, self.half))

    def _cast_node(self, node: ir.Node) -> None:
        if not self.rounded and node.attributes["to"].as_int() == self.half:
            node.attributes["to"] = ir.AttrInt64("to", int(_FLOAT))
            node.outputs[0].dtype = _FLOAT

    def _widen(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == self.half:
                node.replace_input_with(index, self._cast(value, _FLOAT))
        for output in node.outputs:
            if output.dtype != self.half or not output.name:
                continue
            output.dtype = _FLOAT
            if self.rounded and not _is_bare_product(node):
                self._round(node, output)

    def _round(self, node: ir.Node, output: ir.Value) -> None:
        name = output.name
        uses = list(output.uses())
        result = emit("Cast", [output], f"{name}.round", after=node, to=int(self.half))
        result.dtype, result.shape = self.half, output.shape
        output.name, result.name = f"{name}.unrounded", name
        for user, index in uses:
            user.replace_input_with(index, result)
        for index, value in enumerate(self.graph.outputs):
            if value is output:
                self.graph.outputs[index] = result

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        if (value, to) not in self.casts:
            name = f"{value.name}.{'float' if to == _FLOAT else 'half'}"
            producer = value.producer()
            first = self.first if producer is None else None
            result = emit("Cast", [value], name, before=first, after=producer, to=int(to))
            result.dtype, result.shape = to, value.shape
            self.casts[value, to] = result
        return self.casts[value, to]


def _is_bare_product(node: ir.Node) -> bool:
    """Whether a bias is added next: a linear layer rounds once, after its bias, in torch and on GPUs."""
    output = node.outputs[0]
    users = list(output.consumers())
    return (
        node.op_type == "MatMul"
        and not output.is_graph_output()
        and len(users) == 1
        and users[0].op_type == "Add"
        and any(v is not None and v.is_initializer() for v in users[0].inputs)
    )


@functools.cache
def _ops_with_kernel(dtype: ir.DataType) -> frozenset[str]:
    """Standard ops that ONNX Runtime's CPU provider runs on this dtype."""
    name = BY_ONNX[dtype].onnxruntime
    return frozenset(
        kernel.op_name
        for kernel in ort_state.get_all_opkernel_def()
        if kernel.provider == "CPUExecutionProvider"
        and kernel.domain == ""
        and any(name in types for types in kernel.type_constraints.values())
    )
