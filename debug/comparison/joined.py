"""Several forward passes as one, for modules that treat every token by itself (all but attention)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from debug.capture.capture import Forward
from refmodels.taps import is_cache_tap


@dataclass(frozen=True, kw_only=True)
class JoinedForward(Forward):
    """The tokens of `parts`, one forward after the other, without the cache.

    step_of [tokens], slot_of [batch, tokens]: where the tokens are in the parts.
    """

    parts: tuple[Forward, ...]
    step_of: Tensor
    slot_of: Tensor


def places_of(forward: Forward) -> tuple[Tensor, Tensor]:
    """The step [tokens] and the slot [batch, tokens] of each token."""
    if isinstance(forward, JoinedForward):
        return forward.step_of, forward.slot_of
    tokens = torch.arange(forward.inputs.input_ids.shape[1])
    return torch.full_like(tokens, forward.step), forward.inputs.cache_lengths[:, None] + tokens


def join(forwards: Sequence[Forward], columns: slice = slice(None)) -> JoinedForward:
    """`columns`: which tokens of the whole are kept."""
    lengths = [f.inputs.input_ids.shape[1] for f in forwards]
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        given = [t for t in tensors if t is not None]
        return torch.cat(given, 1)[:, columns] if len(given) == len(tensors) else None

    ids = torch.cat([f.inputs.input_ids for f in forwards], 1)[:, columns]
    index = torch.cat([f.inputs.logit_index + s for f, s in zip(forwards, starts, strict=True)], 1)
    mask = torch.cat([f.inputs.new_mask for f in forwards], 1)[:, columns]
    inputs = dataclasses.replace(
        forwards[0].inputs,
        input_ids=ids,
        position_ids=joined([f.inputs.position_ids for f in forwards]),
        new_mask=mask,
        attention_mask=mask.long(),
        cache_lengths=torch.zeros(len(ids), dtype=torch.int64),
        logit_index=index[:, columns] - (columns.start or 0),
    )
    places = [places_of(f) for f in forwards]
    return JoinedForward(
        step=forwards[0].step,
        inputs=inputs,
        tensors=_Tensors(forwards, columns),
        before={},
        parts=tuple(forwards),
        step_of=torch.cat([step for step, _ in places])[columns],
        slot_of=torch.cat([slot for _, slot in places], 1)[:, columns],
    )


class _Tensors(Mapping[str, Tensor]):
    """The taps of all forwards, joined when they are read first."""

    def __init__(self, forwards: Sequence[Forward], columns: slice) -> None:
        self._forwards, self._columns = forwards, columns
        self._names = [name for name in forwards[0].tensors if not is_cache_tap(name)]
        self._joined: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._joined:
            self._joined[name] = torch.cat([f.tensors[name] for f in self._forwards], 1)[:, self._columns]
        return self._joined[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
