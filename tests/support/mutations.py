"""Faults that people plant in engines without meaning to, as edits of an exported (decomposed) ONNX graph.

Each says where it shows first and what the diagnosis should call it.  They edit the graph and its weights, never our
code, so the debugger meets them as it meets a stranger's engine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from refmodels.positions import ntk_alphas, rope_table
from refmodels.spec import ModelSpec
from tests.support.mutate import (
    Fault,
    both,
    constant,
    edit,
    identity,
    initializer,
    insert_before,
    node,
    on_input,
    padding_visible,
    positions_off_by_one,
    replace_input,
    swapped,
)


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """name: for reports.  tap: where it shows first, without its block.  diagnosis: beginning of the right name."""

    name: str
    tap: str
    diagnosis: str
    apply: Fault


def mutations(spec: ModelSpec, layer: int) -> Iterator[Mutation]:
    """Every mutation that applies to a model, at one layer."""
    path = f"blocks.{layer}"
    made = [*_rotation(spec, path), *_attention(spec, path, layer), *_cache(path), *_pointwise(spec, path)]
    for name, tap, diagnosis, apply in [*made, *_linear(spec, path, layer)]:
        yield Mutation(name=name, tap=tap, diagnosis=diagnosis, apply=apply)


Found = list[tuple[str, str, str, Fault]]


# Rotation


def _rotation(spec: ModelSpec, path: str) -> Found:
    rope = spec.rope
    if rope is None:
        return []
    turned, half = f"{path}.attn.rotated", spec.attention.head_dim // 2

    def twice(model: onnx.ModelProto) -> None:
        first = node(model, turned)
        again = onnx.NodeProto()
        again.CopyFrom(first)
        first.output[0] = f"{turned}.once"
        again.name, again.input[0] = f"{turned}.again", first.output[0]
        at = list(model.graph.node).index(first)
        model.graph.node.insert(at + 1, again)

    def interleaved(model: onnx.ModelProto) -> None:
        attribute = next(a for a in node(model, turned).attribute if a.name == "interleaved")
        attribute.i = 1 - attribute.i

    def other_tables(**facts: Any) -> Fault:
        def fault(model: onnx.ModelProto) -> None:
            other = dataclasses.replace(rope, **facts)
            stored = next(i for i in model.graph.initializer if i.name == "rope_cos")
            alphas = ntk_alphas(rope, 1) if rope.ntk_seq_length is None else None
            tables = 1 if alphas else _tables(spec, stored.dims[0])
            positions = stored.dims[0] // tables
            factors = [float(2 ** (t + 1) - 1) for t in range(tables)]
            import torch

            pairs = [
                rope_table(other, positions=positions, alpha=a, numerics="exact", dtype=torch.float32) for a in factors
            ]
            rows = node(model, "rope_cos.rows").input[1]
            for part, index in (("cos", 0), ("sin", 1)):
                table = initializer(model, f"{path}.{part}", np.concatenate([p[index].numpy() for p in pairs]))
                insert_before(model, turned, helper.make_node("Gather", [table, rows], [f"{path}.{part}.rows"], axis=0))
                replace_input(model, turned, f"rope_{part}.rows", f"{path}.{part}.rows")
            dim = next(a for a in node(model, turned).attribute if a.name == "rotary_embedding_dim")
            dim.i = other.dim

        return fault

    def shifted(model: onnx.ModelProto) -> None:
        rows = node(model, "rope_cos.rows").input[1]
        one = initializer(model, f"{path}.one", np.array(1, np.int64))
        insert_before(model, turned, helper.make_node("Add", [rows, one], [f"{path}.shifted"]))
        for part in ("cos", "sin"):
            gather = helper.make_node("Gather", [f"rope_{part}", f"{path}.shifted"], [f"{path}.{part}.rows"], axis=0)
            insert_before(model, turned, gather)
            replace_input(model, turned, f"rope_{part}.rows", f"{path}.{part}.rows")

    found: Found = [
        ("rope twice", "key", "rope applied twice", twice),
        ("rope missing", "key", "rope not applied", identity(turned)),
        ("rope layout", "key", "rope layout", interleaved),
        ("rope theta", "key", "wrong rope theta", other_tables(theta=500000.0 if rope.theta < 1e5 else 10000.0)),
        ("rope positions +1", "key", "positions off", shifted),
        (
            "rope backwards",
            "key",
            "rope turned the wrong way",
            on_input(turned, "rope_sin.rows", lambda x: helper.make_node("Neg", [x], [f"{path}.sin.neg"])),
        ),
    ]
    if rope.scaling is not None and rope.scaling.kind != "dynamic":
        scaled = [
            ("rope scaling missing", None),
            ("rope scaling factor", dataclasses.replace(rope.scaling, factor=2 * rope.scaling.factor)),
        ]
        found += [(name, "key", "rope scaling missing or wrong", other_tables(scaling=s)) for name, s in scaled]
    if rope.dim < 2 * half:
        found.append(("rotary dim full", "key", "wrong rotary dim", other_tables(dim=2 * half)))
    elif half > 2:
        found.append(("rotary dim half", "key", "wrong rotary dim", other_tables(dim=half)))
    if rope.ntk_seq_length is not None:

        def no_ntk(model: onnx.ModelProto) -> None:
            for part in ("cos", "sin"):
                rows = f"{path}.{part}.rows"
                insert_before(
                    model, turned, helper.make_node("Gather", [f"rope_{part}", "position_ids"], [rows], axis=0)
                )
                replace_input(model, turned, f"rope_{part}.rows", rows)

        found.append(("NTK missing", "key", "dynamic NTK", no_ntk))
    return found


def _tables(spec: ModelSpec, rows: int) -> int:
    assert spec.rope is not None
    return next(n for n in range(1, 64) if rows % n == 0 and len(ntk_alphas(spec.rope, rows // n)) == n)


# Scores, masks, heads


def _attention(spec: ModelSpec, path: str, layer: int) -> Found:
    a, attn, context = spec.attention, f"{path}.attn", "attn.context"
    scale = f"{attn}.scale_number"

    seen = f"{attn}.seen_unlimited" if a.window is not None else f"{attn}.seen"

    def no_causal(model: onnx.ModelProto) -> None:
        causal, future = f"{attn}.causal", f"{attn}.future"
        insert_before(
            model,
            seen,
            helper.make_node("Not", [causal], [future]),
            helper.make_node("Or", [causal, future], [f"{attn}.always"]),
        )
        replace_input(model, seen, causal, f"{attn}.always")

    def head_order(model: onnx.ModelProto) -> None:
        identity(f"{attn}.context_by_token")(model)
        shape = node(model, f"{attn}.context_rows_shape").attribute[0]
        shape.ints[1] = -1

    found: Found = [
        ("scale missing", context, "wrong attention scale", constant(scale, lambda s: 1.0)),
        ("scale twice", context, "wrong attention scale", constant(scale, lambda s: s * s)),
        ("scale x 1.1", context, "wrong attention scale", constant(scale, lambda s: 1.1 * s)),
        ("causal missing", context, "causal mask missing", no_causal),
        ("padding seen", context, "padding mask ignored", identity(seen)),
        ("head order", context, "heads reshaped", head_order),
    ]
    if spec.window(layer):
        found.append(("window + 1", context, "sliding window", constant(f"{attn}.window_size", lambda w: w + 1)))
        found.append(("window missing", context, "sliding window", constant(f"{attn}.window_size", lambda w: 0)))
    if 1 < a.kv_heads < a.heads:
        order = np.arange(a.heads).reshape(-1, a.kv_heads).T.flatten()

        def tiled(model: onnx.ModelProto) -> None:
            before = initializer(model, f"{attn}.tile", order)
            after = initializer(model, f"{attn}.untile", np.argsort(order))
            on_input(
                f"{attn}.query_grouped",
                f"{attn}.query_wide",
                lambda x: helper.make_node("Gather", [x, before], [f"{attn}.tiled"], axis=1),
            )(model)
            on_input(
                f"{attn}.context_seen",
                f"{attn}.context_by_head",
                lambda x: helper.make_node("Gather", [x, after], [f"{attn}.untiled"], axis=1),
            )(model)

        found.append(("GQA tiled", context, "grouped heads tiled", tiled))
    if spec.position == "alibi":
        slopes = f"{attn}.slopes"
        for name, factor in (("missing", 0.0), ("sign", -1.0), ("x 1.5", 1.5)):

            def scaled(model: onnx.ModelProto, factor: float = factor) -> None:
                by = initializer(model, f"{attn}.slope_factor", np.array(factor, np.float32))
                make = lambda x: helper.make_node("Mul", [x, by], [f"{attn}.slopes_scaled"])  # noqa: E731
                on_input(slopes, "alibi_slopes", make)(model)

            found.append((f"ALiBi {name}", context, "ALiBi", scaled))
    if a.logn_seq_length is not None:
        found.append(("logn missing", context, "logn", identity(f"{attn}.query_logn")))
    return found


# The cache, wrong in decode only


def _cache(path: str) -> Found:
    write = f"{path}.attn.key"

    def slot(model: onnx.ModelProto) -> None:
        one = initializer(model, f"{path}.one_slot", np.array(1, np.int64))
        zero = initializer(model, f"{path}.no_slot", np.array(0, np.int64))
        on_input(
            write,
            "cache_lengths",
            lambda x: helper.make_node("Sub", [x, one], [f"{path}.slot_before"]),
            lambda x: helper.make_node("Max", [x, zero], [f"{path}.slot"]),
        )(model)

    def rows(model: onnx.ModelProto) -> None:
        new = f"{path}.attn.new_key"
        back = initializer(model, f"{path}.rows_back", np.array([-1], np.int64))
        end = initializer(model, f"{path}.rows_end", np.array([-(2**31)], np.int64))
        axis = initializer(model, f"{path}.rows_axis", np.array([0], np.int64))
        on_input(
            write, new, lambda x: helper.make_node("Slice", [x, back, end, axis, back], [f"{path}.rows_reversed"])
        )(model)

    return [
        ("cache slot - 1", "key", "cache written at the wrong slot", slot),
        ("cache rows", "key", "cache rows", rows),
        ("value in key cache", "key", "key and value caches", _value_as_key(path)),
    ]


def _value_as_key(path: str) -> Fault:
    return lambda model: replace_input(model, f"{path}.attn.key", f"{path}.attn.new_key", f"{path}.attn.new_value")


# Norms, activations, residuals, embedding


def _pointwise(spec: ModelSpec, path: str) -> Found:
    found: Found = [
        ("residual missing", "resid_mid", "residual missing", identity(f"{path}.resid_mid", keep=1)),
        ("attention dropped", "resid_mid", "residual missing", identity(f"{path}.resid_mid", keep=0)),
        ("MLP residual missing", "", "residual missing", identity(path, keep=1)),
    ]
    norm = f"{path}.mlp_norm"
    ones = edit(f"{norm}.weight", np.ones_like)
    found.append(("norm weight missing", "mlp_norm", "norm weight missing", ones))
    if spec.attention.head_norms:
        normed, rows = f"{path}.attn.query_norm.norm", f"{path}.attn.query_norm"
        missing = _replace_value(rows, normed, f"{path}.attn.heads_to_norm")
        found.append(("query norm missing", "attn.query_norm", "norm missing", missing))
        weight = edit(f"{path}.attn.key_norm.weight", np.ones_like)
        found.append(("key norm weight missing", "attn.key_norm", "norm weight missing", weight))
    if spec.sandwich_norms:
        post = edit(f"{path}.attn_post_norm.weight", np.ones_like)
        found.append(("post norm weight missing", "attn_post_norm", "norm weight missing", post))
    if spec.norm.kind == "rms":
        found.append(("norm eps", "mlp_norm", "wrong epsilon", constant(f"{norm}.eps", lambda e: 0.05)))

        def mean(model: onnx.ModelProto) -> None:
            wide, last = f"{norm}.wide", f"{norm}.last_axis"
            initializer(model, last, np.array([-1], np.int64))
            insert_before(
                model,
                f"{norm}.square",
                helper.make_node("ReduceMean", [wide, last], [f"{norm}.center"]),
                helper.make_node("Sub", [wide, f"{norm}.center"], [f"{norm}.centered"]),
            )
            replace_input(model, f"{norm}.square", wide, f"{norm}.centered")
            replace_input(model, f"{norm}.normed", wide, f"{norm}.centered")

        found.append(("LayerNorm for RMSNorm", "mlp_norm", "RMSNorm and LayerNorm", mean))
    else:

        def eps(model: onnx.ModelProto) -> None:
            next(a for a in node(model, norm).attribute if a.name == "epsilon").f = 0.05

        found.append(("norm eps", "mlp_norm", "wrong epsilon", eps))
        found.append(("norm bias missing", "mlp_norm", "norm bias missing", edit(f"{norm}.bias", np.zeros_like)))
    if spec.mlp.gated:
        silu, act = f"{path}.mlp.silu", f"{path}.mlp.act"

        def wrong_half(model: onnx.ModelProto) -> None:
            gate, up = f"{path}.mlp.gate", f"{path}.mlp.up"
            for n in model.graph.node:
                if n.name.startswith(silu) and gate in n.input:
                    n.input[:] = [up if name == gate else name for name in n.input]
            replace_input(model, act, up, gate)

        found.append(("SiLU on up", "mlp.act", "activation on the wrong half", wrong_half))
        found.append(
            ("gate not activated", "mlp.act", "wrong activation", _replace_value(act, silu, f"{path}.mlp.gate"))
        )
        found.append(("up missing", "mlp.act", "gate missing", identity(act, keep=0)))
    else:
        gelu = next_gelu(path)

        def exact(model: onnx.ModelProto) -> None:
            attribute = next(a for n in model.graph.node if gelu(n) for a in n.attribute if a.name == "approximate")
            attribute.s = b"none" if attribute.s == b"tanh" else b"tanh"

        def relu(model: onnx.ModelProto) -> None:
            n = next(n for n in model.graph.node if gelu(n))
            n.op_type = "Relu"
            del n.attribute[:]

        found.append(("gelu for gelu", "mlp.act", "wrong activation", exact))
        found.append(("relu for gelu", "mlp.act", "wrong activation", relu))
    return found


def next_gelu(path: str) -> Callable[[onnx.NodeProto], bool]:
    return lambda n: n.op_type == "Gelu" and n.name.startswith(f"{path}.mlp")


def _replace_value(user: str, old: str, new: str) -> Fault:
    return lambda model: replace_input(model, user, old, new)


# Linear layers: stored [in, out]


def _linear(spec: ModelSpec, path: str, layer: int) -> Found:
    a = spec.attention
    qkv, out = f"{path}.attn.qkv", f"{path}.attn.out"
    widths = [n * a.head_dim for n in (a.heads, a.kv_heads, a.kv_heads)]
    parts = np.split(np.arange(sum(widths)), np.cumsum(widths)[:-1])
    found: Found = []

    def columns(order: np.ndarray) -> Fault:
        weight = edit(f"{qkv}.weight", lambda w: w[:, order])
        return both(weight, edit(f"{qkv}.bias", lambda b: b[order])) if a.qkv_bias else weight

    found.append(
        (
            "q and k exchanged",
            "attn.qkv",
            "query, key and value",
            columns(np.concatenate([parts[1], parts[0], parts[2]])),
        )
    )
    if a.heads > 1:
        rows = np.arange(sum(widths)).reshape(-1, a.head_dim)
        query, key, value = np.split(rows, [a.heads, a.heads + a.kv_heads])
        grouped = np.concatenate([query.reshape(a.kv_heads, -1, a.head_dim), key[:, None], value[:, None]], 1).flatten()
        if a.kv_heads > 1:
            found.append(("qkv by group", "attn.qkv", "fused query, key and value", columns(grouped)))
    if spec.hidden_size == a.heads * a.head_dim:
        found.append(("transposed", "attn.out", "weight transposed", edit(f"{out}.weight", np.transpose)))
    else:
        wrong = edit(f"{out}.weight", lambda w: w.T.reshape(w.shape))
        found.append(("transposed", "attn.out", "weight transposed", wrong))
    found.append(
        ("up misread", "mlp.up", "weight transposed", edit(f"{path}.mlp.up.weight", lambda w: w.T.reshape(w.shape)))
    )
    if a.qkv_bias:
        found.append(("qkv bias missing", "attn.qkv", "bias missing", edit(f"{qkv}.bias", np.zeros_like)))
    if spec.mlp.bias:
        found.append(("MLP bias missing", "mlp.up", "bias missing", edit(f"{path}.mlp.up.bias", np.zeros_like)))
    if spec.mlp.gated:
        found.append(
            ("gate and up", "mlp.gate", "gate and up", swapped(f"{path}.mlp.gate.weight", f"{path}.mlp.up.weight"))
        )
    other = f"blocks.{(layer + 1) % spec.layers}.mlp.out.weight"

    def taken_from(model: onnx.ModelProto) -> None:
        by_name = {i.name: i for i in model.graph.initializer}
        by_name[f"{path}.mlp.out.weight"].CopyFrom(by_name[other])
        by_name[f"{path}.mlp.out.weight"].name = f"{path}.mlp.out.weight"

    found.append(("another layer's weight", "mlp.out", "another layer's weights", taken_from))

    def int4(w: np.ndarray) -> np.ndarray:
        scale = np.abs(w).max(1, keepdims=True) / 7  # by input row of [in, out]: the wrong axis
        return np.clip(np.round(w / scale), -8, 7) * scale

    found.append(("int4 by input", "mlp.out", "weight quantized", edit(f"{path}.mlp.out.weight", int4)))
    return found


def model_wide(spec: ModelSpec) -> Iterator[Mutation]:
    """Mutations that are not of one layer; `tap` is the whole name."""
    if spec.position == "learned":
        yield Mutation(name="learned positions +1", tap="embed", diagnosis="positions off", apply=positions_off_by_one)
    if spec.rope is not None:
        yield Mutation(name="positions +1", tap="blocks.0.key", diagnosis="positions off", apply=positions_off_by_one)
    yield Mutation(
        name="padding visible", tap="blocks.0.attn.context", diagnosis="padding mask ignored", apply=padding_visible
    )
    if not spec.tied_head:
        length = math.sqrt(spec.hidden_size)

        def longer(weight: np.ndarray) -> np.ndarray:
            return weight * np.linspace(0.5, 1.5, weight.shape[1])[None] * (length if spec.head_normalized else 1.0)

        def unit(weight: np.ndarray) -> np.ndarray:
            return weight / np.linalg.norm(weight, axis=0 if not spec.head_normalized else 1, keepdims=True)

        name = "NormHead missing" if spec.head_normalized else "NormHead applied"
        change = longer if spec.head_normalized else unit
        yield Mutation(name=name, tap="logits", diagnosis="NormHead", apply=edit("head.weight", change))
