"""Taps: one name for one tensor, from the reference through ONNX to the engine, and one table of what each of them is.

`tap(name, tensor)` is the identity until a `Recorder` is active; the exporter names the ONNX value after the tap, and
an engine that captures intermediate tensors captures them under the same names.  There is no second naming scheme.
What a tap is stands in `ModelSpec.taps`; nothing works it out from the name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    from refmodels.spec import ModelSpec

TapKind = Literal["embed", "norm", "linear", "cache", "attention", "residual", "activation"]

CACHE_PARTS = ("key", "value")
"""The cache tensors of a block."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One tensor that has a name.

    Attributes:
        name: 'blocks.3.attn.qkv'; 'blocks.3' is the block's output.
        layer: 3; None outside blocks.
        part: the name within the block, 'attn.qkv'; '' for the block's output; the whole name outside blocks.
        kind: the operation that makes it; "cache": keys or values, which attention writes.
        module: the submodule of `Decoder` that makes it.
        reads: the taps that it is computed from, in the order of execution.  Token ids are not among them, nor is the
            cache as it was before the step.
        columns: [start, stop) of the elements of the only tap that it reads; None: all of them.
        shape: dynamic axes are names: "batch", "tokens" (of the step), "logit_tokens" (tokens of the step that get
            logits), "capacity" (of the cache).
        sums: numbers of terms of the dot products that make it (of a norm: of its sum of squares); "slots" is the
            number of cache slots in use.
    """

    name: str
    layer: int | None
    part: str
    kind: TapKind
    module: str
    reads: tuple[str, ...]
    shape: tuple[int | str, ...]
    sums: tuple[int | Literal["slots"], ...] = ()
    columns: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        """Number of elements per token; per slot, if it is a cache tensor."""
        return math.prod(axis for axis in self.shape if isinstance(axis, int))


def make_taps(spec: ModelSpec) -> dict[str, Tap]:
    """All taps of a model by name, in the order of execution: `Decoder.forward` written with names for tensors."""
    a, hidden, ffn = spec.attention, spec.hidden_size, spec.mlp.width
    found: dict[str, Tap] = {}

    def add(
        layer: int | None,
        part: str,
        kind: TapKind,
        reads: list[str],
        *shape: int | str,
        module: str | None = None,
        sums: tuple[int | Literal["slots"], ...] = (),
        columns: tuple[int, int] | None = None,
    ) -> str:
        """Enter a tap and return its name; `module` is its own name if not given, a name within the block if it is."""
        block = "" if layer is None else f"blocks.{layer}."
        name, maker = ((block + own).removesuffix(".") for own in (part, part if module is None else module))
        if kind in ("linear", "norm"):
            sums = sums or (found[reads[0]].width,)
        found[name] = Tap(
            name=name,
            layer=layer,
            part=part,
            kind=kind,
            module=maker,
            reads=tuple(reads),
            shape=("batch", *shape),
            sums=sums,
            columns=columns,
        )
        return name

    x = add(None, "embed", "embed", [], "tokens", hidden)
    for i in range(spec.layers):
        norm = add(i, "attn_norm", "norm", [x], "tokens", hidden)
        qkv = add(i, "attn.qkv", "linear", [norm], "tokens", spec.qkv_width)
        rows, start = [qkv], 0
        for part, heads in (("attn.query_norm", a.heads), ("attn.key_norm", a.kv_heads)) if a.head_norms else ():
            stop = start + heads * a.head_dim
            columns = (start, stop)
            rows.insert(-1, add(i, part, "norm", [qkv], "tokens", stop - start, sums=(a.head_dim,), columns=columns))
            start = stop
        for part in CACHE_PARTS:
            add(i, part, "cache", rows, a.kv_heads, "capacity", a.head_dim, module="attn")
        sums: tuple[int, Literal["slots"]] = (a.head_dim, "slots")
        context = add(i, "attn.context", "attention", rows, "tokens", a.heads * a.head_dim, module="attn", sums=sums)
        out = add(i, "attn.out", "linear", [context], "tokens", hidden)
        if spec.sandwich_norms:
            out = add(i, "attn_post_norm", "norm", [out], "tokens", hidden)
        middle = add(i, "resid_mid", "residual", [x, out], "tokens", hidden, module="")
        norm = add(i, "mlp_norm", "norm", [middle], "tokens", hidden)
        gate = [add(i, "mlp.gate", "linear", [norm], "tokens", ffn)] if spec.mlp.gated else []
        up = add(i, "mlp.up", "linear", [norm], "tokens", ffn)
        act = add(i, "mlp.act", "activation", [*gate, up], "tokens", ffn, module="mlp")
        out = add(i, "mlp.out", "linear", [act], "tokens", hidden)
        if spec.sandwich_norms:
            out = add(i, "mlp_post_norm", "norm", [out], "tokens", hidden)
        x = add(i, "", "residual", [middle, out], "tokens", hidden)
    norm = add(None, "final_norm", "norm", [x], "logit_tokens", hidden)
    add(None, "logits", "linear", [norm], "logit_tokens", spec.vocab_size, module="head")
    return found


def tap_names(spec: ModelSpec) -> tuple[str, ...]:
    """All taps of a model in the order of execution; cache contents are taps as well."""
    return tuple(spec.taps)


def split_name(name: str) -> tuple[int | None, str]:
    """`Tap.layer` and `Tap.part` of a name, for code without a spec; also of the name of a module in `Decoder`."""
    outer, *rest = name.split(".", 2)
    if outer != "blocks" or not rest or not rest[0].isdecimal():
        return None, name
    return int(rest[0]), "".join(rest[1:])


def is_cache_tap(name: str) -> bool:
    """Whether the tap is a cache tensor ([batch, kv_heads, slots, head_dim]) rather than [batch, tokens, width]."""
    layer, part = split_name(name)
    return layer is not None and part in CACHE_PARTS


def cache_numbers(cache: Tensor) -> Tensor:
    """A cache tensor as floats; a quantized one without its scales, which are static."""
    return cache.float() if cache.dtype.itemsize == 1 else cache
