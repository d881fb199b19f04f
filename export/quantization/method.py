"""One method applied to the linear layers of a block, or to the head: from floats and inputs to quantized weights.

    inputs = {site: InputObserver(f"blocks.3.{site}", ...) for site in observed_sites(...)}     # fed while data streams
    result = quantize_layers(spec, parameters, inputs, formats, options)

First each site's scale is searched and folded (AWQ, SmoothQuant), in the order of execution: folding at a site divides
rows of the linear before it, whose errors are multiplied back at the site; its own search must not see them divided.
Then every weight is rounded, for its inputs as they are after folding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from export.quantization.awq import AwqScale, search_clip, search_scale
from export.quantization.fold import BLOCK_SITES, Site, can_fold, divided, fold, readers, share, width
from export.quantization.gptq import Hessian, damped_root, gptq, layer_error, row_errors
from export.quantization.observers import MaxObserver, PercentileObserver, TokenSample
from export.quantization.smoothquant import smooth_scale
from refmodels.errors import LogitLockError
from refmodels.quantization.arithmetic import LEAST_SCALE, QuantizedWeight, quantize_weight, weight_scale
from refmodels.quantization.formats import LIMITS, LinearFormat
from refmodels.spec import ModelSpec

Method = Literal["rtn", "awq", "gptq", "smoothquant"]

Formats = Mapping[str, LinearFormat | None]
"""By the linear's name relative to the block, 'attn.qkv', or 'head'; None or absent: not quantized."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Options of the quantization algorithm.

    Attributes:
        method: "awq" concerns weights whose inputs stay floats, "smoothquant" those whose inputs are quantized; layers
            of the other kind are rounded to nearest.
        alpha: of SmoothQuant.
        grid: steps of AWQ's searches.
        clip: whether AWQ and GPTQ clip groups where it lowers the error; None: AWQ does.
        act_order, damping, block: of GPTQ.
        sample: number of tokens kept per site for AWQ.
        percentile: of |x| that static input scales cover; 100: the largest.
        per_tensor: fp8 weights have a single scale where their input has one, and so have cached keys and values:
            nvidia-modelopt's layout has no place for more.
    Raises:
        LogitLockError: a value is out of its range.
    """

    method: Method = "rtn"
    alpha: float = 0.5
    grid: int = 20
    clip: bool | None = None
    act_order: bool = False
    damping: float = 0.01
    block: int = 128
    sample: int = 2048
    percentile: float = 100.0
    per_tensor: bool = False

    def __post_init__(self) -> None:
        for name, good, must in (
            ("alpha", 0 <= self.alpha <= 1, "in [0, 1]"),
            ("grid", self.grid >= 1, "at least 1"),
            ("damping", self.damping > 0, "positive"),
            ("block", self.block >= 1, "at least 1"),
            ("sample", self.sample >= 1, "at least 1"),
            ("percentile", 0 < self.percentile <= 100, "above 0 and at most 100"),
        ):
            if not good:
                raise LogitLockError(f"{name} {getattr(self, name):g} of quantization must be {must}")


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Squared errors of a linear's output on the observed inputs, over the square of the output.

    One is that of the chosen values, with folded scales undone, the other that of rounding the float model's weight to
    nearest.  None where no inputs were kept (rtn, smoothquant).
    """

    error: float | None
    nearest_error: float | None


@dataclass(frozen=True, kw_only=True)
class QuantizedLayers:
    """A block (or the head) after quantization; names as in `Decoder`, relative to the block.

    parameters: the floats that remain, changed by folding or not.  weights: those of every quantized linear.
    input_scales: [] wide, of linears with static input scales.  folded: scale [width] by site.
    """

    parameters: dict[str, Tensor]
    weights: dict[str, QuantizedWeight]
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    folded: dict[Site, Tensor] = field(default_factory=dict)
    awq: dict[Site, AwqScale] = field(default_factory=dict)
    reports: dict[str, LayerReport] = field(default_factory=dict)


