"""What is stored in how many bits: declarative, a part of `ModelSpec`.

A quantized model is a model like any other: its linear layers hold codes and scales instead of floats
(`refmodels.quantization.linear`), and its cache may hold codes too.  How the codes were found (round to nearest, AWQ,
GPTQ, SmoothQuant) leaves no trace in the arithmetic, so it is none of this module's business.
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
"""The largest code.  Integer weights go down one further (`arithmetic.code_range`); inputs and caches do not."""

CODE_TYPES: Mapping[Code, torch.dtype] = {code: DTYPE_TABLE[code].torch for code in get_args(Code)}
"""dtype of a tensor of codes; int4 codes lie in int8, one a byte, until they are packed for storage or a kernel."""


@dataclass(frozen=True, kw_only=True)
class LinearFormat:
    """How a linear layer stores its weight [out, in] and what it does with its input.

    Attributes:
        weight: of the codes.
        group: input columns that share a scale; None: one scale a row (per output channel).
        symmetric: False adds a zero point to every scale; integer weights without `input` only.
        input: the input is quantized as well, and the product is taken of codes.
        input_scale: one for all inputs, found by calibration ("tensor"); or found as they come, one a token ("token"),
            or one a token and group of columns ("group"), which is what ONNX Runtime's fast CPU kernel does.
        reordered: codes are stored in another order of columns than the input has (GPTQ's act-order).
        pre_quant_scale: the input is first multiplied by a constant, one a column: AWQ's and SmoothQuant's scale where
            it is not folded into what makes the input (nvidia-modelopt).
    Raises:
        LogitLockError: a combination that nothing computes.
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
                raise LogitLockError("inputs with a scale a group are int8, and so are the weights, or int4, in groups")
        elif self.input is not None and (self.weight != self.input or self.group is not None or not self.symmetric):
            raise LogitLockError(
                f"{self.input} inputs need symmetric {self.input} weights with one scale an output channel, not "
                f"{self.weight}" + ("" if self.group is None else f" in groups of {self.group}")
            )
        if self.weight == "fp8" and not self.symmetric:
            raise LogitLockError("fp8 weights have no zero point")

    def groups(self, columns: int) -> int:
        """How many scales a row of `columns` has.

        Raises:
            LogitLockError: the columns are no whole number of groups.
        """
        if self.group is None:
            return 1
        if columns % self.group:
            raise LogitLockError(
                f"{columns} input columns are no multiple of the group size {self.group}; choose a --group that "
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
    """Which linear layers are quantized and how (all others are plain), and what the cache holds.

    cache: codes with one constant scale a layer, key or value, and kv head; None: the working dtype.
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
        """One phrase: 'int4 weights in groups of 64; int8 cache'."""
        parts = [f"{describe_format(group.format)} ({len(group.modules)} layers)" for group in self.groups]
        return "; ".join([*parts, *([f"{self.cache} cache"] if self.cache else [])])


def group_formats(formats: Mapping[str, LinearFormat], *, cache: EightBit | None = None) -> QuantizationSpec | None:
    """The spec that gives each layer its format; None where nothing is quantized."""
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
