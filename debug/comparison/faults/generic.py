"""Faults that any module can have: its output is scaled, moved or rounded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import Detail, Fit
from debug.comparison.modules import Module
from refmodels.dtypes import unit_roundoff
from refmodels.taps import is_cache_tap

_LOWER = {
    torch.float32: (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16),
    torch.float16: (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16),
    torch.bfloat16: (torch.float8_e4m3fn, torch.float8_e5m2),
}
"""The narrowest first: a number of a narrow dtype is one of a wide dtype too."""
_NOISE = 4.0
"""Largest error of a rounded sum, as a multiple of a random walk of roundings: partial sums also grow."""
_PREDICTED = 0.9
"""An error is linear in the input if other tokens predict a fifth of its square."""


def transformed(module: Module, expected: Tensor, engine: Tensor) -> Iterator[tuple[Detail, Tensor]]:
    """(fault, output) for each way to change the right output of a module; shapes as those of its tap.

    expected, engine: the reference's and the engine's output, fp64.
    """
    yield "output missing (zero)", torch.zeros_like(expected)
    yield "sign of the output reversed", -expected
    size = float(expected.square().sum())
    factor = float((expected * engine).sum()) / size if size else 1.0
    if factor > 0:
        words = "output scaled by {}"
        yield Fit(words=words, value=factor, changes=lambda f: {"output": expected * f}), expected * factor
    axis = 2 if is_cache_tap(module.tap) else 1
    if expected.shape[axis] > 1:
        for shift in (1, -1):
            yield f"tokens moved by {shift:+d}", expected.roll(shift, axis)
    heads = _heads_exchanged(module, expected, engine)
    if heads is not None:
        yield heads
    batch = len(expected)
    for order in itertools.islice(itertools.permutations(range(batch)), 1, 24 if batch > 1 else 1):
        yield f"rows of the batch exchanged: {list(order)}", expected[list(order)]


def _heads_exchanged(module: Module, expected: Tensor, engine: Tensor) -> tuple[str, Tensor] | None:
    """The right heads in the engine's order, found from the correlation of each pair of heads."""
    if is_cache_tap(module.tap):
        right, found = (t.transpose(0, 1).flatten(1) for t in (expected, engine))
    elif module.part in ("attn.context", "attn.qkv"):
        dim = module.decoder.spec.attention.head_dim
        right, found = (t.unflatten(-1, (-1, dim)).movedim(2, 0).flatten(1) for t in (expected, engine))
    else:
        return None
    alike = (found @ right.t()) / (found.norm(dim=1)[:, None] * right.norm(dim=1)).clamp(min=1e-300)
    order = alike.argmax(1)
    if torch.equal(order, torch.arange(len(order), device=order.device)) or not bool(torch.isfinite(alike).all()):
        return None
    if is_cache_tap(module.tap):
        output = expected[:, order]
    else:
        output = expected.unflatten(-1, (-1, dim))[:, :, order].flatten(2)
    return f"heads in the order {order.tolist()}", output


def stored_as(engine: Tensor, dtype: torch.dtype) -> torch.dtype | None:
    """A narrower dtype that represents all of the engine's numbers, although it computes in `dtype`."""
    shown = engine.to(dtype)
    for narrow in _LOWER.get(dtype, ()):
        if bool(shown.any()) and torch.equal(shown.to(narrow).to(dtype), shown):
            return narrow
    return None


def rounded_sums(module: Module, off: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether an error looks like sums in the working dtype: noise, as large as a random walk of that many roundings.

    off, expected: rows of real tokens, fp64 [tokens, width].
    """
    if module.kind != "linear" or off.shape[0] < 8 or dtype == torch.float32:
        return False
    terms = module["weight"].shape[1]
    unit = unit_roundoff(dtype)
    relative = float(off.norm() / expected.norm())
    if not relative < _NOISE * unit * terms**0.5:
        return False
    # Noise has no direction: it is neither along the output nor equal in a channel for all tokens.
    along = float((off * expected).sum()) / float(off.norm() * expected.norm())
    steady = float(off.mean(0).norm()) * off.shape[0] ** 0.5 / float(off.std(0).norm())
    if not (abs(along) < 5 / off.numel() ** 0.5 + unit and steady < 1.5):
        return False
    return not _linear_in(module["input"][module.forward.inputs.new_mask].double(), off)


def _linear_in(x: Tensor, off: Tensor) -> bool:
    """Whether an error [tokens, out] is predicted by the input [tokens, in], each token's from the others'.

    Wrong weights make an error that is linear in the input; that of rounded sums is not.
    """
    kernel = x @ x.t()
    strength = float(kernel.diagonal().mean())
    for ridge in (1e-6, 1e-3, 1e-2, 0.1):
        hat = torch.linalg.solve(kernel + ridge * strength * torch.eye(len(x), dtype=x.dtype, device=x.device), kernel)
        # Leave-one-out residuals of a ridge regression in closed form.
        left = (off - hat @ off) / (1 - hat.diagonal()).clamp(min=1e-9)[:, None]
        if float(left.norm()) < _PREDICTED * float(off.norm()):
            return True
    return False
