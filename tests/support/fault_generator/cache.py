"""Faults of the KV cache: slots, rows, dtypes, staleness, whose cache it is."""

from __future__ import annotations

import numpy as np
import onnx

from tests.support.fault_generator.attention import _next_row
from tests.support.fault_generator.kinds import Draw, Name, Planted, kind
from tests.support.fault_generator.linear import GRID, ORDER, SCALED
from tests.support.mutate import Fault, Patch, Rework, replace_input, reroute, rework


def _part(draw: Draw) -> str:
    return draw.chance.choice(["key", "value"])


def _cached(draw: Draw, part: str, fault: Fault, *names: Name, numbers: str = "") -> Planted:
    return Planted(tap=f"{draw.path}.{part}", apply=fault, names=names, numbers=numbers)


def _new(draw: Draw, part: str, change: Rework) -> Fault:
    """Change what is written, on its way into the cache."""
    return reroute(f"{draw.path}.attn.{part}", f"{draw.path}.attn.new_{part}", change)


@kind("cache", "write to another slot")
def slot(draw: Draw) -> Planted:
    part, by = _part(draw), draw.chance.choice([-2, -1, 1, 2])
    change: Rework = lambda p, x: p("Max", p("Add", x, np.array(by)), np.array(0))  # noqa: E731
    fault = reroute(f"{draw.path}.attn.{part}", "cache_lengths", change, wide=True)
    name = Name(r"slot", (by, abs(by)))
    return _cached(draw, part, fault, name, numbers=f"{by:+d}")


@kind("cache", "exchange rows")
def rows(draw: Draw) -> Planted:
    part = _part(draw)
    return _cached(draw, part, _new(draw, part, _next_row), Name(r"row|batch"))


@kind("cache", "key and value exchanged")
def key_and_value(draw: Draw) -> Planted:
    part, other = draw.chance.sample(["key", "value"], 2)
    path = f"{draw.path}.attn"
    fault: Fault = lambda m: replace_input(m, f"{path}.{part}", f"{path}.new_{part}", f"{path}.new_{other}")  # noqa: E731
    return _cached(draw, part, fault, Name(r"key.*value|value.*key"))


@kind("cache", "permute heads")
def heads(draw: Draw) -> Planted | None:
    count = draw.spec.attention.kv_heads
    if count < 2:
        return None
    part, order = _part(draw), draw.order(count)
    fault = _new(draw, part, lambda p, x: p("Gather", x, order, axis=1))
    return _cached(draw, part, fault, Name(rf"head|{ORDER}"), numbers=str(order.tolist()))


@kind("cache", "permute channels")
def channels(draw: Draw) -> Planted:
    part, order = _part(draw), draw.order(draw.spec.attention.head_dim)
    return _cached(draw, part, _new(draw, part, lambda p, x: p("Gather", x, order, axis=3)), Name(rf"channel|{ORDER}"))


@kind("cache", "scale")
def scale(draw: Draw) -> Planted:
    """A cache scale that is applied on the way in and not on the way out."""
    part, factor = _part(draw), draw.factor()
    fault = _new(draw, part, lambda p, x: p("Mul", x, factor))
    return _cached(draw, part, fault, Name(SCALED, (factor,)), numbers=f"x {factor:.4g}")


@kind("cache", "round to int8")
def int8(draw: Draw) -> Planted:
    part, step = _part(draw), draw.log_between(0.005, 0.05)
    change: Rework = lambda p, x: p("Mul", p("Clip", p("Round", p("Div", x, step)), -128.0, 127.0), step)  # noqa: E731
    name = Name(GRID)
    return _cached(draw, part, _new(draw, part, change), name, numbers=f"scale {step:.3g}")


@kind("cache", "round to float8")
def float8(draw: Draw) -> Planted:
    """e4m3 has three bits behind the first, e5m2 two; small numbers are left as they are."""
    part, bits = _part(draw), draw.chance.choice([2, 3])

    def change(p: Patch, x: str) -> str:
        # Veltkamp's splitting keeps the leading 24 - s bits of a float32.
        c = p("Mul", x, float(2 ** (23 - bits) + 1))
        return p("Sub", c, p("Sub", c, x))

    fault = _new(draw, part, change)
    return _cached(draw, part, fault, Name(r"fp8|float8|e4m3|e5m2"), numbers="e4m3" if bits == 3 else "e5m2")


@kind("cache", "stale")
def stale(draw: Draw) -> Planted:
    """What decode steps write is lost: the cache keeps the prompt only."""
    part = _part(draw)

    def fault(model: onnx.ModelProto) -> None:
        def change(p: Patch, x: str) -> str:
            first = p("Cast", p("Equal", "cache_lengths", np.array(0)), to=onnx.TensorProto.FLOAT)
            return p("Mul", x, p("Unsqueeze", first, np.array([1, 2, 3])))

        _new(draw, part, change)(model)

    return _cached(draw, part, fault, Name(r"not updated|stale|missing|zero|not written|lost"))


@kind("cache", "read one slot late")
def read_late(draw: Draw) -> Planted:
    """The cache is right, but attention reads the slots moved by one."""
    part = _part(draw)

    def change(p: Patch, x: str) -> str:
        large, axis = np.array([2**31 - 1]), np.array([2])
        first = p("Slice", x, np.array([0]), np.array([1]), axis)
        return p("Concat", p("Slice", x, np.array([1]), large, axis), first, axis=2)

    fault = rework(f"{draw.path}.attn.live_{part}", change)
    return Planted(tap=f"{draw.path}.attn.context", apply=fault, names=(Name(r"slot|shift|off by|read"),), numbers=part)


@kind("cache", "read another layer's")
def other_layer(draw: Draw) -> Planted | None:
    """Layers share pages of the cache."""
    if draw.layer == 0:
        return None
    other, part, path = draw.chance.randrange(draw.layer), _part(draw), draw.path
    fault: Fault = lambda m: replace_input(m, f"{path}.attn.live_{part}", f"{path}.{part}", f"blocks.{other}.{part}")  # noqa: E731
    words = r"another layer|other layer|layer \d|blocks\.\d"
    return Planted(tap=f"{path}.attn.context", apply=fault, names=(Name(words),), numbers=f"{part} of layer {other}")


@kind("cache", "add noise")
def noise(draw: Draw) -> Planted:
    part, size = _part(draw), draw.log_between(0.05, 0.5)
    a = draw.spec.attention
    factors = 1.0 + size * draw.generator.standard_normal((1, a.kv_heads, 1, a.head_dim))
    fault = _new(draw, part, lambda p, x: p("Mul", x, factors))
    return _cached(draw, part, fault, Name(r"noise|channel|differ|per[ -]"), numbers=f"{size:.2g}")
