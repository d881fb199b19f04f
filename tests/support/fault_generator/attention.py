"""Faults of attention: scores, masks, heads, and what is made of the probabilities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from tests.support.fault_generator.kinds import Draw, Name, Planted, kind
from tests.support.fault_generator.linear import GRID, ORDER
from tests.support.mutate import Fault, Patch, Rework, both, constant, identity, node, reroute, rework

_SCALE = r"scale|factor|times"


def _context(draw: Draw, fault: Fault, *names: Name, numbers: str = "") -> Planted:
    return Planted(tap=f"{draw.path}.attn.context", apply=fault, names=names, numbers=numbers)


def _scores(draw: Draw) -> str:
    """The scores as the mask meets them."""
    return f"{draw.path}.attn.{'biased' if draw.spec.position == 'alibi' else 'scores'}"


@kind("attention", "scale scores")
def scale(draw: Draw) -> Planted:
    factor, path = draw.factor(), f"{draw.path}.attn.scale_number"
    right = draw.spec.attention.scale / (draw.layer + 1 if draw.spec.attention.scale_by_layer else 1)
    name = Name(_SCALE, (factor, right * factor))
    return _context(draw, constant(path, lambda s: s * factor), name, numbers=f"x {factor:.4g}")


@kind("attention", "scale scores in every layer")
def scale_everywhere(draw: Draw) -> Planted:
    factor, right = draw.factor(), draw.spec.attention.scale
    paths = [f"blocks.{n}.attn.scale_number" for n in range(draw.spec.layers)]
    fault = both(*(constant(path, lambda s: s * factor) for path in paths))
    name = Name(_SCALE, (factor, right * factor))
    return Planted(tap="blocks.0.attn.context", apply=fault, names=(name,), numbers=f"x {factor:.4g}")


@kind("attention", "soft cap")
def soft_cap(draw: Draw) -> Planted:
    cap = draw.log_between(0.1, 1.0)
    change: Rework = lambda p, x: p("Mul", p("Tanh", p("Div", x, cap)), cap)  # noqa: E731
    fault = rework(f"{draw.path}.attn.scores", change, wide=True)
    return _context(draw, fault, Name(r"cap|tanh", (cap,), tolerance=0.05), numbers=f"{cap:.3g}")


@kind("attention", "noise on scores")
def noise(draw: Draw) -> Planted:
    """A bias for each head that the model does not have."""
    size = draw.between(0.3, 1.0)
    heads = draw.spec.attention.heads
    slots = size * draw.generator.standard_normal((1, heads, 1, 1))

    def change(p: Patch, x: str) -> str:
        return p("Add", x, p("Mul", p("Sin", p("Mul", x, 40.0)), slots))

    words = r"score|noise|bias"
    return _context(draw, rework(_scores(draw), change, wide=True), Name(words), numbers=f"{size:.2g}")


# Masks


def _seen(draw: Draw, make: Callable[[Patch, str, str, str], str]) -> Fault:
    """Another mask before the window.

    `make` gets the patch, the right mask [batch, 1, tokens, slots] and the slots of key and query.
    """
    attn = f"{draw.path}.attn"

    def change(p: Patch, seen: str) -> str:
        return make(p, seen, f"{attn}.key_slot", f"{attn}.query_slot")

    unlimited = "_unlimited" if draw.spec.attention.window is not None else ""
    return rework(f"{attn}.seen{unlimited}", change, wide=True)


def _padding(draw: Draw) -> str:
    return f"{draw.path}.attn.visible_by_query"


@kind("mask", "no causal mask")
def not_causal(draw: Draw) -> Planted:
    fault = _seen(draw, lambda p, seen, key, query: p("And", p("LessOrEqual", key, p("Add", query, np.array(10**6))),
                                                      _padding(draw)))  # fmt: skip
    words = r"causal.*(?:missing|ignored|not|dropped)|(?:no|not) causal|future"
    return _context(draw, fault, Name(words))


@kind("mask", "causal off by one")
def causal_off(draw: Draw) -> Planted:
    """Strict, so that a token does not see itself, or one to three tokens ahead."""
    by = draw.chance.choice([-1, 1, 2, 3])

    def make(p: Patch, seen: str, key: str, query: str) -> str:
        return p("And", p("LessOrEqual", key, p("Add", query, np.array(by))), _padding(draw))

    words = r"strict|itself" if by < 0 else r"ahead|future"
    return _context(draw, _seen(draw, make), Name(rf"{words}|causal.*off|diagonal"), numbers=f"by {by}")


@kind("mask", "another window")
def window(draw: Draw) -> Planted:
    right = draw.spec.window(draw.layer) or 10**6
    width = draw.chance.choice([w for w in (1, 2, 3, 4, 5, 6, 7, 9, 11, 13) if w < min(right, draw.prompt_length)])

    def make(p: Patch, seen: str, key: str, query: str) -> str:
        return p("And", seen, p("Greater", key, p("Sub", query, np.array(width))))

    return _context(draw, _seen(draw, make), Name(r"window", (width,)), numbers=f"{width}")


@kind("mask", "window lost")
def no_window(draw: Draw) -> Planted | None:
    if not draw.spec.window(draw.layer):
        return None
    fault = constant(f"{draw.path}.attn.window_size", lambda w: 0)
    return _context(draw, fault, Name(r"window"))


@kind("mask", "padding seen")
def padding_seen(draw: Draw) -> Planted:
    fault = _seen(draw, lambda p, seen, key, query: p("Or", seen, p("And", p("LessOrEqual", key, query),
                                                                    p("Not", _padding(draw)))))  # fmt: skip
    return _context(draw, fault, Name(r"padding"))


@kind("mask", "padding of another row")
def padding_of_other(draw: Draw) -> Planted:
    def make(p: Patch, seen: str, key: str, query: str) -> str:
        rolled = _next_row(p, p("Cast", _padding(draw), to=onnx.TensorProto.FLOAT))
        return p("And", p("LessOrEqual", key, query), p("Cast", rolled, to=onnx.TensorProto.BOOL))

    return _context(draw, _seen(draw, make), Name(r"row"))


@kind("mask", "first token hidden")
def first_hidden(draw: Draw) -> Planted:
    """The attention sink is cut off: slots below a number are not seen, as in a ring buffer without sinks."""
    # Not a padding of the prompts: that would be another fault with the same effect.
    start = draw.prompt_length // 2 + draw.chance.choice([2, 4, 5])

    def make(p: Patch, seen: str, key: str, query: str) -> str:
        return p("And", seen, p("GreaterOrEqual", key, np.array(start)))

    return _context(draw, _seen(draw, make), Name(r"mask|hidden|not seen|slot|window"), numbers=f"below {start}")


def _next_row(p: Patch, x: str) -> str:
    """The rows of the batch moved on by one."""
    large = np.array([2**31 - 1])
    first = p("Slice", x, np.array([0]), np.array([1]), np.array([0]))
    return p("Concat", p("Slice", x, np.array([1]), large, np.array([0])), first, axis=0)


# Heads


@kind("heads", "permute")
def permute_heads(draw: Draw) -> Planted | None:
    heads = draw.spec.attention.heads
    if heads < 2:
        return None
    order = draw.order(heads)
    change: Rework = lambda p, x: p("Gather", x, order, axis=1)  # noqa: E731
    fault = rework(f"{draw.path}.attn.context_seen", change, wide=True)
    return _context(draw, fault, Name(rf"heads?.*(?:{ORDER})|(?:{ORDER}).*heads?"), numbers=str(order.tolist()))


@kind("heads", "drop one")
def drop_head(draw: Draw) -> Planted:
    heads, factor = draw.spec.attention.heads, 0.0
    head = draw.chance.randrange(heads)
    factors = np.ones((1, heads, 1, 1))
    factors[:, head] = factor
    fault = rework(f"{draw.path}.attn.context_seen", lambda p, x: p("Mul", x, factors), wide=True)
    return _context(
        draw,
        fault,
        Name(
            r"head.*(?:missing|zero|dropped|lost|not|without)|(?:missing|zero|no).*head|head \d", vague="zero|missing"
        ),
        numbers=f"head {head}",
    )


@kind("heads", "other key and value heads")
def kv_heads(draw: Draw) -> Planted | None:
    """Queries that read the next group's keys and values."""
    count = draw.spec.attention.kv_heads
    if count < 2:
        return None
    order = np.roll(np.arange(count), draw.chance.randrange(1, count))
    change: Rework = lambda p, x: p("Gather", x, order, axis=1)  # noqa: E731
    attn = f"{draw.path}.attn"
    fault = both(rework(f"{attn}.live_key", change), rework(f"{attn}.live_value", change))
    return _context(draw, fault, Name(r"head|group|GQA"), numbers=str(order.tolist()))


