"""Statistics of the activations that stream by in calibration: one pass, bounded memory, mergeable.

An observer belongs to one linear layer's input (its `name` is in every error) and is fed `observe(x)`, x [..., width],
with the real tokens only.  Two observers that saw different batches `merge` into one that saw both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refmodels.dtypes import wide_dtype
from refmodels.errors import LogitLockError

SKETCH_ERROR = 0.01
"""Largest relative error of a percentile."""

_GAMMA = (1 + SKETCH_ERROR) / (1 - SKETCH_ERROR)
_OCTAVES = 24
"""Magnitudes from 2^-24 (the smallest fp16 number; smaller ones count as it) to 2^24 have bins of their own; a
percentile above that is the maximum."""

_BINS = 2 * math.ceil(_OCTAVES / math.log2(_GAMMA)) + 1


def tokens_of(x: Tensor, name: str, width: int) -> Tensor:
    """x [..., width] as [tokens, width] in the wide dtype (a view where it has it already).

    Raises:
        LogitLockError: another width, NaN or infinity; the layer is named.
    """
    if x.shape[-1] != width:
        raise LogitLockError(f"the input of {name} has {x.shape[-1]} channels; it was to have {width}")
    tokens = x.detach().reshape(-1, width)
    # Minimum and maximum carry NaN and Inf on and need no temporary of the tensor's size.
    if tokens.numel() and not all(bool(bound.isfinite()) for bound in torch.aminmax(tokens)):
        kind = "NaN" if bool(tokens.isnan().any()) else "infinity"
        raise LogitLockError(
            f"the input of {name} holds {kind} during calibration; nothing can be calibrated on it. Use a wider dtype "
            "or other data"
        )
    return tokens.to(wide_dtype(tokens.dtype))


class MaxObserver:
    """Largest and mean magnitude of every channel; the tensor's largest is the maximum of these.

    Attributes:
        tokens: number of tokens observed.
    """

    def __init__(self, name: str, width: int) -> None:
        self.name, self.width, self.tokens = name, width, 0
        self._max: Tensor | None = None
        self._sum: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """x: [..., width], any float dtype and device.  Raises: as `tokens_of`."""
        magnitude = tokens_of(x, self.name, self.width).abs()
        if len(magnitude):
            self._add(len(magnitude), magnitude.amax(0), magnitude.sum(0, dtype=torch.float64))

    def merge(self, other: MaxObserver) -> None:
        _same_input(self, other)
        if other._max is not None and other._sum is not None:
            self._add(other.tokens, other._max, other._sum)

    def _add(self, tokens: int, largest: Tensor, total: Tensor) -> None:
        self.tokens += tokens
        self._max = largest if self._max is None else torch.maximum(self._max, largest.to(self._max.device))
        self._sum = total if self._sum is None else self._sum + total.to(self._sum.device)

    @property
    def channel(self) -> Tensor:
        """max |x| of each channel, [width], wide."""
        return _seen(self._max, self.name)

    @property
    def tensor(self) -> Tensor:
        """max |x|, []."""
        return self.channel.amax()

    @property
    def mean(self) -> Tensor:
        """mean |x| of each channel, [width], wide (summed in fp64)."""
        return (_seen(self._sum, self.name) / self.tokens).to(self.channel.dtype)


class PercentileObserver:
    """Percentiles of |x| per channel and, from the same counts, per group of channels or of the whole tensor.

    A histogram with bins of equal ratio (DDSketch; Masson et al., arXiv:1908.10693): it needs no range in advance, adds
    up when merged, and every percentile is within `SKETCH_ERROR` of the exact one (for magnitudes in 2^-24 .. 2^24).
    Because bins are logarithmic and per channel, percentiles of x / s are known as well, for an s found later.

    Memory: width * 1665 bins * 8 bytes.  per_channel=False counts the whole tensor in one row of bins.
    """

    def __init__(self, name: str, width: int, *, per_channel: bool = True) -> None:
        self.name, self.width, self.per_channel = name, width, per_channel
        self._counts: Tensor | None = None
        self._max: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """x: [..., width].  Raises: as `tokens_of`."""
        magnitude = tokens_of(x, self.name, self.width).abs()
        if not len(magnitude):
            return
        rows = self.width if self.per_channel else 1
        counts = torch.zeros(rows * _BINS, dtype=torch.int64, device=x.device)
        bins = (magnitude.log2_() / math.log2(_GAMMA)).ceil_().clamp_(-(_BINS // 2), _BINS // 2).to(torch.int64)
        bins += _BINS // 2
        if self.per_channel:
            bins += torch.arange(rows, device=x.device) * _BINS
        counts.scatter_add_(0, bins.flatten(), torch.ones((), dtype=torch.int64, device=x.device).expand(bins.numel()))
        # Not from `magnitude`: it holds logarithms by now.
        largest = tokens_of(x, self.name, self.width).abs().amax(0)
        self._add(counts.view(rows, _BINS), largest if self.per_channel else largest.amax(0, keepdim=True))

    def merge(self, other: PercentileObserver) -> None:
        _same_input(self, other)
        if self.per_channel != other.per_channel:
            raise LogitLockError(f"percentiles of {self.name} by channel and by tensor cannot be merged")
        if other._counts is not None and other._max is not None:
            self._add(other._counts, other._max)

    def _add(self, counts: Tensor, largest: Tensor) -> None:
        self._counts = counts if self._counts is None else self._counts + counts.to(self._counts.device)
        self._max = largest if self._max is None else torch.maximum(self._max, largest.to(self._max.device))

    def percentile(self, percent: float, *, groups: int = 1, divisor: Tensor | None = None) -> Tensor:
        """The magnitude that `percent` % of the elements do not exceed, [groups].

        Args:
            percent: in (0, 100]; 100 is the exact maximum.
            groups: equal runs of channels that share a percentile: 1 for the tensor, `width` for each channel.
            divisor: [width]; percentiles of x / divisor.
        Raises:
            LogitLockError: percent is out of range, nothing was observed, groups or a divisor need counts per channel.
        """
        if not 0 < percent <= 100:
            raise LogitLockError(f"a percentile of {percent}: it must be above 0 and at most 100")
        counts, largest = _seen(self._counts, self.name), _seen(self._max, self.name)
        if not self.per_channel and (groups != 1 or divisor is not None):
            raise LogitLockError(f"percentiles of {self.name} were counted for the tensor as a whole")
        if self.width % groups:
            raise LogitLockError(f"{self.width} channels of {self.name} are no multiple of {groups} groups")
        if divisor is not None:
            largest = largest / divisor
        top = largest.view(groups, -1).amax(1)
        if percent == 100:
            return top
        exponents = torch.arange(-(_BINS // 2), _BINS // 2 + 1, dtype=torch.float64, device=counts.device)
        values = 2 / (_GAMMA + 1) * _GAMMA**exponents
        values[-1] = float("inf")  # everything above: cut to the maximum below
        values = values.expand(counts.shape)
        if divisor is not None:
            values = values / divisor.to(torch.float64)[:, None]
        values, order = values.reshape(groups, -1).sort(1)
        cumulative = counts.view(groups, -1).gather(1, order).cumsum(1)
        # The same rank as numpy's "inverted_cdf".
        rank = (cumulative[:, -1:].to(torch.float64) * (percent / 100)).ceil().to(torch.int64)
        found = values.gather(1, torch.searchsorted(cumulative, rank)).squeeze(1).to(top.dtype)
        return torch.minimum(found, top)


class TokenSample:
    """At most `size` tokens, drawn uniformly from all that were seen, [size, width].

    Every token gets a random number, and those with the largest stay (bottom-k sampling), so that merged samples are
    again uniform.  Which tokens stay depends on the seed and the order of observation only.
    """

    def __init__(self, name: str, width: int, *, size: int, seed: int = 0) -> None:
        self.name, self.width, self.size = name, width, size
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: Tensor | None = None
        self._priority = torch.empty(0)

    def observe(self, x: Tensor) -> None:
        """x: [..., width].  Raises: as `tokens_of`."""
        tokens = tokens_of(x, self.name, self.width)
        self._add(tokens, torch.rand(len(tokens), generator=self._generator))

    def merge(self, other: TokenSample) -> None:
        _same_input(self, other)
        if other._kept is not None:
            self._add(other._kept, other._priority)

    def _add(self, tokens: Tensor, priority: Tensor) -> None:
        both = torch.cat((self._priority, priority))
        best = both.topk(min(self.size, len(both))).indices.sort().values
        old, new = best[best < len(self._priority)], best[best >= len(self._priority)] - len(self._priority)
        fresh = tokens[new.to(tokens.device)]
        if self._kept is None:
            # A copy: advanced indexing never returns a view of the caller's tensor.
            self._kept = fresh
        else:
            self._kept = torch.cat((self._kept[old.to(self._kept.device)], fresh.to(self._kept.device)))
        self._priority = both[best]

    @property
    def tokens(self) -> Tensor:
        """[at most size, width], wide, on the device of the activations."""
        return _seen(self._kept, self.name)


def _seen(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise LogitLockError(f"the input of {name} was never observed; calibration needs at least one token")
    return value


def _same_input(one: MaxObserver | PercentileObserver | TokenSample, other: object) -> None:
    if getattr(other, "name", None) != one.name or getattr(other, "width", None) != one.width:
        raise LogitLockError(f"observers of {one.name} and {getattr(other, 'name', other)} cannot be merged")