def observed_sites(spec: ModelSpec, formats: Formats, options: MethodOptions) -> tuple[Site, ...]:
    """The sites whose inputs the method must see, in the order of execution; none for rtn with dynamic inputs."""
    return tuple(
        site for site in _sites(spec, formats) if _Needs.of(_formats_at(spec, site, formats), options).anything
    )


class InputObserver:
    """The statistics of the input at a site that a method needs: maxima, percentiles, a sample, a Hessian.

    Args:
        name: of the site, for errors: 'blocks.3.mlp.up'.
        spec, site, formats, options: as for `quantize_layers`.
    """

    def __init__(self, name: str, spec: ModelSpec, site: Site, formats: Formats, options: MethodOptions) -> None:
        channels, needs = width(spec, site), _Needs.of(_formats_at(spec, site, formats), options)
        self.maximum = MaxObserver(name, channels)
        self.percentile = PercentileObserver(name, channels) if needs.percentile else None
        self.sample = TokenSample(name, channels, size=options.sample) if needs.sample else None
        self.hessian = Hessian(name, channels) if needs.hessian else None

    def observe(self, x: Tensor) -> None:
        """x: [..., width], real tokens only.  Raises LogitLockError: NaN or infinity, with the name."""
        self.maximum.observe(x)
        for observer in (self.percentile, self.sample, self.hessian):
            if observer is not None:
                observer.observe(x)

    def merge(self, other: InputObserver) -> None:
        self.maximum.merge(other.maximum)
        if self.percentile is not None and other.percentile is not None:
            self.percentile.merge(other.percentile)
        if self.sample is not None and other.sample is not None:
            self.sample.merge(other.sample)
        if self.hessian is not None and other.hessian is not None:
            self.hessian.merge(other.hessian)


@dataclass(frozen=True, kw_only=True)
class _Needs:
    """How a method uses the inputs at a site; their maximum is cheap and always kept."""

    static: bool
    smoothing: bool
    percentile: bool
    sample: bool
    hessian: bool

    @classmethod
    def of(cls, formats: list[LinearFormat], options: MethodOptions) -> _Needs:
        static = any(_static(linear) for linear in formats)
        coded = any(linear.input is not None for linear in formats)
        return cls(
            static=static,
            smoothing=coded and options.method == "smoothquant",
            percentile=static and options.percentile < 100,
            sample=options.method == "awq" and bool(formats) and not coded,
            hessian=options.method == "gptq" and bool(formats),
        )

    @property
    def anything(self) -> bool:
        return self.static or self.smoothing or self.sample or self.hessian


def quantize_layers(
    spec: ModelSpec,
    parameters: Mapping[str, Tensor],
    inputs: Mapping[Site, InputObserver],
    formats: Formats,
    options: MethodOptions,
) -> QuantizedLayers:
    """Quantize the linears of one block, or the head.

    Args:
        parameters: floats of the block ('attn_norm.weight', 'attn.qkv.weight', ...), or 'final_norm.*' and
            'head.weight'; not altered.
        inputs: observers of `observed_sites`, on any device.
        formats: of the linears to quantize.
    Raises:
        LogitLockError: inputs were not observed, or the method raises it; the message has the layer's name.
    """
    floats = dict(parameters)
    result = QuantizedLayers(parameters=floats, weights={})
    for site in _sites(spec, formats):
        try:
            scale = _find_scale(spec, site, floats, inputs, formats, options, result)
            if scale is not None:
                floats.update(fold(spec, site, scale, floats))
                result.folded[site] = scale
        except LogitLockError as error:
            raise LogitLockError(f"{site}: {error}") from None
    for site in _sites(spec, formats):
        try:
            _round_site(spec, site, parameters, inputs, formats, options, result)
        except LogitLockError as error:
            raise LogitLockError(f"{site}: {error}") from None
    return result


