"""Imitating half precision on a CPU, and other rewrites of a bundle's graph that leave its weights where they are.

ONNX Runtime has no bf16 arithmetic on the CPU and computes fp16 graphs in fp32, so overflow and rounding of the real
engine would not show.  `compute_in_float` rewrites the graph so that every node computes in fp32 and, if asked, rounds
each result to the half type by an explicit Cast; ONNX Runtime never removes such a pair of casts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from refmodels.errors import LogitLockError

HALF_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FLOAT = ir.DataType.FLOAT
_MOVES = frozenset((
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape",
    "ScatterElements", "ScatterND", "Shape", "Size", "Slice", "Split", "Squeeze", "TensorScatter", "Tile", "Transpose",
    "Unsqueeze",
))  # fmt: skip
"""Ops that copy elements and never compute with them: they round nothing, so they may stay in the half type."""


def load_graph(path: Path, *, files: Iterable[str]) -> ir.Model:
    """Read model.onnx; weights stay on disk.

    Raises:
        LogitLockError: weights in a file that is not one of `files`, the bundle's own.
    """
    model = ir.load(path)
    allowed = set(files)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) not in allowed:
            raise LogitLockError(
                f"{path}: the weight {name} lies in {str(tensor.location)!r}, which is not a file of this bundle"
            )
    return model


def promote(model: ir.Model, names: Iterable[str]) -> None:
    """Make values of the graph outputs of it, after the ones that there are.

    Raises:
        LogitLockError: a name that is no value of the graph.
    """
    graph = model.graph
    wanted = dict.fromkeys(names)
    for output in graph.outputs:
        wanted.pop(output.name or "", None)
    values = {v.name: v for node in graph for v in node.outputs if v.name in wanted}
    for name in wanted:
        if name not in values:
            raise LogitLockError(f"the graph has no value {name!r}, which the bundle's table of taps names")
        graph.outputs.append(values[name])


def cut_at(model: ir.Model, names: Iterable[str], *, prefix: str) -> None:
    """Make the readers of some values read new graph inputs instead, named `prefix` + the value; changed in place."""
    graph = model.graph
    values = {v.name: v for node in graph for v in node.outputs}
    for name in names:
        value = values[name]
        assert value.dtype is not None, f"{name} has no dtype"
        # A type of its own: that of the value changes when its node is made to compute in fp32.
        fed = ir.Value(name=f"{prefix}{name}", shape=value.shape, type=ir.TensorType(value.dtype))
        for user, index in list(value.uses()):
            user.replace_input_with(index, fed)
        graph.inputs.append(fed)


def inline_and_type(model: ir.Model) -> ir.Model:
    """Put function bodies in place of their calls and infer the dtype of every value."""
    model = passes.InlinePass()(model).model
    return passes.ShapeInferencePass()(model).model


def compute_in_float(model: ir.Model, half: ir.DataType, *, rounded: bool) -> None:
    """Make every node that computes with `half` compute in fp32; inputs, weights and caches keep their dtype.

    Args:
        model: without functions, with dtypes (`inline_and_type`); changed in place.
        half: FLOAT16 or BFLOAT16.
        rounded: round every result to `half`, as an engine does that stores each tensor in `half`; values then keep
            their name and dtype.  Otherwise results stay fp32, also under their names, and only what is written to the
            caches is rounded.
    """
    _Rewrite(model.graph, half, rounded=rounded).run()


class _Rewrite:
    def __init__(self, graph: ir.Graph, half: ir.DataType, *, rounded: bool) -> None:
        self.graph, self.half, self.rounded = graph, half, rounded
        self.movable = (_MOVES & _ops_with_kernel(half)) | {"Constant"}
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
        cast = ir.Node("", "Cast", [output], [ir.AttrInt64("to", int(self.half))], num_outputs=1, name=f"{name}.round")
        result = cast.outputs[0]
        result.dtype, result.shape = self.half, output.shape
        output.name, result.name = f"{name}.unrounded", name
        self.graph.insert_after(node, cast)
        for user, index in uses:
            user.replace_input_with(index, result)
        for index, value in enumerate(self.graph.outputs):
            if value is output:
                self.graph.outputs[index] = result

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        if (value, to) not in self.casts:
            name = f"{value.name}.{'float' if to == _FLOAT else 'half'}"
            cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))], num_outputs=1, name=name)
            result = cast.outputs[0]
            result.dtype, result.shape, result.name = to, value.shape, name
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.first, cast)
            else:
                self.graph.insert_after(producer, cast)
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


def _ops_with_kernel(dtype: ir.DataType) -> frozenset[str]:
    """Standard ops that ONNX Runtime's CPU provider runs on this dtype."""
    name = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}[dtype]
    return frozenset(
        kernel.op_name
        for kernel in ort_state.get_all_opkernel_def()
        if kernel.provider == "CPUExecutionProvider"
        and kernel.domain == ""
        and any(name in types for types in kernel.type_constraints.values())
    )
