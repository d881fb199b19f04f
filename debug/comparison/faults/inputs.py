"""A module that reads another tensor than its own input: any tap of the same width, of any layer, or none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import Variants, fault
from debug.comparison.modules import Module
from refmodels.taps import is_cache_tap

_READS = {"norm": ("x",), "linear": ("input",), "activation": ("gate", "up"), "residual": ("x", "branch")}
_TAPS = 96
"""Largest number of other tensors that are tried: those of the nearest layers."""


def others(m: Module, argument: str) -> Iterator[tuple[str, Tensor]]:
    """Every tap of this width that is not what the module makes or reads, the nearest layers first."""
    right: Tensor = m[argument]
    taps = m.decoder.spec.taps
    own = taps[m.tap]
    here = own.layer if own.layer is not None else m.decoder.spec.layers
    read = own.reads[-1 if argument in ("up", "branch") else 0] if own.reads else None
    names = [n for n in m.forward.tensors if n in taps and not is_cache_tap(n) and taps[n].width == right.shape[-1]]
    names.sort(key=lambda n: abs(_layer(m, n) - here))
    for name in names[:_TAPS]:
        # The logits' input is selected from all tokens; its taps may have fewer.
        if name not in (m.tap, read) and m.forward.tensors[name].shape == right.shape:
            yield name, m.forward.tensors[name].to(right)


def _layer(m: Module, tap: str) -> int:
    layer = m.decoder.spec.taps[tap].layer
    return -1 if layer is None else layer


@fault("reads another tensor", "norm", "linear", "activation", "residual", first=True)
def other_input(m: Module, _: Tensor) -> Variants:
    for argument in _READS[m.kind]:
        if m[argument] is None:
            continue
        what = {"x": "the residual" if m.kind == "residual" else "the input"}.get(argument, f"the {argument}")
        for name, tensor in others(m, argument):
            yield f"{name} as {what}", {argument: tensor}


@fault("reads the input of another token", "norm", "linear", "activation", "residual")
def other_token(m: Module, _: Tensor) -> Variants:
    for argument in _READS[m.kind]:
        x = m[argument]
        if x is None or x.shape[1] < 2 or len(_READS[m.kind]) == 1:
            continue
        for shift in (1, -1):
            yield f"the {argument} is moved by {shift:+d}", {argument: x.roll(shift, 1)}


@fault("a norm of the input is missing or too many", "linear", "residual")
def normed_input(m: Module, _: Tensor) -> Variants:
    """A module that is given its input normalized once more, or the sum normalized after it (post-norm)."""
    size = m.decoder.spec.hidden_size
    norms = [(n, mod) for n, mod in m.decoder.named_modules() if n.endswith("norm") and n.startswith(_near(m))]
    # Those of heads are narrower.
    norms = [(name, module) for name, module in norms if next(module.parameters()).shape[-1] == size]
    for argument in _READS[m.kind]:
        for name, module in norms:
            if next(module.parameters()).is_meta or m[argument].shape[-1] != size:
                continue
            yield f"{argument} normalized by {name}", {argument: module(m[argument])}
    if m.kind == "residual":
        for name, module in norms:
            if not next(module.parameters()).is_meta:
                yield f"the sum normalized by {name}", {"x": module(m()), "branch": torch.zeros_like(m["branch"])}


def _near(m: Module) -> str:
    return f"blocks.{m.layer}." if m.layer is not None else "final_norm"


@fault("cache rows of the batch exchanged", "attention")
def new_rows(m: Module, _: Tensor) -> Variants:
    """The new entries of the cache, unlike the cache itself, are those of other rows."""
    batch = len(m["qkv"])
    if m.part == "attn.context" or batch < 2:
        return
    for order in itertools.islice(itertools.permutations(range(batch)), 1, 24):
        moved = {n: m[n][list(order)] for n in ("qkv", "cos", "sin") if m[n] is not None}
        yield f"{list(order)}, new entries", moved
