"""The search for a single number."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def minimize(f: Callable[[float], float], low: float, high: float) -> float:
    """The place of the smallest f on a logarithmic scale: on a grid, then by golden section around the best."""
    count = 24
    grid = [low * (high / low) ** (i / count) for i in range(count + 1)]
    values = [f(x) for x in grid]
    best = values.index(min(values))
    a, b = (math.log(grid[max(0, min(i, count))]) for i in (best - 1, best + 1))
    golden = (math.sqrt(5) - 1) / 2
    x, y = b - golden * (b - a), a + golden * (b - a)
    fx, fy = f(math.exp(x)), f(math.exp(y))
    for _ in range(40):
        if fx < fy:
            b, y, fy = y, x, fx
            x = b - golden * (b - a)
            fx = f(math.exp(x))
        else:
            a, x, fx = x, y, fy
            y = a + golden * (b - a)
            fy = f(math.exp(y))
    return math.exp((a + b) / 2)