@kind("heads", "other value heads")
def value_heads(draw: Draw) -> Planted | None:
    count = draw.spec.attention.kv_heads
    if count < 2:
        return None
    order = draw.order(count)
    change: Rework = lambda p, x: p("Gather", x, order, axis=1)  # noqa: E731
    fault = rework(f"{draw.path}.attn.live_value", change)
    return _context(draw, fault, Name(r"head|value"), numbers=str(order.tolist()))


@kind("heads", "tiled groups")
def tiled(draw: Draw) -> Planted | None:
    a = draw.spec.attention
    if not 1 < a.kv_heads < a.heads:
        return None
    order = np.arange(a.heads).reshape(-1, a.kv_heads).T.flatten()
    attn = f"{draw.path}.attn"
    change: Rework = lambda p, x: p("Gather", x, order, axis=1)  # noqa: E731
    back: Rework = lambda p, x: p("Gather", x, np.argsort(order), axis=1)  # noqa: E731
    fault = both(rework(f"{attn}.query_wide", change, wide=True), rework(f"{attn}.context_by_head", back, wide=True))
    return _context(draw, fault, Name(r"tiled|group|head"))


@kind("heads", "order of heads and tokens")
def not_transposed(draw: Draw) -> Planted:
    """The context is reshaped without the transpose."""

    def fault(model: onnx.ModelProto) -> None:
        identity(f"{draw.path}.attn.context_by_token")(model)
        node(model, f"{draw.path}.attn.context_rows_shape").attribute[0].ints[1] = -1

    return _context(draw, fault, Name(r"reshap|transpos|order"))


