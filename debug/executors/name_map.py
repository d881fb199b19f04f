"""A name map: the places of our taps in a third party's graph, as a JSON file that a person can write and correct.

    {"taps": {"blocks.0.attn_norm": "/model/layers.0/input_layernorm/Mul_1_output_0",
              "blocks.0.attn.qkv": {"concat": ["val_84", "val_92", "val_100"]},
              "blocks.0.mlp.gate": {"value": "val_131", "columns": [0, 4096]},
              "blocks.0.attn.context": {"value": "val_120", "transpose": [0, 2, 1, 3]}},
     "inputs": {"input_ids": "tokens", "blocks.0.key": "layer0_k_in"},
     "outputs": {"logits": "lm_out", "blocks.0.key": "layer0_k_out"},
     "axes": {"kv_cache_dim": "head_dim"}}

`inputs`, `outputs` and `axes` (what a symbolic size of the cache inputs is) are needed only if names and shapes do not
identify them.  A file may also hold only the object under `taps`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from debug.executors.step import regroup_heads
from refmodels.errors import LogitLockError
from refmodels.files import write_text
from refmodels.json_records import read_json, read_record
from refmodels.spec import ModelSpec
from refmodels.taps import tap_names

AXES = {"B": "batch", "H": "kv_heads", "S": "slots", "D": "head_dim"}
"""The axes of a cache tensor by their letter in `debug.executors.step.CacheAxes`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """How a tap is made from values of a graph, in this order: transpose, [batch, tokens, -1], columns, heads.

    Attributes:
        value: a name; or `concat`, several sources joined along the last axis.
        transpose: axes that bring batch and tokens to the front ([0, 2, 1, 3] for [batch, heads, tokens, head_dim]);
            not needed for [batch, tokens, ...] and [batch * tokens, width].
        columns: [start, stop) of the width, if one value holds several taps.
        heads: number of heads by which the width is grouped, (query, key, value) of each together.
    """

    value: str | None = None
    concat: list[Source] = field(default_factory=list)
    transpose: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    heads: int = 0

    def __post_init__(self) -> None:
        if (self.value is None) == (not self.concat):
            raise LogitLockError('the source of a tap needs either "value" or "concat"')
        if len(self.columns) not in (0, 2):
            raise LogitLockError(f"columns of {self.value} must be [start, stop], got {self.columns}")
        if self.columns and not 0 <= self.columns[0] < self.columns[1]:
            raise LogitLockError(f"columns of {self.value} are {self.columns}; they must be [start, stop], from 0 on")
        if self.heads < 0:
            raise LogitLockError(f"heads of {self.value} are {self.heads}; they must be at least 0")

    def values(self) -> Iterator[str]:
        """Names of all values that are read."""
        if self.value is not None:
            yield self.value
        for part in self.concat:
            yield from part.values()

    def read(self, tensors: Mapping[str, Tensor], batch: int, tokens: int) -> Tensor:
        """[batch, tokens, width] from the graph's tensors.

        Raises:
            LogitLockError: a tensor cannot be brought into this form.
        """
        if self.value is None:
            return torch.cat([part.read(tensors, batch, tokens) for part in self.concat], -1)
        tensor = tensors[self.value]
        shape = list(tensor.shape)
        if self.transpose:
            if sorted(self.transpose) != list(range(tensor.ndim)):
                raise LogitLockError(f"{self.value} has shape {shape}, which cannot be transposed by {self.transpose}")
            tensor = tensor.permute(self.transpose)
        # Only a flattened [batch * tokens, width] may be reshaped; anything else would mix tokens.
        flat = tensor.ndim == 2 and tensor.shape[0] == batch * tokens
        if not flat and list(tensor.shape[:2]) != [batch, tokens]:
            raise LogitLockError(
                f"{self.value} has shape {shape}; with [{batch}, {tokens}] tokens its first axes must be these (say "
                "with transpose how), or their product"
            )
        tensor = tensor.reshape(batch, tokens, -1)
        if self.columns:
            tensor = tensor[..., self.columns[0] : self.columns[1]]
        if not self.heads:
            return tensor
        if tensor.shape[-1] % (3 * self.heads):
            raise LogitLockError(
                f"{self.value} has a width of {tensor.shape[-1]}, which is not (query, key, value) of {self.heads} "
                "heads"
            )
        return regroup_heads(tensor, self.heads)

    def to_json(self) -> str | dict[str, Any]:
        facts: dict[str, Any] = {"value": self.value} if self.value is not None else {}
        if self.concat:
            facts["concat"] = [part.to_json() for part in self.concat]
        for name in ("transpose", "columns", "heads"):
            if getattr(self, name):
                facts[name] = getattr(self, name)
        return self.value if list(facts) == ["value"] and self.value is not None else facts


@dataclass(frozen=True, kw_only=True)
class NameMap:
    """`taps`: sources by tap; `inputs`, `outputs`: names in the graph by role (see `debug.executors.roles`); `axes`:
    one of `AXES` by the name of a symbolic size of the cache inputs."""

    taps: dict[str, Source] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, axis in self.axes.items():
            if axis not in AXES.values():
                raise LogitLockError(
                    f"the name map calls the axis {name} {axis!r}; it must be one of {', '.join(AXES.values())}"
                )

    def values(self) -> list[str]:
        """Every value of the graph that a tap reads, once."""
        return list(dict.fromkeys(name for source in self.taps.values() for name in source.values()))

    def to_json(self) -> dict[str, Any]:
        taps = {tap: source.to_json() for tap, source in self.taps.items()}
        found = {"taps": taps, "inputs": self.inputs, "outputs": self.outputs}
        return {**found, "axes": self.axes} if self.axes else found


def read_name_map(file: Path, spec: ModelSpec) -> NameMap:
    """Read a name map.

    Raises:
        LogitLockError: the file cannot be read, or has an unknown key or a tap that this model does not have.
    """
    data = read_json(file)
    if not data.keys() & {"taps", "inputs", "outputs", "axes"}:
        data = {"taps": data}
    # The comments of a proposal are for people.
    data = {key: value for key, value in data.items() if key not in ("confidence", "ambiguous", "unmatched")}
    known, taps = tap_names(spec), data.get("taps", {})
    if not isinstance(taps, dict):
        raise LogitLockError(f"{file}.taps must be an object, got {type(taps).__name__}")
    for tap in taps:
        if tap not in known:
            raise LogitLockError(
                f"{file}: {tap!r} is not a tap of {spec.variant}; its taps are {', '.join(known[:4])}, ..."
            )
    return read_record(NameMap, {**data, "taps": {tap: _objects(source) for tap, source in taps.items()}}, str(file))


def _objects(taps: Any) -> Any:
    """Turn bare names into objects, also inside `concat`."""
    if isinstance(taps, str):
        return {"value": taps}
    if isinstance(taps, list):
        return [_objects(item) for item in taps]
    if isinstance(taps, dict) and "concat" in taps:
        return {**taps, "concat": _objects(taps["concat"])}
    return taps


def check_width(spec: ModelSpec, tap: str, tensor: Tensor) -> Tensor:
    """The tensor, if it has the tap's width.

    Raises:
        LogitLockError: it has another width.
    """
    width = spec.taps[tap].width
    if tensor.shape[-1] != width:
        raise LogitLockError(f"the name map gives {tap} a width of {tensor.shape[-1]}; it must be {width}")
    return tensor


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, indented; a `LogitLockError` if it cannot be written."""
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n", "name map")
