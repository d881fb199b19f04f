"""Taps: one name for one tensor, from the reference through ONNX to the engine.

`tap(name, tensor)` is the identity until a `Recorder` is active; the exporter names the ONNX value after the tap, and
an engine that captures intermediate tensors captures them under the same names.  There is no second naming scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from refmodels.spec import ModelSpec

_GATED_MLP = ("mlp.gate", "mlp.up", "mlp.act", "mlp.out")
_BLOCK = ("attn_norm", "attn.qkv", "key", "value", "attn.context", "attn.out", "resid_mid", "mlp_norm")


def tap_names(spec: ModelSpec) -> tuple[str, ...]:
    """All taps of a model in the order of execution; cache contents are taps as well."""
    mlp = _GATED_MLP if spec.mlp.gated else _GATED_MLP[1:]
    names = ["embed"]
    for i in range(spec.layers):
        names += [f"blocks.{i}.{part}" for part in (*_BLOCK, *mlp)] + [f"blocks.{i}"]
    return (*names, "final_norm", "logits")


def linear_name(tap: str) -> str:
    """The name in `Decoder` of the linear layer that makes a tap: the tap's own, but for the head's."""
    return "head" if tap == "logits" else tap


def input_of(tap: str) -> str:
    """The tap that a linear layer reads, by the tap that it makes."""
    if tap == "logits":
        return "final_norm"
    block, _, part = tap.partition(".attn.") if ".attn." in tap else tap.partition(".mlp.")
    sources = {"qkv": "attn_norm", "out": "attn.context" if ".attn." in tap else "mlp.act"}
    return f"{block}.{sources.get(part, 'mlp_norm')}"


def is_cache_tap(name: str) -> bool:
    """Whether the tap is a cache tensor ([batch, kv_heads, slots, head_dim]) rather than [batch, tokens, width]."""
    return name.endswith((".key", ".value"))


def cache_numbers(cache: Tensor) -> Tensor:
    """A cache tensor as floats: the codes of a quantised one without their scales, which are constant."""
    return cache.float() if cache.dtype.itemsize == 1 else cache


class Recorder:
    """Collects tapped tensors of one forward, and may substitute what flows on.

    Args:
        names: taps to keep; None keeps all.
        substitutes: tensors that replace the computed ones downstream.  Feeding an engine's captures here runs every
            module of the reference on the engine's own inputs: what is recorded is then the local result.
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
    """Make `recorder` receive every tap of the forwards run inside the block (None: record nothing)."""
    token = _active.set(recorder)
    try:
        yield recorder
    finally:
        _active.reset(token)
