"""The layers that TensorRT made of a graph, as `engine.layers.json` in a bundle records them.

A plan can be opened only on a GPU that it was built for; this list comes from its builder and can be read anywhere.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from refmodels.json_records import read_json, read_record
from trt_runtime.bundle import TensorInfo

_CALL = re.compile(r" \(\w+\)$")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One step of an engine: usually one kernel for many nodes of the graph.

    Attributes:
        name, type: TensorRT's; a call of one of our plugins has type "custom_layer".
        profile: index of the optimization profile; every profile has its own layers.
        inputs, outputs: the tensors that it reads and writes; -1 is a dynamic axis.
        constants: weights it reads, in the layout that TensorRT gave them.
        refs: the nodes it was made of; a node inside a function comes with its calls, innermost first:
            'node_of_mean | blocks.0.attn_norm (FusedRmsNorm)'.
        taps: the taps that these nodes compute, or else the next ones that depend on them.
    """

    name: str
    type: str
    profile: int
    inputs: list[TensorInfo] = field(default_factory=list)
    outputs: list[TensorInfo] = field(default_factory=list)
    constants: list[TensorInfo] = field(default_factory=list)
    refs: list[str] = field(default_factory=list)
    taps: list[str] = field(default_factory=list)

    @property
    def nodes(self) -> list[str]:
        """For each of `refs` the node of the main graph that it belongs to: the outermost call for a node of a
        function."""
        return [_CALL.sub("", ref.split(" | ")[-1]) for ref in self.refs]


@dataclass(frozen=True, kw_only=True)
class PlanLayers:
    """The layers of one plan, as its builder listed them.

    Attributes:
        plan: the file in the bundle.
        weight_bytes: of all weights in the plan, once.
        activation_bytes: scratch memory that each profile needs at its largest shapes.
        layers: of all profiles, in order of execution.
        warnings: TensorRT's warnings that are not known to be harmless.
    """

    plan: str
    weight_bytes: int
    activation_bytes: list[int]
    layers: list[Layer]
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Counts for people: layers and their types in each profile, plugin calls, and how many map to a tap."""
        profiles = sorted({layer.profile for layer in self.layers})
        return {
            "plan": self.plan,
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
            "layers": [sum(layer.profile == p for layer in self.layers) for p in profiles],
            "types": [dict(Counter(x.type for x in self.layers if x.profile == p).most_common()) for p in profiles],
            "with_taps": sum(bool(layer.taps) for layer in self.layers),
            "warnings": self.warnings,
        }


@dataclass(frozen=True, kw_only=True)
class EngineLayers:
    """The content of engine.layers.json."""

    plans: list[PlanLayers]


def write_layers(path: Path, plans: list[PlanLayers]) -> None:
    path.write_text(json.dumps(asdict(EngineLayers(plans=plans)), ensure_ascii=False) + "\n", encoding="utf-8")


def read_layers(path: Path) -> list[PlanLayers]:
    """The plans listed in an engine.layers.json.

    Raises:
        LogitLockError: not readable, or not such a file.
    """
    return read_record(EngineLayers, read_json(path), str(path)).plans
