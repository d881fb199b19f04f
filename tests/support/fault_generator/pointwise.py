"""Faults of activations, residuals, the embedding, the order of blocks and the logits."""

from __future__ import annotations

import numpy as np
import onnx

from tests.support.fault_generator.kinds import Draw, Name, Planted, kind
from tests.support.fault_generator.linear import GRID, ORDER, OTHER, SCALED, changed
from tests.support.mutate import Fault, Patch, Rework, both, edit, node, replace_input, reroute, rework, swapped

# The activation


def _curve(draw: Draw, change: Rework, *names: Name, numbers: str = "") -> Planted:
    """Another curve in the place of the activation, on the same input."""
    tap = f"{draw.path}.mlp.act"

    def fault(model: onnx.ModelProto) -> None:
        if draw.spec.mlp.gated:
            source, result = f"{draw.path}.mlp.gate", f"{draw.path}.mlp.silu"
        else:
            source, result = f"{draw.path}.mlp.up", tap

        def from_source(patch: Patch, x: str) -> str:
            return change(patch, patch("Cast", source, to=onnx.TensorProto.FLOAT))

        rework(result, from_source)(model)

    return Planted(tap=tap, apply=fault, names=names, numbers=numbers)


def _swish(p: Patch, x: str, beta: float = 1.0) -> str:
    return p("Mul", x, p("Sigmoid", p("Mul", x, beta)))


@kind("activation", "swish with another slope")
def swish(draw: Draw) -> Planted:
    beta = draw.log_between(1.2, 3.0) if draw.spec.mlp.gated else draw.log_between(0.6, 1.4)
    name = Name(r"swish|quick|sigmoid|beta|slope|silu", (beta,), tolerance=0.05)
    return _curve(draw, lambda p, x: _swish(p, x, beta), name, numbers=f"{beta:.3g}")


@kind("activation", "relu")
def relu(draw: Draw) -> Planted:
    return _curve(draw, lambda p, x: p("Relu", x), Name(r"\brelu"))


@kind("activation", "leaky relu")
def leaky(draw: Draw) -> Planted:
    slope = draw.between(0.02, 0.3)
    return _curve(
        draw,
        lambda p, x: p("LeakyRelu", x, alpha=slope),
        Name(r"leaky", (slope,), tolerance=0.05),
        numbers=f"{slope:.3g}",
    )


@kind("activation", "mish")
def mish(draw: Draw) -> Planted:
    return _curve(draw, lambda p, x: p("Mul", x, p("Tanh", p("Softplus", x))), Name(r"mish"))


@kind("activation", "softplus")
def softplus(draw: Draw) -> Planted:
    return _curve(draw, lambda p, x: p("Softplus", x), Name(r"softplus"))


@kind("activation", "squared relu")
def squared(draw: Draw) -> Planted:
    def change(p: Patch, x: str) -> str:
        positive = p("Relu", x)
        return p("Mul", positive, positive)

    return _curve(draw, change, Name(r"squar|relu.?2"))


@kind("activation", "gelu and silu exchanged")
def exchanged(draw: Draw) -> Planted:
    if draw.spec.mlp.gated:
        return _curve(draw, lambda p, x: p("Gelu", x, approximate="tanh"), Name(r"gelu"))
    return _curve(draw, lambda p, x: _swish(p, x), Name(r"silu|swish"))


@kind("activation", "not activated")
def linear(draw: Draw) -> Planted:
    names = Name(
        r"activation missing|not activated|no activation|identity|linear|without activation|wrong activation.*none"
    )
    return _curve(draw, lambda p, x: p("Identity", x), names)


def _after(draw: Draw, change: Rework, *names: Name, numbers: str = "") -> Planted:
    tap = f"{draw.path}.mlp.act"
    return Planted(tap=tap, apply=rework(tap, change), names=names, numbers=numbers)


def _quantile(draw: Draw) -> float:
    """A limit that a good share of activations passes, for weights of this model's size."""
    return draw.log_between(0.02, 0.3)


@kind("activation", "clamp")
def clamp(draw: Draw) -> Planted:
    limit = _quantile(draw)
    name = Name(r"clamp|clip|satur|limit|cap", (limit,), tolerance=0.05)
    return _after(draw, lambda p, x: p("Clip", x, -limit, limit), name, numbers=f"at {limit:.3g}")


@kind("activation", "soft cap")
def soft_cap(draw: Draw) -> Planted:
    cap = _quantile(draw)
    name = Name(r"cap|tanh", (cap,), tolerance=0.05)
    return _after(draw, lambda p, x: p("Mul", p("Tanh", p("Div", x, cap)), cap), name, numbers=f"{cap:.3g}")


