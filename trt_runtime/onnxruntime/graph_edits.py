"""Edits of a bundle's ONNX graph before ONNX Runtime gets it: load, inline, promote taps to outputs, cut at taps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes

from refmodels.errors import LogitLockError


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