def _find_scale(
    spec: ModelSpec,
    site: Site,
    floats: Mapping[str, Tensor],
    inputs: Mapping[Site, InputObserver],
    formats: Formats,
    options: MethodOptions,
    result: QuantizedLayers,
) -> Tensor | None:
    """The scale that the method gives the input at a site; None: it stays as it is."""
    needs = _Needs.of(_formats_at(spec, site, formats), options)
    names = readers(spec, site)
    weights = [floats[f"{name}.weight"] for name in names]
    device = weights[0].device
    if not can_fold(spec, site):
        return None
    if needs.sample:
        observer = _observed(inputs, site)
        found = search_scale(
            weights,
            observer.sample.tokens.to(device) if observer.sample is not None else torch.empty(0),
            [formats.get(name) for name in names],
            magnitude=observer.maximum.mean.to(device),
            share=partial(share, spec, site),
            grid=options.grid,
        )
        result.awq[site] = found
        return found.scale if found.alpha or found.by_weight else None
    if needs.smoothing:
        largest = share(spec, site, _observed(inputs, site).maximum.channel.to(device))
        return share(spec, site, smooth_scale(weights, largest, alpha=options.alpha))
    return None


def _round_site(
    spec: ModelSpec,
    site: Site,
    parameters: Mapping[str, Tensor],
    inputs: Mapping[Site, InputObserver],
    formats: Formats,
    options: MethodOptions,
    result: QuantizedLayers,
) -> None:
    """Quantize the weights at a site; readers of one format are one weight, since rows are independent."""
    by_format: dict[LinearFormat, list[str]] = {}
    for name in readers(spec, site):
        linear = formats.get(name)
        if linear is not None:
            by_format.setdefault(linear, []).append(name)
    needs = _Needs.of(list(by_format), options)
    observer = _observed(inputs, site) if needs.anything else inputs.get(site)
    divisor = result.folded.get(site)
    for linear, names in by_format.items():
        weights = [result.parameters.pop(f"{name}.weight") for name in names]
        rows = [len(weight) for weight in weights]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        gram = None
        if needs.hessian and observer is not None and observer.hessian is not None:
            gram = observer.hessian.matrix.to(weight.device)
            quantized = _gptq(weight, gram, linear, options)
        elif needs.sample and observer is not None and observer.sample is not None:
            x = observer.sample.tokens.to(weight.device)
            gram = x.t() @ x
            scale, zero = weight_scale(weight, linear)
            if options.clip is not False:
                folded = x if divisor is None else x / divisor
                scale, zero = search_clip(weight, folded, linear, grid=options.grid)
            quantized = _nearest(weight, linear, options, scale, zero)
        else:
            quantized = _nearest(weight, linear, options)
        for name, part in zip(names, _split(quantized, rows), strict=True):
            result.weights[name] = part
            result.reports[name] = _report(
                spec, name, parameters[f"{name}.weight"], part, gram, result, options, linear
            )
            if observer is not None and _static(linear):
                result.input_scales[name] = _input_scale(observer, divisor, linear, options)


def _report(
    spec: ModelSpec,
    name: str,
    original: Tensor,
    quantized: QuantizedWeight,
    gram: Tensor | None,
    result: QuantizedLayers,
    options: MethodOptions,
    linear: LinearFormat,
) -> LayerReport:
    if gram is None:
        return LayerReport(error=None, nearest_error=None)
    undone = quantized.dequantized().to(gram.dtype)
    for site, scale in result.folded.items():
        if name in readers(spec, site):
            undone = undone / scale
        producer, rows = divided(spec, site, scale)
        if name == producer:
            undone = undone * rows[:, None]
    nearest = _nearest(original, linear, options).dequantized()
    whole = layer_error(original, torch.zeros_like(original), gram) or 1.0
    return LayerReport(
        error=layer_error(original, undone, gram) / whole, nearest_error=layer_error(original, nearest, gram) / whole
    )


