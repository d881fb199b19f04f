"""Why a module is wrong: try every known fault on the reference module and see which one makes the engine right.

The module runs in fp64 on the inputs that the engine showed.  A fault is named if, with it, the engine's output is
within the same multiple of the noise floor that a healthy module is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from debug.capture import Forward
from debug.faults import CATALOGUE
from debug.metrics import ErrorStats, compare
from debug.modules import Module, module_at
from debug.results import Diagnosis
from refmodels.model import Decoder
from refmodels.taps import is_cache_tap

_MOST = 5
"""Diagnoses to give for one tap: two faults can be the same on these inputs, but a long list says nothing."""
_ALIKE = 1.5
"""Local errors within this factor say nothing about which of two faults it is."""


def diagnose(
    tap: str, forward: Forward, truth: Decoder, rounded: Decoder, *, bound: float, multiple: float, dtype: torch.dtype
) -> list[Diagnosis]:
    """The faults that explain the engine's output at `tap`, the best one first; none: unknown.

    Args:
        tap, forward: the culprit and a forward in which it is wrong.
        truth, rounded: the reference in fp64 and in the engine's dtype and numerics.
        bound: the least relative floor of the tap (`debug.diff.lower_bound`).
        multiple: noise floors that a healthy module may be off.
        dtype: of the engine.
    """
    module = module_at(truth, tap, forward)
    engine = forward.tensors[tap].to(truth.device, torch.float64)
    expected = module()
    before = _compare(engine, expected, module, dtype)
    floor = _compare(module_at(rounded, tap, forward)(), expected, module, dtype)
    # Per token, absolute: a fault may make the output longer or shorter, the rounding of its inputs stays.
    whole = max(floor.rel_l2 if floor.rel_l2 == floor.rel_l2 else 0.0, bound)
    allowed = floor.token_rel.nan_to_num(nan=0.0, posinf=0.0).clamp(min=whole)
    size = _token_norms(expected, module)
    found = []
    for fault in CATALOGUE:
        if fault.kind != module.kind:
            continue
        for detail, changes in fault.variants(module, engine):
            output = module(**changes)
            after = _compare(engine, output, module, dtype)
            limit = torch.maximum(allowed, allowed * size / _token_norms(output, module).clamp(min=1e-300))
            ratio = float((after.token_rel / limit).nan_to_num(nan=float("inf")).max())
            if ratio <= multiple and after.rel_l2 < before.rel_l2:
                name = fault.name + (f": {detail}" if detail else "")
                found.append(
                    Diagnosis(fault=name, local_before=before.rel_l2, local_after=after.rel_l2, ratio_after=ratio)
                )
    best = min((d.local_after for d in found), default=0.0)
    # Those that explain it equally well stay in the order of the catalogue, in which exact faults precede estimates.
    return sorted(found, key=lambda d: max(d.local_after, _ALIKE * best))[:_MOST]


def _compare(actual: Tensor, expected: Tensor, module: Module, dtype: torch.dtype) -> ErrorStats:
    return compare(_by_token(actual, module), _by_token(expected, module), _real(module), dtype)


def _by_token(tensor: Tensor, module: Module) -> Tensor:
    """A cache tensor counts by slot: [batch, slots, kv_heads, head_dim]."""
    if not is_cache_tap(module.tap):
        return tensor
    return tensor[:, :, : module.forward.plan.attention_mask.shape[1]].transpose(1, 2)


def _real(module: Module) -> Tensor:
    plan = module.forward.plan
    return plan.attention_mask != 0 if is_cache_tap(module.tap) else plan.new_mask


def _token_norms(tensor: Tensor, module: Module) -> Tensor:
    rows = _by_token(tensor, module)[_real(module)].double().flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms
