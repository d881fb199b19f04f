"""Faults of norms: weights, biases, epsilon, the statistic, and what is normalized."""

from __future__ import annotations

import numpy as np
import onnx

from tests.support.fault_generator.kinds import Draw, Name, Planted, kind
from tests.support.fault_generator.linear import GRID, NO_BIAS, ORDER, OTHER, SCALED
from tests.support.mutate import (
    Fault,
    Patch,
    Rework,
    attribute,
    both,
    constant,
    edit,
    node,
    place,
    replace_input,
    rework,
    working_type,
)

_NO_WEIGHT = r"weight.*(?:missing|dropped|of ones|not applied)|without.*weight"


def norms(draw: Draw) -> list[str]:
    return [f"{draw.path}.attn_norm", f"{draw.path}.mlp_norm", "final_norm"]


def set_epsilon(draw: Draw, tap: str, eps: float) -> Fault:
    if draw.spec.norm.kind == "rms":
        return constant(f"{tap}.eps", lambda old: eps)

    def fault(model: onnx.ModelProto) -> None:
        attribute(node(model, tap), "epsilon").f = eps

    return fault


def _weight(draw: Draw, change: Rework | object, *names: Name, numbers: str = "", bias: bool = False) -> Planted:
    tap = draw.chance.choice(norms(draw))
    fault = edit(f"{tap}.weight", change)  # type: ignore[arg-type]
    if bias and f"{tap}.bias" in draw.weights:
        fault = both(fault, edit(f"{tap}.bias", change))  # type: ignore[arg-type]
    return Planted(tap=tap, apply=fault, names=names, numbers=numbers)


@kind("norm", "change epsilon")
def epsilon(draw: Draw) -> Planted:
    tap, eps = draw.chance.choice(norms(draw)), draw.log_between(1e-3, 0.5)
    name = Name(r"eps", (eps,), tolerance=0.05)
    return Planted(tap=tap, apply=set_epsilon(draw, tap, eps), names=(name,), numbers=f"{eps:.3g}")


@kind("norm", "scale weight")
def scale_weight(draw: Draw) -> Planted:
    factor = draw.factor()
    return _weight(draw, lambda w: w * factor, Name(SCALED, (factor,)), numbers=f"x {factor:.4g}")


@kind("norm", "weight plus one")
def plus_one(draw: Draw) -> Planted:
    """Gemma's convention, with which some engines load every norm."""
    return _weight(draw, lambda w: w + 1.0, Name(r"\+ ?1\b|plus one|one more|1 added|one added"))


@kind("norm", "weight of ones")
def ones(draw: Draw) -> Planted:
    return _weight(draw, np.ones_like, Name(_NO_WEIGHT))


@kind("norm", "permute weight")
def permute(draw: Draw) -> Planted:
    order = draw.order(draw.spec.hidden_size)
    return _weight(draw, lambda w: w[order], Name(ORDER, vague=OTHER), bias=True)


@kind("norm", "reverse weight")
def reverse(draw: Draw) -> Planted:
    return _weight(draw, lambda w: w[::-1], Name(rf"revers|{ORDER}", vague=OTHER))


@kind("norm", "weight noise")
def noise(draw: Draw) -> Planted:
    size = draw.log_between(0.05, 0.5)
    draws = 1.0 + size * draw.generator.standard_normal(draw.spec.hidden_size)
    return _weight(draw, lambda w: w * draws, Name(rf"noise|deviat|{OTHER}"), numbers=f"{size:.2g}")


@kind("norm", "replace by another norm's")
def other_norms(draw: Draw) -> Planted:
    tap, other = draw.chance.sample(norms(draw), 2)
    found = {part: draw.weights.get(f"{other}.{part}") for part in ("weight", "bias")}
    edits = [edit(f"{tap}.{part}", lambda w, o=o: o) for part, o in found.items() if o is not None]  # type: ignore[misc]
    words = r"another (?:layer|norm)|other (?:layer|norm)|weight.* of |exchang|swap|layer \d"
    return Planted(tap=tap, apply=both(*edits), names=(Name(words),), numbers=f"of {other}")


@kind("norm", "drop bias")
def drop_bias(draw: Draw) -> Planted | None:
    if draw.spec.norm.kind != "layer":
        return None
    tap = draw.chance.choice(norms(draw))
    return Planted(tap=tap, apply=edit(f"{tap}.bias", np.zeros_like), names=(Name(NO_BIAS),))


@kind("norm", "drop")
def drop(draw: Draw) -> Planted:
    tap = draw.chance.choice(norms(draw))

    def fault(model: onnx.ModelProto) -> None:
        before = _input(model, tap)
        maker = model.graph.node[place(model, tap)]
        maker.op_type = "Identity"
        maker.input[:] = [before]
        del maker.attribute[:]

    return Planted(
        tap=tap, apply=fault, names=(Name(r"norm (?:is )?(?:missing|skipp|dropp|not)|without.*norm|no norm"),)
    )


def _input(model: onnx.ModelProto, tap: str) -> str:
    """What a norm reads."""
    wide = [n for n in model.graph.node if n.name == f"{tap}.wide" and n.op_type == "Cast"]
    made = wide[0] if wide else node(model, tap) if _has(model, tap) else node(model, f"{tap}.square")
    return str(made.input[0])


