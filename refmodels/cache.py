"""The explicit key/value cache: the caller owns it, every executor (reference or engine) reads and updates it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refmodels.errors import LogitLockError
from refmodels.positions import ntk_table_index
from refmodels.quantization.formats import CODE_TYPES
from refmodels.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Tensors of one forward; the field names are the arguments of `Decoder.forward` and the inputs of the ONNX graph.

    input_ids [B, S]; cache_lengths [B]; attention_mask [B, T] with T = max(cache_lengths) + S, 1 where a slot holds a
    real token; position_ids [B, S] unless the model has no positions; ntk_table [B] where the rope base grows only;
    logit_index [B, N]: which of the S tokens get logits.  All int64, on the CPU.  `new_mask` [B, S] bool tells the
    real tokens of this step.
    """

    input_ids: Tensor
    cache_lengths: Tensor
    attention_mask: Tensor
    logit_index: Tensor
    new_mask: Tensor
    position_ids: Tensor | None = None
    ntk_table: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The graph inputs by name, without the absent ones."""
        values = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cache_lengths": self.cache_lengths,
            "attention_mask": self.attention_mask,
            "ntk_table": self.ntk_table,
            "logit_index": self.logit_index,
        }
        return {name: value for name, value in values.items() if value is not None}


class KVCache:
    """Static-capacity cache with per-row lengths.

    `key[i]`, `value[i]`: [batch, kv_heads, capacity, head_dim] of layer i; keys are stored rotated.  `lengths` [batch]:
    slots in use; `mask` [batch, capacity]: slots that hold a real token (False: padding or free); `ntk_table` [batch]:
    the rope table of the row where the base grows, which upstream hides in module state.  Metadata stay on the CPU.

    Left pads occupy slots and are masked; trailing pads of a ragged batch do not advance the row, so the next tokens
    overwrite them.  A row without any real token in a step does not change.

    Args:
        dtype: dtype of the buffers, unless the spec's cache is quantized.
        buffers: memory to use for `key` and `value`, of that shape; it is cleared.  None: new memory.
    Raises:
        LogitLockError: the capacity is not positive, or exceeds the learned positions of the model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        buffers: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise LogitLockError(f"a cache needs batch and capacity of at least 1, got {batch} and {capacity}")
        if spec.position == "learned" and capacity > spec.max_positions:
            raise LogitLockError(
                f"a cache of {capacity} tokens is longer than the {spec.max_positions} learned positions "
                f"of {spec.variant}"
            )
        self.spec = spec
        self.batch = batch
        self.capacity = capacity
        a = spec.attention
        shape = (batch, a.kv_heads, capacity, a.head_dim)
        if spec.cache_code is not None:
            dtype = CODE_TYPES[spec.cache_code]
        if buffers is None:
            self.key = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
            self.value = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        else:
            self.key, self.value = ([tensor.zero_() for tensor in tensors] for tensors in buffers)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens; the buffers stay."""
        self.lengths = torch.zeros(self.batch, dtype=torch.int64)
        self.mask = torch.zeros(self.batch, self.capacity, dtype=torch.bool)
        self.ntk_table = torch.zeros(self.batch, dtype=torch.int64)

    def by_tap(self) -> dict[str, Tensor]:
        """The buffers, by the names of their taps."""
        return {tap.name: self.at(tap.name) for tap in self.spec.cache_taps}

    def at(self, tap: str) -> Tensor:
        """The buffer of a cache tap."""
        made = self.spec.taps[tap]
        assert made.layer is not None
        return (self.key if made.part == "key" else self.value)[made.layer]

    def next_step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompt_lengths: Tensor | None = None,
        last_logits_only: bool = False,
    ) -> StepInputs:
        """Check a step against the cache, and make its graph inputs.

        Args:
            input_ids: [batch, tokens] int64.
            attention_mask: [batch, tokens], nonzero for real tokens of this step; None: all real.
            prompt_lengths: [batch] number of real tokens of the whole prompt, if this step is only its first chunk;
                dynamic NTK chooses a row's table by it, once, in the step in which the row is empty.
            last_logits_only: logits for the last real token of each row only.
        Raises:
            LogitLockError: a shape is wrong, a token id is outside the vocabulary, a row of an empty cache gets no real
                token, or the cache is full.
        """
        if input_ids.ndim != 2 or input_ids.shape[0] != self.batch or input_ids.shape[1] == 0:
            raise LogitLockError(
                f"input_ids has shape {list(input_ids.shape)}; this cache takes [{self.batch}, tokens] with tokens >= 1"
            )
        ids = input_ids.to(device="cpu", dtype=torch.int64)
        tokens = ids.shape[1]
        outside = (ids < 0) | (ids >= self.spec.vocab_size)
        if bool(outside.any()):
            raise LogitLockError(
                f"token id {int(ids[outside][0])} is outside the vocabulary of {self.spec.vocab_size} ids"
            )
        if attention_mask is None:
            new = torch.ones_like(ids, dtype=torch.bool)
        elif attention_mask.shape != ids.shape:
            raise LogitLockError(
                f"attention_mask has shape {list(attention_mask.shape)}; it must match input_ids {list(ids.shape)} "
                "(the mask of the new tokens only)"
            )
        else:
            new = attention_mask.to("cpu") != 0
        empty = self.lengths == 0
        if bool((empty & ~new.any(1)).any()):
            row = int((empty & ~new.any(1)).nonzero()[0])
            raise LogitLockError(f"row {row} of the prompt has no real token: its attention_mask is all zero")
        longest = int(self.lengths.max())
        if longest + tokens > self.capacity:
            raise LogitLockError(
                f"the cache is full: capacity {self.capacity} tokens, {longest} in use, {tokens} more wanted"
            )
        steps = torch.arange(tokens)
        mask = self.mask[:, : longest + tokens].to(torch.int64)
        mask.scatter_(1, self.lengths[:, None] + steps, new.to(torch.int64))
        real = self.mask.sum(1)
        if self.spec.position_origin == "slot":
            positions = self.lengths[:, None] + steps
        else:
            positions = (real[:, None] + new.cumsum(1) - 1).clamp(min=0)
        wanted = new.sum(1) if prompt_lengths is None else prompt_lengths
        return StepInputs(
            input_ids=ids,
            cache_lengths=self.lengths.clone(),
            attention_mask=mask,
            logit_index=last_real(new)[:, None] if last_logits_only else steps.expand(self.batch, tokens).contiguous(),
            new_mask=new,
            position_ids=positions.contiguous() if self.spec.uses_position_ids else None,
            ntk_table=self._tables(wanted, empty, positions),
        )

    def _tables(self, prompt_lengths: Tensor, empty: Tensor, positions: Tensor) -> Tensor | None:
        """The rope table of each row, if the base grows.

        Qwen's follows the prompt and stays.  The dynamic scaling of transformers takes the longest row of the batch at
        every step and never shrinks (modeling_rope_utils.py 83-119 at 5.24.0); keys stay as they were rotated.
        """
        rope = self.spec.rope
        if rope is None or not rope.grows:
            return None
        if rope.ntk_seq_length is not None:
            chosen = torch.tensor([ntk_table_index(int(n), rope.ntk_seq_length) for n in prompt_lengths.tolist()])
            return torch.where(empty, chosen, self.ntk_table)
        assert rope.scaling is not None
        longest = max([int(positions.max()) + 1, *prompt_lengths[empty].tolist()])
        grown = [0, longest - rope.scaling.original_positions, *self.ntk_table[~empty].tolist()]
        return torch.full((self.batch,), max(grown), dtype=torch.int64)

    def advance(self, step: StepInputs) -> None:
        """Commit a step that has run: its real tokens, and the pads before them, now occupy their slots."""
        steps = torch.arange(step.new_mask.shape[1])
        used = torch.where(step.new_mask, steps + 1, 0).amax(1)
        # A row's mask is False beyond its length, and the step's mask is False beyond its last real token.
        self.mask.scatter_(1, self.lengths[:, None] + steps, step.new_mask)
        self.lengths = self.lengths + used
        if step.ntk_table is not None:
            self.ntk_table = step.ntk_table


def last_real(mask: Tensor) -> Tensor:
    """Index of the last nonzero entry of each row, or 0 if there is none: [batch] from [batch, tokens]."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask != 0, steps, 0).amax(1)
