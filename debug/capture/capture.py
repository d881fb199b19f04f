"""The capture of an executor on one input: every tap of a prefill and of teacher-forced decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from debug.capture.prompts import Prompts
from export.progress import Progress, silent
from refmodels.cache import KVCache, StepInputs
from refmodels.recorder import Recorder
from refmodels.spec import ModelSpec
from refmodels.taps import is_cache_tap
from trt_runtime.engine import Engine

SPARE_SLOTS = 8
"""Cache slots behind the last token: an engine that writes a few slots late shows it, instead of running out of its
cache."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The taps of an engine in one forward pass.

    step: 0 for the prefill.  tensors: its taps; cache taps hold the live slots after the step.  before: the cache taps
    before the step ([batch, kv_heads, slots, head_dim], no slots before the first).
    """

    step: int
    inputs: StepInputs
    tensors: Mapping[str, Tensor]
    before: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """One prefill and `tokens.shape[1]` decode steps of an executor.

    tokens: [batch, steps] int64, fed after the prompt.  forwards: the tapped run.  untapped: logits
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

    def as_one_step(self) -> StepInputs:
        """Prompt and fed tokens as one forward pass, so that the reference can run once instead of step by step."""
        tokens = self.tokens
        ids = torch.cat([self.prompts.ids, tokens], 1)
        mask = torch.cat([self.prompts.mask, torch.ones_like(tokens)], 1)
        # A cache without memory: only its bookkeeping is needed.
        cache = KVCache(self.spec, batch=len(ids), capacity=ids.shape[1], device="meta")
        return cache.next_step(ids, mask, prompt_lengths=self.prompts.mask.sum(1))

    def whole(self) -> Forward:
        """All forward passes as one: taps of all tokens one after the other (joined when they are read).

        Cache taps are left out, because they are states, not streams.
        """
        return Forward(step=0, inputs=self.as_one_step(), tensors=_Joined(self), before={})


class _Joined(Mapping[str, Tensor]):
    def __init__(self, capture: Capture) -> None:
        self._forwards = capture.forwards
        self._names = [name for name in capture.tap_names if not is_cache_tap(name)]
        self._last: tuple[str, Tensor] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._last is None or self._last[0] != name:
            self._last = name, torch.cat([forward.tensors[name] for forward in self._forwards], 1)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def run_steps(
    engine: Engine,
    prompts: Prompts,
    *,
    steps: int,
    tokens: Tensor | None = None,
    recorder: Callable[[], Recorder] | None = None,
    fed: list[Tensor] | None = None,
    progress: Progress = silent,
) -> Iterator[tuple[int, StepInputs, Tensor]]:
    """Prefill and decode steps of an engine: (step, inputs, logits on the CPU) after each.

    Args:
        tokens: [batch, steps] to feed after the prompt; None: the engine's own greedy tokens.
        recorder: makes the recorder of each forward; None: no taps.
        fed: receives the [batch, 1] tokens of each decode step.
        progress: told of each forward.
    """
    batch, length = prompts.ids.shape
    needed = length + steps
    cache = engine.new_cache(batch=batch, capacity=max(needed, min(needed + SPARE_SLOTS, engine.max_positions)))
    ids, mask = prompts.ids, prompts.mask
    for step in range(steps + 1):
        progress("engine" if recorder is None else "engine with taps", step, steps + 1)
        inputs = cache.next_step(ids, mask)
        logits = engine.run(inputs, cache, recorder=recorder() if recorder is not None else None).cpu()
        yield step, inputs, logits
        if step < steps:
            ids = logits[:, -1:].argmax(-1) if tokens is None else tokens[:, step : step + 1]
            mask = torch.ones_like(ids)
            if fed is not None:
                fed.append(ids)


def capture_engine(
    engine: Engine, prompts: Prompts, *, steps: int, tokens: Tensor | None = None, progress: Progress = silent
) -> Capture:
    """Run an engine without taps and then, on the same tokens, with them.

    Args:
        prompts: the input.
        steps: decode steps.
        tokens: [batch, steps] to feed after the prompt; None: the engine's own greedy tokens.
        progress: told of each forward.
    """
    fed: list[Tensor] = []
    run = partial(run_steps, engine, prompts, steps=steps, progress=progress)
    untapped = [logits for _, _, logits in run(tokens=tokens, fed=fed)]
    tokens = torch.cat(fed, 1) if fed else torch.zeros(len(prompts.ids), 0, dtype=torch.int64)
    forwards: list[Forward] = []
    recorders: list[Recorder] = []

    def recorder() -> Recorder:
        recorders.append(Recorder())
        return recorders[-1]

    for step, inputs, _ in run(tokens=tokens, recorder=recorder):
        now = {name: tensor.cpu() for name, tensor in recorders[-1].tensors.items()}
        states = {name: now[name] for name in engine.tap_names if is_cache_tap(name)}
        before = (
            {name: forwards[-1].tensors[name] for name in states}
            if forwards
            else {name: tensor[:, :, :0] for name, tensor in states.items()}
        )
        forwards.append(Forward(step=step, inputs=inputs, tensors=now, before=before))
    return Capture(
        spec=engine.spec,
        dtype=engine.dtype,
        tap_names=engine.tap_names,
        arithmetic=engine.arithmetic,
        prompts=prompts,
        tokens=tokens,
        forwards=forwards,
        untapped=untapped,
    )
