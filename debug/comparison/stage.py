"""One run of a wrong module on the engine's inputs, and how far an output is from the engine's, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from debug.capture.capture import Forward
from debug.comparison.joined import join, places_of
from debug.comparison.modules import Module, module_at
from refmodels.model import Decoder
from refmodels.taps import is_cache_tap

_WORK = 4e9
"""Largest number of multiplications per hypothesis: a fraction of a second in fp64 on one core.  A linear layer of a
large model is searched on fewer tokens, and what is found is checked on all."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A module in one forward pass, or in several joined.

    engine, expected: the engine's and the reference's output, fp64, in the shape of the tap.  allowed: [tokens] noise
    floor relative to the token's size.  before: [tokens] local error in floors.  place: [tokens, 3] step, row and slot.
    """

    module: Module
    engine: Tensor
    expected: Tensor
    allowed: Tensor
    size: Tensor
    before: Tensor
    place: Tensor

    @property
    def real(self) -> Tensor:
        return real_tokens(self.module)

    def rows(self, tensor: Tensor) -> Tensor:
        """The real tokens, fp64 [tokens, width]."""
        return by_token(tensor, self.module)[self.real].double().flatten(1)

    def errors(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[tokens] each: error of the engine against `output`, its floor, size of `output`; all absolute."""
        rows = self.rows(output)
        off, size = torch.linalg.vector_norm(self.rows(self.engine) - rows, dim=1), rows.norm(dim=1)
        # Absolute, per token: a fault may make the output larger or smaller, but the rounding of its inputs stays.
        return off, self.allowed * torch.maximum(size, self.size), size


def stages_of(
    tap: str,
    forwards: Sequence[Forward],
    truth: Decoder,
    rounded: Decoder,
    *,
    bounds: Sequence[float],
    multiple: float,
) -> list[Stage]:
    """The module in all forwards, first the one on which hypotheses are made: in it the module is wrong.

    Args:
        bounds: lower bound of the relative noise floor in each forward.
    Raises:
        KeyError: the executor does not record the module's inputs.
    """
    each = [_stage(tap, f, truth, rounded, b) for f, b in zip(forwards, bounds, strict=True)]
    wrong = [bool((s.before > multiple).any()) for s in each]
    if truth.spec.taps[tap].kind in ("cache", "attention"):
        # The first wrong one; among the others the wrong ones, which exclude more.
        return sorted(each, key=lambda s: not bool((s.before > multiple).any()))
    groups = [[f for f, w in zip(forwards, wrong, strict=True) if w is kind] for kind in (True, False)]
    bound = max(bounds)
    joined = [_stage(tap, join(g), truth, rounded, bound) for g in groups if g]
    first = joined[0]
    bad = first.before > multiple
    if bool(bad.any()) and not bool(bad.all()):
        # Only some tokens are wrong: fit to these.
        where = first.real.nonzero()[bad.cpu()]
        mask = torch.zeros_like(first.real)
        mask[where[:, 0], where[:, 1]] = True
        forward = first.module.forward
        forward = dataclasses.replace(forward, inputs=dataclasses.replace(forward.inputs, new_mask=mask))
        joined.insert(0, _stage(tap, forward, truth, rounded, bound))
        return joined
    if first.module.kind == "linear":
        work = first.module["weight"].numel() * first.engine.shape[0]
        most = max(8, int(_WORK / work))
        if most < first.engine.shape[1]:
            bad = (first.before > multiple).nonzero()
            columns = first.real.nonzero()[:, 1]
            start = int(columns[bad].min()) if len(bad) else 0
            start = max(0, min(start, first.engine.shape[1] - most))
            joined.insert(0, _stage(tap, join(groups[0], slice(start, start + most)), truth, rounded, bound))
    return joined


def _stage(tap: str, forward: Forward, truth: Decoder, rounded: Decoder, bound: float) -> Stage:
    module = module_at(truth, tap, forward)
    engine = forward.tensors[tap].to(truth.device, torch.float64)
    expected = module().double()
    real = real_tokens(module)
    own, right, floor = (
        by_token(t, module)[real].double().flatten(1) for t in (engine, expected, module_at(rounded, tap, forward)())
    )
    size = right.norm(dim=1)
    tiny = torch.finfo(forward.tensors[tap].dtype).smallest_normal if forward.tensors[tap].is_floating_point() else 0.0
    scale = size.clamp(min=max(tiny, 1e-300))
    noise = (floor - right).norm(dim=1)
    whole = float(noise.norm() / scale.norm())
    # For a token whose floor happens to be small, the floor of the whole tensor counts.
    allowed = (noise / scale).nan_to_num(nan=0.0, posinf=0.0).clamp(min=max(whole if whole == whole else 0.0, bound))
    before = (own - right).norm(dim=1) / (allowed * scale)
    return Stage(
        module=module,
        engine=engine,
        expected=expected,
        allowed=allowed,
        size=scale,
        before=before.nan_to_num(nan=float("inf")),
        place=_places(module),
    )


def _places(module: Module) -> Tensor:
    """Step, row and slot of each real token."""
    rows, columns = real_tokens(module).nonzero().unbind(1)
    forward = module.forward
    if is_cache_tap(module.tap):
        return torch.stack([torch.full_like(rows, forward.step), rows, columns], 1)
    step, slot = places_of(forward)
    return torch.stack([step[columns], rows, slot[rows, columns]], 1)


def by_token(tensor: Tensor, module: Module) -> Tensor:
    """A cache tensor by slot: [batch, slots, kv_heads, head_dim]."""
    if not is_cache_tap(module.tap):
        return tensor
    return tensor[:, :, : module.forward.inputs.attention_mask.shape[1]].transpose(1, 2)


def real_tokens(module: Module) -> Tensor:
    inputs = module.forward.inputs
    return inputs.attention_mask != 0 if is_cache_tap(module.tap) else inputs.new_mask
