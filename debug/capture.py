"""What an executor did with one input: every tap of a prefill and of teacher-forced decode steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from debug.prompts import Prompts
from refmodels.cache import KVCache, StepInputs
from refmodels.spec import ModelSpec
from refmodels.taps import Recorder, is_cache_tap
from trt_runtime.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What an engine showed of one forward.

    step: 0 for the prefill.  tensors: its taps; cache taps hold the live slots after the step.  before: the cache taps
    before the step ([batch, kv_heads, slots, head_dim], no slots before the first).
    """

    step: int
    plan: StepInputs
    tensors: Mapping[str, Tensor]
    before: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """One prefill and `tokens.shape[1]` decode steps of an executor.

    tokens: [batch, steps] int64, what was fed after the prompt.  forwards: the tapped run.  untapped: logits
    [batch, tokens, vocab] of each forward of a run without taps, as the engine ships.
    """

    spec: ModelSpec
    dtype: torch.dtype
    tap_names: tuple[str, ...]
    arithmetic: str
    prompts: Prompts
    tokens: Tensor
    forwards: Sequence[Forward]
    untapped: Sequence[Tensor]

    @property
    def steps(self) -> int:
        return self.tokens.shape[1]

    def plan(self) -> StepInputs:
        """Prompt and fed tokens as one forward: what the reference needs to run once instead of step by step."""
        tokens = self.tokens
        ids = torch.cat([self.prompts.ids, tokens], 1)
        mask = torch.cat([self.prompts.mask, torch.ones_like(tokens)], 1)
        # A cache without memory: only its bookkeeping is wanted.
        cache = KVCache(self.spec, batch=len(ids), capacity=ids.shape[1], device="meta")
        return cache.plan(ids, mask, prompt_lengths=self.prompts.mask.sum(1))

    def whole(self) -> Forward:
        """All forwards as one: taps of all tokens one after the other (joined when they are read).

        Cache taps are left out: they are states, not streams.
        """
        return Forward(step=0, plan=self.plan(), tensors=_Joined(self), before={})


class _Joined(Mapping[str, Tensor]):
    def __init__(self, capture: Capture) -> None:
        self._forwards = capture.forwards
        self._names = [name for name in capture.tap_names if not is_cache_tap(name)]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return torch.cat([forward.tensors[name] for forward in self._forwards], 1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def capture_engine(engine: Engine, prompts: Prompts, *, steps: int, tokens: Tensor | None = None) -> Capture:
    """Run an engine without taps and then, on the same tokens, with them.

    Args:
        prompts: the input.
        steps: decode steps.
        tokens: [batch, steps] to feed after the prompt; None: the engine's own greedy tokens.
    """
    batch, length = prompts.ids.shape
    fed, untapped = [], []
    cache = engine.new_cache(batch=batch, capacity=length + steps)
    ids, mask = prompts.ids, prompts.mask
    for step in range(steps + 1):
        logits = engine.run(cache.plan(ids, mask), cache)
        untapped.append(logits.cpu())
        if step < steps:
            ids = untapped[-1][:, -1:].argmax(-1) if tokens is None else tokens[:, step : step + 1]
            mask = torch.ones_like(ids)
            fed.append(ids)
    del cache
    cache = engine.new_cache(batch=batch, capacity=length + steps)
    before = {
        name: _buffer(cache, name)[:, :, :0] for name in engine.tap_names if is_cache_tap(name)
    }  # fmt: skip
    forwards = []
    for step in range(steps + 1):
        ids, mask = (prompts.ids, prompts.mask) if step == 0 else (fed[step - 1], torch.ones_like(fed[step - 1]))
        plan, recorder = cache.plan(ids, mask), Recorder()
        engine.run(plan, cache, recorder=recorder)
        forwards.append(Forward(step=step, plan=plan, tensors=recorder.tensors, before=before))
        before = {name: recorder.tensors[name] for name in before}
    return Capture(
        spec=engine.spec,
        dtype=engine.dtype,
        tap_names=engine.tap_names,
        arithmetic=engine.arithmetic,
        prompts=prompts,
        tokens=torch.cat(fed, 1) if fed else torch.zeros(batch, 0, dtype=torch.int64),
        forwards=forwards,
        untapped=untapped,
    )


def _buffer(cache: KVCache, name: str) -> Tensor:
    _, layer, part = name.split(".")
    return (cache.key if part == "key" else cache.value)[int(layer)]
