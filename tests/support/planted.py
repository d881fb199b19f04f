"""Faults planted in single reference modules: what the diagnosis names them, without an export and an engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import refmodels
from debug.capture.capture import Forward
from debug.capture.prompts import random_prompts
from debug.comparison.bounds import lower_bound
from debug.comparison.compare import MULTIPLE
from debug.comparison.diagnose import diagnose
from debug.comparison.modules import Module, module_at
from debug.comparison.results import Diagnosis
from refmodels.model import Decoder
from refmodels.recorder import Recorder, recording
from refmodels.taps import is_cache_tap, tap_names
from tests.support.goldens import case_source
from tests.support.paths import GOLDENS

Change = Callable[[Module], Tensor]
"""The wrong output of a module, given the right one in fp64."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A reference in fp64 and in `dtype`, and forwards of the latter: a prefill of three rows and decode steps."""

    truth: Decoder
    rounded: Decoder
    forwards: tuple[Forward, ...]
    dtype: torch.dtype

    def named(
        self, tap: str, change: Change, *, steps: Collection[int] | None = None, exact: bool = False
    ) -> list[Diagnosis]:
        """The diagnoses, if the module of `tap` is wrong in the forwards of `steps` (None: in all).

        A correct engine rounds like the reference in its dtype; `exact`: leave this rounding out.
        """
        forwards, bounds = [], []
        for forward in self.forwards:
            with torch.inference_mode():
                module = module_at(self.truth, tap, forward)
                right = module()
                output = change(module) if steps is None or forward.step in steps else right
            own = forward.tensors[tap]
            right, output = (t[..., : own.shape[-2], :] for t in (right, output))
            size = output.norm(dim=-1, keepdim=True) / right.norm(dim=-1, keepdim=True).clamp(min=1e-30)
            noise = 0.0 if exact else (own.double() - right) * size
            forwards.append(replace(forward, tensors={**forward.tensors, tap: (output + noise).to(self.dtype)}))
            slots = self.forwards[-1].inputs.attention_mask.shape[1]
            bounds.append(lower_bound(self.truth.spec, tap, self.dtype, slots=slots))
        with torch.inference_mode():
            found, _ = diagnose(
                tap, forwards, self.truth, self.rounded, bounds=bounds, multiple=MULTIPLE, dtype=self.dtype
            )
        return found

    def first(self, tap: str, change: Change, *, steps: Collection[int] | None = None, exact: bool = False) -> str:
        """The first name; "unknown" without one."""
        found = self.named(tap, change, steps=steps, exact=exact)
        return found[0].fault if found else "unknown"


@functools.cache
def run(case: str, dtype: torch.dtype = torch.float32, *, lengths: tuple[int, ...] = (20, 13, 9)) -> Run:
    """`case`: a golden case, or a family name (its toy)."""
    source = case_source(case) if (GOLDENS / case).is_dir() else refmodels.resolve(case)
    truth, rounded = (refmodels.load(source, dtype=t) for t in (torch.float64, dtype))
    prompts = random_prompts(source.spec.vocab_size, lengths, seed=0)
    steps = 3
    cache = rounded.new_cache(batch=len(lengths), capacity=max(lengths) + steps)
    ids, mask = prompts.ids, prompts.mask
    names = [name for name in tap_names(source.spec) if is_cache_tap(name)]
    before = {n: cache.at(n)[:, :, :0].clone() for n in names}
    forwards = []
    for step in range(steps + 1):
        inputs, recorder = cache.next_step(ids, mask), Recorder()
        with torch.inference_mode(), recording(recorder):
            logits = rounded.run(inputs, cache)
        tensors = {n: t.clone() for n, t in recorder.tensors.items()}
        truth.prepare_tables(cache.capacity)
        forwards.append(Forward(step=step, inputs=inputs, tensors=tensors, before=before))
        before = {n: tensors[n] for n in names}
        ids = logits[:, -1:].argmax(-1)
        mask = torch.ones_like(ids)
    return Run(truth=truth, rounded=rounded, forwards=tuple(forwards), dtype=dtype)
