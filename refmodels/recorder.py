"""Record the taps of a forward pass, or substitute them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from refmodels.taps import cache_numbers, is_cache_tap


class Recorder:
    """Collects the tapped tensors of one forward pass, and may replace them downstream.

    Args:
        names: taps to keep; None keeps all.
        substitutes: tensors that replace the computed ones downstream.  With an engine's captured tensors, every module
            of the reference runs on the engine's own inputs, and the recorded tensors are local results.
        sink: called with (name, tensor) instead of storing, for callers that stream.
    """

    def __init__(
        self,
        names: Collection[str] | None = None,
        *,
        substitutes: Mapping[str, Tensor] | None = None,
        sink: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.live_slots: int | None = None
        self._names = None if names is None else frozenset(names)
        self._substitutes = substitutes or {}
        self._sink = sink

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if self._names is None or name in self._names:
            kept = tensor.detach()
            if is_cache_tap(name):
                # The cache is updated in place by later steps, and only its live slots hold data.
                kept = cache_numbers(kept[:, :, : self.live_slots]).clone()
            if self._sink is None:
                self.tensors[name] = kept
            else:
                self._sink(name, kept)
        substitute = self._substitutes.get(name)
        if substitute is None or is_cache_tap(name):
            return tensor
        return substitute.to(device=tensor.device, dtype=tensor.dtype)


_active: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def tap(name: str, tensor: Tensor) -> Tensor:
    """Name a tensor.  Returns it unchanged, or the active recorder's substitute."""
    recorder = _active.get()
    return tensor if recorder is None else recorder(name, tensor)


def active_recorder() -> Recorder | None:
    return _active.get()


@contextmanager
def recording(recorder: Recorder | None) -> Iterator[Recorder | None]:
    """Send every tap of the forward passes inside the block to `recorder` (None: record nothing)."""
    token = _active.set(recorder)
    try:
        yield recorder
    finally:
        _active.reset(token)