@kind("activation", "scale")
def scale(draw: Draw) -> Planted:
    factor = draw.factor()
    return _after(draw, lambda p, x: p("Mul", x, factor), Name(SCALED, (factor,)), numbers=f"x {factor:.4g}")


@kind("activation", "round to a grid")
def grid(draw: Draw) -> Planted:
    step = draw.log_between(0.01, 0.1)
    change: Rework = lambda p, x: p("Mul", p("Round", p("Div", x, step)), step)  # noqa: E731
    return _after(draw, change, Name(GRID), numbers=f"step {step:.3g}")


def _gated(draw: Draw, op: str, left: str, right: str, words: str) -> Planted | None:
    if not draw.spec.mlp.gated:
        return None
    path = draw.path
    parts = {"silu": f"{path}.mlp.silu", "up": f"{path}.mlp.up", "gate": f"{path}.mlp.gate"}

    def fault(model: onnx.ModelProto) -> None:
        product = node(model, f"{path}.mlp.act")
        product.op_type = op
        product.input[:] = [parts[left], parts[right]] if op != "Identity" else [parts[left]]

    return Planted(tap=f"{path}.mlp.act", apply=fault, names=(Name(words),))


@kind("activation", "gate added")
def gate_added(draw: Draw) -> Planted | None:
    return _gated(draw, "Add", "silu", "up", r"add|sum")


@kind("activation", "up dropped")
def up_dropped(draw: Draw) -> Planted | None:
    return _gated(
        draw, "Identity", "silu", "silu", r"(?:gate|up) (?:is )?(?:missing|alone|dropped)|without|missing|alone"
    )


@kind("activation", "gate for up")
def gate_for_up(draw: Draw) -> Planted | None:
    return _gated(draw, "Mul", "silu", "gate", r"gate|half|up\b")


# Residuals

_NO_BRANCH = r"branch.*(?:missing|dropped|lost|not added)|(?:missing|no|without).*branch|residual alone"


def _residual(draw: Draw) -> tuple[str, str, str]:
    """A sum, its residual and its branch."""
    path = draw.path
    if draw.chance.random() < 0.5:
        before = f"blocks.{draw.layer - 1}" if draw.layer else "embed"
        return f"{path}.resid_mid", before, f"{path}.attn.out"
    return path, f"{path}.resid_mid", f"{path}.mlp.out"


@kind("residual", "drop residual")
def no_residual(draw: Draw) -> Planted:
    total, residual, _ = _residual(draw)
    return Planted(
        tap=total,
        apply=_times(total, residual, 0.0),
        names=(Name(r"residual.*(?:missing|dropped|not added)|no residual|branch alone"),),
    )


@kind("residual", "drop branch")
def no_branch(draw: Draw) -> Planted:
    total, _, branch = _residual(draw)
    return Planted(tap=total, apply=_times(total, branch, 0.0), names=(Name(_NO_BRANCH),))


def _times(total: str, value: str, factor: float) -> Fault:
    return reroute(total, value, lambda p, x: p("Mul", x, factor))


@kind("residual", "scale residual")
def scale_residual(draw: Draw) -> Planted:
    total, residual, _ = _residual(draw)
    factor = draw.factor()
    name = Name(rf"residual|{SCALED}", (factor,))
    return Planted(tap=total, apply=_times(total, residual, factor), names=(name,), numbers=f"x {factor:.4g}")


@kind("residual", "scale branch")
def scale_branch(draw: Draw) -> Planted:
    total, _, branch = _residual(draw)
    factor = draw.factor()
    name = Name(rf"branch|{SCALED}", (factor,))
    return Planted(tap=total, apply=_times(total, branch, factor), names=(name,), numbers=f"x {factor:.4g}")


@kind("residual", "subtract branch")
def subtract(draw: Draw) -> Planted:
    total, _, branch = _residual(draw)
    return Planted(
        tap=total,
        apply=_times(total, branch, -1.0),
        names=(Name(r"subtract|sign|negat|minus|branch", (-1.0,), said=r"subtract|sign|negat|minus"),),
    )


@kind("residual", "add branch twice")
def twice(draw: Draw) -> Planted:
    """An all-reduce over two ranks that both hold the whole."""
    total, _, branch = _residual(draw)
    return Planted(tap=total, apply=_times(total, branch, 2.0), names=(Name(r"branch", (2.0,), said=r"twice|doubl"),))