# What is made of them


@kind("attention", "attention sink")
def sink(draw: Draw) -> Planted:
    """The probabilities sum up to less than one, as with a learned sink."""
    logit = draw.between(-1.0, 2.0)
    attn = f"{draw.path}.attn"

    def change(p: Patch, weights: str) -> str:
        masked = f"{attn}.masked"
        total = p("ReduceSum", p("Exp", masked), np.array([-1]))
        return p("Mul", weights, p("Div", total, p("Add", total, float(np.exp(logit)))))

    return _context(draw, rework(f"{attn}.weights", change, wide=True), Name(r"sink"), numbers=f"{logit:.3g}")


@kind("attention", "round probabilities")
def round_probabilities(draw: Draw) -> Planted:
    """Probabilities quantized to 8 bits or fewer between the two products."""
    bits = draw.chance.choice([4, 5, 6, 7, 8])
    levels = float(2**bits - 1)
    change: Rework = lambda p, x: p("Div", p("Round", p("Mul", x, levels)), levels)  # noqa: E731
    fault = rework(f"{draw.path}.attn.weights", change, wide=True)
    return _context(draw, fault, Name(rf"probabilit|{GRID}"), numbers=f"{bits} bits")


@kind("attention", "uniform")
def uniform(draw: Draw) -> Planted:
    """The queries do not arrive: all visible tokens count alike."""
    fault = rework(f"{draw.path}.attn.scores", lambda p, x: p("Mul", x, 0.0), wide=True)
    return _context(draw, fault, Name(r"uniform|scale.* 0\b|mean of|query|score"))


@kind("attention", "values of another row")
def other_row(draw: Draw) -> Planted:
    fault = rework(f"{draw.path}.attn.live_value", _next_row)
    return _context(draw, fault, Name(r"row|batch"))


@kind("attention", "scale and mask")
def scale_and_mask(draw: Draw) -> Planted:
    """Two faults in one module."""
    first, second = scale(draw), not_causal(draw)
    return _context(draw, both(first.apply, second.apply), *first.names, *second.names, numbers=first.numbers)


# ALiBi and logn


def _slopes(draw: Draw, change: Rework) -> Fault:
    return reroute(f"{draw.path}.attn.slopes", "alibi_slopes", change, wide=True)


@kind("attention", "scale ALiBi")
def alibi_factor(draw: Draw) -> Planted | None:
    if draw.spec.position != "alibi":
        return None
    factor = draw.chance.choice([draw.factor(), -1.0, 0.0])
    name = Name(r"ALiBi", (factor,) if factor not in (0.0, -1.0) else ())
    return _context(draw, _slopes(draw, lambda p, x: p("Mul", x, factor)), name, numbers=f"x {factor:.4g}")


@kind("attention", "order of ALiBi slopes")
def alibi_order(draw: Draw) -> Planted | None:
    if draw.spec.position != "alibi":
        return None
    order = draw.chance.choice([draw.order(draw.spec.attention.heads), np.arange(draw.spec.attention.heads)[::-1]])
    return _context(draw, _slopes(draw, lambda p, x: p("Gather", x, order.copy(), axis=0)), Name(r"ALiBi|slope"))


@kind("attention", "ALiBi of the next power of two")
def alibi_base(draw: Draw) -> Planted | None:
    """Slopes 2^(-8 i / heads) also where the number of heads is no power of two."""
    heads = draw.spec.attention.heads
    if draw.spec.position != "alibi":
        return None
    slopes = 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads * draw.between(0.7, 1.3))
    return _context(draw, _slopes(draw, lambda p, x: p("Add", p("Mul", x, 0.0), slopes)), Name(r"ALiBi|slope"))


@kind("attention", "scale queries by position")
def logn(draw: Draw) -> Planted:
    """Log-n scaling of another length, or where there is none."""
    length, attn = draw.chance.randrange(4, 12), f"{draw.path}.attn"

    def change(p: Patch, x: str) -> str:
        position = p("Cast", p("Squeeze", f"{attn}.query_slot", np.array([1])), to=onnx.TensorProto.FLOAT)
        ratio = p("Div", p("Log", p("Add", position, 1.0)), float(np.log(length)))
        return p("Mul", x, p("Unsqueeze", p("Max", ratio, 1.0), np.array([1])))

    return _context(
        draw, rework(f"{attn}.scores", change, wide=True), Name(r"logn|log-n|log n|position"), numbers=f"{length}"
    )


@kind("attention", "logn lost")
def no_logn(draw: Draw) -> Planted | None:
    if draw.spec.attention.logn_seq_length is None:
        return None
    return _context(draw, identity(f"{draw.path}.attn.query_logn"), Name(r"logn|log-n|log n"))
