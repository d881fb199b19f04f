"""Plant a fault in an exported bundle: in its graph and weights, not in our code."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

Fault = Callable[[onnx.ModelProto], None]


def mutated(bundle: Path, target: Path, fault: Fault) -> Path:
    """A copy of the bundle with the fault in it and a manifest that fits."""
    shutil.copytree(bundle, target)
    model = onnx.load(target / "model.onnx")
    fault(model)
    (target / "model.onnx.data").unlink()
    onnx.save(model, target / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    manifest = json.loads((target / "bundle.json").read_text())
    for name in manifest["files"]:
        content = (target / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (target / "bundle.json").write_text(json.dumps(manifest))
    return target


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(a for a in node.attribute if a.name == name)


def edit(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """Change a weight or table."""

    def fault(model: onnx.ModelProto) -> None:
        initializer = next(i for i in model.graph.initializer if i.name == name)
        stored = numpy_helper.to_array(initializer)
        changed = np.ascontiguousarray(change(stored.astype(np.float64))).astype(stored.dtype)
        initializer.CopyFrom(numpy_helper.from_array(changed, name))

    return fault


def epsilon(tap: str, value: float) -> Fault:
    def fault(model: onnx.ModelProto) -> None:
        attribute(node(model, tap), "epsilon").f = value

    return fault


def attention_scale(path: str, factor: float) -> Fault:
    def fault(model: onnx.ModelProto) -> None:
        attribute(node(model, path), "scale").f *= factor

    return fault


def attention_window(path: str, more: int) -> Fault:
    def fault(model: onnx.ModelProto) -> None:
        attribute(node(model, path), "window").i += more

    return fault


def no_residual(tap: str) -> Fault:
    def fault(model: onnx.ModelProto) -> None:
        add = node(model, tap)
        add.op_type = "Identity"
        del add.input[0]

    return fault


def swapped(first: str, second: str) -> Fault:
    def fault(model: onnx.ModelProto) -> None:
        by_name = {i.name: i for i in model.graph.initializer}
        by_name[first].name, by_name[second].name = second, first

    return fault


def padding_visible(model: onnx.ModelProto) -> None:
    cast = next(n for n in model.graph.node if n.op_type == "Cast" and "attention_mask" in n.input)
    cast.op_type = "Equal"
    cast.input.append("attention_mask")
    del cast.attribute[:]


def positions_off_by_one(model: onnx.ModelProto) -> None:
    for n in model.graph.node:
        n.input[:] = ["shifted_positions" if name == "position_ids" else name for name in n.input]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["one_position"], value_int=1, name="one_position"))
    shift = helper.make_node("Add", ["position_ids", "one_position"], ["shifted_positions"], name="shifted_positions")
    model.graph.node.insert(1, shift)
