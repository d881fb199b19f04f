"""Attributes of plugin nodes that no run on ONNX Runtime shows.

A node CachedAttention or FusedRmsNorm comes with a function body.  ONNX Runtime runs the body, in which most facts are
constants; a TensorRT plugin gets the node's attributes.  Where the body does not read an attribute, the two may
contradict each other without a wrong tensor, so attributes are compared with the model's spec.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

from debug.comparison.results import Culprit, Diagnosis
from refmodels.attention import NODE_ATTRIBUTES, AttentionFacts, inputs_of, node_attributes
from refmodels.spec import ModelSpec
from trt_runtime.bundle import Bundle
from trt_runtime.onnxruntime.errors import cannot_read, graph_errors

_LISTED = 4


def configuration_culprit(tap: str, fault: str) -> Culprit:
    """A wrong setting, which no tensor shows."""
    diagnosis = Diagnosis(fault=fault, local_before=1.0, local_after=0.0, ratio_after=0.0)
    return Culprit(
        tap=tap,
        phase="decode",
        step=0,
        kind="configuration",
        local=0.0,
        floor=0.0,
        ratio=0.0,
        worst=(0, 0),
        occurrences=1,
        diagnosis=[diagnosis],
    )


def wrong_attributes(bundle: Bundle, spec: ModelSpec) -> list[Culprit]:
    """One culprit per attribute and wrong value: plugin nodes that contradict their function body and the model.

    Raises:
        LogitLockError: the bundle's graph cannot be read.
    """
    with graph_errors(cannot_read(bundle.model_path)):
        model = onnx.load(bundle.model_path, load_external_data=False)
        found: dict[tuple[str, Any, Any], list[str]] = {}
        for node, name, given, right in _contradictions(model, spec):
            found.setdefault((name, given, right), []).append(node)
    return [
        configuration_culprit(
            nodes[0],
            f"wrong node attribute {name}: {given:g} instead of {right:g}, in {_names(nodes)}; the function body "
            "does not read it (ONNX Runtime runs the body), but TensorRT's plugin does",
        )
        for (name, given, right), nodes in found.items()
    ]


def _names(nodes: list[str]) -> str:
    rest = len(nodes) - _LISTED
    return ", ".join(nodes[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _contradictions(model: onnx.ModelProto, spec: ModelSpec) -> Iterator[tuple[str, str, float, float]]:
    """(node, attribute, the node's value, the model's)."""
    bodies = {(f.domain, f.name): _read(f) for f in model.functions}
    layers = {tap.module: tap.layer for tap in spec.taps.values() if tap.kind == "attention"}
    for node in model.graph.node:
        read = bodies.get((node.domain, node.op_type))
        if read is None:
            continue
        expected: dict[str, int | float] = {}
        if node.op_type == "CachedAttention" and layers.get(node.name) is not None:
            expected = _attention(spec, layers[node.name] or 0)
        elif node.op_type in ("FusedRmsNorm", "FusedRmsNormQuant"):
            expected = {"weight_in_float": int(spec.norm.weight_in_float)}
        for attribute in node.attribute:
            if attribute.name in expected and attribute.name not in read:
                given, right = onnx.helper.get_attribute_value(attribute), expected[attribute.name]
                if given != right:
                    yield node.name, attribute.name, given, right


def _read(function: onnx.FunctionProto) -> set[str]:
    """The attributes that a body reads."""
    return {a.ref_attr_name for node in function.node for a in node.attribute if a.ref_attr_name}


def _attention(spec: ModelSpec, layer: int) -> dict[str, int | float]:
    a, rope = spec.attention, spec.rope
    facts = AttentionFacts(
        heads=a.heads,
        kv_heads=a.kv_heads,
        scale=spec.scale(layer),
        rotary_interleaved=rope is not None and rope.interleaved,
        window=spec.window(layer),
    )
    given = [row.name for row in inputs_of(spec)]
    found = node_attributes(facts, given, rotary_dim=0 if rope is None else rope.dim)
    # Floats of a node are rounded to fp32; the only one, scale, is read by the body.
    return {name: value for name, value in found.items() if NODE_ATTRIBUTES[name] is int}
