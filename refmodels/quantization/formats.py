"""The formats of quantized layers and caches, declared as a part of `ModelSpec`.

A quantized model is a model like any other: its linear layers hold quantized weights and scales instead of floats
(`refmodels.quantization.linear`), and its cache may be quantized too.  The method that found the quantized weights
(round to nearest, AWQ, GPTQ, SmoothQuant) has no effect on the arithmetic, so this module does not know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch

from refmodels.dtypes import DTYPE_TABLE
from refmodels.errors import LogitLockError

Code = Literal["int8", "int4", "fp8"]
"""fp8 is e4m3fn."""

EightBit = Literal["int8", "fp8"]

InputScale = Literal["tensor", "token", "group"]

LIMITS: Mapping[Code, float] = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
"""The largest quantized value.  Integer weights also use -limit - 1 (`arithmetic.code_range`); inputs and caches do
not."""

CODE_TYPES: Mapping[Code, torch.dtype] = {code: DTYPE_TABLE[code].torch for code in get_args(Code)}
"""dtype of a tensor of quantized values; int4 is held in int8, one value per byte, until it is packed for storage or
a kernel."""


@dataclass(frozen=True, kw_only=True)
class LinearFormat:
    """How a linear layer stores its weight [out, in] and what it does with its input.

    Attributes:
        weight: type of the quantized weights.
        group: group size, the number of input columns that share a scale; None: per channel (one scale per row).
        symmetric: False adds a zero point to every scale; only for integer weights without `input`.
        input: type of the quantized inputs; None: inputs are not quantized.
        input_scale: "tensor" is one static scale for all inputs, found by calibration; "token" is computed at run time,
            per token; "group" per token and group of columns, as in ONNX Runtime's fast CPU kernel.
        reordered: the weight is stored in another order of columns than the input has (GPTQ's act-order).
        pre_quant_scale: the input is first multiplied by a constant per column: AWQ's and SmoothQuant's scale if it is
            not folded into the layer before (nvidia-modelopt).
    Raises:
        LogitLockError: no engine computes this combination.
    """

    weight: Code
    group: int | None = None
    symmetric: bool = True
    input: EightBit | None = None
    input_scale: InputScale = "token"
    reordered: bool = False
    pre_quant_scale: bool = False

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise LogitLockError(f"a group of {self.group} columns: it must be at least 1, or None for a whole row")
        if self.input is not None and self.input_scale == "group":
            if self.input != "int8" or self.weight == "fp8" or self.group is None:
                raise LogitLockError("inputs with scales per group must be int8, with int8 or int4 weights in groups")
        elif self.input is not None and (self.weight != self.input or self.group is not None or not self.symmetric):
            raise LogitLockError(
                f"{self.input} inputs need symmetric {self.input} weights with one scale per output channel, not "
                f"{self.weight}" + ("" if self.group is None else f" in groups of {self.group}")
            )
        if self.weight == "fp8" and not self.symmetric:
            raise LogitLockError("fp8 weights have no zero points")

    def groups(self, columns: int) -> int:
        """Number of scales of a row of `columns` columns.

        Raises:
            LogitLockError: `columns` is not a multiple of the group size.
        """
        if self.group is None:
            return 1
        if columns % self.group:
            raise LogitLockError(
                f"{columns} input columns are not a multiple of the group size {self.group}; choose a --group that "
                "divides them"
            )
        return columns // self.group


@dataclass(frozen=True, kw_only=True)
class LinearGroup:
    """Layers of one format, by their names in `Decoder`: 'blocks.0.attn.qkv', ..., 'head'."""

    format: LinearFormat
    modules: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec:
    """Which linear layers are quantized and how (the others are not), and the type of the cache.

    cache: a quantized type, with one static scale per layer, per key or value, and per kv head; None: the working
        dtype.
    """

    groups: tuple[LinearGroup, ...] = ()
    cache: EightBit | None = None

    @cached_property
    def _formats(self) -> Mapping[str, LinearFormat]:
        return {module: group.format for group in self.groups for module in group.modules}

    def format_of(self, module: str) -> LinearFormat | None:
        """The format of a linear layer by its name in `Decoder`; None: it is not quantized."""
        return self._formats.get(module)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self._formats)

    def describe(self) -> str:
        """One phrase, such as 'int4 weights in groups of 64; int8 cache'."""
        parts = [f"{describe_format(group.format)} ({len(group.modules)} layers)" for group in self.groups]
        return "; ".join([*parts, *([f"{self.cache} cache"] if self.cache else [])])


def group_formats(formats: Mapping[str, LinearFormat], *, cache: EightBit | None = None) -> QuantizationSpec | None:
    """The spec that gives each layer its format; None if nothing is quantized."""
    by_format: dict[LinearFormat, list[str]] = {}
    for module, linear in formats.items():
        by_format.setdefault(linear, []).append(module)
    if not by_format and cache is None:
        return None
    groups = tuple(LinearGroup(format=linear, modules=tuple(modules)) for linear, modules in by_format.items())
    return QuantizationSpec(groups=groups, cache=cache)


def describe_format(linear: LinearFormat) -> str:
    text = f"{linear.weight} weights " + ("by channel" if linear.group is None else f"in groups of {linear.group}")
    if not linear.symmetric:
        text += " with zero points"
    if linear.input is not None:
        text += (
            f", {linear.input} inputs by {'token and group' if linear.input_scale == 'group' else linear.input_scale}"
        )
    if linear.pre_quant_scale:
        text += ", pre-quant scale"
    return text
