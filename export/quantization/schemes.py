"""The format that a quantization scheme and its options give every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from export.precision import SCHEMES, Inputs, Scheme, check_scheme
from export.precision_plan import read_schemes
from export.quantization.method import MethodOptions
from refmodels.errors import LogitLockError
from refmodels.options import check_choice
from refmodels.quantization.formats import EightBit, InputScale, LinearFormat, QuantizationSpec, group_formats
from refmodels.spec import ModelSpec

DEFAULT_GROUP = 128
_LEAST_GROUP = 16


_METHODS_WITH = {
    "alpha": ("smoothquant",),
    "clip": ("awq", "gptq"),
    "act_order": ("gptq",),
    "damping": ("gptq",),
}
"""The options that only some methods have."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Options of quantization.

    Attributes:
        scheme: one of `export.precision.SCHEMES`; None: only the cache is quantized.
        group: columns that share a scale; 0: one scale per row; None: the scheme's default (128 for int4).  A layer
            whose columns it does not divide takes the largest half, quarter, ... that does.
        symmetric: False adds zero points.
        inputs: quantization of the layers' inputs; None: the scheme's default.
        head: also quantize the head.
        cache: quantize keys and values to this type.
        plan: a file that gives layers other schemes; see `export.precision_plan`.
        method: options of the algorithm; its `method` is the scheme's.
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
        if self.scheme is not None:
            check_scheme(self.scheme)
        if self.scheme is None and self.cache is None:
            raise LogitLockError("there is nothing to quantize: give --precision SCHEME, --kv-cache, or both")
        if self.inputs is not None:
            check_choice("inputs", self.inputs, Inputs)
        if self.cache is not None:
            check_choice("kv-cache", self.cache, EightBit)
        if self.plan is None:
            # The layers of a plan may have other methods.
            self._check_method("rtn" if self.scheme is None else SCHEMES[self.scheme].method)

    def _check_method(self, method: str) -> None:
        for name, serves in _METHODS_WITH.items():
            value = getattr(self.method, name)
            if value != getattr(MethodOptions(), name) and method not in serves:
                schemes = ", ".join(scheme for scheme, s in SCHEMES.items() if s.method in serves)
                raise LogitLockError(
                    f"--{name.replace('_', '-')} is for --precision {schemes}; it has no effect "
                    + (f"with {self.scheme}" if self.scheme else "without one")
                )


def quantization_of(spec: ModelSpec, options: QuantizeOptions) -> QuantizationSpec:
    """Every layer's format.

    Raises:
        LogitLockError: the head is tied and cannot be quantized, nothing computes the combination, the group fits no
            layer, or the plan does not fit the model.
    """
    if options.head and spec.tied_head:
        raise LogitLockError(f"the head of {spec.variant} is its embedding, which is not quantized; leave --head out")
    overrides = plan_of(spec, options)
    for name, scheme in overrides.items():
        if scheme is not None and scheme not in SCHEMES:
            raise LogitLockError(
                f"{options.plan} gives {name} the scheme {scheme!r}; known ones: {', '.join(SCHEMES)}, null"
            )
    columns = {tap.module: spec.taps[tap.reads[0]].width for tap in spec.taps.values() if tap.kind == "linear"}
    formats = {}
    for module in spec.linears:
        default = None if module == "head" and not options.head else options.scheme
        scheme = overrides.get(module, default)
        if scheme is not None:
            formats[module] = _format(SCHEMES[scheme], columns[module], module, options)
    found = group_formats(formats, cache=options.cache)
    assert found is not None or options.plan is not None
    if found is None:
        raise LogitLockError(f"{options.plan} leaves nothing to quantize")
    return found


def plan_of(spec: ModelSpec, options: QuantizeOptions) -> dict[str, str | None]:
    """The layers to which a plan gives another scheme."""
    return {} if options.plan is None else read_schemes(options.plan, spec, options.scheme)


def _format(scheme: Scheme, width: int, module: str, options: QuantizeOptions) -> LinearFormat:
    # The options are meant for the scheme that they name, not for a plan's exceptions.
    exception = scheme is not SCHEMES.get(options.scheme or "")
    inputs = scheme.inputs if exception else options.inputs or scheme.inputs
    wanted = options.group
    if wanted is None or (exception and inputs in ("token", "tensor")):
        wanted = DEFAULT_GROUP if scheme.grouped or inputs == "group" else 0
    if wanted < 0:
        raise LogitLockError(f"--group is {wanted}; it must be at least {_LEAST_GROUP}, or 0 for one scale per row")
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
