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
from debug.comparison.faults.rotation import padding_before
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
    estimate = float(found.flatten().median())
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
}


@fault("wrong activation", "activation", small=True)
def activation(m: Module, _: Tensor) -> Variants:
    right = m["function"](sample := torch.linspace(-4, 4, 65, dtype=m["up"].dtype))
    for name, function in ACTIVATIONS.items():
        if not torch.allclose(function(sample), right, rtol=1e-9, atol=1e-9):
            yield f"{name}", {"function": function}


@fault("activation on the wrong half", "activation")
def wrong_half(m: Module, _: Tensor) -> Variants:
    if m["gate"] is not None:
        yield "on up instead of gate", {"gate": m["up"], "up": m["gate"]}
        yield "on both", {"up": m["function"](m["up"])}


@fault("gate missing", "activation")
def gate_missing(m: Module, _: Tensor) -> Variants:
    if m["gate"] is not None:
        ones = torch.ones_like(m["up"])
        yield "up alone", {"function": lambda x: torch.ones_like(x)}
        yield "gate alone", {"up": ones}
        yield "activated up alone", {"gate": m["up"], "up": ones}


def _one(argument: str, value: float) -> dict[str, Any]:
    return {argument: value}


@fault("residual missing or doubled", "residual")
def residual(m: Module, engine: Tensor) -> Variants:
    yield "residual missing", {"x_factor": 0.0}
    yield "branch missing", {"branch_factor": 0.0}
    yield "residual doubled", {"x_factor": 2.0}
    yield "branch doubled", {"branch_factor": 2.0}
    for name, other in (("branch", "x"), ("x", "branch")):
        part: Tensor = m[name]
        factor = float(((engine - m[other]) * part).sum() / part.square().sum().clamp(min=1e-300))
        what = "branch" if name == "branch" else "residual"
        argument = f"{name}_factor"
        changes = partial(_one, argument)
        yield Fit(words=f"{what} scaled by {{}}", value=factor, changes=changes), {argument: factor}
    norm = "mlp_norm" if m.part == "" else "attn_norm"
    yield "residual taken after the norm", {"x": m.forward.tensors[f"blocks.{m.layer}.{norm}"].to(m["x"])}


@fault("positions off", "embed")
def learned_positions(m: Module, _: Tensor) -> Variants:
    if m["position_table"] is not None:
        for shift in (1, -1, 2, -2):
            yield f"by {shift:+d}", {"positions": m["positions"] + shift}
        padding = padding_before(m)
        yield "by the left padding (slots counted)", {"positions": m["positions"] + padding}


@fault("position embedding missing", "embed")
def position_missing(m: Module, _: Tensor) -> Variants:
    if m["position_table"] is not None:
        yield "", {"position_table": None}


@fault("wrong embedding rows or scale", "embed")
def embedding(m: Module, _: Tensor) -> Variants:
    yield "ids off by +1", {"ids": m["ids"] + 1}
    yield "ids off by -1", {"ids": m["ids"] - 1}
    yield "scaled by the square root of the hidden size", {"factor": m.decoder.spec.hidden_size**0.5}
