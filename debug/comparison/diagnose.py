"""Why a module is wrong: try every known fault on the reference module, and see which one reproduces the engine.

The module runs in fp64 on the engine's own inputs.  A fault is named if, with it, the engine's output is within the
same multiple of the noise floor as a healthy module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from debug.capture.capture import Forward
from debug.comparison.faults import CATALOGUE
from debug.comparison.faults.generic import rounded_sums, stored_as, transformed
from debug.comparison.metrics import ErrorStats, compare
from debug.comparison.modules import Module, module_at
from debug.comparison.results import Diagnosis, Evidence, TokenView
from refmodels.dtypes import torch_name
from refmodels.model import Decoder
from refmodels.taps import is_cache_tap

_MOST = 5
"""Maximum number of diagnoses per tap: two faults may be equal on these inputs, but a long list does not help."""
_PAIRS = 3
"""If no single fault explains a module, the number of best faults that are tried in pairs."""
_ALIKE = 1.5
"""Local errors within this factor do not tell two faults apart."""


def diagnose(
    tap: str, forward: Forward, truth: Decoder, rounded: Decoder, *, bound: float, multiple: float, dtype: torch.dtype
) -> tuple[list[Diagnosis], Evidence]:
    """The faults that explain the engine's output at `tap`, the best one first (none: unknown), and where the error is.

    Args:
        tap, forward: the culprit and a forward in which it is wrong.
        truth, rounded: the reference in fp64 and in the engine's dtype and numerics.
        bound: the lower bound of the tap's relative floor (`debug.comparison.bounds.lower_bound`).
        multiple: number of noise floors that a healthy module may be off.
        dtype: the engine's dtype.
    """
    try:
        module = module_at(truth, tap, forward)
    except KeyError:
        # The executor does not record the module's inputs.
        return [], Evidence()
    engine = forward.tensors[tap].to(truth.device, torch.float64)
    expected = module()
    before = _compare(engine, expected, module, dtype)
    floor = _compare(module_at(rounded, tap, forward)(), expected, module, dtype)
    # Absolute, per token: a fault may make the output larger or smaller, but the rounding of its inputs stays.
    whole = max(floor.rel_l2 if floor.rel_l2 == floor.rel_l2 else 0.0, bound)
    allowed = floor.token_rel.nan_to_num(nan=0.0, posinf=0.0).clamp(min=whole)
    size = _token_norms(expected, module)

    def tried(name: str, output: Tensor) -> Diagnosis:
        after = _compare(engine, output, module, dtype)
        # An output that is all zero has only its own error.
        limit = torch.maximum(allowed, allowed * size / _token_norms(output, module).clamp(min=1e-300))
        ratio = float((after.token_rel / limit).nan_to_num(nan=float("inf")).max())
        return Diagnosis(fault=name, local_before=before.rel_l2, local_after=after.rel_l2, ratio_after=ratio)

    def explains(diagnosis: Diagnosis) -> bool:
        return diagnosis.ratio_after <= multiple and diagnosis.local_after < before.rel_l2

    single = [(tried(name, module(**changes)), changes) for name, changes in _faults(module, engine)]
    found = [diagnosis for diagnosis, _ in single if explains(diagnosis)]
    found += [d for name, output in transformed(module, expected, engine) if explains(d := tried(name, output))]
    if not found:
        found = _of_rounding(module, engine, expected, before, dtype)
    if not found:
        # Two faults in one module: combine each of the best faults with every other one.
        helping = sorted((s for s in single if s[0].local_after < before.rel_l2), key=lambda s: s[0].local_after)
        for first, changes in helping[:_PAIRS]:
            changed = replace(module, arguments={**module.arguments, **changes})
            for name, more in _faults(changed, engine):
                if more.keys().isdisjoint(changes) and explains(d := tried(f"{first.fault}; {name}", changed(**more))):
                    found.append(d)
    best = min((d.local_after for d in found), default=0.0)
    # Faults that explain it equally well stay in the order of the catalogue, in which exact faults precede estimates.
    found.sort(key=lambda d: max(d.local_after, _ALIKE * best))
    return found[:_MOST], _evidence(module, engine, expected, before, allowed)


def _faults(module: Module, engine: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and changed arguments of every fault of the module's kind."""
    for fault in CATALOGUE:
        if fault.kind == module.kind:
            for detail, changes in fault.variants(module, engine):
                yield fault.full_name(detail), changes


