"""Where a fault acts: everywhere, or in a region that a few words describe."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def region(place: Tensor, needed: Tensor, excluded: Tensor) -> tuple[str, int] | None:
    """The simplest region that has all of `needed` and nothing of `excluded`, and how many numbers describe it.

    Args:
        place: [tokens, 3] step, row and slot of each token.
        needed, excluded: [tokens] bool.
    Returns: ("", 0) for everywhere; None: there is none.
    """
    if not bool(excluded.any()):
        return "", 0
    for inside, words, numbers in _regions(place, needed):
        if _separates(inside, needed, excluded):
            return words, numbers
    return None


def _separates(inside: Tensor, needed: Tensor, excluded: Tensor) -> bool:
    return bool(inside[needed].all()) and not bool(inside[excluded].any())


def _regions(place: Tensor, needed: Tensor) -> Iterator[tuple[Tensor, str, int]]:
    step, row, slot = place.unbind(1)
    yield step > 0, "in decode only", 1
    yield step == 0, "in the prefill only", 1
    if int(row.max()) > 0:
        rows = row[needed].unique()
        inside = torch.isin(row, rows)
        if len(rows) <= int(row.max()):
            listed = ", ".join(map(str, rows.tolist()))
            yield inside, f"in row{'s' if len(rows) > 1 else ''} {listed} of the batch only", len(rows) + 1
    first, last = int(slot[needed].min()), int(slot[needed].max())
    yield slot >= first, f"from slot {first} on only", 2
    yield slot <= last, f"up to slot {last} only", 2
    first, last = int(step[needed].min()), int(step[needed].max())
    yield (step >= first) & (step <= last), f"in the forwards from step {first} to {last} only", 3