def _has(model: onnx.ModelProto, name: str) -> bool:
    return any(n.name == name for n in model.graph.node)


@kind("norm", "apply twice")
def twice(draw: Draw) -> Planted | None:
    """The norm of the normalized, with the weight once."""
    if draw.spec.norm.kind != "rms":
        return None
    tap = draw.chance.choice(norms(draw))
    weight = draw.weights[f"{tap}.weight"].astype(np.float32)

    def again(p: Patch, x: str) -> str:
        mean = p("ReduceMean", p("Mul", x, x), np.array([-1]))
        return p("Mul", p("Div", x, p("Sqrt", p("Add", mean, 1e-6))), weight)

    return Planted(tap=tap, apply=rework(tap, again), names=(Name(r"twice|two|again|statistic"),))


@kind("norm", "another statistic")
def statistic(draw: Draw) -> Planted | None:
    """RMSNorm by the mean of absolute values, the largest value, the sum of squares, or half of the channels."""
    if draw.spec.norm.kind != "rms":
        return None
    tap, which = draw.chance.choice(norms(draw)), draw.chance.choice(["mean abs", "sum", "half"])
    size = draw.spec.hidden_size

    def other(p: Patch, x: str) -> str:
        last = np.array([-1])
        if which == "mean abs":
            mean = p("ReduceMean", p("Sqrt", x), last)
            return p("Mul", mean, mean)
        if which == "sum":
            return p("ReduceSum", x, last)
        return p("ReduceMean", p("Slice", x, np.array([0]), np.array([size // 2]), last), last)

    def fault(model: onnx.ModelProto) -> None:
        patch = Patch(model, place(model, f"{tap}.biased"))
        replace_input(model, f"{tap}.biased", f"{tap}.mean", other(patch, f"{tap}.square"))

    words = {"mean abs": r"abs", "sum": r"sum|scal|factor|times", "half": r"half|part|channels"}[which]
    return Planted(tap=tap, apply=fault, names=(Name(rf"statistic|{words}"),), numbers=which)


@kind("norm", "center or not")
def center(draw: Draw) -> Planted:
    """LayerNorm where RMSNorm is right, and the other way round."""
    tap = draw.chance.choice(norms(draw))
    name = Name(r"RMSNorm|LayerNorm|layer norm|center|mean")
    if draw.spec.norm.kind == "rms":

        def centered(model: onnx.ModelProto) -> None:
            wide = str(node(model, f"{tap}.square").input[0])
            patch = Patch(model, place(model, f"{tap}.square"))
            other = patch("Sub", wide, patch("ReduceMean", wide, np.array([-1])))
            replace_input(model, f"{tap}.square", wide, other)
            replace_input(model, f"{tap}.normed", wide, other)

        return Planted(tap=tap, apply=centered, names=(name,))

    def uncentered(model: onnx.ModelProto) -> None:
        at = place(model, tap)
        maker = model.graph.node[at]
        x, eps = maker.input[0], attribute(maker, "epsilon").f
        del model.graph.node[at]
        p = Patch(model, at)
        wide = p("Cast", x, to=onnx.TensorProto.FLOAT)
        mean = p("ReduceMean", p("Mul", wide, wide), np.array([-1]))
        weight, bias = (draw.weights[f"{tap}.{part}"].astype(np.float32) for part in ("weight", "bias"))
        y = p("Add", p("Mul", p("Div", wide, p("Sqrt", p("Add", mean, eps))), weight), bias)
        p("Cast", y, to=working_type(model), name=tap)

    return Planted(tap=tap, apply=uncentered, names=(name,))


@kind("norm", "round output")
def rounded(draw: Draw) -> Planted:
    tap, bits = draw.chance.choice(norms(draw)), draw.chance.choice([3, 4, 5])
    step = 2.0**-bits

    def grid(p: Patch, x: str) -> str:
        return p("Mul", p("Round", p("Div", x, step)), step)

    return Planted(tap=tap, apply=rework(tap, grid), names=(Name(GRID),), numbers=f"{step}")


@kind("norm", "change epsilon and drop the weight")
def epsilon_and_weight(draw: Draw) -> Planted:
    """Two faults in one module."""
    tap, eps = draw.chance.choice(norms(draw)), draw.log_between(0.02, 0.5)
    fault = both(set_epsilon(draw, tap, eps), edit(f"{tap}.weight", np.ones_like))
    return Planted(
        tap=tap, apply=fault, names=(Name(r"eps", (eps,), tolerance=0.05), Name(_NO_WEIGHT)), numbers=f"{eps:.3g}"
    )


@kind("norm", "change epsilon in every layer")
def epsilon_everywhere(draw: Draw) -> Planted:
    eps = draw.log_between(1e-2, 0.5)
    taps = [f"blocks.{n}.{part}" for n in range(draw.spec.layers) for part in ("attn_norm", "mlp_norm")]
    fault = both(*(set_epsilon(draw, tap, eps) for tap in taps))
    name = Name(r"eps", (eps,), tolerance=0.05)
    return Planted(tap="blocks.0.attn_norm", apply=fault, names=(name,), numbers=f"{eps:.3g}")
