"""Edits of a bundle's ONNX graph before ONNX Runtime loads it: load, inline, promote taps to outputs, cut at taps, and
insert or replace nodes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes

from refmodels.errors import LogitLockError
from trt_runtime.onnxruntime.errors import cannot_read, graph_errors, quiet


def load_graph(path: Path, *, files: Iterable[str]) -> ir.Model:
    """Read model.onnx; weights stay on disk.

    Raises:
        LogitLockError: it is no ONNX model, or its weights are in a file that is not one of `files`, the bundle's own.
    """
    with graph_errors(cannot_read(path)):
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
    """Make values of the graph outputs of it, after its own outputs.

    Raises:
        LogitLockError: the graph has no value of a given name.
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
    """Inline function bodies and infer the dtype of every value."""
    return infer_types(passes.InlinePass()(model).model)


def infer_types(model: ir.Model) -> ir.Model:
    """Infer dtype and shape of every value, in place.

    A graph that contradicts onnx's rules (onnxruntime-genai's do) keeps the types that its own file states.
    """
    with quiet():
        return passes.ShapeInferencePass()(model).model


def emit(
    op: str,
    inputs: Iterable[ir.Value | None],
    name: str,
    *,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
    domain: str = "",
    **attributes: int | list[int],
) -> ir.Value:
    """Put a node into a graph, before or after one of its nodes; the result has the node's name, and no type yet."""
    neighbour = before or after
    assert neighbour is not None and neighbour.graph is not None and None in (before, after)
    listed = [ir.AttrInt64s(k, v) if isinstance(v, list) else ir.AttrInt64(k, v) for k, v in attributes.items()]
    node = ir.Node(domain, op, list(inputs), listed, num_outputs=1, name=name)
    node.outputs[0].name = name
    if before is not None:
        neighbour.graph.insert_before(neighbour, node)
    else:
        neighbour.graph.insert_after(neighbour, node)
    return node.outputs[0]


def initializer(beside: ir.Node, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of that name in a node's graph, created from `tensor` if there is none yet."""
    assert beside.graph is not None
    known = beside.graph.initializers
    if name not in known:
        known[name] = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return known[name]


def replace(node: ir.Node, result: ir.Value) -> None:
    """Remove a node with one output; `result` takes its place and its name."""
    old = node.outputs[0]
    assert node.graph is not None
    result.shape, result.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    result.name = old.name
