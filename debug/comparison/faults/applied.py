"""Functions applied to the right output of any module: limits, caps, constants, orders of channels, dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from debug.comparison.faults.catalogue import Detail, Fit
from debug.comparison.faults.numbers import minimize, soft_cap

_APPLIED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "magnitude": torch.abs,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1),
    "log-softmax": lambda x: x.log_softmax(-1),
    "rms normalization": lambda x: x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30),
    "normalization to length 1": lambda x: F.normalize(x, dim=-1),
    "subtraction of the mean": lambda x: x - x.mean(-1, keepdim=True),
}
_MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "in reverse order": lambda x: x.flip(-1),
    "shifted by +1": lambda x: x.roll(1, -1),
    "shifted by -1": lambda x: x.roll(-1, -1),
    "halves exchanged": lambda x: x.roll(x.shape[-1] // 2, -1),
    "even ones first": lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1),
}


def applied(expected: Tensor, right: Tensor, rows: Tensor, engine: Tensor) -> Iterator[tuple[Detail, Tensor]]:
    """(fault, output); right, rows: the real tokens of `expected` and of `engine`."""
    for name, function in _APPLIED.items():
        yield f"{name} applied to the output", function(expected)
    for name, function in _MOVED.items():
        yield f"channels of the output {name}", function(expected)
    if not rows.numel() or not bool(torch.isfinite(rows).all()):
        return
    made: list[tuple[str, Callable[[float], Tensor], float]] = [
        ("output clamped at {}", lambda c: expected.clamp(-abs(c), abs(c)), float(rows.abs().max())),
        ("output limited to at most {}", lambda c: expected.clamp(max=c), float(rows.max())),
        ("output limited to at least {}", lambda c: expected.clamp(min=c), float(rows.min())),
        ("{} added to the output", lambda c: expected + c, float((rows - right).mean())),
    ]
    largest = float(right.abs().max())
    if largest > 0:
        cap = minimize(lambda c: float((soft_cap(right, c) - rows).norm()), largest / 20, largest * 10)
        made.append(("output soft-capped at {}", lambda c: soft_cap(expected, c), cap))
    for words, change, value in made:
        yield Fit(words=words, value=value, changes=partial(_output, change)), change(value)
    share = float((rows == 0).double().mean())
    if 0.005 < share < 0.95 and not bool((right == 0).any()):
        kept = rows != 0
        scaled = float((rows[kept] * right[kept]).sum() / right[kept].square().sum())
        for factor, more in ((1.0, ""), (scaled, f" and the others scaled by {scaled:.4g} (dropout left on?)")):
            fit = Fit(words=f"{share:.0%} of the elements zero{more}", numbers=3, key=f"elements zero{bool(more)}")
            yield fit, torch.where(engine == 0, torch.zeros_like(expected), expected * factor)


def _output(change: Callable[[float], Tensor], value: float) -> dict[str, Any]:
    return {"output": change(value)}