@kind("residual", "take after the norm")
def after_norm(draw: Draw) -> Planted:
    total, residual, _ = _residual(draw)
    norm = f"{draw.path}.{'attn_norm' if total.endswith('mid') else 'mlp_norm'}"
    return Planted(
        tap=total, apply=lambda m: replace_input(m, total, residual, norm), names=(Name(r"after the norm|norm"),)
    )


@kind("residual", "take from another place")
def stale(draw: Draw) -> Planted | None:
    """The block's input instead of the middle (parallel form without attention), or of the block before."""
    path = draw.path
    before = f"blocks.{draw.layer - 1}" if draw.layer else "embed"
    words = r"residual|parallel|block'?s input|another|stale|before"
    return Planted(tap=path, apply=lambda m: replace_input(m, path, f"{path}.resid_mid", before), names=(Name(words),))


# The embedding


@kind("embed", "scale")
def scale_embedding(draw: Draw) -> Planted:
    """Gemma's factor, applied where there is none."""
    factor = draw.chance.choice([draw.factor(), float(np.sqrt(draw.spec.hidden_size))])
    return Planted(
        tap="embed",
        apply=rework("embed", lambda p, x: p("Mul", x, factor)),
        names=(Name(SCALED, (factor,), said="root" if factor == np.sqrt(draw.spec.hidden_size) else None),),
        numbers=f"x {factor:.4g}",
    )


@kind("embed", "shift rows")
def shift_rows(draw: Draw) -> Planted:
    by = draw.chance.choice([1, -1, 2, 3])

    def fault(model: onnx.ModelProto) -> None:
        gather = next(n for n in model.graph.node if n.op_type == "Gather" and "input_ids" in n.input)
        last = draw.spec.vocab_size - 1
        change: Rework = lambda p, x: p("Clip", p("Add", x, np.array(by)), np.array(0), np.array(last))  # noqa: E731
        reroute(gather.name, "input_ids", change, wide=True)(model)

    return Planted(tap="embed", apply=fault, names=(Name(r"ids?|rows?|shift", (by, -by)),), numbers=f"by {by}")


@kind("embed", "permute channels")
def permute_channels(draw: Draw) -> Planted:
    order = draw.order(draw.spec.hidden_size)
    change: Rework = lambda p, x: p("Gather", x, order, axis=-1)  # noqa: E731
    return Planted(tap="embed", apply=rework("embed", change), names=(Name(rf"{ORDER}|channel|column"),))


@kind("embed", "round to a grid")
def embedding_grid(draw: Draw) -> Planted:
    bits = draw.chance.choice([3, 4, 8])
    step = float(np.abs(draw.weights["embed.weight"]).max()) / (2 ** (bits - 1) - 1)
    change: Rework = lambda p, x: p("Mul", p("Round", p("Div", x, step)), step)  # noqa: E731
    return Planted(tap="embed", apply=rework("embed", change), names=(Name(GRID),), numbers=f"{bits} bits")


@kind("embed", "offset positions")
def offset_positions(draw: Draw) -> Planted | None:
    if draw.spec.position != "learned":
        return None
    by = draw.chance.choice([1, 2, 3, 5])
    last = draw.spec.max_positions - 1
    change: Rework = lambda p, x: p("Min", p("Add", x, np.array(by)), np.array(last))  # noqa: E731
    fault = reroute("position_embed.rows", "position_ids", change, wide=True)
    return Planted(tap="embed", apply=fault, names=(Name(r"position", (by,)),), numbers=f"by {by}")


@kind("embed", "drop positions")
def drop_positions(draw: Draw) -> Planted | None:
    if draw.spec.position != "learned":
        return None
    fault = edit("position_embed.weight", np.zeros_like)
    return Planted(tap="embed", apply=fault, names=(Name(r"position.*(?:missing|not|zero)|(?:missing|no) position"),))


# The order of blocks


@kind("blocks", "swap two layers")
def swap_layers(draw: Draw) -> Planted | None:
    if draw.spec.layers < 2:
        return None
    first, second = sorted((draw.layer, draw.other_layer()))
    names = [n for n in draw.weights if n.startswith(f"blocks.{first}.")]
    fault = both(*(swapped(n, n.replace(f"blocks.{first}.", f"blocks.{second}.", 1)) for n in names))
    words = r"another layer|other layer|layer \d|blocks?\.?\d|exchang|swap|order"
    return Planted(tap=f"blocks.{first}.attn_norm", apply=fault, names=(Name(words),), numbers=f"{first} and {second}")


