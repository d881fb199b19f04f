"""Plant a fault in an exported bundle: in its graph and weights, not in our code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trt_runtime.bundle import Bundle, read_bundle

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


def initializer(model: onnx.ModelProto, name: str, array: np.ndarray) -> str:
    """A Constant node: shape inference cannot read small numbers from external data."""
    constant = helper.make_node("Constant", [], [name], name=name, value=numpy_helper.from_array(array))
    model.graph.node.insert(0, constant)
    return name


def replace_input(model: onnx.ModelProto, user: str, old: str, new: str) -> None:
    inputs = node(model, user).input
    assert old in inputs, f"{user} does not read {old}"
    inputs[:] = [new if name == old else name for name in inputs]


def insert_before(model: onnx.ModelProto, user: str, *nodes: onnx.NodeProto) -> None:
    at = next(i for i, n in enumerate(model.graph.node) if n.name == user)
    for new in reversed(nodes):
        new.name = new.output[0]
        model.graph.node.insert(at, new)


def on_input(user: str, value: str, *nodes: Callable[[str], onnx.NodeProto]) -> Fault:
    """Put nodes between `value` and `user`."""

    def fault(model: onnx.ModelProto) -> None:
        made, name = [], value
        for make in nodes:
            made.append(make(name))
            name = made[-1].output[0]
        insert_before(model, user, *made)
        replace_input(model, user, value, name)

    return fault


def identity(name: str, keep: int = 0) -> Fault:
    """The node passes one of its inputs on."""

    def fault(model: onnx.ModelProto) -> None:
        n = node(model, name)
        n.op_type = "Identity"
        n.input[:] = [n.input[keep]]
        del n.attribute[:]

    return fault


def constant(name: str, change: Callable[[float], float]) -> Fault:
    def fault(model: onnx.ModelProto) -> None:
        value = node(model, name).attribute[0]
        if value.type == onnx.AttributeProto.FLOAT:
            value.f = change(value.f)
        else:
            value.i = int(change(value.i))

    return fault


def both(*faults: Fault) -> Fault:
    def fault(model: onnx.ModelProto) -> None:
        for each in faults:
            each(model)

    return fault


class Patch:
    """New nodes at one place of a graph: `patch("Mul", x, 0.5)` adds a node there and returns its result's name.

    Numbers and arrays become Constants, float32 or int64.
    """

    def __init__(self, model: onnx.ModelProto, at: int) -> None:
        self.model, self.at = model, at

    def __call__(self, op: str, *inputs: str | float | np.ndarray, name: str | None = None, **attributes: Any) -> str:
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        return self._add(helper.make_node(op, names, [name or self._fresh()], **attributes))

    def constant(self, value: float | np.ndarray) -> str:
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32)
        made = helper.make_node("Constant", [], [self._fresh()], value=numpy_helper.from_array(array))
        return self._add(made)

    def _fresh(self) -> str:
        return f"fault{len(self.model.graph.node)}"

    def _add(self, made: onnx.NodeProto) -> str:
        made.name = made.output[0]
        self.model.graph.node.insert(self.at, made)
        self.at += 1
        return made.output[0]


Rework = Callable[[Patch, str], str]
"""Adds nodes that read one value, and returns the name of their result."""


def place(model: onnx.ModelProto, value: str) -> int:
    """Index of the node that makes a value."""
    return next(i for i, n in enumerate(model.graph.node) if value in n.output)


def working_type(model: onnx.ModelProto) -> int:
    """ONNX's number of the dtype of weights and taps."""
    return int(next(i.data_type for i in model.graph.initializer if i.name == "embed.weight"))


def rework(value: str, change: Rework, *, wide: bool = False) -> Fault:
    """Replace a value by one computed from it in float32, for all its readers; `wide`: it is float32 in any model."""

    def fault(model: onnx.ModelProto) -> None:
        at = place(model, value)
        maker = model.graph.node[at]
        right = f"{value}.right{len(model.graph.node)}"
        maker.output[:] = [right if name == value else name for name in maker.output]
        maker.name = right if maker.name == value else maker.name
        patch = Patch(model, at + 1)
        if wide:
            patch("Identity", change(patch, right), name=value)
        else:
            patch("Cast", change(patch, patch("Cast", right, to=onnx.TensorProto.FLOAT)), name=value,
                  to=working_type(model))  # fmt: skip

    return fault


def reroute(user: str, value: str, change: Rework, *, wide: bool = False) -> Fault:
    """As `rework`, for one reader."""

    def fault(model: onnx.ModelProto) -> None:
        patch = Patch(model, next(i for i, n in enumerate(model.graph.node) if n.name == user))
        if wide:
            other = change(patch, value)
        else:
            changed = change(patch, patch("Cast", value, to=onnx.TensorProto.FLOAT))
            other = patch("Cast", changed, to=working_type(model))
        replace_input(model, user, value, other)

    return fault


def edit_factor(product: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """Change the weight [in, out] that one MatMul reads, and leave it to its other readers as it is (a tied head)."""

    def fault(model: onnx.ModelProto) -> None:
        named = [n for n in model.graph.node if n.name in (f"{product}.product", product) and n.op_type == "MatMul"]
        weight = weight_of(model, named[0].input[1])
        other = f"{product}.weight.fault{len(model.graph.node)}"
        stored = np.ascontiguousarray(change(weight.astype(np.float64))).astype(weight.dtype)
        model.graph.initializer.append(numpy_helper.from_array(stored, other))
        named[0].input[1] = other

    return fault


def weight_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    """A weight by its name, or the transposed embedding of a tied head."""
    by_name = {i.name: i for i in model.graph.initializer}
    if name in by_name:
        return numpy_helper.to_array(by_name[name])
    transposed = node(model, name)
    assert transposed.op_type == "Transpose", name
    return numpy_helper.to_array(by_name[transposed.input[0]]).T


class LoadedBundle:
    """A bundle in memory, of which mutants are made without hashing files: only model.onnx is written."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = read_bundle(bundle)
        self.model = onnx.load(bundle / "model.onnx")

    def mutant(self, fault: Fault, target: Path) -> Bundle:
        """A bundle in `target` with the fault in its graph; its bundle.json stays with the original."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        fault(model)
        target.mkdir(parents=True, exist_ok=True)
        (target / "model.onnx").write_bytes(model.SerializeToString())
        return dataclasses.replace(self.bundle, directory=target)
