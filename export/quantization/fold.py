"""Folding a scale of input channels into the layer before: W x = (W s) (x / s), without a division at run time.

    site        read by            x / s comes from
    attn.qkv    attn.qkv           attn_norm: weight and bias / s
    attn.out    attn.out           value rows of attn.qkv / s: the context of a head is a mean of its values
    mlp.up      mlp.gate, mlp.up   mlp_norm: weight and bias / s
    mlp.out     mlp.out            rows of mlp.up / s, where the MLP is gated: act(gate) * up is linear in up
    head        head               final_norm: weight and bias / s, where the head is not tied

A site has the name of the linear that reads it (the last one in `Decoder`'s order).  Query heads that share a value
head share its rows, and so their scales (`share`).  In an MLP without gate a non-linear function lies between mlp.up
and mlp.out; nothing before it can divide its result by a scale, so that mlp.out keeps its input.

Sites, parameters and linears are named as in `Decoder`, relative to the block; those of the head are
'final_norm.weight' and 'head.weight'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from refmodels.dtypes import wide_dtype
from refmodels.errors import LogitLockError
from refmodels.spec import ModelSpec
from refmodels.taps import Tap

Site = Literal["attn.qkv", "attn.out", "mlp.up", "mlp.out", "head"]

BLOCK_SITES: tuple[Site, ...] = ("attn.qkv", "attn.out", "mlp.up", "mlp.out")
"""In the order of execution."""


def readers(spec: ModelSpec, site: Site) -> tuple[str, ...]:
    """The linears that read the input at a site."""
    read = _input(spec, site).name
    return tuple(_name(tap) for tap in spec.taps.values() if tap.kind == "linear" and read in tap.reads)


def input_tap(spec: ModelSpec, site: Site) -> str:
    """The tap that is the input at a site, relative to the block; 'final_norm' is the model's."""
    return _name(_input(spec, site))


def width(spec: ModelSpec, site: Site) -> int:
    """Channels of the input at a site."""
    return _input(spec, site).width


def _input(spec: ModelSpec, site: Site) -> Tap:
    # All blocks are alike.
    reader = spec.taps["logits" if site == "head" else f"blocks.0.{site}"]
    return spec.taps[reader.reads[0]]


def _producer(spec: ModelSpec, site: Site) -> str:
    """The norm or linear whose output, or a function of it without parameters, is the input at a site."""
    tap = _input(spec, site)
    while tap.kind not in ("norm", "linear"):
        tap = spec.taps[tap.reads[-1]]
    return _name(tap)


def _name(tap: Tap) -> str:
    return tap.module if tap.layer is None else tap.part


def can_fold(spec: ModelSpec, site: Site) -> bool:
    """Whether a scale of this input can be folded into the layer that produces it."""
    if site == "head":
        return not spec.tied_head
    return site != "mlp.out" or spec.mlp.gated


def share(spec: ModelSpec, site: Site, statistic: Tensor) -> Tensor:
    """A statistic of channels, [width], made equal where channels must share a scale: the largest of those.

    At 'attn.out' with fewer kv heads than heads, channel d of all query heads that read one value head shares it.
    """
    a = spec.attention
    if site != "attn.out" or a.heads == a.kv_heads:
        return statistic
    shape = (a.kv_heads, a.heads // a.kv_heads, a.head_dim)
    return statistic.view(shape).amax(1, keepdim=True).expand(shape).reshape(-1)


def fold(spec: ModelSpec, site: Site, scale: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that change when the input at `site` is divided by `scale` and its readers multiply by it.

    Args:
        scale: [width], positive; equal where channels share (as from `share`).
        parameters: those of the block (or of the head), any float dtype; biases may be absent.
    Returns: new tensors by name, in the dtypes of the old ones (products are wide, rounded once).
    Raises:
        LogitLockError: the site cannot be folded, or the scale is not positive, finite, shared, or of this width.
    """
    if not can_fold(spec, site):
        raise LogitLockError(
            f"a scale of the input of {site} in {spec.variant} cannot be folded into what comes before it"
        )
    if scale.shape != (width(spec, site),):
        raise LogitLockError(f"the input of {site} has {width(spec, site)} channels; the scale is {list(scale.shape)}")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise LogitLockError(f"a scale of the input of {site} is not positive and finite")
    if not torch.equal(share(spec, site, scale), scale):
        raise LogitLockError(f"query heads that share a value head must share the scales of {site}")
    changed = {f"{name}.weight": _times(parameters[f"{name}.weight"], scale) for name in readers(spec, site)}
    producer, rows = divided(spec, site, scale)
    for leaf in ("weight", "bias"):
        name = f"{producer}.{leaf}"
        if name in parameters:
            old = parameters[name]
            changed[name] = _times(old, rows.reciprocal()[:, None] if old.ndim == 2 else rows.reciprocal())
    return changed


def divided(spec: ModelSpec, site: Site, scale: Tensor) -> tuple[str, Tensor]:
    """The layer that produces the input at `site`, and the divisor of its rows (of a norm's elements) for a scale
    [width]."""
    if site != "attn.out":
        return _producer(spec, site), scale
    # Queries and keys stay as they are; a value row is read by all query heads of its group, at equal scales.
    value = scale.view(spec.attention.kv_heads, -1, spec.attention.head_dim)[:, 0].reshape(-1)
    return _producer(spec, site), torch.cat((value.new_ones(spec.qkv_width - len(value)), value))


def _times(parameter: Tensor, factor: Tensor) -> Tensor:
    wide = wide_dtype(parameter.dtype)
    return (parameter.to(wide) * factor.to(wide)).to(parameter.dtype)