@kind("blocks", "use a layer's weights again")
def layer_again(draw: Draw) -> Planted | None:
    if draw.spec.layers < 2:
        return None
    other = draw.other_layer()
    names = [n for n in draw.weights if n.startswith(f"{draw.path}.")]
    sources = {n: draw.weights[n.replace(draw.path, f"blocks.{other}", 1)] for n in names}
    fault = both(*(edit(n, lambda w, o=o: o) for n, o in sources.items()))  # type: ignore[misc]
    words = r"another layer|other layer|layer \d|blocks?\.?\d|exchang|repeat|again"
    return Planted(tap=f"{draw.path}.attn_norm", apply=fault, names=(Name(words),), numbers=f"of layer {other}")


@kind("blocks", "skip a block")
def skip(draw: Draw) -> Planted:
    """Both branches of a block are lost; the first sum shows it."""
    path = draw.path
    fault = both(_times(f"{path}.resid_mid", f"{path}.attn.out", 0.0), _times(path, f"{path}.mlp.out", 0.0))
    return Planted(tap=f"{path}.resid_mid", apply=fault, names=(Name(rf"skip|{_NO_BRANCH}"),))


# The logits


@kind("logits", "scale")
def temperature(draw: Draw) -> Planted:
    factor = draw.factor()
    return Planted(
        tap="logits",
        apply=rework("logits", lambda p, x: p("Mul", x, factor)),
        names=(Name(SCALED, (factor,)),),
        numbers=f"x {factor:.4g}",
    )


@kind("logits", "soft cap")
def cap_logits(draw: Draw) -> Planted:
    cap = draw.log_between(0.3, 3.0)
    change: Rework = lambda p, x: p("Mul", p("Tanh", p("Div", x, cap)), cap)  # noqa: E731
    name = Name(r"cap|tanh", (cap,), tolerance=0.05)
    return Planted(tap="logits", apply=rework("logits", change), names=(name,), numbers=f"{cap:.3g}")


@kind("logits", "add bias")
def bias(draw: Draw) -> Planted:
    added = draw.between(0.1, 0.5) * draw.generator.standard_normal(draw.spec.vocab_size)
    change: Rework = lambda p, x: p("Add", x, added)  # noqa: E731
    return Planted(tap="logits", apply=rework("logits", change), names=(Name(r"bias|added|constant"),))


@kind("logits", "permute rows of the head")
def permute_vocabulary(draw: Draw) -> Planted:
    order = draw.order(draw.spec.vocab_size)
    change: Rework = lambda p, x: p("Gather", x, order, axis=-1)  # noqa: E731
    return Planted(tap="logits", apply=rework("logits", change), names=(Name(rf"{ORDER}|column|row"),))


@kind("logits", "shift the vocabulary")
def shift_vocabulary(draw: Draw) -> Planted:
    """A head that was padded or cut at the wrong end."""
    size, by = draw.spec.vocab_size, draw.chance.choice([1, 2, 3, 7])
    order = np.roll(np.arange(size), by)
    change: Rework = lambda p, x: p("Gather", x, order, axis=-1)  # noqa: E731
    name = Name(rf"shift|roll|{ORDER}")
    return Planted(tap="logits", apply=rework("logits", change), names=(name,), numbers=f"by {by}")


@kind("logits", "head noise")
def head_noise(draw: Draw) -> Planted | None:
    if not (draw.spec.tied_head or "head.weight" in draw.weights):
        return None
    size = draw.log_between(0.03, 0.3)
    draws = draw.generator.standard_normal((draw.spec.hidden_size, draw.spec.vocab_size))
    name = Name(rf"noise|deviat|{OTHER}", (size, 100 * size), tolerance=0.2)
    return changed(draw, "logits", lambda w: w + size * np.sqrt(np.mean(w**2)) * draws, name, numbers=f"{size:.2g}")


@kind("logits", "head of the embedding")
def head_of_embedding(draw: Draw) -> Planted | None:
    """Tied where the model's head is its own."""
    if draw.spec.tied_head or "head.weight" not in draw.weights:
        return None
    weight = draw.weights["embed.weight"].T
    return changed(draw, "logits", lambda w: weight, Name(r"tied|embedding"))


@kind("logits", "wrong token")
def wrong_token(draw: Draw) -> Planted:
    """The logits of the token before."""

    def fault(model: onnx.ModelProto) -> None:
        change: Rework = lambda p, x: p("Max", p("Sub", x, np.array(1)), np.array(0))  # noqa: E731
        reroute("selected.index", "logit_index", change, wide=True)(model)

    return Planted(tap="final_norm", apply=fault, names=(Name(r"token|position|index|shift|off"),))
