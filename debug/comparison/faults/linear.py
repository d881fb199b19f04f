"""Faults of linear layers: layout, order, bias, whose weights, quantization."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from debug.comparison.faults.catalogue import MANY, Fit, Variants, fault
from debug.comparison.modules import Module, float_weight, linear_of
from refmodels.quantization.linear import QuantizedLinear


@fault("weight transposed", "linear")
def transposed(m: Module, _: Tensor) -> Variants:
    weight: Tensor = m["weight"]
    rows, columns = weight.shape
    if rows == columns:
        yield "", {"weight": weight.t()}
    else:
        yield "read as [in, out]", {"weight": weight.reshape(columns, rows).t()}
        yield "written as [in, out]", {"weight": weight.t().reshape(rows, columns)}


@fault("bias missing", "linear")
def bias_missing(m: Module, _: Tensor) -> Variants:
    bias: Tensor | None = m["bias"]
    if bias is not None:
        yield "", {"bias": None}
        yield "added twice", {"bias": 2 * bias}
        if m.part == "attn.qkv":
            for name, part in zip("qkv", _row_blocks(m), strict=True):
                kept = bias.clone()
                kept[part] = 0
                yield f"of {name}", {"bias": kept}


@fault("query, key and value in the wrong order", "linear")
def qkv_order(m: Module, _: Tensor) -> Variants:
    if m.part == "attn.qkv":
        blocks = _row_blocks(m)
        for order in itertools.permutations(range(3)):
            if order != (0, 1, 2):
                yield "".join("qkv"[i] for i in order), _rows(m, torch.cat([blocks[i] for i in order]))


@fault("fused query, key and value split in the wrong layout", "linear")
def qkv_layout(m: Module, _: Tensor) -> Variants:
    if m.part != "attn.qkv":
        return
    a = m.decoder.spec.attention
    group = a.heads // a.kv_heads
    rows = torch.arange(m["weight"].shape[0]).view(-1, a.head_dim)
    query, key, value = rows.split([a.heads, a.kv_heads, a.kv_heads])
    grouped = torch.cat([query.view(a.kv_heads, group, -1), key[:, None], value[:, None]], 1).flatten()
    yield "rows grouped by kv head", _rows(m, grouped)
    yield "rows of kv groups read as blocks", _rows(m, grouped.argsort())
    by_dim = rows.view(-1, a.head_dim).t().flatten()
    yield "head_dim before heads", _rows(m, by_dim)
    half = torch.cat([torch.arange(0, a.head_dim, 2), torch.arange(1, a.head_dim, 2)])
    for detail, order in (
        ("interleaved rows made half-split", half),
        ("half-split rows made interleaved", half.argsort()),
    ):
        turned = torch.cat([query[:, order], key[:, order], value])
        yield detail, _rows(m, turned.flatten())


def _row_blocks(m: Module) -> list[Tensor]:
    a = m.decoder.spec.attention
    return list(torch.arange(m["weight"].shape[0]).split([n * a.head_dim for n in (a.heads, a.kv_heads, a.kv_heads)]))


def _rows(m: Module, order: Tensor) -> dict[str, Tensor | None]:
    bias = m["bias"]
    return {"weight": m["weight"][order], "bias": None if bias is None else bias[order]}


@fault("gate and up exchanged", "linear")
def gate_up(m: Module, _: Tensor) -> Variants:
    other = {"mlp.gate": "up", "mlp.up": "gate"}.get(m.part)
    if other is not None and m.decoder.spec.mlp.gated:
        linear = linear_of(m.decoder, f"blocks.{m.layer}.mlp.{other}")
        yield "", {"weight": float_weight(linear, m["weight"].dtype), "bias": linear.bias}


@fault("NormHead missing or on the wrong axis", "linear")
def norm_head(m: Module, engine: Tensor) -> Variants:
    if m.tap == "logits":
        weight: Tensor = m["weight"]
        yield "rows normalized", {"weight": F.normalize(weight, dim=1)}
        yield "columns normalized", {"weight": F.normalize(weight, dim=0)}
        # Without the division, each row has its own length, which shows in the logits.
        mask = m.forward.inputs.new_mask
        expected, found = m()[mask], engine[mask]
        length = (found * expected).sum(0) / expected.square().sum(0).clamp(min=1e-300)
        if m.decoder.spec.head_normalized:
            yield Fit(words="not normalized", numbers=MANY), {"weight": weight * length[:, None]}


@fault("embedding used as head, or head as embedding", "linear")
def tied_head(m: Module, _: Tensor) -> Variants:
    if m.tap == "logits" and not m.decoder.spec.tied_head:
        yield "", {"weight": m.decoder.embed.weight}


@fault("another layer's weights", "linear")
def other_weights(m: Module, _: Tensor) -> Variants:
    own = linear_of(m.decoder, m.tap)
    for name, module in m.decoder.named_modules():
        if not isinstance(module, torch.nn.Linear | QuantizedLinear) or module.weight.shape != own.weight.shape:
            continue
        # If the model is streamed part by part, other parts are not loaded.
        if module.weight is not own.weight and not module.weight.is_meta:
            weight = float_weight(module, m["weight"].dtype)
            yield f"those of {name}", {"weight": weight, "bias": module.bias}
            if module.bias is not None:
                yield f"the weight of {name}", {"weight": weight}