def _of_rounding(
    module: Module, engine: Tensor, expected: Tensor, before: ErrorStats, dtype: torch.dtype
) -> list[Diagnosis]:
    """Faults of rounding, which no exact output explains, recognized from the pattern of the error."""
    real = _real(module)
    shown, right = (_by_token(t, module)[real].flatten(1) for t in (engine, expected))
    narrow = stored_as(shown, dtype)
    if narrow is not None:
        name, after = f"output rounded to {torch_name(narrow)}", right.to(narrow).double()
    elif rounded_sums(module, shown - right, right, dtype):
        name, after = f"wrong dtype accumulate: sums rounded in {torch_name(dtype)}", right
    else:
        return []
    left = float((shown - after).norm() / right.norm())
    return [Diagnosis(fault=name, local_before=before.rel_l2, local_after=left, ratio_after=0.0)]


def _evidence(module: Module, engine: Tensor, expected: Tensor, before: ErrorStats, allowed: Tensor) -> Evidence:
    ratios = before.token_rel / allowed
    worst = ratios.nan_to_num(nan=float("inf")).argsort(descending=True)[:_MOST].tolist()
    tokens = [
        TokenView(
            row=int(before.token_of[i, 0]),
            position=int(before.token_of[i, 1]),
            local=float(before.token_rel[i]),
            ratio=float(ratios[i]),
        )
        for i in worst
    ]
    off, size = ((_by_token(t, module)[_real(module)]) for t in (engine - expected, expected))
    heads: list[float] = []
    names: list[str] = []
    if is_cache_tap(module.tap) or module.part in ("attn.qkv", "attn.context"):
        head_dim = module.decoder.spec.attention.head_dim
        errors, sizes = (t.reshape(len(t), -1, head_dim).square().sum((0, 2)).sqrt() for t in (off, size))
        heads = (errors / sizes.clamp(min=1e-300)).tolist()
        names = _head_names(module)
    shares = off.flatten(1).square().sum(0)
    shares = shares / shares.sum().clamp(min=1e-300)
    top = shares.topk(min(_MOST, len(shares)))
    channels = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    # Report channels only if a few of them stand out.
    few = float(top.values.sum()) > 0.5 and len(shares) > 4 * _MOST
    return Evidence(tokens=tokens, heads=heads, head_names=names, channels=channels if few else [])


def _head_names(module: Module) -> list[str]:
    attention = module.decoder.spec.attention
    queries = [f"query {i}" for i in range(attention.heads)]
    kinds = ("key", "value") if module.part == "attn.qkv" else (module.part,)
    others = [f"{kind} {i}" for kind in kinds for i in range(attention.kv_heads)]
    return queries + others if module.part == "attn.qkv" else others if is_cache_tap(module.tap) else queries


def _compare(actual: Tensor, expected: Tensor, module: Module, dtype: torch.dtype) -> ErrorStats:
    return compare(_by_token(actual, module), _by_token(expected, module), _real(module), dtype)


def _by_token(tensor: Tensor, module: Module) -> Tensor:
    """A cache tensor by slot: [batch, slots, kv_heads, head_dim]."""
    if not is_cache_tap(module.tap):
        return tensor
    return tensor[:, :, : module.forward.inputs.attention_mask.shape[1]].transpose(1, 2)


def _real(module: Module) -> Tensor:
    inputs = module.forward.inputs
    return inputs.attention_mask != 0 if is_cache_tap(module.tap) else inputs.new_mask


def _token_norms(tensor: Tensor, module: Module) -> Tensor:
    rows = _by_token(tensor, module)[_real(module)].double().flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms
