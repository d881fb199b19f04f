"""The contents of a bundle as plain data, for `logitlock inspect`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from refmodels.errors import LogitLockError
from refmodels.taps import split_name
from refmodels.terminal import new_console
from trt_runtime.bundle import LAYERS_NAME, Bundle, read_bundle
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
    if tensor.dtype == ir.DataType.STRING:
        raise LogitLockError(f"the weight {name} of the bundle's graph holds text; it must hold numbers")
    return {
        "name": name,
        "dtype": "float32" if tensor.dtype == ir.DataType.FLOAT else tensor.dtype.name.lower(),
        "shape": list(tensor.shape.numpy()),
        "bytes": tensor.nbytes,
    }


def inspect_bundle(directory: Path, *, json_output: bool) -> None:
    """Print the contents of a bundle as tables or as one JSON document.  Errors as `read_bundle`."""
    found = describe(read_bundle(directory))
    if json_output:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    console = new_console()
    spec = found["spec"]
    console.print(found["bundle"], style="bold", highlight=False)
    facts = Table(show_header=False, box=None)
    attention, rope = spec["attention"], spec["rope"]
    for name, value in (
        ("model", f"{found['model']} ({spec['variant']})"),
        ("precision", f"{found['precision']}, {found['numerics']} numerics, attention {found['attention']}"),
        ("quantized", found["quantization"] or "no"),
        ("shape", f"{spec['layers']} layers, hidden {spec['hidden_size']}, vocabulary {spec['vocab_size']:,}"),
        ("heads", f"{attention['heads']} ({attention['kv_heads']} kv), head_dim {attention['head_dim']}"),
        ("position", spec["position"] + (f" {rope['dim']}, theta {rope['theta']:g}" if rope else "")),
        ("positions", f"{found['max_positions']:,}"),
        ("checkpoint", found["checkpoint_hash"][:16]),
        ("tools", ", ".join(f"{name} {version}" for name, version in found["tools"].items())),
        ("taps", f"{len(found['taps'])}: {', '.join(list(found['taps'])[:4])}, …"),
    ):
        facts.add_row(name, value)
    console.print(facts, highlight=False)
    nodes = Table("node", "count", "body", title=f"nodes (opset {found['opset']})", title_justify="left")
    for name, count in found["nodes"].items():
        body = found["functions"].get(name)
        nodes.add_row(name, str(count), f"{body} nodes" if body is not None else "")
    console.print(nodes)
    total = sum(weight["bytes"] for weight in found["weights"])
    weights = Table("weight", "count", "shape", "dtype", "MB", "share", title="weights", title_justify="left")
    for group in weight_groups(found["weights"]):
        size = group["bytes"]
        shape = " x ".join(map(str, group["shape"]))
        share = f"{size / total:.1%}"
        weights.add_row(group["name"], str(group["count"]), shape, group["dtype"], f"{size / 1e6:.2f}", share)
    weights.add_row("total", str(len(found["weights"])), "", "", f"{total / 1e6:.2f}", "")
    console.print(weights)
    if found["engine"] is not None:
        _show_engine(console, found)
    files = Table("file", "bytes", "sha256", title="files", title_justify="left")
    for name, file in found["files"].items():
        files.add_row(name, f"{file['bytes']:,}", file["sha256"][:16])
    console.print(files)


def _show_engine(console: Console, found: dict[str, Any]) -> None:
    engine = found["engine"]
    facts = Table(show_header=False, box=None, title="engine", title_justify="left")
    for name, value in (
        ("made by", f"{engine['package']} ({engine['backend']})"),
        ("GPUs", ", ".join(engine["compute_capabilities"]) or "the package's default"),
        ("plugins", ", ".join(f"{name} {version}" for name, version in engine["plugins"].items()) or "none"),
    ):
        facts.add_row(name, value)
    console.print(facts, highlight=False)
    columns = ("plan", "profile", "batch", "tokens", "cache", "layers", "scratch MB")
    profiles = Table(*columns, title="profiles", title_justify="left")
    for plan in found["plans"]:
        for profile, layers, scratch in zip(found["profiles"], plan["layers"], plan["activation_bytes"], strict=False):
            sizes = ("–".join(map(str, dict.fromkeys(profile[k]))) for k in ("batch", "tokens", "capacity"))
            profiles.add_row(plan["plan"], profile["name"], *sizes, str(layers), f"{scratch / 1e6:.1f}")
    console.print(profiles)
    types = Table("plan", "weights MB", "with taps", "layers by type", title="layers", title_justify="left")
    for plan in found["plans"]:
        counts: Counter[str] = sum((Counter(c) for c in plan["types"]), Counter())
        named = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        share = f"{plan['with_taps']} of {sum(plan['layers'])}"
        types.add_row(plan["plan"], f"{plan['weight_bytes'] / 1e6:.2f}", share, named)
    console.print(types)
    for plan in found["plans"]:
        for warning in plan["warnings"]:
            console.print(f"warning of {plan['plan']}: {warning}", highlight=False, markup=False)
