"""TensorRT's layer list, read from the builder's log, and the taps that its layers compute.

A plan cannot be opened on a machine without a GPU, but at VERBOSE, with detailed profiling verbosity, the builder
prints what the engine inspector would say: every layer of every profile with its tensors and its source nodes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import onnx

from refmodels.dtypes import DTYPE_TABLE, torch_name
from trt_runtime.bundle import TensorInfo
from trt_runtime.plan_layers import Layer, PlanLayers

_NAME = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: ")
_TENSORS = r", {}: \[((?:[ ,]*\{{[^{{}}]*\}})*)\]"
_TENSOR = re.compile(r"\{ Name: (.*?), (?:Location: \w+, )?Dimensions: \[(.*?)\], .*?Datatype: (\w+)")
_METADATA = re.compile(r", Metadata: (.*)$")
_REF = re.compile(r"\[(?:ONNX Layer|torch): (.*?)\]\s*(?:\x1f|$)")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_SUBGRAPH = re.compile(r"_myl(\d+)_\d+$")
_DTYPES = {str(d.tensorrt).lower(): torch_name(d.torch) for d in (DTYPE_TABLE["fp32"], DTYPE_TABLE["fp16"])}
"""The two dtypes that the log and torch spell differently: "float" and "half"."""


def parse_log(messages: Iterable[str], *, plan: str, taps: Mapping[str, Sequence[str]]) -> PlanLayers:
    """The engine's layers, from the builder's messages.

    Args:
        messages: all of one build, in order.
        plan: name of the plan's file.
        taps: the taps of every node, from `node_taps`.
    """
    layers: list[Layer] = []
    weights = 0
    activations = []
    for message in messages:
        if message.startswith("Layers:"):
            lines = [line for line in message.splitlines() if _NAME.match(line)]
            layers += [_layer(line, profile) for line, profile in zip(lines, _profiles(lines), strict=True)]
        elif found := re.match(r"Total Weights Memory: (\d+) bytes", message):
            weights = int(found[1])
        elif found := re.match(r"Total Activation Memory: (\d+) bytes", message):
            activations.append(int(found[1]))
    return PlanLayers(plan=plan, weight_bytes=weights, activation_bytes=activations, layers=map_to_taps(layers, taps))


def node_taps(model: onnx.ModelProto, taps: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The taps that each node of a graph computes, or else the next taps that depend on it, by the node's name.

    Args:
        taps: names of values of the graph.
    """
    order = {tap: i for i, tap in enumerate(taps)}
    after: dict[str, set[str]] = defaultdict(set)
    found = {}
    for node in reversed(model.graph.node):
        reached = {tap for value in node.output for tap in ({value} if value in order else after[value])}
        found[node.name] = tuple(sorted(reached, key=order.__getitem__))
        for value in node.input:
            after[value] |= reached
    return found


def map_to_taps(layers: Sequence[Layer], taps: Mapping[str, Sequence[str]]) -> list[Layer]:
    """The layers with their taps filled in: those of their source nodes.

    Layers that TensorRT adds have no source nodes: changes of layout, events, dimension arithmetic on the host.  They
    belong to the taps of the layers that read their outputs or, if none in the list does, to those of the next layer.
    """
    found = [list(dict.fromkeys(tap for node in layer.nodes for tap in taps.get(node, ()))) for layer in layers]
    for i in range(len(layers) - 1, -1, -1):
        if not layers[i].refs:
            later = [j for j in range(i + 1, len(layers)) if layers[j].profile == layers[i].profile]
            written = {tensor.name for tensor in layers[i].outputs}
            readers = [j for j in later if written & {tensor.name for tensor in layers[j].inputs}]
            found[i] = list(dict.fromkeys(tap for j in readers or later[:1] for tap in found[j]))
    return [replace(layer, taps=names) for layer, names in zip(layers, found, strict=True)]


def _profiles(lines: Sequence[str]) -> list[int]:
    """The profile of each layer.

    The log lists layers profile by profile and marks the names in later profiles; in a fused subgraph only some.
    """
    subgraphs = [found[1] if (found := _SUBGRAPH.search(_name(line))) else None for line in lines]
    marks: dict[str | None, int] = {}
    for line, subgraph in zip(lines, subgraphs, strict=True):
        marks[subgraph] = max([marks.get(subgraph, 0), *map(int, _PROFILE.findall(line))])
    marks.pop(None, None)
    profiles: list[int] = []
    for line, subgraph in zip(lines, subgraphs, strict=True):
        own = marks[subgraph] if subgraph is not None else max([0, *map(int, _PROFILE.findall(line))])
        profiles.append(max(own, profiles[-1] if profiles else 0))
    return profiles


def _layer(line: str, profile: int) -> Layer:
    found = _NAME.match(line)
    assert found is not None
    metadata = _METADATA.search(line)
    return Layer(
        name=_PROFILE.sub("", found["name"]),
        type=found["type"],
        profile=profile,
        inputs=_tensors("Inputs", line),
        outputs=_tensors("Outputs", line),
        constants=_tensors("Constants", line),
        refs=_REF.findall(metadata[1]) if metadata else [],
    )


def _name(line: str) -> str:
    found = _NAME.match(line)
    return found["name"] if found else ""


def _tensors(kind: str, line: str) -> list[TensorInfo]:
    found = re.search(_TENSORS.format(kind), line)
    return [
        TensorInfo(
            name=_PROFILE.sub("", name),
            dtype=_DTYPES.get(dtype.lower(), dtype.lower()),
            shape=[int(size) for size in shape.split(",") if size.strip()],
        )
        for name, shape, dtype in _TENSOR.findall(found[1] if found else "")
    ]
