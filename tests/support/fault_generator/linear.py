"""Faults of linear layers: their weights [in, out], biases, quantization, and what tensor parallelism loses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
import onnx

from tests.support.fault_generator.kinds import Draw, Name, Planted, kind
from tests.support.mutate import Fault, Patch, both, edit, edit_factor, reroute, rework

SCALED = r"scal|times|factor|multipl|divid"
NO_BIAS = r"bias.*(?:missing|dropped|zero|not added|absent)|(?:missing|no|without).*bias"
ORDER = r"permut|order|exchang|swap|shuffl|wrong place|moved"
OTHER = r"other values|other weights|differ|changed|fitted"
"""Words that are true of any other weight."""
GRID = r"quanti|grid|bits?\b|int\d|steps? of|rounded to (?:a |int|\d)"
"""Names of a grid of equal steps; a float type is none."""

Change = Callable[[Draw, np.ndarray], np.ndarray]


def linears(draw: Draw) -> list[str]:
    """Taps of the linear layers of one block."""
    names = ["attn.qkv", "attn.out", "mlp.up", "mlp.out", *(["mlp.gate"] if draw.spec.mlp.gated else [])]
    return [f"{draw.path}.{name}" for name in names]


def biased(draw: Draw) -> list[str]:
    return [name for name in linears(draw) if f"{name}.bias" in draw.weights]


def changed(
    draw: Draw, tap: str, change: Callable[[np.ndarray], np.ndarray], *names: Name, numbers: str = ""
) -> Planted:
    return Planted(tap=tap, apply=edit_factor(tap, change), names=names, numbers=numbers)


def with_bias(tap: str, draw: Draw, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """Change the columns of a weight and the elements of its bias alike."""
    weight = edit_factor(tap, change)
    return both(weight, edit_bias(tap, change)) if f"{tap}.bias" in draw.weights else weight


def edit_bias(tap: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    return edit(f"{tap}.bias", change)


@kind("linear", "scale weight")
def scale_weight(draw: Draw) -> Planted:
    factor, tap = draw.factor(), draw.chance.choice(linears(draw))
    return changed(draw, tap, lambda w: w * factor, Name(SCALED, (factor,)), numbers=f"x {factor:.4g}")


@kind("linear", "scale output")
def scale_output(draw: Draw) -> Planted:
    factor, tap = draw.factor(), draw.chance.choice(linears(draw))
    return Planted(
        tap=tap,
        apply=rework(tap, lambda p, x: p("Mul", x, factor)),
        names=(Name(SCALED, (factor,)),),
        numbers=f"x {factor:.4g}",
    )


@kind("linear", "scale per column")
def scale_columns(draw: Draw) -> Planted:
    tap = draw.chance.choice(linears(draw))
    factors = draw.generator.uniform(0.5, 2.0, draw.weights[f"{tap}.weight"].shape[1])
    return changed(draw, tap, lambda w: w * factors, Name(r"columns?|channels?|per[ -]|each|diagonal"))


@kind("linear", "scale per row")
def scale_rows(draw: Draw) -> Planted:
    """A smoothing factor that was divided out of the weight but not out of the norm before it."""
    tap = draw.chance.choice(linears(draw))
    factors = draw.generator.uniform(0.5, 2.0, draw.weights[f"{tap}.weight"].shape[0])
    return changed(draw, tap, lambda w: w * factors[:, None], Name(r"rows?|inputs?|channels?|per[ -]|each|smooth"))


@kind("linear", "permute rows")
def permute_rows(draw: Draw) -> Planted:
    tap = draw.chance.choice(linears(draw))
    order = draw.order(draw.weights[f"{tap}.weight"].shape[0])
    return changed(draw, tap, lambda w: w[order], Name(ORDER))


@kind("linear", "permute columns")
def permute_columns(draw: Draw) -> Planted:
    tap = draw.chance.choice(linears(draw))
    order = draw.order(draw.weights[f"{tap}.weight"].shape[1])
    return Planted(tap=tap, apply=with_bias(tap, draw, lambda w: w[..., order]), names=(Name(ORDER),))


@kind("linear", "swap two columns")
def swap_columns(draw: Draw) -> Planted:
    tap = draw.chance.choice(linears(draw))
    width = draw.weights[f"{tap}.weight"].shape[1]
    a, b = draw.chance.sample(range(width), 2)
    order = np.arange(width)
    order[[a, b]] = b, a
    return Planted(
        tap=tap, apply=with_bias(tap, draw, lambda w: w[..., order]), names=(Name(ORDER),), numbers=f"{a} and {b}"
    )


@kind("linear", "shift columns")
def shift_columns(draw: Draw) -> Planted:
    tap = draw.chance.choice(linears(draw))
    by = draw.chance.randrange(1, draw.weights[f"{tap}.weight"].shape[1])
    return changed(draw, tap, lambda w: np.roll(w, by, 1), Name(rf"shift|roll|{ORDER}"), numbers=f"by {by}")


@kind("linear", "reverse rows")
def reverse_rows(draw: Draw) -> Planted:
    tap = draw.chance.choice(linears(draw))
    return changed(draw, tap, lambda w: w[::-1], Name(rf"revers|{ORDER}"))


@kind("linear", "transpose or misread")
def transpose(draw: Draw) -> Planted:
    tap = draw.chance.choice(linears(draw))
    return changed(draw, tap, lambda w: w.T.reshape(w.shape), Name(r"transpos|misread|layout"))


@kind("linear", "zero columns")
def zero_columns(draw: Draw) -> Planted:
    tap = draw.chance.choice(linears(draw))
    width = draw.weights[f"{tap}.weight"].shape[1]
    start = draw.chance.randrange(width // 2)
    stop = start + draw.chance.randrange(1, width // 2)

    def zero(w: np.ndarray) -> np.ndarray:
        w = w.copy()
        w[..., start:stop] = 0.0
        return w

    return Planted(
        tap=tap,
        apply=with_bias(tap, draw, zero),
        names=(Name(r"zero(?!\))|columns?.*missing|part of|dropped|lost"),),
        numbers=f"{start} to {stop}",
    )


@kind("linear", "one rank only")
def missing_all_reduce(draw: Draw) -> Planted:
    """Row-parallel layers whose partial sums were never added up: one rank's part of the inputs counts."""
    tap = draw.chance.choice([f"{draw.path}.attn.out", f"{draw.path}.mlp.out"])
    rows = draw.weights[f"{tap}.weight"].shape[0]
    ranks = draw.chance.choice([n for n in (2, 4, 8) if rows % n == 0])
    rank = draw.chance.randrange(ranks)
    kept = (np.arange(rows) * ranks // rows == rank).astype(np.float64)
    words = r"all-?reduce|half|rank|part of|zero|missing|only|inputs"
    return changed(draw, tap, lambda w: w * kept[:, None], Name(words), numbers=f"rank {rank} of {ranks}")


@kind("linear", "replace by another layer's")
def other_layers(draw: Draw) -> Planted | None:
    if draw.spec.layers < 2:
        return None
    tap = draw.chance.choice(linears(draw))
    layer = draw.other_layer()
    name = tap.replace(draw.path, f"blocks.{layer}", 1)
    other = draw.weights[f"{name}.weight"]
    fault = edit_factor(tap, lambda w: other)
    if f"{tap}.bias" in draw.weights:
        bias = draw.weights[f"{name}.bias"]
        fault = both(fault, edit_bias(tap, lambda b: bias))
    words = r"another layer|other layer|layer \d|blocks\.\d|exchang|swap"
    return Planted(tap=tap, apply=fault, names=(Name(words),), numbers=f"of layer {layer}")


@kind("linear", "replace by another matrix")
def other_matrix(draw: Draw) -> Planted | None:
    if not draw.spec.mlp.gated:
        return None
    tap, other = draw.chance.sample([f"{draw.path}.mlp.gate", f"{draw.path}.mlp.up"], 2)
    weight = draw.weights[f"{other}.weight"]
    return changed(draw, tap, lambda w: weight, Name(r"gate|up\b|another"), numbers=f"by {other}")


@kind("linear", "low-rank delta")
def low_rank(draw: Draw) -> Planted:
    """A LoRA adapter that was merged on one side only."""
    tap, rank, size = draw.chance.choice(linears(draw)), draw.chance.choice([1, 2, 4, 8]), draw.log_between(0.1, 0.8)
    rows, columns = draw.weights[f"{tap}.weight"].shape
    delta = draw.generator.standard_normal((rows, rank)) @ draw.generator.standard_normal((rank, columns))
    delta *= size * np.linalg.norm(draw.weights[f"{tap}.weight"]) / np.linalg.norm(delta)
    return changed(
        draw, tap, lambda w: w + delta, Name(r"low.?rank|lora|rank", (rank,)), numbers=f"rank {rank}, {size:.2g}"
    )


@kind("linear", "add noise")
def noise(draw: Draw) -> Planted:
    tap, size = draw.chance.choice(linears(draw)), draw.log_between(0.02, 0.5)
    shape = draw.weights[f"{tap}.weight"].shape
    draws = draw.generator.standard_normal(shape)
    name = Name(rf"noise|deviat|{OTHER}", (size, 100 * size), tolerance=0.2)
    return changed(draw, tap, lambda w: w + size * np.sqrt(np.mean(w**2)) * draws, name, numbers=f"{size:.2g}")


@kind("linear", "change one element")
def one_element(draw: Draw) -> Planted:
    tap = draw.chance.choice(linears(draw))
    row, column = (draw.chance.randrange(n) for n in draw.weights[f"{tap}.weight"].shape)
    by = draw.between(2.0, 8.0)

    def change(w: np.ndarray) -> np.ndarray:
        w = w.copy()
        w[row, column] += by * np.abs(w).max()
        return w

    return changed(draw, tap, change, Name(r"element|single|one weight|one column|entry"), numbers=f"[{row}, {column}]")


def quantized(w: np.ndarray, bits: int, group: int, *, stale: int = 0, symmetric: bool = True) -> np.ndarray:
    """Integers with a scale for each `group` inputs of an output; `stale`: scales of the column so far away."""
    rows, columns = w.shape
    parts = w.reshape(rows // group, group, columns)
    if symmetric:
        scale = np.maximum(np.abs(parts).max(1, keepdims=True), 1e-9) / (2 ** (bits - 1) - 1)
        codes = np.round(parts / scale)
        return (codes * np.roll(scale, stale, 2)).reshape(w.shape)
    low, high = parts.min(1, keepdims=True), parts.max(1, keepdims=True)
    scale = np.maximum(high - low, 1e-9) / (2**bits - 1)
    zero = np.round(-low / scale)
    codes = np.clip(np.round(parts / scale) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(w.shape)


def _quantized(draw: Draw, bits: int, words: str, **how: bool | int) -> Planted:
    tap = draw.chance.choice(linears(draw))
    rows = draw.weights[f"{tap}.weight"].shape[0]
    group = draw.chance.choice([g for g in (8, 16, 32, rows) if rows % g == 0])
    change = partial(quantized, bits=bits, group=group, **how)  # type: ignore[arg-type]
    return changed(draw, tap, change, Name(words), numbers=f"{bits} bits, groups of {group}")


@kind("linear", "round to a symmetric grid")
def symmetric_grid(draw: Draw) -> Planted:
    return _quantized(draw, draw.chance.choice([2, 3, 4, 5, 6, 8]), GRID)


@kind("linear", "round to an asymmetric grid")
def asymmetric_grid(draw: Draw) -> Planted:
    return _quantized(draw, draw.chance.choice([2, 3, 4, 5, 6, 8]), GRID, symmetric=False)


@kind("linear", "neighbour's scales")
def stale_scales(draw: Draw) -> Planted:
    """Scales stored in another order than the quantized weights."""
    return _quantized(draw, 8, rf"scale|{GRID}", stale=draw.chance.choice([1, -1, 2]))


@kind("linear", "saturate weights")
def saturated(draw: Draw) -> Planted:
    tap, share = draw.chance.choice(linears(draw)), draw.between(0.2, 0.6)
    limit = share * float(np.abs(draw.weights[f"{tap}.weight"]).max())
    words = Name(r"satur|clip|clamp|limit")
    return changed(draw, tap, lambda w: np.clip(w, -limit, limit), words, numbers=f"at {limit:.3g}")


@kind("linear", "round to float8")
def float8(draw: Draw) -> Planted:
    tap = draw.chance.choice(linears(draw))
    kind_of = draw.chance.choice([ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
    name = Name(r"fp8|float8|e4m3|e5m2|8.?bit|quanti")
    return changed(draw, tap, lambda w: w.astype(kind_of).astype(np.float64), name, numbers=kind_of.__name__)


@kind("linear", "round inputs to int8")
def rounded_inputs(draw: Draw) -> Planted:
    """Activations quantized with one static scale for the tensor, as in W8A8 without calibration of outliers."""
    tap = draw.chance.choice(linears(draw))
    scale = draw.log_between(0.05, 0.3)

    def fault(model: onnx.ModelProto) -> None:
        product = next(n for n in model.graph.node if n.name in (f"{tap}.product", tap) and n.op_type == "MatMul")

        def grid(p: Patch, x: str) -> str:
            return p("Mul", p("Clip", p("Round", p("Div", x, scale)), -128.0, 127.0), scale)

        reroute(product.name, product.input[0], grid)(model)

    return Planted(tap=tap, apply=fault, names=(Name(rf"input|activation|{GRID}"),), numbers=f"scale {scale:.3g}")


@kind("linear", "drop bias")
def drop_bias(draw: Draw) -> Planted | None:
    if not biased(draw):
        return None
    tap = draw.chance.choice(biased(draw))
    return Planted(tap=tap, apply=edit_bias(tap, np.zeros_like), names=(Name(NO_BIAS),))


@kind("linear", "bias from every rank")
def bias_times(draw: Draw) -> Planted | None:
    """A row-parallel layer that adds its bias on each rank before the all-reduce."""
    if not biased(draw):
        return None
    tap, ranks = draw.chance.choice(biased(draw)), draw.chance.choice([2, 4, 8])
    name = Name(r"bias", (ranks, ranks - 1), said=r"twice|doubl" if ranks == 2 else None)
    return Planted(tap=tap, apply=edit_bias(tap, lambda b: b * ranks), names=(name,), numbers=f"{ranks} times")


@kind("linear", "permute bias")
def bias_order(draw: Draw) -> Planted | None:
    if not biased(draw):
        return None
    tap = draw.chance.choice(biased(draw))
    order = draw.order(len(draw.weights[f"{tap}.bias"]))
    return Planted(
        tap=tap,
        apply=edit_bias(tap, lambda b: b[order]),
        names=(Name(rf"bias.*(?:{ORDER})", vague=rf"bias.*(?:{OTHER})"),),
    )


@kind("linear", "bias of another layer")
def bias_of_other(draw: Draw) -> Planted | None:
    if not biased(draw) or draw.spec.layers < 2:
        return None
    tap = draw.chance.choice(biased(draw))
    other = draw.weights[f"{tap.replace(draw.path, f'blocks.{draw.other_layer()}', 1)}.bias"]
    return Planted(
        tap=tap,
        apply=edit_bias(tap, lambda b: other),
        names=(Name(r"bias.*(?:another|layer|blocks|that of)", vague=rf"bias.*(?:{OTHER})"),),
    )


@kind("linear", "swap key and value")
def key_and_value(draw: Draw) -> Planted:
    a, tap = draw.spec.attention, f"{draw.path}.attn.qkv"
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    order = np.concatenate([np.arange(query), np.arange(query + key, query + 2 * key), np.arange(query, query + key)])
    return Planted(
        tap=tap, apply=with_bias(tap, draw, lambda w: w[..., order]), names=(Name(r"query, key|key.*value|exchang"),)
    )


@kind("linear", "permute query heads")
def query_heads(draw: Draw) -> Planted | None:
    a, tap = draw.spec.attention, f"{draw.path}.attn.qkv"
    if a.heads < 2:
        return None
    order = np.arange((a.heads + 2 * a.kv_heads) * a.head_dim).reshape(-1, a.head_dim)
    order[: a.heads] = order[: a.heads][draw.order(a.heads)]
    flat = order.flatten()
    return Planted(
        tap=tap,
        apply=with_bias(tap, draw, lambda w: w[..., flat]),
        names=(Name(rf"head|blocks of {a.head_dim}\b", vague=ORDER),),
    )


@kind("linear", "scale missing and bias missing")
def scale_and_bias(draw: Draw) -> Planted | None:
    """Two faults in one module."""
    if not biased(draw):
        return None
    tap, factor = draw.chance.choice(biased(draw)), draw.factor()
    fault = both(edit_factor(tap, lambda w: w * factor), edit_bias(tap, np.zeros_like))
    return Planted(tap=tap, apply=fault, names=(Name(SCALED, (factor,)), Name(NO_BIAS)), numbers=f"x {factor:.4g}")


@kind("linear", "bias doubled and columns exchanged")
def columns_and_bias(draw: Draw) -> Planted | None:
    """Two faults in one module."""
    if f"{draw.path}.attn.qkv.bias" not in draw.weights:
        return None
    planted = key_and_value(draw)
    fault = both(planted.apply, edit_bias(planted.tap, lambda b: 2 * b))
    return Planted(
        tap=planted.tap, apply=fault, names=(*planted.names, Name(r"bias.*(?:twice|doubl|times|scaled by|x 2)"))
    )
