"""The vocabulary of `--precision` beyond dtypes: schemes by name, and the format that each gives every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from export.precision_plan import read_schemes
from export.quantization.method import Method, MethodOptions
from refmodels.errors import LogitLockError
from refmodels.quantization.formats import EightBit, InputScale, LinearFormat, QuantizationSpec, group_formats
from refmodels.spec import ModelSpec

Inputs = Literal["float", "tensor", "token", "group"]
"""What a layer does with its input: nothing, or 8-bit codes with a scale of this extent."""

DEFAULT_GROUP = 128
_LEAST_GROUP = 16


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A name of `--precision`.  grouped: weights have a scale a group of columns by default, not one a row."""

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
class QuantizeOptions:
    """What to quantize, and how.

    Attributes:
        scheme: one of `SCHEMES`.
        group: columns that share a scale; 0: one scale a row; None: the scheme's default (128 for int4).  A layer whose
            columns it does not divide takes the largest half, quarter, ... that does.
        symmetric: False adds zero points.
        inputs: None: the scheme's default.
        head: also the head.
        cache: of keys and values.
        plan: a file that says which scheme other layers have; see `export.precision_plan`.
        method: how codes are found; its `method` is the scheme's.
    """

    scheme: str | None
    group: int | None = None
    symmetric: bool = True
    inputs: Inputs | None = None
    head: bool = False
    cache: EightBit | None = None
    plan: Path | None = None
    method: MethodOptions = field(default_factory=MethodOptions)

    def __post_init__(self) -> None:
        if self.scheme is not None and self.scheme not in SCHEMES:
            raise LogitLockError(f"--precision is {self.scheme!r}; quantization schemes are {', '.join(SCHEMES)}")
        if self.scheme is None and self.cache is None:
            raise LogitLockError("there is nothing to quantize: give --precision SCHEME, --kv-cache, or both")
        if self.inputs is not None and self.inputs not in get_args(Inputs):
            raise LogitLockError(f"--inputs is {self.inputs!r}; it must be one of {', '.join(get_args(Inputs))}")
        if self.cache is not None and self.cache not in get_args(EightBit):
            raise LogitLockError(f"--kv-cache is {self.cache!r}; it must be one of {', '.join(get_args(EightBit))}")


def is_scheme(precision: str) -> bool:
    """Whether a value of `--precision` is a scheme of quantization, not a dtype."""
    return precision in SCHEMES


def quantization_of(spec: ModelSpec, options: QuantizeOptions) -> QuantizationSpec:
    """Every layer's format.

    Raises:
        LogitLockError: a tied head that is to be quantized, a combination that nothing computes, a group that fits no
            layer, a plan that does not fit the model.
    """
    if options.head and spec.tied_head:
        raise LogitLockError(f"the head of {spec.variant} is its embedding, which is not quantized; leave --head out")
    overrides = plan_of(spec, options)
    for name, scheme in overrides.items():
        if scheme is not None and scheme not in SCHEMES:
            raise LogitLockError(
                f"{options.plan} gives {name} the scheme {scheme!r}; known ones: {', '.join(SCHEMES)}, null"
            )
    formats = {}
    for module in spec.linears:
        default = None if module == "head" and not options.head else options.scheme
        scheme = overrides.get(module, default)
        if scheme is not None:
            formats[module] = _format(SCHEMES[scheme], columns(spec, module), module, options)
    found = group_formats(formats, cache=options.cache)
    assert found is not None or options.plan is not None
    if found is None:
        raise LogitLockError(f"{options.plan} leaves nothing to quantize")
    return found


def plan_of(spec: ModelSpec, options: QuantizeOptions) -> dict[str, str | None]:
    """The layers to which a plan gives another scheme."""
    return {} if options.plan is None else read_schemes(options.plan, spec, options.scheme)


def columns(spec: ModelSpec, module: str) -> int:
    """Input features of a linear layer."""
    if module.endswith("attn.out"):
        return spec.attention.heads * spec.attention.head_dim
    return spec.mlp.width if module.endswith("mlp.out") else spec.hidden_size


def _format(scheme: Scheme, width: int, module: str, options: QuantizeOptions) -> LinearFormat:
    # What the options say is meant for the scheme that they name, not for a plan's exceptions.
    exception = scheme is not SCHEMES.get(options.scheme or "")
    inputs = scheme.inputs if exception else options.inputs or scheme.inputs
    wanted = options.group
    if wanted is None or (exception and inputs in ("token", "tensor")):
        wanted = DEFAULT_GROUP if scheme.grouped or inputs == "group" else 0
    if wanted < 0:
        raise LogitLockError(f"--group is {wanted}; it must be at least {_LEAST_GROUP}, or 0 for one scale a row")
    code: EightBit | None = None
    if inputs != "float":
        code = "fp8" if scheme.weight == "fp8" else "int8"
    scale: InputScale = "token" if inputs == "float" else inputs
    return LinearFormat(
        weight=scheme.weight,
        group=_fitting(wanted, width, module) if wanted else None,
        symmetric=options.symmetric,
        input=code,
        input_scale=scale,
    )


def _fitting(group: int, width: int, module: str) -> int:
    """The largest of group, group / 2, group / 4, ... that divides the columns."""
    found = group
    while width % found and found % 2 == 0:
        found //= 2
    if width % found or found < _LEAST_GROUP:
        raise LogitLockError(
            f"{module} has {width} input columns, which groups of {group} (or a half, a quarter, ... of it, at least "
            f"{_LEAST_GROUP}) do not divide; choose another --group, or 0"
        )
    return found