def _gptq(weight: Tensor, hessian: Tensor, linear: LinearFormat, options: MethodOptions) -> QuantizedWeight:
    """The weight by GPTQ; with `clip`, each row by clipped scales where their error is lower."""
    run = partial(
        gptq, weight, hessian, linear, act_order=options.act_order, damping=options.damping, block=options.block
    )
    if _per_tensor(linear, options):
        return run(scale=_covering(weight, linear, options)[0]).weight
    plain = run().weight
    if not options.clip:
        return plain
    # The search uses inner products of the inputs only, however they are quantized later.
    sample = damped_root(hessian, options.damping)
    scale, zero = search_clip(weight, sample, replace(linear, input=None), grid=options.grid)
    clipped = run(scale=scale, zero=zero).weight
    lower = row_errors(weight, clipped.dequantized(), hessian) < row_errors(weight, plain.dequantized(), hessian)

    def chosen(one: Tensor, other: Tensor) -> Tensor:
        # As bytes: float8 cannot be selected everywhere.
        rows = torch.where(lower[:, None], one.view(torch.uint8), other.view(torch.uint8))
        return rows.view(one.dtype)

    zeros = None if plain.zero is None or clipped.zero is None else chosen(clipped.zero, plain.zero)
    return QuantizedWeight(
        codes=chosen(clipped.codes, plain.codes), scale=chosen(clipped.scale, plain.scale), zero=zeros
    )


def _nearest(
    weight: Tensor,
    linear: LinearFormat,
    options: MethodOptions,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> QuantizedWeight:
    if scale is None:
        scale, zero = _covering(weight, linear, options)
    return quantize_weight(weight, linear, scale=scale, zero=zero)


def _covering(weight: Tensor, linear: LinearFormat, options: MethodOptions) -> tuple[Tensor, Tensor | None]:
    """The scales [out, groups] of `weight_scale`, all equal with `per_tensor`; and zero points."""
    scale, zero = weight_scale(weight, linear)
    return (scale.amax().expand_as(scale) if _per_tensor(linear, options) else scale), zero


def _per_tensor(linear: LinearFormat, options: MethodOptions) -> bool:
    return options.per_tensor and linear.weight == "fp8" and _static(linear)


def _split(quantized: QuantizedWeight, rows: list[int]) -> list[QuantizedWeight]:
    zeros = [None] * len(rows) if quantized.zero is None else quantized.zero.split(rows)
    pieces = zip(quantized.codes.split(rows), quantized.scale.split(rows), zeros, strict=True)
    return [QuantizedWeight(codes=codes, scale=scale, zero=zero) for codes, scale, zero in pieces]


def _input_scale(
    observer: InputObserver, divisor: Tensor | None, linear: LinearFormat, options: MethodOptions
) -> Tensor:
    assert linear.input is not None
    if observer.percentile is not None:
        found = observer.percentile.percentile(
            options.percentile, divisor=None if divisor is None else divisor.to(observer.maximum.channel.device)
        )[0]
    else:
        channel = observer.maximum.channel
        found = (channel if divisor is None else channel / divisor.to(channel.device)).amax()
    return (found / LIMITS[linear.input]).clamp(min=LEAST_SCALE)


def _static(linear: LinearFormat) -> bool:
    return linear.input is not None and linear.input_scale == "tensor"


def _sites(spec: ModelSpec, formats: Formats) -> tuple[Site, ...]:
    sites: tuple[Site, ...] = (*BLOCK_SITES, "head")
    return tuple(site for site in sites if _formats_at(spec, site, formats))


def _formats_at(spec: ModelSpec, site: Site, formats: Formats) -> list[LinearFormat]:
    found = (formats.get(name) for name in readers(spec, site))
    return [linear for linear in found if linear is not None]


def _observed(inputs: Mapping[Site, InputObserver], site: Site) -> InputObserver:
    if site not in inputs:
        raise LogitLockError("its input was not observed; calibration must feed it")
    return inputs[site]
