"""Faults that any module can have: its output is scaled, moved or rounded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from debug.comparison.faults.applied import applied
from debug.comparison.faults.catalogue import Detail, Fit
from debug.comparison.faults.parts import rounded_bits
from debug.comparison.modules import Module
from refmodels.dtypes import torch_name, unit_roundoff
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
    right, found = _real_rows(module, expected), _real_rows(module, engine)
    size = float(right.square().sum())
    factor = float((right * found).sum()) / size if size else 1.0
    if factor > 0:
        words = "output scaled by {}"
        yield Fit(words=words, value=factor, changes=lambda f: {"output": expected * f}), expected * factor
    axis = 2 if is_cache_tap(module.tap) else 1
    if expected.shape[axis] > 1:
        for shift in (1, -1):
            yield f"tokens moved by {shift:+d}", expected.roll(shift, axis)
        for place, index in (("first", 0), ("last", -1)):
            yield (
                f"the {place} token's for all tokens",
                expected.select(axis, index).unsqueeze(axis).expand_as(expected),
            )
    yield from applied(expected, right, found, engine)
    heads = _heads_exchanged(module, expected, engine)
    if heads is not None:
        yield heads
    batch = len(expected)
    for order in itertools.islice(itertools.permutations(range(batch)), 1, 24 if batch > 1 else 1):
        yield f"rows of the batch exchanged: {list(order)}", expected[list(order)]


def _real_rows(module: Module, tensor: Tensor) -> Tensor:
    inputs = module.forward.inputs
    if not is_cache_tap(module.tap):
        return tensor[inputs.new_mask]
    mask = inputs.attention_mask != 0
    return tensor.transpose(1, 2)[:, : mask.shape[1]][mask].flatten(1)


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


def on_a_grid(engine: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[str, Tensor] | None:
    """(name, right output on that grid) if the engine's numbers are steps of one size, or have a short mantissa.

    engine, expected: rows of real tokens, fp64.
    """
    unit = unit_roundoff(dtype)
    levels = engine.unique()
    if engine.numel() > 16 * len(levels) and 1 < len(levels) <= 256:
        step = float((levels[1:] - levels[:-1]).min())
        low, high = float(levels[0]), float(levels[-1])
        if float((levels / step - (levels / step).round()).abs().max()) < 0.25:
            rounded = ((expected / step).round() * step).clamp(low, high)
            bits = max(1, int((high - low) / step).bit_length())
            return f"output quantized to {bits} bits, in steps of {step:.4g}", rounded
    largest = engine.abs().max()
    for narrow, limit in ((torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)):
        scale = largest / limit
        shown = (engine / scale).float().to(narrow).double() * scale
        if bool(((shown - engine).abs() <= 2 * unit * engine.abs() + unit * scale).all()):
            rounded = (expected / scale).clamp(-limit, limit).float().to(narrow).double() * scale
            return f"output rounded to {torch_name(narrow)} with one scale for all", rounded
    mantissa, _ = torch.frexp(engine)
    for bits in range(1, 12 if dtype == torch.float32 else 0):
        scaled = mantissa * 2.0 ** (bits + 1)
        if torch.equal(scaled, scaled.round()):
            name = f"output rounded to {bits} bits of mantissa{' (TF32)' if bits == 10 else ''}"
            return name, rounded_bits(expected, bits)
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
