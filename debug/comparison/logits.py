"""Logits of an engine against the reference's: KL, top-1, flips, and the effect of recording taps."""

from __future__ import annotations

import torch
from torch import Tensor

from debug.comparison.metrics import kl_divergence, nonfinite_count, top_margin
from debug.comparison.results import LogitError, LogitToken, ObserverEffect
from refmodels.cache import StepInputs

_BLOCK_TOKENS = 32


class LogitComparison:
    """Logits of the real tokens of all forward passes: a few numbers per token, never the logits themselves."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.squares = torch.zeros(3, dtype=torch.float64)
        self.nonfinite = 0
        self.changed = False

    def add(self, truth: Tensor, rounded: Tensor, untapped: Tensor, tapped: Tensor) -> None:
        """Each [tokens, vocab]; processed one block of tokens at a time, because float64 logits are large."""
        for start in range(0, len(truth), _BLOCK_TOKENS):
            block = slice(start, start + _BLOCK_TOKENS)
            self._add(*(t[block].to("cpu", torch.float64) for t in (truth, rounded, untapped, tapped)))

    def _add(self, truth: Tensor, rounded: Tensor, untapped: Tensor, tapped: Tensor) -> None:
        self.nonfinite += nonfinite_count(untapped)
        # Unlike torch.equal, this counts NaN in the same place as equal.
        self.changed |= not torch.allclose(untapped, tapped, rtol=0.0, atol=0.0, equal_nan=True)
        best = truth.argmax(-1)
        self.squares += torch.stack(
            [(t - o).square().sum() for t, o in ((truth, 0), (untapped, truth), (rounded, truth))]
        )
        self.rows.append(
            torch.stack(
                [
                    kl_divergence(truth, untapped),
                    kl_divergence(truth, rounded),
                    untapped.argmax(-1) != best,
                    rounded.argmax(-1) != best,
                    top_margin(truth),
                    (untapped - truth).abs().amax(-1),
                    (rounded - truth).abs().amax(-1),
                    (untapped - tapped).abs().amax(-1),
                    untapped.argmax(-1) != tapped.argmax(-1),
                    best,
                    untapped.argmax(-1),
                ],
                1,
            )
        )

    def result(self) -> LogitError:
        kl, floor_kl, flips, floor_flips, _, error, floor_error, *_ = torch.cat(self.rows).unbind(1)
        size, off, floor_off = self.squares.sqrt().tolist()
        return LogitError(
            tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            top1=float(1 - flips.mean()),
            flips=int(flips.sum()),
            margin_flips=int(self._beyond_rounding().sum()),
            max_abs=float(error.max()),
            rel_l2=off / size if size else off,
            floor_kl_mean=float(floor_kl.mean()),
            floor_kl_max=float(floor_kl.max()),
            floor_top1=float(1 - floor_flips.mean()),
            floor_max_abs=float(floor_error.max()),
            floor_rel_l2=floor_off / size if size else floor_off,
            nonfinite=self.nonfinite,
        )

    def _beyond_rounding(self) -> Tensor:
        _, _, flips, _, margin, _, floor_error, *_ = torch.cat(self.rows).unbind(1)
        return (flips > 0) & (margin > 2 * floor_error.max())

    def tokens(self, inputs: StepInputs, length: int) -> list[LogitToken]:
        """The tokens one by one, in the order of adding: all real tokens of `inputs`, whose first `length` columns are
        the prefill."""
        places = inputs.new_mask.nonzero().tolist()
        index = inputs.new_mask.cumsum(1) - 1
        found = []
        for (row, column), values, beyond in zip(
            places, torch.cat(self.rows).tolist(), self._beyond_rounding().tolist(), strict=True
        ):
            kl, floor_kl, _, _, margin, error, floor_error, _, _, expected, chosen = values
            step = max(0, column - length + 1)
            found.append(
                LogitToken(
                    step=step,
                    row=row,
                    position=0 if step else column,
                    index=int(index[row, column]),
                    token=int(inputs.input_ids[row, column]),
                    expected=int(expected),
                    chosen=int(chosen),
                    kl=kl,
                    floor_kl=floor_kl,
                    margin=margin,
                    error=error,
                    floor_error=floor_error,
                    beyond_rounding=beyond,
                )
            )
        return found

    def observer_effect(self) -> ObserverEffect:
        rows = torch.cat(self.rows)
        return ObserverEffect(changed=self.changed, max_abs=float(rows[:, 7].max()), top1_changed=int(rows[:, 8].sum()))
