"""Faults of norms, activations, residuals and embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from debug.comparison.faults.catalogue import Fit, Variants, fault
from debug.comparison.faults.numbers import minimize
from debug.comparison.modules import Module
from refmodels.ops import by_head

# Norms


@fault("wrong epsilon", "norm", small=True)
def norm_eps(m: Module, engine: Tensor) -> Variants:
    known = [e for e in (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3) if not math.isclose(e, m["eps"])]
    for eps in known:
        # A value of the list within the interval of the estimate is no fact either.
        words = f"{{}} instead of {m['eps']:g}"
        yield Fit(words=words, value=eps, changes=lambda e: {"eps": e}, numbers=0, least=0.0), {"eps": eps}
    estimate = _estimated_eps(m, engine)
    if estimate is not None:
        words = f"{{}} instead of {m['eps']:g}"
        yield Fit(words=words, value=estimate, changes=lambda e: {"eps": e}, least=0.0), {"eps": estimate}


def _estimated_eps(m: Module, engine: Tensor) -> float | None:
    """The epsilon that explains the length of the engine's rows: y' = y sqrt((v + eps) / (v + eps'))."""
    bias = 0.0 if m["bias"] is None else m["bias"]
    x = m["x"]
    if m["index"] is not None:
        x = torch.take_along_dim(x, m["index"][:, :, None], 1)
    # Heads that are normalized one by one are rows of their own.
    x, expected, engine = (by_head(t, len(m["weight"])) for t in (x, m(), engine))
    expected, engine = expected - bias, engine - bias
    ratio = (engine * expected).sum(-1) / expected.square().sum(-1)
    spread = x.var(-1, unbiased=False) if m["norm"] == "layer" else x.square().mean(-1)
    found = (spread + m["eps"]) / ratio.square() - spread
    estimate = float(found[m.forward.inputs.new_mask].median())
    return estimate if math.isfinite(estimate) and estimate > 0 else None


@fault("norm weight missing or wrong", "norm")
def norm_weight(m: Module, _: Tensor) -> Variants:
    weight: Tensor = m["weight"]
    yield "missing", {"weight": torch.ones_like(weight)}
    yield "1 added", {"weight": weight + 1}
    yield "1 subtracted", {"weight": weight - 1}
    for name, other in m.decoder.named_parameters():
        if name.endswith("norm.weight") and other is not weight and other.shape == weight.shape:
            yield f"that of {name}", {"weight": other}


@fault("norm bias missing", "norm")
def norm_bias(m: Module, _: Tensor) -> Variants:
    if m["bias"] is not None:
        yield "", {"bias": torch.zeros_like(m["bias"])}


@fault("norm weight applied on the wrong side of the cast", "norm")
def norm_cast(m: Module, _: Tensor) -> Variants:
    if m["norm"] == "rms":
        yield "", {"weight_in_float": not m["weight_in_float"]}


@fault("RMSNorm and LayerNorm exchanged", "norm")
def norm_kind(m: Module, _: Tensor) -> Variants:
    yield "", {"norm": "rms" if m["norm"] == "layer" else "layer"}


@fault("norm missing", "norm")
def norm_missing(m: Module, _: Tensor) -> Variants:
    yield "", {"norm": "none"}


@fault("logits of the wrong token", "norm")
def wrong_token(m: Module, _: Tensor) -> Variants:
    if m["index"] is not None and m["x"].shape[1] > 1:
        for shift in (1, -1):
            yield f"off by {shift:+d}", {"index": (m["index"] + shift).clamp(0, m["x"].shape[1] - 1)}


# Activation, residual, embedding


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu (exact)": F.gelu,
    "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "squared relu": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
    "mish": F.mish,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "elu": F.elu,
    "selu": F.selu,
    "leaky relu (0.01)": F.leaky_relu,
    "relu6": F.relu6,
    "hard swish": F.hardswish,
    "hard sigmoid": F.hardsigmoid,
    "softsign": F.softsign,
    "log sigmoid": F.logsigmoid,
    "square": torch.square,
    "magnitude": torch.abs,
    "sine": torch.sin,
    "silu applied twice": lambda x: F.silu(F.silu(x)),
    "x tanh(softplus(1.702 x))": lambda x: x * torch.tanh(F.softplus(1.702 * x)),
}


@fault("wrong activation", "activation", small=True)
def activation(m: Module, _: Tensor) -> Variants:
    right = m["function"](sample := torch.linspace(-4, 4, 65, dtype=m["up"].dtype))
    for name, function in ACTIVATIONS.items():
        if not torch.allclose(function(sample), right, rtol=1e-9, atol=1e-9):
            yield f"{name}", {"function": function}


@fault("activation with another number", "activation", first=True)
def activation_number(m: Module, engine: Tensor) -> Variants:
    """The curve with a scaled argument, the gate or the result clamped or capped, a slope below zero."""
    function: Callable[[Tensor], Tensor] = m["function"]
    mask = m.forward.inputs.new_mask
    gate = m["gate"] if m["gate"] is not None else m["up"]
    target, up = engine[mask], m["up"][mask]
    x = gate[mask]
    others = up if m["gate"] is not None else torch.ones_like(up)

    def left(curve: Callable[[Tensor], Tensor]) -> float:
        return float((curve(x) * others - target).norm())

    largest = float(x.abs().max())
    curves: list[tuple[str, Callable[[float], Callable[[Tensor], Tensor]], float, float]] = [
        ("x sigmoid({} x)", lambda b: lambda x: x * torch.sigmoid(b * x), 0.1, 10.0),
        ("its argument scaled by {}", lambda b: lambda x: function(b * x), 0.1, 10.0),
        ("leaky relu with slope {}", lambda b: lambda x: F.leaky_relu(x, b), 1e-3, 0.9),
        ("elu with alpha {}", lambda b: lambda x: F.elu(x, b), 0.05, 5.0),
        ("softplus with beta {}", lambda b: lambda x: F.softplus(x, b), 0.1, 10.0),
        ("its argument clamped at {}", lambda c: lambda x: function(x.clamp(-c, c)), largest / 50, largest),
        ("its argument limited to at most {}", lambda c: lambda x: function(x.clamp(max=c)), largest / 50, largest),
        (
            "its argument soft-capped at {}",
            lambda c: lambda x: function(c * torch.tanh(x / c)),
            largest / 20,
            largest * 5,
        ),
        ("its result clamped at {}", lambda c: lambda x: function(x).clamp(-c, c), largest / 50, largest),
        (
            "its result soft-capped at {}",
            lambda c: lambda x: c * torch.tanh(function(x) / c),
            largest / 20,
            largest * 5,
        ),
        ("{} added to its argument", lambda c: lambda x: function(x + c), 1e-3, 5.0),
        ("{} subtracted from its argument", lambda c: lambda x: function(x - c), 1e-3, 5.0),
        ("{} added to its result", lambda c: lambda x: function(x) + c, 1e-3, 5.0),
    ]
    for words, made, low, high in curves:
        value = minimize(partial(_left, left, made), low, high)
        changes = partial(_function, made)
        yield Fit(words=words, value=value, changes=changes, least=0.0), changes(value)


def _function(made: Callable[[float], Callable[[Tensor], Tensor]], value: float) -> dict[str, Any]:
    return {"function": made(value)}


def _left(left: Callable[[Callable[[Tensor], Tensor]], float], made: Callable[..., Any], value: float) -> float:
    return left(made(value))


@fault("activation on the wrong half", "activation")
def wrong_half(m: Module, _: Tensor) -> Variants:
    if m["gate"] is not None:
        yield "on up instead of gate", {"gate": m["up"], "up": m["gate"]}
        yield "on both", {"up": m["function"](m["up"])}


def _plus(m: Module) -> Callable[[Tensor], Tensor]:
    return lambda gate: m["function"](gate) + m["up"]


@fault("gate missing", "activation")
def gate_missing(m: Module, engine: Tensor) -> Variants:
    if m["gate"] is not None:
        ones = torch.ones_like(m["up"])
        yield "up alone", {"function": lambda x: torch.ones_like(x)}
        yield "gate alone", {"up": ones}
        yield "activated up alone", {"gate": m["up"], "up": ones}
        yield "1 added to up", {"up": m["up"] + 1}
        yield "up added instead of multiplied", {"function": _plus(m), "up": ones}
        largest, mask = float(m["up"].abs().max()), m.forward.inputs.new_mask

        def clamped(limit: float) -> dict[str, Any]:
            return {"up": m["up"].clamp(-limit, limit)}

        value = minimize(lambda c: float((m(**clamped(c)) - engine)[mask].norm()), largest / 50, largest)
        yield Fit(words="up clamped at {}", value=value, changes=clamped, least=0.0), clamped(value)


def _one(argument: str, value: float) -> dict[str, Any]:
    return {argument: value}


@fault("residual missing or doubled", "residual")
def residual(m: Module, engine: Tensor) -> Variants:
    yield "residual missing", {"x_factor": 0.0}
    yield "branch missing", {"branch_factor": 0.0}
    yield "residual doubled", {"x_factor": 2.0}
    yield "branch doubled", {"branch_factor": 2.0}
    yield "branch subtracted", {"branch_factor": -1.0}
    yield "residual subtracted", {"x_factor": -1.0}
    mask = m.forward.inputs.new_mask
    for name, other in (("branch", "x"), ("x", "branch")):
        part: Tensor = m[name]
        factor = float(((engine - m[other]) * part)[mask].sum() / part[mask].square().sum().clamp(min=1e-300))
        what = "branch" if name == "branch" else "residual"
        argument = f"{name}_factor"
        changes = partial(_one, argument)
        yield Fit(words=f"{what} scaled by {{}}", value=factor, changes=changes), {argument: factor}
    x, branch, y = (t[mask].flatten().double() for t in (m["x"], m["branch"], engine))
    both = torch.linalg.lstsq(torch.stack([x, branch], 1), y[:, None]).solution.flatten().tolist()
    words = f"residual scaled by {both[0]:.4g} and branch by {both[1]:.4g}"
    detail = Fit(words=words, numbers=2, key="both scaled")
    yield detail, {"x_factor": both[0], "branch_factor": both[1]}
    norm = "mlp_norm" if m.part == "" else "attn_norm"
    yield "residual taken after the norm", {"x": m.forward.tensors[f"blocks.{m.layer}.{norm}"].to(m["x"])}
