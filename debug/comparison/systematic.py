"""Faults smaller than the rounding of one token, found from all tokens together.

Half precision hides a wrong epsilon or the other GELU: they change a token less than rounding does.  But rounding has
    no
direction and a fault has: over thousands of elements, the engine deviates in the direction in which a certain fault
would push it only if it has that fault.  With t the reference in fp64, f the same with the fault, r the reference in
the engine's dtype (whose weights are rounded as the engine's are) and e the engine, the least-squares amount of the
fault in the engine is

    c = <e - r, f - t> / |f - t|^2

which is 0 in a healthy engine and 1 in a faulty one, up to its standard deviation.  Rounding is not independent between
elements (a rounded weight affects all tokens, a rounded sum a whole token), so the standard deviation is estimated from
the sums over tokens and over channels, whichever is larger (cluster-robust; Liang & Zeger 1986).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from debug.capture.capture import Forward
from debug.comparison.faults import CATALOGUE
from debug.comparison.faults.catalogue import ESTIMATED, Fit
from debug.comparison.modules import Module, module_at
from debug.comparison.results import Diagnosis
from refmodels.model import Decoder

SIGNIFICANT = 10.0
"""Threshold in standard deviations from 0.  A diff makes thousands of these tests; by chance, one in 10^5 reaches
4.5."""
_AMOUNT = 0.1
"""Largest distance of a fault's amount from 1, in addition to its own uncertainty."""
KINDS = ("norm", "activation")
"""Kinds of taps for which small faults are known."""


def systematic(tap: str, whole: Forward, truth: Decoder, rounded: Decoder, real: Tensor) -> Diagnosis | None:
    """The small fault that the engine has at `tap`, if any.

    Args:
        tap: a tap within its noise floor.
        whole: all tokens of a capture (`Capture.whole`).
        truth, rounded: the reference in fp64, and in the engine's dtype, with the weights of this tap.
        real: [batch, tokens] bool.
    """
    try:
        module = module_at(truth, tap, whole)
    except KeyError:
        return None
    if module.kind not in KINDS:
        return None
    engine = whole.tensors[tap].to(truth.device, torch.float64)
    expected = module()[real]
    off = engine[real] - module_at(rounded, tap, whole)()[real].double()
    if not bool(torch.isfinite(off).all()):
        return None
    size = float(expected.norm())
    best: Diagnosis | None = None
    for name, output in _small_faults(module, engine):
        push = output[real] - expected
        strength = float(push.square().sum())
        if not math.isfinite(strength) or strength == 0.0:
            continue
        amount = float((off * push).sum()) / strength
        left = (off - amount * push) * push
        # Even a deviation that fits to the last bit contains the rounding of fp64.
        least = torch.finfo(torch.float64).eps * size / math.sqrt(strength)
        deviation = max(least, *(float(left.sum(axis).norm()) / strength for axis in (0, 1)))
        if amount < SIGNIFICANT * deviation or abs(amount - 1) > _AMOUNT + 3 * deviation:
            continue
        found = Diagnosis(
            fault=name,
            local_before=float((engine[real] - expected).norm()) / size,
            local_after=float((engine[real] - output[real]).norm()) / size,
            ratio_after=0.0,
            significance=amount / deviation,
        )
        if best is None or found.local_after < best.local_after:
            best = found
    return best


def _small_faults(module: Module, engine: Tensor) -> list[tuple[str, Tensor]]:
    """Name and output of each fault, except those whose number was fitted to the engine: their amount is always 1."""
    return [
        (fault.full_name(detail), module(**changes))
        for fault in CATALOGUE
        if fault.small and fault.kind == module.kind
        for detail, changes in fault.variants(module, engine)
        if not (isinstance(detail, Fit) and detail.numbers) and ESTIMATED not in str(detail)
    ]
