"""The contents of a bundle as plain data, for `logitlock inspect`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir

from refmodels.taps import split_name
from trt_runtime.bundle import LAYERS_NAME, Bundle
from trt_runtime.onnxruntime.graph_edits import load_graph
from trt_runtime.plan_layers import PlanLayers, read_layers


def describe(bundle: Bundle) -> dict[str, Any]:
    """The contents of bundle.json and of the graph, as JSON values.

    `nodes` counts the graph's own nodes by operator, `functions` gives the number of nodes in each function body,
    `weights` has one entry per weight, the largest first, `spec` the architecture, `quantization` a phrase on it (None:
    not quantized), `engine` the entry of bundle.json on the TensorRT engine (None: there is none) and `plans` the
    builder's summary of each plan.
    """
    info = bundle.info
    model = load_graph(bundle.model_path, files=info.files)
    return {
        "bundle": str(bundle.directory),
        "schema": info.schema,
        "model": info.model,
        "precision": info.precision,
        "numerics": info.numerics,
        "attention": info.attention,
        "max_positions": info.max_positions,
        "checkpoint_hash": info.checkpoint_hash,
        "opset": model.opset_imports.get(""),
        "tools": info.tools,
        "spec": info.spec,
        "quantization": None if bundle.spec.quantization is None else bundle.spec.quantization.describe(),
        "nodes": dict(Counter(_operator(node) for node in model.graph).most_common()),
        "functions": {f"{f.domain}::{f.name}": len(list(f)) for f in model.functions.values()},
        "weights": sorted(
            (_weight(name, value) for name, value in model.graph.initializers.items()),
            key=lambda weight: (-weight["bytes"], weight["name"]),
        ),
        "inputs": [vars(tensor) for tensor in info.inputs],
        "outputs": [vars(tensor) for tensor in info.outputs],
        "taps": info.taps,
        "engine": None if info.engine is None else vars(info.engine),
        "plans": [plan.summary() for plan in _plans(bundle)],
        "profiles": [vars(profile) for profile in info.profiles],
        "files": {name: vars(file) for name, file in info.files.items()},
    }


def weight_groups(weights: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same weight of all blocks together: name with * for the block, count, shape, dtype, bytes; largest first."""
    groups: dict[str, dict[str, Any]] = {}
    for weight in weights:
        layer, part = split_name(weight["name"])
        name = part if layer is None else f"blocks.*.{part}"
        group = groups.setdefault(name, {**weight, "name": name, "count": 0, "bytes": 0})
        group["count"] += 1
        group["bytes"] += weight["bytes"]
    return sorted(groups.values(), key=lambda group: -group["bytes"])


def _plans(bundle: Bundle) -> list[PlanLayers]:
    return read_layers(bundle.directory / LAYERS_NAME) if LAYERS_NAME in bundle.info.files else []


def _operator(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _weight(name: str, value: ir.Value) -> dict[str, Any]:
    tensor = value.const_value
    assert tensor is not None
    return {
        "name": name,
        "dtype": "float32" if tensor.dtype == ir.DataType.FLOAT else tensor.dtype.name.lower(),
        "shape": list(tensor.shape.numpy()),
        "bytes": tensor.nbytes,
    }
