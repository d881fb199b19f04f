"""Taps: one name for one tensor, from the reference through ONNX to the engine.

`tap(name, tensor)` is the identity until a `Recorder` is active; the exporter names the ONNX value after the tap, and
an engine that captures intermediate tensors captures them under the same names.  There is no second naming scheme.
"""

from __future__ import annotations

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
    """The name in `Decoder` of the linear layer that makes a tap: that of the tap, except for the head."""
    return "head" if tap == "logits" else tap


def input_of(tap: str) -> str:
    """The tap that a linear layer reads, given the tap that it makes."""
    if tap == "logits":
        return "final_norm"
    block, _, part = tap.partition(".attn.") if ".attn." in tap else tap.partition(".mlp.")
    sources = {"qkv": "attn_norm", "out": "attn.context" if ".attn." in tap else "mlp.act"}
    return f"{block}.{sources.get(part, 'mlp_norm')}"


def is_cache_tap(name: str) -> bool:
    """Whether the tap is a cache tensor ([batch, kv_heads, slots, head_dim]) rather than [batch, tokens, width]."""
    return name.endswith((".key", ".value"))


def cache_numbers(cache: Tensor) -> Tensor:
    """A cache tensor as floats; a quantized one without its scales, which are static."""
    return cache.float() if cache.dtype.itemsize == 1 else cache


def tap_shape(spec: ModelSpec, name: str) -> tuple[int | str, ...]:
    """The shape of a tap, or of the past of a cache tap; dynamic axes are names."""
    a = spec.attention
    if is_cache_tap(name):
        return ("batch", a.kv_heads, "capacity", a.head_dim)
    widths = {
        "qkv": spec.qkv_width,
        "context": a.heads * a.head_dim,
        "gate": spec.mlp.width,
        "up": spec.mlp.width,
        "act": spec.mlp.width,
        "logits": spec.vocab_size,
    }
    tokens = "logit_tokens" if name in ("final_norm", "logits") else "tokens"
    return ("batch", tokens, widths.get(name.rpartition(".")[2], spec.hidden_size))


def tap_width(spec: ModelSpec, name: str) -> int:
    """Size of the last axis of a tap that is not a cache tensor."""
    part = name.split(".", 2)[2] if name.count(".") >= 2 else name
    if part == "logits":
        return spec.vocab_size
    if part == "attn.qkv":
        return spec.qkv_width
    if part == "attn.context":
        return spec.attention.heads * spec.attention.head_dim
    return spec.mlp.width if part in ("mlp.gate", "mlp.up", "mlp.act") else spec.hidden_size
