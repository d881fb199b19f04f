"""A linear layer's inputs and outputs over all tokens, and the regression of its weight from them."""

from __future__ import annotations

import torch
from torch import Tensor

from debug.comparison.faults.parts import real_rows
from debug.comparison.modules import Module
from refmodels.dtypes import unit_roundoff

COLUMNS = 2048
"""Largest number of input channels for which factors per channel are solved for: the cost is its cube."""
ROWS = 1 << 15
"""Largest number of outputs that are looked up among the rows of all matrices; the head of a large model has more."""
SMALL = 1 << 18
"""Up to this many weights, every hypothesis is tried on all of them; of larger weights first on a block of rows."""
LARGEST = 1 << 26
"""Above this many weights (the head of a large vocabulary), only fits of its outputs are made: each hypothesis about
the weight is a copy of it in fp64."""
_BLOCK = 1 << 16
"""Number of weights on which a hypothesis is tried first: hundreds then take a fraction of a second."""
_PROMISING = 0.7
"""A weight that is not the right one makes an error of its own, and leaves more than there was."""
CLOSE = 8.0
"""Roundings of the working dtype, and of the sums, that a fitted factor may be off."""


class Pairs:
    """Inputs and outputs of a linear layer over all real tokens, and the noise of an output."""

    def __init__(self, m: Module, engine: Tensor) -> None:
        self.m = m
        self.x, self.y = real_rows(m, m["input"]), real_rows(m, engine)
        self.weight: Tensor = m["weight"].double()
        self.bias = torch.zeros(len(self.weight), dtype=torch.float64) if m["bias"] is None else m["bias"].double()
        self.bias = self.bias.to(self.x)
        self.product = self.x @ self.weight.t()
        self.unit = unit_roundoff(m.forward.tensors[m.tap].dtype)
        # A rounded input or weight has an error of its own, as large as that of an output.
        self.noise = (
            2 * self.unit * (self.y.square().mean(0) + self.product.square().mean(0) + self.bias.square()).sqrt()
        )

    def wrong(self, expected: Tensor) -> Tensor:
        """[out] bool: the outputs whose error over all tokens is more than rounding."""
        off = (self.y - expected).square().mean(0).sqrt()
        wrong: Tensor = off > CLOSE * self.noise.clamp(min=1e-300)
        return wrong


def regressed(m: Module, engine: Tensor) -> tuple[Tensor, Tensor] | None:
    """The weight and bias that fit best; None if the tokens do not determine them with some to spare."""
    p = Pairs(m, engine)
    tokens, columns = p.x.shape
    biased = m["bias"] is not None
    if columns > COLUMNS or tokens < 1.25 * columns + 8:
        return None
    x = torch.cat([p.x, torch.ones(tokens, 1).to(p.x)], 1) if biased else p.x
    if int(torch.linalg.matrix_rank(x)) < x.shape[1]:
        return None
    solution = torch.linalg.lstsq(x, p.y).solution.t()
    return (solution[:, :-1], solution[:, -1]) if biased else (solution, p.bias)


class Block:
    """Whether a weight is worth trying: on a few rows, and whatever the bias is."""

    def __init__(self, m: Module, engine: Tensor, weight: Tensor) -> None:
        self.x = real_rows(m, m["input"])
        self.x = self.x - self.x.mean(0)
        wanted = max(4, _BLOCK // weight.shape[1])
        y = real_rows(m, engine)
        off = (y - y.mean(0) - self.x @ weight.t()).norm(dim=0) if weight.numel() <= 1 << 22 else None
        # Around the row with the largest error: only some rows may be wrong.
        worst = 0 if off is None else int(off.argmax())
        start = max(0, min(worst - wanted // 2, len(weight) - wanted))
        self.rows = slice(start, min(len(weight), start + wanted))
        self.y = y[:, self.rows] - y[:, self.rows].mean(0)
        self.before = float((self.y - self.x @ weight[self.rows].t()).norm())

    def left(self, block: Tensor) -> float:
        """The error with `block` as the rows `self.rows` of the weight."""
        return float((self.y - self.x @ block.t()).norm())

    def promising(self, block: Tensor) -> bool:
        return self.left(block) < _PROMISING * self.before
