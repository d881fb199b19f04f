"""What executors of foreign models share: writing the caller's cache, showing taps, the layout of cache tensors."""

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
    """One forward: taps go to the recorder as they come, keys and values to the caller's cache.

    Raises (deliver and write):
        LogitLockError: the recorder substitutes a tensor, which only the reference can do.
    """

    def __init__(self, step: StepInputs, cache: KVCache, recorder: Recorder | None) -> None:
        self.step, self.cache, self.recorder = step, cache, recorder
        if recorder is not None:
            recorder.live_slots = step.attention_mask.shape[1]

    @property
    def past_slots(self) -> int:
        """Slots of the cache before this step, those of the longest row."""
        return self.step.attention_mask.shape[1] - self.step.input_ids.shape[1]

    def appended_mask(self) -> Tensor:
        """[batch, past_slots + tokens] int64 for code that appends the new tokens of all rows in one place."""
        return torch.cat((self.cache.mask[:, : self.past_slots], self.step.new_mask), 1).to(torch.int64)

    def check_appended(self, what: str) -> None:
        """Refuse rows of different lengths in a model for which it matters in which slot a token is.

        Such code appends a token to all rows in one place; ours go to each row's own slot.
        """
        spec, lengths = self.cache.spec, self.step.cache_lengths
        if counts_slots(spec) and bool((lengths != lengths[0]).any()):
            raise LogitLockError(
                f"{what} cannot go on with rows of different lengths {lengths.tolist()} in a {spec.variant}, which "
                "counts cache slots; pad the prompts on the left"
            )

    def deliver(self, name: str, tensor: Tensor) -> None:
        """Show a tap."""
        if self.recorder is not None and self.recorder(name, tensor) is not tensor:
            raise LogitLockError(f"the recorder substitutes {name}, which only the reference can do")

    def write(self, tap: str, new: Tensor) -> None:
        """Put the new tokens' keys or values [batch, kv_heads, tokens, head_dim] in their slots, and show them."""
        _, layer, part = tap.split(".")
        buffer = (self.cache.key if part == "key" else self.cache.value)[int(layer)]
        rows, slots = torch.arange(new.shape[0])[:, None], self.step.cache_lengths[:, None] + torch.arange(new.shape[2])
        buffer[rows, :, slots] = new.transpose(1, 2).to(buffer.dtype)
        self.deliver(tap, buffer)

    def logits_of(self, x: Tensor) -> Tensor:
        """The tokens that the step asks logits of: [batch, N, width] from [batch, tokens, width]."""
        return select_tokens(x, self.step.logit_index.to(x.device))


def counts_slots(spec: ModelSpec) -> bool:
    """Whether it matters to a model in which slot of the cache a token is, and not only at which position."""
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
