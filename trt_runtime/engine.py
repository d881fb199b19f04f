"""The interface of every executor: run a step on a cache, prefill (in chunks), decode, and record taps."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from refmodels.cache import KVCache, StepInputs, last_real
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder
from refmodels.spec import ModelSpec


class Engine(ABC):
    """A model that can be run step by step.

    Attributes:
        spec: architecture facts.
        max_positions: the longest cache, in slots.
        dtype: dtype of the cache buffers.
        device: where the cache buffers are.
        tap_names: tensors that a `Recorder` can receive, in the order of execution.
        arithmetic: one phrase that says how this engine computes and rounds.
    """

    spec: ModelSpec
    max_positions: int
    dtype: torch.dtype
    device: torch.device
    tap_names: tuple[str, ...]
    arithmetic: str

    @abstractmethod
    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        """Run a step and advance the cache.

        Args:
            step: from `cache.next_step`.
            cache: from `new_cache` of this engine; updated in place.
            recorder: receives the taps that it asks for; None costs nothing.
        Returns:
            logits [batch, N, vocab], N as in `step.logit_index`; a tensor that later steps do not overwrite.
        """

    def new_cache(self, *, batch: int, capacity: int) -> KVCache:
        """An empty cache for this engine.

        Raises:
            LogitLockError: `capacity` is above `max_positions`.
        """
        self.check_capacity(capacity)
        return KVCache(self.spec, batch=batch, capacity=capacity, dtype=self.dtype, device=self.device)

    def check_capacity(self, capacity: int) -> None:
        """Raise the error of `new_cache`, if there is one."""
        if capacity > self.max_positions:
            raise LogitLockError(
                f"a cache of {capacity} tokens is longer than the {self.max_positions} positions of {self.spec.variant}"
            )

    def prefill(
        self,
        input_ids: Tensor,
        cache: KVCache,
        attention_mask: Tensor | None = None,
        *,
        last_logits_only: bool = False,
        chunk: int | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Run a prompt.

        Args:
            input_ids: [batch, tokens] int64.
            attention_mask: [batch, tokens], nonzero for real tokens; None: all are.
            last_logits_only: logits of the last real token of each row only.
            chunk: maximum number of tokens per chunk (less memory, the same result); left padding makes the first
                chunk longer.  The recorder then keeps the last chunk's tensors.
        Returns:
            logits [batch, tokens, vocab], or [batch, 1, vocab].
        Raises:
            LogitLockError: as `KVCache.next_step`.
        """
        tokens = input_ids.shape[-1]
        if chunk is None or chunk >= tokens:
            step = cache.next_step(input_ids, attention_mask, last_logits_only=last_logits_only)
            return self.run(step, cache, recorder=recorder)
        if chunk < 1:
            raise LogitLockError(f"the prefill chunk must be at least 1 token, got {chunk}")
        mask = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).to(torch.int64)
        # A row that has not begun cannot take a chunk of nothing but padding.
        start, stop = 0, max(chunk, int(mask.argmax(1).max()) + 1)
        wanted = last_real(mask)
        pieces: list[Tensor] = []
        last: Tensor | None = None
        while start < tokens:
            stop = min(stop, tokens)
            step = cache.next_step(
                input_ids[:, start:stop],
                mask[:, start:stop],
                prompt_lengths=mask.sum(1),
                last_logits_only=last_logits_only,
            )
            logits = self.run(step, cache, recorder=recorder)
            if last_logits_only:
                here = ((wanted >= start) & (wanted < stop)).to(logits.device)
                last = logits if last is None else torch.where(here[:, None, None], logits, last)
            else:
                pieces.append(logits)
            start, stop = stop, stop + chunk
        return torch.cat(pieces, 1) if last is None else last

    def decode(
        self,
        input_ids: Tensor,
        cache: KVCache,
        attention_mask: Tensor | None = None,
        *,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Run one new token per row.

        Args:
            input_ids: [batch, 1] (or [batch]) int64.
            attention_mask: like input_ids; 0 leaves a row of the cache as it is (its logits mean nothing).
        Returns:
            logits [batch, 1, vocab].
        """
        ids = input_ids.reshape(-1, 1)
        mask = None if attention_mask is None else attention_mask.reshape(-1, 1)
        return self.run(cache.next_step(ids, mask, last_logits_only=True), cache, recorder=recorder)
