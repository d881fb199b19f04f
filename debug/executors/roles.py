"""Roles of the inputs and outputs of a third party's decoder graph, recognized by name, dtype and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from debug.executors.name_map import AXES, NameMap
from debug.executors.step import CacheAxes
from refmodels.dtypes import DTYPE_TABLE, DTYPES
from refmodels.errors import LogitLockError
from refmodels.spec import ModelSpec

FLOATS = tuple(DTYPE_TABLE[name].onnx for name in DTYPES)
_STEP_INPUTS = {
    "cache_position": r"cache_?position",
    "use_cache_branch": r"use_cache",
    "position_ids": r"pos(ition)?(_?ids?|s|itions)?\b|position",
    "attention_mask": r"mask",
    "input_ids": r"^(input_?)?(ids?|tokens?)|^inputs?$|input_?ids|token_?ids",
}
"""Inputs by role, tried in this order, because cache_position must not be taken for position_ids."""
_CACHE_WORDS = r"past_?key_?values?|present_?key_?values?|key_?values?|kv_?cache"
_LAYOUTS = ("BHSD", "BSHD", "SBHD", "BHDS")
_NEEDS_ROWS = frozenset({"GroupQueryAttention"})
"""Ops that take a length instead of a mask: they cannot see padding on the left."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Names in the graph by role.

    Attributes:
        step: input_ids, attention_mask, position_ids, cache_position, use_cache_branch, as far as they exist.
        past, present: cache inputs and outputs by tap ("blocks.0.key"); empty for a graph without a cache.
        logits: the output.
        axes: the layout of cache tensors.
        one_row: rows must run one by one, without their padding.
    """

    step: Mapping[str, str]
    past: Mapping[str, str]
    present: Mapping[str, str]
    logits: str
    axes: CacheAxes
    one_row: bool


def read_roles(graph: ir.Graph, spec: ModelSpec, names: NameMap, path: Path) -> Roles:
    """Find the role of every input and output.

    Args:
        graph: a decoder's graph: token ids in, logits out, with or without key/value caches.
        names: roles given by the caller, which take precedence.
        path: the file, for errors.
    Raises:
        LogitLockError: a needed role is missing or an input or output is left over; all of them are listed.
    """
    inputs = [v for v in graph.inputs if v.name not in graph.initializers]
    outputs = list(graph.outputs)
    step, past = _named(names.inputs, inputs, path)
    cache = [v for v in inputs if v.name not in {*step.values(), *past.values()} and _is_cache(v)]
    others = [v for v in inputs if v.name not in {*step.values(), *past.values()} and v not in cache]
    past |= _cache_names(cache, spec)
    left_over = [v for v in cache if v.name not in past.values()]
    for value in others:
        role = _role(value)
        if role is None or role in step:
            left_over.append(value)
        else:
            step[role] = value.name or ""
    given, present = _named(names.outputs, outputs, path)
    logits = given.get("logits") or _logits(outputs, spec)
    cache = [v for v in outputs if v.name not in {logits, *present.values()} and _is_cache(v)]
    present |= _cache_names(cache, spec)
    if past and not present and len(cache) == len(past):
        # Exporters name outputs after nodes, but in the order of the inputs.
        order = [v.name for v in inputs if v.name in past.values()]
        tap_of = {name: tap for tap, name in past.items()}
        present = {tap_of[name]: v.name or "" for name, v in zip(order, cache, strict=True) if name is not None}
    _check(path, spec, step, past, present, logits, left_over, outputs)
    first = next((v for v in inputs if v.name in past.values()), None)
    ids = next(v for v in inputs if v.name == step["input_ids"])
    single = ids.shape is not None and ids.shape[0] == 1
    return Roles(
        step=step,
        past=past,
        present=present,
        logits=logits or "",
        axes=CacheAxes("BHSD" if first is None else _axes(first, spec, names.axes, path)),
        one_row=single or any(node.op_type in _NEEDS_ROWS for node in graph),
    )


def _named(given: Mapping[str, str], values: Sequence[ir.Value], path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The roles in the name map: those of the step, and cache tensors."""
    known = {v.name for v in values}
    for role, name in given.items():
        if name not in known:
            raise LogitLockError(
                f"the name map calls {name!r} the {role} of {path.name}, which has only {', '.join(map(str, known))}"
            )
    cache = {role: name for role, name in given.items() if role.startswith("blocks.")}
    return {role: name for role, name in given.items() if role not in cache}, cache


