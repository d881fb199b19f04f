"""Shared by executors of foreign models: writing the caller's cache, reporting taps, the layout of cache tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refmodels.cache import KVCache, StepInputs
from refmodels.errors import LogitLockError
from refmodels.ops import select_tokens
from refmodels.recorder import Recorder
from refmodels.spec import ModelSpec


class ForeignStep:
    """One forward pass: taps go to the recorder when they are computed, keys and values to the caller's cache.

    Raises (deliver and write):
        LogitLockError: the recorder substitutes a tensor, which only the reference can do.
    """

    def __init__(self, step: StepInputs, cache: KVCache, recorder: Recorder | None) -> None:
        self.step, self.cache, self.recorder = step, cache, recorder
        if recorder is not None:
            recorder.live_slots = step.attention_mask.shape[1]

    @property
    def past_slots(self) -> int:
        """Number of cache slots before this step, in the longest row."""
        return self.step.attention_mask.shape[1] - self.step.input_ids.shape[1]

    def appended_mask(self) -> Tensor:
        """Mask [batch, past_slots + tokens] int64, for code that appends the new tokens of all rows at the same
        slot."""
        return torch.cat((self.cache.mask[:, : self.past_slots], self.step.new_mask), 1).to(torch.int64)

    def check_appended(self, what: str) -> None:
        """Refuse rows of different lengths if the model depends on the slot of a token.

        Such code appends a token to all rows at the same slot; ours uses each row's own slot.
        """
        spec, lengths = self.cache.spec, self.step.cache_lengths
        if counts_slots(spec) and bool((lengths != lengths[0]).any()):
            raise LogitLockError(
                f"{what} cannot continue with rows of different lengths {lengths.tolist()} in a {spec.variant}, which "
                "counts cache slots; pad the prompts on the left"
            )

    def deliver(self, name: str, tensor: Tensor) -> None:
        """Show a tap."""
        if self.recorder is not None and self.recorder(name, tensor) is not tensor:
            raise LogitLockError(f"the recorder substitutes {name}, which only the reference can do")

    def write(self, tap: str, new: Tensor) -> None:
        """Write the new tokens' keys or values [batch, kv_heads, tokens, head_dim] to their slots, and report them."""
        buffer = self.cache.at(tap)
        rows, slots = torch.arange(new.shape[0])[:, None], self.step.cache_lengths[:, None] + torch.arange(new.shape[2])
        buffer[rows, :, slots] = new.transpose(1, 2).to(buffer.dtype)
        self.deliver(tap, buffer)

    def logits_of(self, x: Tensor) -> Tensor:
        """The tokens for which the step wants logits: [batch, N, width] from [batch, tokens, width]."""
        return select_tokens(x, self.step.logit_index.to(x.device))


def counts_slots(spec: ModelSpec) -> bool:
    """Whether a model depends on the cache slot of a token, and not only on its position."""
    return spec.position == "alibi" or spec.position_origin == "slot" or spec.attention.window is not None


@dataclass(frozen=True)
class CacheAxes:
    """The order of a foreign cache tensor's axes: B, S (slots), H (kv heads), D, as letters."""

    order: str

    def to_ours(self, tensor: Tensor) -> Tensor:
        """[batch, kv_heads, slots, head_dim], a view."""
        return tensor.permute([self.order.index(axis) for axis in "BHSD"])

    def from_ours(self, tensor: Tensor) -> Tensor:
        """The foreign layout, a view."""
        return tensor.permute(["BHSD".index(axis) for axis in self.order])


def regroup_heads(x: Tensor, heads: int) -> Tensor:
    """All queries, all keys, all values, from the last axis grouped by head (query, key, value of each together)."""
    grouped: Tensor = x.unflatten(-1, (heads, 3, -1))
    return grouped.transpose(-3, -2).flatten(-3)
