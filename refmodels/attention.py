"""The inputs of attention, said once: one table of what varies by step, one type for what is fixed in a layer.

`ATTENTION_INPUTS` is read off the fields of `AttentionInputs`.  From it are made: the schemas of the torch operators
(`torch_schema`), the inputs and attributes of the ONNX node and of its function body (`node_inputs`,
`node_attributes`), the inputs of the TensorRT plugin, what the hosts hand to the kernels, the arguments that the
debugger changes, and the table in docs/plugins.md.  A new input is a new field here, and its mathematics in
`refmodels/ops.py` and `export/graph/attention_body.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from torch import Tensor

from refmodels.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class AttentionInput:
    """One row of `ATTENTION_INPUTS`.

    Attributes:
        name: the field of `AttentionInputs` and the argument of the torch operator.
        optional: it may be None.
        axes: its shape, a name or a product of names for each axis.
        dtype: "working" is that of qkv and "cache" that of the caches; the "table" inputs share one float dtype.
        meaning: what it does.
        present: whether models of a spec have it, and `when`: the same in words.
        node: its name in an ONNX graph, if that is another.
        attribute: the node's attribute that is not 0 where an optional input is given.
        updated: it is an output as well, and the operator writes it in place.
        late: callers of the torch operator may leave it out, so it comes after the facts in the schema.  A new input
            must be late and the last field, so that existing calls keep their meaning.
        tensorrt: a TensorRT plan can have it.
    """

    name: str = ""
    optional: bool = False
    axes: tuple[str, ...]
    dtype: Literal["working", "cache", "int64", "bool", "table", "fp32"]
    meaning: str
    present: Callable[[ModelSpec], bool] = lambda spec: True
    when: str = "always"
    node: str = ""
    attribute: str | None = None
    updated: bool = False
    late: bool = False
    tensorrt: bool = True


_CACHE = ("batch", "kv_heads", "capacity", "head_dim")
_ROTATION = partial(
    AttentionInput,
    axes=("batch", "tokens", "rotary_dim / 2"),
    dtype="table",
    present=lambda spec: spec.rope is not None,
    when="the model has rotary embedding",
    attribute="rotary_dim",
)
_CACHE_SCALE = partial(
    AttentionInput,
    axes=("kv_heads",),
    dtype="working",
    present=lambda spec: spec.cache_code is not None,
    when="the cache is quantized",
    late=True,
    tensorrt=False,
)


class AttentionInputs(NamedTuple):
    """The inputs that vary by step: the tensors of `refmodels.ops.cached_attention`, described by annotations."""

    qkv: Annotated[
        Tensor,
        AttentionInput(
            axes=("batch", "tokens", "(heads + 2 * kv_heads) * head_dim"),
            dtype="working",
            meaning="the fused projection, rows [query | key | value]",
        ),
    ]
    key_cache: Annotated[
        Tensor,
        AttentionInput(
            axes=_CACHE,
            dtype="cache",
            meaning="rotated keys, updated in place: the dtype of qkv, or int8 or float8_e4m3fn with `key_scale`",
            node="past_key",
            updated=True,
        ),
    ]
    value_cache: Annotated[
        Tensor,
        AttentionInput(
            axes=_CACHE,
            dtype="cache",
            meaning="values, updated in place: the dtype of `key_cache`, with `value_scale` if it is quantized",
            node="past_value",
            updated=True,
        ),
    ]
    cache_lengths: Annotated[
        Tensor,
        AttentionInput(
            axes=("batch",),
            dtype="int64",
            meaning="token s of row b goes to slot cache_lengths[b] + s, which must be < capacity",
        ),
    ]
    visible: Annotated[
        Tensor,
        AttentionInput(
            axes=("batch", "slots"),
            dtype="bool",
            meaning="False hides a slot (padding); slots >= max(cache_lengths) + tokens",
        ),
    ]
    cos: Annotated[
        Tensor | None,
        _ROTATION(
            meaning="cosines that rotate the first rotary_dim elements of query and key, in the dtype of the table"
        ),
    ] = None
    sin: Annotated[
        Tensor | None,
        _ROTATION(meaning="sines of the same rotation"),
    ] = None
    query_scale: Annotated[
        Tensor | None,
        AttentionInput(
            axes=("batch", "tokens"),
            dtype="table",
            meaning="multiplies the rotated query, never the key",
            present=lambda spec: spec.attention.logn_seq_length is not None,
            when="the model scales queries by logn (Qwen)",
            attribute="has_query_scale",
        ),
    ] = None
    alibi_slopes: Annotated[
        Tensor | None,
        AttentionInput(
            axes=("heads",),
            dtype="fp32",
            meaning="adds slope * (key slot - query slot) to the scores",
            present=lambda spec: spec.position == "alibi",
            when="the model has ALiBi",
            attribute="has_alibi",
        ),
    ] = None
    key_scale: Annotated[
        Tensor | None,
        _CACHE_SCALE(meaning="scales of the quantized keys: every query, also of the same step, sees code * scale"),
    ] = None
    value_scale: Annotated[
        Tensor | None,
        _CACHE_SCALE(meaning="scales of the quantized values"),
    ] = None


@dataclass(frozen=True)
class AttentionFacts:
    """The facts that are fixed in a layer.

    Attributes:
        heads, kv_heads: query head h reads kv head h // (heads // kv_heads).
        scale: factor on query . key.
        rotary_interleaved: rotate pairs (0,1),(2,3).. instead of (i, i + rotary_dim/2).
        window: keys visible to a query, self included; 0 for all.
        arithmetic: "exact" keeps everything from rotation to context in fp32 (fp64 for fp64) and rounds once, and the
            cached key once.  The others repeat an upstream implementation in half precision: "sdpa"; "eager_multiply" /
            "eager_divide" (score rounded, then scaled by a product / quotient; softmax in the working dtype), the same
            with "_float32" (softmax in fp32), and "eager_upcast" (scores and softmax in fp32).  There ALiBi has
            upstream's absolute form, slope * key slot.
    """

    heads: int
    kv_heads: int
    scale: float
    rotary_interleaved: bool = False
    window: int = 0
    arithmetic: str = "exact"

    def __fx_create_arg__(self, tracer: Any) -> AttentionFacts:
        """In traces it is a constant; torch.fx would make a node that constructs it."""
        return self


Positions = Mapping[str, Any]
"""Where the tokens of a step are: the inputs of attention that all layers share, by name: tensors, or None."""


def _rows() -> Iterator[AttentionInput]:
    for name, hint in get_type_hints(AttentionInputs, include_extras=True).items():
        (row,) = hint.__metadata__
        optional = name in AttentionInputs._field_defaults
        yield replace(row, name=name, node=row.node or name, optional=optional)


ATTENTION_INPUTS: tuple[AttentionInput, ...] = tuple(_rows())
"""All inputs in order; those that a model does not have are left out of its graphs."""

TENSORRT_INPUTS = tuple(row for row in ATTENTION_INPUTS if row.tensorrt)

_FACTS = tuple(field.name for field in fields(AttentionFacts))


# The torch operators


def torch_arguments(inputs: Sequence[AttentionInput] = ATTENTION_INPUTS) -> tuple[str, ...]:
    """Names of the arguments of an operator with these inputs, in order."""
    early, late = ([row.name for row in inputs if row.late == late] for late in (False, True))
    return (*early, *_FACTS, *late)


def torch_schema(name: str, inputs: Sequence[AttentionInput] = ATTENTION_INPUTS, *, functional: bool = False) -> str:
    """The schema of an operator that returns the context; a functional one returns the caches as well, updated."""
    alias = iter("abcdefgh")
    written = {}
    for row in inputs:
        kind = f"Tensor({next(alias)}!)" if row.updated and not functional else "Tensor"
        written[row.name] = f"{kind}{'?' * row.optional} {row.name}{'=None' * row.late}"
    for field in fields(AttentionFacts):
        written[field.name] = f"{field.type} {field.name}"
    result = f"({', '.join(['Tensor'] * (1 + sum(row.updated for row in inputs)))})" if functional else "Tensor"
    return f"{name}({', '.join(written[argument] for argument in torch_arguments(inputs))}) -> {result}"


TENSORRT_ARGUMENTS = torch_arguments(TENSORRT_INPUTS)
_EARLY = sum(not row.late for row in ATTENTION_INPUTS)


def to_torch(inputs: AttentionInputs, facts: AttentionFacts) -> tuple[Any, ...]:
    """The arguments of `torch.ops.refmodels.cached_attention`."""
    return (*inputs[:_EARLY], *(getattr(facts, name) for name in _FACTS), *inputs[_EARLY:])


def from_torch(*arguments: Any) -> tuple[AttentionInputs, AttentionFacts]:
    """The arguments of `to_torch`; late ones may be missing."""
    end = _EARLY + len(_FACTS)
    return AttentionInputs(*arguments[:_EARLY], *arguments[end:]), AttentionFacts(*arguments[_EARLY:end])


# The ONNX node and the TensorRT plugin


def inputs_of(spec: ModelSpec) -> tuple[AttentionInput, ...]:
    """The attention inputs that a model of this spec has, in the order of `AttentionInputs`."""
    return tuple(row for row in ATTENTION_INPUTS if row.present(spec))


def node_inputs(spec: ModelSpec) -> tuple[str, ...]:
    """Inputs of a CachedAttention node, in order."""
    return tuple(row.node for row in inputs_of(spec))


NODE_ATTRIBUTES: dict[str, type[int] | type[float]] = {
    "heads": int,
    "kv_heads": int,
    "scale": float,
    "rotary_dim": int,
    "rotary_interleaved": int,
    "window": int,
    **{row.attribute: int for row in ATTENTION_INPUTS if row.attribute not in (None, "rotary_dim")},
}  # fmt: skip
"""Attributes of a CachedAttention node, in order, beside those that name the plugin; flags are 0 or 1."""


def node_attributes(facts: AttentionFacts, given: Collection[str], *, rotary_dim: int) -> dict[str, int | float]:
    """The values of `NODE_ATTRIBUTES` of a node with the inputs `given`, names of `AttentionInputs`."""
    flags = {row.attribute: row.name in given for row in ATTENTION_INPUTS if row.attribute is not None}
    values = {**flags, **vars(facts), "rotary_dim": rotary_dim}
    return {name: kind(values[name]) for name, kind in NODE_ATTRIBUTES.items()}


def plugin_inputs(attributes: Any) -> tuple[AttentionInput, ...]:
    """Inputs of the plugin of a node with these attributes (an object with the fields `NODE_ATTRIBUTES`)."""
    return tuple(row for row in TENSORRT_INPUTS if row.attribute is None or getattr(attributes, row.attribute))