def _check(
    path: Path,
    spec: ModelSpec,
    step: Mapping[str, str],
    past: Mapping[str, str],
    present: Mapping[str, str],
    logits: str | None,
    left_over: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
) -> None:
    wanted = {tap.name for tap in spec.cache_taps}
    problems = []
    if "input_ids" not in step:
        problems.append("no input of token ids")
    if logits is None:
        problems.append(f"no output of logits with {spec.vocab_size} columns")
    for what, found in (("cache inputs", past), ("cache outputs", present)):
        if (past or what == "cache inputs") and found and set(found) != wanted:
            missing = sorted(wanted - set(found))
            problems.append(f"{len(found)} {what} for {spec.layers} layers, without {', '.join(missing[:3])}")
    if past and not present:
        names = ", ".join(str(v.name) for v in outputs[:8])
        problems.append(f"no cache outputs for the {len(past)} cache inputs among {names}")
    problems += [f"the input {v.name} of {_describe(v)} has no known role" for v in left_over]
    if problems:
        raise LogitLockError(
            f"{path} is not understood as a decoder: {'; '.join(problems)}. Say in the name map what they are, under "
            '"inputs" and "outputs" (roles: input_ids, attention_mask, position_ids, logits, blocks.N.key, '
            "blocks.N.value)"
        )


def _describe(value: ir.Value) -> str:
    shape = "unknown shape" if value.shape is None else f"shape {value.shape}"
    return f"{value.dtype.name.lower() if value.dtype else 'unknown dtype'} and {shape}"


def _is_cache(value: ir.Value) -> bool:
    return value.dtype in FLOATS and value.shape is not None and len(value.shape) == 4


def _role(value: ir.Value) -> str | None:
    if value.dtype in FLOATS and (value.shape is None or len(value.shape) > 2):
        return None
    name = (value.name or "").lower()
    return next((role for role, pattern in _STEP_INPUTS.items() if re.search(pattern, name)), None)


def _logits(outputs: Sequence[ir.Value], spec: ModelSpec) -> str | None:
    by_name = [v for v in outputs if "logits" in (v.name or "").lower()]
    by_shape = [v for v in outputs if v.shape is not None and len(v.shape) == 3 and v.shape[2] == spec.vocab_size]
    found = by_name or by_shape
    return found[0].name if len(found) == 1 else None


def _cache_names(values: Sequence[ir.Value], spec: ModelSpec) -> dict[str, str]:
    """Cache tensors by tap, if their names say it: a word for key or value, and a layer number."""
    words = [re.sub(_CACHE_WORDS, "", (v.name or "").lower()) for v in values]
    parts = [re.search(r"(?<![a-z])(key|value|k|v)s?(?![a-z])", word) for word in words]
    numbers = [re.findall(r"\d+", word) for word in words]
    columns = list(zip(*numbers, strict=False))
    layers = {str(i) for i in range(spec.layers)}
    column = next((c for c in columns if set(c) == layers), None)
    if column is None or not all(parts):
        return {}
    return {
        f"blocks.{layer}.{'key' if part[1][0] == 'k' else 'value'}": value.name or ""
        for value, part, layer in zip(values, parts, column, strict=True)
        if part is not None
    }


def _axes(value: ir.Value, spec: ModelSpec, axes: Mapping[str, str], path: Path) -> str:
    """The layout that fits the sizes of a cache input and the axes that the name map states; if several fit, the one
    with the most of them, then the usual one."""
    assert value.shape is not None
    dims = [dim if isinstance(dim, int) else str(dim.value or "") for dim in value.shape]
    if not axes and all(isinstance(dim, str) for dim in dims):
        return _LAYOUTS[0]
    fixed = {"H": spec.attention.kv_heads, "D": spec.attention.head_dim}

    def known(axis: str, dim: int | str) -> int | None:
        """1: the axis is this one; 0: it may be; None: it is another."""
        if isinstance(dim, int):
            return 1 if dim == fixed.get(axis, 1 if axis == "B" else None) else None
        if dim in axes:
            return 1 if axes[dim] == AXES[axis] else None
        return 0 if axis == "S" or not re.search("seq|past", dim) else None

    found = []
    for order in _LAYOUTS:
        fits = [known(axis, dim) for axis, dim in zip(order, dims, strict=True)]
        if None not in fits:
            found.append((-sum(fit or 0 for fit in fits), _LAYOUTS.index(order), order))
    if found:
        return min(found)[2]
    raise LogitLockError(
        f"{path}: the cache input {value.name} of {_describe(value)} is not understood; expected the axes batch, "
        f"{fixed['H']} key heads, any number of slots and a head_dim of {fixed['D']} (the name map can say under "
        f'"axes" what a symbolic size is: {{"its name": "head_dim"}})'
    )
