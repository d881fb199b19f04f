"""Faults of the rotation: frequencies, positions, layout, and what is rotated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from refmodels.positions import ntk_alphas
from tests.support.fault_generator.kinds import Draw, Name, Planted, kind
from tests.support.mutate import Fault, Patch, attribute, identity, node, replace_input, rework

Angles = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""positions [n, 1] and right frequencies [dim / 2] -> angles [n, dim / 2]."""


def _turned(draw: Draw, layer: int | None = None) -> str:
    return f"blocks.{draw.layer if layer is None else layer}.attn.rotated"


def _tables(draw: Draw, angles: Angles, layers: list[int] | None = None) -> Fault:
    """Other tables for some layers.  Dynamic NTK's further tables keep their ratio of frequencies."""
    rope = draw.spec.rope
    assert rope is not None
    cos, sin = draw.weights["rope_cos"], draw.weights["rope_sin"]
    rows = cos.shape[0]
    alphas = _alphas(draw, rows)
    positions = np.arange(rows // len(alphas), dtype=np.float64)[:, None] / rope.position_divisor
    parts = []
    for alpha in alphas:
        theta = rope.theta * alpha ** (rope.dim / (rope.dim - 2)) if alpha != 1.0 else rope.theta
        parts.append(angles(positions, theta ** (-np.arange(0, rope.dim, 2) / rope.dim)))
    angle = np.concatenate(parts)
    assert angle.shape == cos.shape == sin.shape

    def fault(model: onnx.ModelProto) -> None:
        index = node(model, "rope_cos.rows").input[1]
        for layer in layers or [draw.layer]:
            turned = _turned(draw, layer)
            patch = Patch(model, next(i for i, n in enumerate(model.graph.node) if n.name == turned))
            for part, table in (("cos", np.cos(angle)), ("sin", np.sin(angle))):
                replace_input(model, turned, f"rope_{part}.rows", patch("Gather", table, index, axis=0))

    return fault


def _alphas(draw: Draw, rows: int) -> list[float]:
    assert draw.spec.rope is not None
    for tables in range(1, 64):
        if rows % tables == 0 and len(found := ntk_alphas(draw.spec.rope, rows // tables)) == tables:
            return found
    raise AssertionError("no number of tables fits")


def _key(draw: Draw, fault: Fault, *names: Name, numbers: str = "", layer: int | None = None) -> Planted:
    where = draw.layer if layer is None else layer
    return Planted(tap=f"blocks.{where}.key", apply=fault, names=names, numbers=numbers)


def _theta(draw: Draw) -> float:
    assert draw.spec.rope is not None
    return draw.spec.rope.theta * draw.log_between(*draw.chance.choice([(0.02, 0.7), (1.5, 100.0)]))


def _other_theta(draw: Draw, theta: float) -> Angles:
    assert draw.spec.rope is not None
    return lambda n, f: n * f ** (np.log(theta) / np.log(draw.spec.rope.theta))  # type: ignore[union-attr]


@kind("rotation", "change theta")
def theta(draw: Draw) -> Planted | None:
    if draw.spec.rope is None:
        return None
    value = _theta(draw)
    name = Name(r"theta|base", (value,))
    return _key(draw, _tables(draw, _other_theta(draw, value)), name, numbers=f"{value:.6g}")


@kind("rotation", "change theta in every layer")
def theta_everywhere(draw: Draw) -> Planted | None:
    if draw.spec.rope is None:
        return None
    value = _theta(draw)
    fault = _tables(draw, _other_theta(draw, value), list(range(draw.spec.layers)))
    return _key(draw, fault, Name(r"theta|base", (value,)), numbers=f"{value:.6g}", layer=0)


@kind("rotation", "divide positions")
def linear_scaling(draw: Draw) -> Planted | None:
    if draw.spec.rope is None:
        return None
    factor = draw.log_between(*draw.chance.choice([(1.15, 8.0), (0.3, 0.85)]))
    name = Name(r"divid|linear|interpol|factor|scal", (factor, 1 / factor, factor * draw.spec.rope.position_divisor))
    return _key(draw, _tables(draw, lambda n, f: n / factor * f), name, numbers=f"{factor:.4g}")


@kind("rotation", "llama3 frequencies")
def llama3(draw: Draw) -> Planted | None:
    """Llama 3.1's frequency scaling with short lengths, so that some of the frequencies change."""
    if draw.spec.rope is None:
        return None
    factor, length = draw.log_between(2.0, 16.0), draw.log_between(16, 256)

    def angles(n: np.ndarray, f: np.ndarray) -> np.ndarray:
        wave = 2 * np.pi / f
        smooth = np.clip((length / wave - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        return n * (smooth * f + (1 - smooth) * f / factor)

    return _key(
        draw, _tables(draw, angles), Name(r"llama|frequenc|smooth|by part"), numbers=f"{factor:.3g}, {length:.0f}"
    )


@kind("rotation", "yarn frequencies")
def yarn(draw: Draw) -> Planted | None:
    """A ramp between interpolated and right frequencies, and YaRN's larger cosines and sines."""
    if draw.spec.rope is None:
        return None
    factor = draw.log_between(2.0, 16.0)

    def angles(n: np.ndarray, f: np.ndarray) -> np.ndarray:
        ramp = np.linspace(0.0, 1.0, len(f))
        return n * (f * (1 - ramp) + f / factor * ramp)

    return _key(draw, _tables(draw, angles), Name(r"yarn|frequenc|ramp"), numbers=f"{factor:.3g}")


@kind("rotation", "reverse frequencies")
def reversed_frequencies(draw: Draw) -> Planted | None:
    if draw.spec.rope is None or draw.spec.rope.dim < 4:
        return None
    return _key(draw, _tables(draw, lambda n, f: n * f[::-1]), Name(r"frequenc|revers|order"))


@kind("rotation", "rotate a part only")
def partial_frequencies(draw: Draw) -> Planted | None:
    """The last pairs of a head are not rotated, though the frequencies are those of the whole."""
    if draw.spec.rope is None or draw.spec.rope.dim < 6:
        return None
    pairs = draw.spec.rope.dim // 2
    kept = draw.chance.randrange(1, pairs - 1)
    mask = np.arange(pairs) < kept
    return _key(
        draw, _tables(draw, lambda n, f: n * f * mask), Name(r"dim|partial|part|pairs"), numbers=f"{kept} of {pairs}"
    )


@kind("rotation", "offset positions")
def offset(draw: Draw) -> Planted | None:
    if draw.spec.rope is None:
        return None
    by = draw.chance.choice([-3, -2, -1, 1, 2, 3, 4, 7])
    name = Name(r"position|off by|offset", (by, -by))
    return _key(draw, _tables(draw, lambda n, f: (n + by) * f), name, numbers=f"{by:+d}")


@kind("rotation", "limit positions")
def limited(draw: Draw) -> Planted | None:
    """Positions stop growing at a maximum, as with a table that is too short."""
    if draw.spec.rope is None:
        return None
    last = draw.chance.randrange(3, draw.prompt_length - 2)
    name = Name(r"position|clamp|clip|limit|stop")
    return _key(draw, _tables(draw, lambda n, f: np.minimum(n, last) * f), name, numbers=f"{last}")


@kind("rotation", "round the table")
def rounded_table(draw: Draw) -> Planted | None:
    """Angles computed in half precision."""
    if draw.spec.rope is None:
        return None
    bits = draw.chance.choice([3, 4, 5, 6])
    step = 2.0**-bits
    name = Name(r"round|precision|half|table|quanti")
    return _key(draw, _tables(draw, lambda n, f: np.round(n * f / step) * step), name, numbers=f"step {step}")


@kind("rotation", "other layout")
def layout(draw: Draw) -> Planted | None:
    if draw.spec.rope is None or draw.spec.rope.dim < 4:
        return None

    def fault(model: onnx.ModelProto) -> None:
        found = attribute(node(model, _turned(draw)), "interleaved")
        found.i = 1 - found.i

    return _key(draw, fault, Name(r"layout|interleav"))


@kind("rotation", "turn the other way")
def backwards(draw: Draw) -> Planted | None:
    if draw.spec.rope is None:
        return None
    return _key(draw, _tables(draw, lambda n, f: -n * f), Name(r"wrong way|direction|sign|backward|negat"))


@kind("rotation", "drop")
def dropped(draw: Draw) -> Planted | None:
    if draw.spec.rope is None:
        return None
    return _key(draw, identity(_turned(draw)), Name(r"not applied|missing|no rope|without|not rotated"))


@kind("rotation", "rotate values")
def rotated_values(draw: Draw) -> Planted | None:
    """Values that are rotated like keys."""
    if draw.spec.rope is None:
        return None
    attn, rope = f"{draw.path}.attn", draw.spec.rope

    def fault(model: onnx.ModelProto) -> None:
        def change(p: Patch, x: str) -> str:
            return p("RotaryEmbedding", x, "rope_cos.rows", "rope_sin.rows", num_heads=draw.spec.attention.kv_heads,
                     rotary_embedding_dim=rope.dim, interleaved=int(rope.interleaved))  # fmt: skip

        rework(f"{attn}.value_rows", change)(model)

    return Planted(tap=f"{draw.path}.value", apply=fault, names=(Name(r"rot|rope"),))


@kind("rotation", "queries at other positions")
def query_offset(draw: Draw) -> Planted | None:
    """Only the queries are turned by more: keys are right, scores are not."""
    if draw.spec.rope is None:
        return None
    by = draw.chance.choice([1, 2, 3, 5])
    rope, attn = draw.spec.rope, f"{draw.path}.attn"
    angle = by / rope.position_divisor * rope.theta ** (-np.arange(0, rope.dim, 2) / rope.dim)

    def fault(model: onnx.ModelProto) -> None:
        def change(p: Patch, x: str) -> str:
            # One row for all tokens, spread over them by a sum with zeros of the right shape.
            zeros = p("Mul", "rope_cos.rows", 0.0)
            return p("RotaryEmbedding", x, p("Add", zeros, np.cos(angle)), p("Add", zeros, np.sin(angle)),
                     num_heads=draw.spec.attention.heads, rotary_embedding_dim=rope.dim,
                     interleaved=int(rope.interleaved))  # fmt: skip

        rework(f"{attn}.query_turned", change, wide=True)(model)

    return Planted(
        tap=f"{attn}.context", apply=fault, names=(Name(r"query|quer|position|rot|rope"),), numbers=f"{by:+d}"
    )


@kind("rotation", "offset in every layer")
def offset_everywhere(draw: Draw) -> Planted | None:
    if draw.spec.rope is None:
        return None
    by = draw.chance.choice([-1, 1, 2])
    fault = _tables(draw, lambda n, f: (n + by) * f, list(range(draw.spec.layers)))
    return _key(draw, fault, Name(r"position|off by|offset", (by, -by)), numbers=f"{by:+d}", layer=0)
