"""Faults of the embedding of tokens and of learned positions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from debug.comparison.faults.catalogue import MANY, Fit, Variants, fault
from debug.comparison.faults.parts import real_rows
from debug.comparison.faults.rotation import padding_before
from debug.comparison.modules import Module

_SHIFTS = 64
"""Largest offset of learned positions that is tried."""
_WORK = 4e9
"""Largest number of multiplications for the search of the engine's rows in the table: below a second."""


def _padding(m: Module) -> Tensor:
    parts = getattr(m.forward, "parts", (m.forward,))
    found = torch.cat([padding_before(replace(m, forward=part)) for part in parts], 1)
    return found[:, : m["ids"].shape[1]]


@fault("positions off", "embed")
def learned_positions(m: Module, _: Tensor) -> Variants:
    if m["position_table"] is None:
        return
    positions: Tensor = m["positions"]
    for shift in (1, -1, 2, -2, *(s for n in range(3, _SHIFTS + 1) for s in (n, -n))):
        yield f"by {shift:+d}", {"positions": positions + shift}
    yield "by the left padding (slots counted)", {"positions": positions + _padding(m)}
    yield "by the left padding (tokens counted)", {"positions": positions - _padding(m)}
    yield "all 0", {"positions": torch.zeros_like(positions)}
    yield "twice as far apart", {"positions": positions * 2}
    yield "half as far apart", {"positions": positions // 2}
    yield "reversed", {"positions": positions.amax(1, keepdim=True) - positions}
    yield "read from the end of the table", {"positions": len(m["position_table"]) - 1 - positions}
    steps = getattr(m.forward, "step_of", None)
    if steps is not None and bool((steps > 0).any()):
        decode = (steps > 0).to(positions.device)
        yield "restarted at 0 in decode", {"positions": torch.where(decode, torch.zeros_like(positions), positions)}
        if not bool(decode.all()):
            last = positions[:, ~decode].amax(1, keepdim=True)
            yield "not advanced in decode", {"positions": torch.where(decode, last, positions)}


@fault("position embedding missing", "embed")
def position_missing(m: Module, _: Tensor) -> Variants:
    if m["position_table"] is not None:
        yield "", {"position_table": None}


@fault("wrong embedding rows or scale", "embed")
def embedding(m: Module, engine: Tensor) -> Variants:
    table: Tensor = m["table"]
    for shift in (1, -1, 2, -2, 3, -3, 4, -4):
        yield f"ids off by {shift:+d}", {"ids": m["ids"] + shift}
    yield "ids of the token before", {"ids": m["ids"].roll(1, 1)}
    yield "ids of the token after", {"ids": m["ids"].roll(-1, 1)}
    yield "rows in reverse order", {"ids": len(table) - 1 - m["ids"]}
    yield "scaled by the square root of the hidden size", {"factor": m.decoder.spec.hidden_size**0.5}
    yield "divided by the square root of the hidden size", {"factor": m.decoder.spec.hidden_size**-0.5}
    head = m.decoder.head.weight
    if not m.decoder.spec.tied_head and not head.is_meta and head.is_floating_point() and head.shape == table.shape:
        yield "the head used as embedding", {"table": head.to(table)}
    yield "rows normalized", {"table": torch.nn.functional.normalize(table, dim=1)}
    if m["position_table"] is not None:
        tokens = m(position_table=None)
        pairs = torch.stack([real_rows(m, t).flatten() for t in (tokens, m() - tokens)], 1)
        first, second = torch.linalg.lstsq(pairs, real_rows(m, engine).flatten()[:, None]).solution.flatten().tolist()
        for words, argument, value in (("tokens", "factor", first), ("positions", "position_factor", second)):
            change = partial(_one, argument)
            yield Fit(words=f"{words} scaled by {{}}", value=value, changes=change), change(value)
        yield "positions subtracted", {"position_factor": -1.0}
        yield "positions added twice", {"position_factor": 2.0}
        yield "tokens missing", {"factor": 0.0}
    yield from _looked_up(m, engine)


def _one(argument: str, value: float) -> dict[str, Any]:
    return {argument: value}


def _looked_up(m: Module, engine: Tensor) -> Variants:
    """The rows of the table that the engine shows, and a row that is added to all."""
    table = m["table"].double()
    mask = m.forward.inputs.new_mask
    ids = m["ids"][mask]
    positions = m() - m(position_table=None)
    rows = real_rows(m, engine) - positions[mask].double()
    if table.numel() * len(rows) > _WORK:
        return
    norms = table.square().sum(1)
    found = (norms - 2 * rows @ table.t()).argmin(1)
    shift = found - ids
    if bool((shift == shift[0]).all()) and int(shift[0]) != 0:
        yield f"ids off by {int(shift[0]):+d}", {"ids": m["ids"] + int(shift[0])}
    changed = found != ids
    wrong = {(int(a), int(b)) for a, b in zip(ids[changed], found[changed], strict=True)}
    if 0 < len(wrong) <= 3 and len(wrong) == len({a for a, _ in wrong}):
        new = m["ids"].clone()
        for a, b in wrong:
            new[m["ids"] == a] = b
        yield "; ".join(f"id {a} reads row {b}" for a, b in sorted(wrong)), {"ids": new}
    elif bool(changed.any()):
        new = m["ids"].clone()
        new[mask] = found
        yield Fit(words="other rows of the table", numbers=MANY), {"ids": new}
    off = rows - table[ids]
    bad = off.norm(dim=1) > 1e-3 * rows.norm(dim=1).mean()
    tokens = ids[bad].unique()
    if 0 < len(tokens) <= 3 and not bool(torch.isin(ids[~bad], tokens).any()):
        made = table.clone()
        for token in tokens.tolist():
            made[token] = rows[bad & (ids == token)].mean(0)
        named = ", ".join(map(str, tokens.tolist()))
        zero = bool((made[tokens].norm(dim=1) < 1e-3 * norms.sqrt().mean()).all())
        words = f"row{'s' if len(tokens) > 1 else ''} {named} of the table {'zero' if zero else 'with other values'}"
        yield Fit(words=words, numbers=0 if zero else 2 * len(tokens)), {"table": made.to(m["table"])}
    constant = off.mean(0)
    for name, others in (("row {} of the token table", table), ("row {} of the position table", m["position_table"])):
        if others is not None:
            row = int((others.double() - constant).square().sum(1).argmin())
            yield f"{name.format(row)} added to every token", {"table": m["table"] + others[row]}
    yield (
        Fit(words="a constant vector added to every token", numbers=MANY),
        {"table": (table + constant).to(m["table"])},
    )
