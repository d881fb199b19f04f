"""How checkpoint tensors become parameters, as data: it can be checked, inverted and streamed.

A `WeightMap` gives for each parameter of `Decoder` the checkpoint tensors (or rows of them) that are stacked to make
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one checkpoint tensor.

    Attributes:
        name: the tensor's name upstream.
        shape: the shape it must have in the checkpoint.
        rows: [start, stop) of the first axis, where several parameters share a tensor; None takes all.
        transposed: stored [in, out] (GPT-2's Conv1D).
        interleaved_heads: rows are grouped by head, (query, key, value) of each head together; they are regrouped into
            all queries, all keys, all values.  0: not so.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False
    interleaved_heads: int = 0

    def read(self, tensor: Tensor) -> Tensor:
        """The rows that this part contributes, from the whole checkpoint tensor; views where possible."""
        if self.transposed:
            tensor = tensor.t() if tensor.ndim == 2 else tensor
        if self.interleaved_heads:
            tensor = _regroup(tensor, (self.interleaved_heads, 3))
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    @property
    def row_count(self) -> int:
        if self.rows is not None:
            return self.rows[1] - self.rows[0]
        return self.shape[-1] if self.transposed else self.shape[0]


def _regroup(tensor: Tensor, groups: tuple[int, int]) -> Tensor:
    """Swap the two outer levels of the first axis."""
    return tensor.reshape(*groups, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


WeightMap = Mapping[str, tuple[Part, ...]]


def linear(
    parameter: str,
    *names: str,
    rows: tuple[int, ...],
    columns: int,
    bias: bool = False,
    transposed: bool = False,
    interleaved_heads: int = 0,
) -> dict[str, tuple[Part, ...]]:
    """Map `parameter`.weight (and .bias) to the stack of checkpoint linears `names`, of `rows` rows each."""
    weight, biases = [], []
    for name, count in zip(names, rows, strict=True):
        shape = (columns, count) if transposed else (count, columns)
        part = Part(name=f"{name}.weight", shape=shape, transposed=transposed, interleaved_heads=interleaved_heads)
        weight.append(part)
        biases.append(replace(part, name=f"{name}.bias", shape=(count,)))
    made = {f"{parameter}.weight": tuple(weight)}
    return made | {f"{parameter}.bias": tuple(biases)} if bias else made


def norm(parameter: str, name: str, *, width: int, bias: bool) -> dict[str, tuple[Part, ...]]:
    """Map a norm's weight (and bias)."""
    return {
        f"{parameter}.{suffix}": (Part(name=f"{name}.{suffix}", shape=(width,)),)
        for suffix in (("weight", "bias") if bias else ("weight",))
    }


def embedding(parameter: str, name: str, *, rows: int, columns: int) -> dict[str, tuple[Part, ...]]:
    return {f"{parameter}.weight": (Part(name=f"{name}.weight", shape=(rows, columns)),)}


def to_checkpoint(weights: WeightMap, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of loading: tensors under their upstream names, from parameters by name.

    Parameters that share a checkpoint tensor (fused gate and up) are put back together; tensors are new copies.
    """
    result: dict[str, Tensor] = {}
    for parameter, parts in weights.items():
        start = 0
        for part in parts:
            piece = parameters[parameter].detach()[start : start + part.row_count]
            start += part.row_count
            if part.rows is not None:
                whole = result.setdefault(part.name, torch.empty(part.shape, dtype=piece.dtype))
                whole[part.rows[0] : part.rows[1]] = piece
                continue
            if part.interleaved_heads:
                piece = _regroup(piece, (3, part.interleaved_heads))
            if part.transposed and piece.ndim == 2:
                piece = piece.t()
            result[part.name] = piece.clone(memory_format=torch.contiguous_format)
    return result
