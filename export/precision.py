"""The words of `--precision` and `--dtype`: dtypes, and schemes of quantization; parsed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from export.quantization.method import Method
from refmodels.errors import LogitLockError
from trt_runtime.bundle import Precision as DTypeName

Inputs = Literal["float", "tensor", "token", "group"]
"""Quantization of a layer's input: none, or 8 bits with one scale per tensor, token, or token and group."""

DTYPES: Mapping[str, DTypeName] = {name: name for name in get_args(DTypeName)}
DEFAULT_DTYPE: DTypeName = "fp16"
"""Dtype of everything that a scheme does not quantize."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How linear layers are quantized.  grouped: weights have one scale per group of columns, not per row, if nothing
    else is asked for."""

    weight: Literal["int8", "int4", "fp8"]
    method: Method = "rtn"
    inputs: Inputs = "float"
    grouped: bool = False
    describes: str


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(weight="int8", describes="int8 weights, rounded to nearest"),
    "int4": Scheme(weight="int4", grouped=True, describes="int4 weights in groups, rounded to nearest"),
    "int4-awq": Scheme(weight="int4", method="awq", grouped=True, describes="int4 weights, activation-aware (AWQ)"),
    "int4-gptq": Scheme(weight="int4", method="gptq", grouped=True, describes="int4 weights, by GPTQ"),
    "smoothquant": Scheme(
        weight="int8", method="smoothquant", inputs="token", describes="int8 weights and inputs, smoothed (SmoothQuant)"
    ),
    "fp8": Scheme(weight="fp8", inputs="token", describes="fp8 (e4m3) weights and inputs"),
}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The precision of an exported model.

    Attributes:
        dtype: dtype of the weights, activations and cache that are not quantized.
        scheme: quantization scheme, one of `SCHEMES`; None: linear layers are not quantized.
    """

    dtype: DTypeName
    scheme: str | None = None

    @classmethod
    def parse(cls, word: str, *, dtype: str | None = None) -> Precision:
        """Read `--precision`, a dtype or a scheme, and `--dtype`, which goes with a scheme; None: fp16.

        Raises:
            LogitLockError: `precision` is neither, `dtype` is unknown, or both are dtypes.
        """
        if word in SCHEMES:
            return cls(dtype=_dtype("dtype", dtype or DEFAULT_DTYPE, DTYPES), scheme=word)
        if dtype is not None:
            raise LogitLockError(f"--dtype says what is not quantized; --precision {word} has nothing else")
        return cls(dtype=_dtype("precision", word, (*DTYPES, *SCHEMES)))


def check_scheme(word: str) -> None:
    """Raises LogitLockError where `--precision` must be a scheme and is none."""
    if word not in SCHEMES:
        raise LogitLockError(f"--precision is {word!r}; quantization schemes are {', '.join(SCHEMES)}")


def _dtype(option: str, word: str, known: Iterable[str]) -> DTypeName:
    found = DTYPES.get(word)
    if found is None:
        raise LogitLockError(f"--{option} is {word!r}; it must be one of {', '.join(known)}")
    return found
