"""Candidates for taps: every float value that a graph computes on a short prompt and whose shape fits a tap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from debug.capture.prompts import random_prompts
from debug.executors.name_map import Source
from debug.executors.onnx_file import Group, OnnxFileEngine
from debug.executors.roles import FLOATS
from debug.executors.step import ForeignStep, regroup_heads
from refmodels.spec import ModelSpec
from trt_runtime.onnxruntime.graph_edits import infer_types

_CHUNK = 1024
"""Number of values captured at a time; the graph is opened again for each chunk."""
_LENGTHS = (13, 17, 19, 23, 29)
"""Numbers of prompt tokens to try: one of them equals no other size of the model, so that the token axis is known."""
_LAYOUTS: Mapping[int, Sequence[tuple[int, ...]]] = {
    3: ((0, 1, 2), (1, 0, 2)),
    4: ((0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (0, 3, 1, 2)),
}
"""Permutations that bring batch and tokens to the front, by rank."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to read a tensor [batch * tokens, width] from the graph; `nodes`: the nodes that compute its values."""

    source: Source
    rows: Tensor
    nodes: tuple[int, ...]

    def cut(self, start: int, stop: int) -> Candidate:
        source = replace(self.source, columns=[start, stop])
        return replace(self, source=source, rows=self.rows[:, start:stop])

    def regrouped(self, heads: int) -> Candidate:
        return replace(self, source=replace(self.source, heads=heads), rows=regroup_heads(self.rows, heads))


def joined(parts: Sequence[Candidate]) -> Candidate:
    return Candidate(
        source=Source(concat=[part.source for part in parts]),
        rows=torch.cat([part.rows for part in parts], 1),
        nodes=tuple(node for part in parts for node in part.nodes),
    )


@dataclass(frozen=True, kw_only=True)
class Captured:
    """The graph's values: candidates by width, and for each node the nodes that it depends on, as bits."""

    ids: Tensor
    by_width: Mapping[int, list[Candidate]]
    logits: Tensor
    before: Sequence[int]


def capture(engine: OnnxFileEngine, seed: int) -> Captured:
    spec = engine.spec
    graph = infer_types(engine.load_graph()).graph
    taken = {2, *_widths(spec), spec.attention.head_dim, spec.attention.heads, spec.attention.kv_heads}
    tokens = next(n for n in _LENGTHS if n not in taken)
    batch = 1 if engine.roles.one_row else 2
    ids = random_prompts(spec.vocab_size, [tokens] * batch, seed).ids
    nodes = {v.name: i for i, node in enumerate(graph) for v in node.outputs}
    wanted = [v.name for node in graph for v in node.outputs if v.name and plausible(v)]
    group = Group(torch.arange(batch), torch.arange(0), torch.arange(tokens))
    by_width: dict[int, list[Candidate]] = {width: [] for width in _widths(spec)}
    logits = torch.empty(0)
    # One run at least, for the logits.
    for start in range(0, max(len(wanted), 1), _CHUNK):
        chunk = wanted[start : start + _CHUNK]
        cache = engine.new_cache(batch=batch, capacity=tokens)
        foreign = ForeignStep(cache.next_step(ids), cache, None)
        engine.remember(foreign)
        outputs = engine.execute(engine.session(chunk), foreign, group)
        logits = engine.logits_in(outputs, batch, tokens).double()
        for name in chunk:
            for source, rows in _layouts(name, outputs[name], batch, tokens, by_width):
                by_width[rows.shape[1]].append(Candidate(source=source, rows=rows, nodes=(nodes[name],)))
    return Captured(ids=ids, by_width=by_width, logits=logits, before=_before(graph))


def _widths(spec: ModelSpec) -> set[int]:
    a = spec.attention
    query, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    return {spec.hidden_size, spec.qkv_width, query, kv, spec.mlp.width, 2 * spec.mlp.width}


def plausible(value: ir.Value) -> bool:
    if value.dtype is not None and value.dtype not in FLOATS:
        return False
    if value.shape is None:
        return True
    # Constants folded by hand have no symbolic size.
    return len(value.shape) in (2, 3, 4) and not all(isinstance(dim, int) for dim in value.shape)


def _layouts(
    name: str, value: Tensor, batch: int, tokens: int, widths: Mapping[int, object]
) -> list[tuple[Source, Tensor]]:
    """Every way to read a value as [batch * tokens, width] with a width that a tap may have."""
    if not value.is_floating_point():
        return []
    found = []
    if value.ndim == 2 and value.shape[0] == batch * tokens and value.shape[1] in widths:
        found.append((Source(value=name), value.float()))
    for order in _LAYOUTS.get(value.ndim, ()):
        moved = value.permute(order)
        if moved.shape[:2] == (batch, tokens) and moved[0, 0].numel() in widths:
            plain = order == tuple(range(value.ndim))
            source = Source(value=name, transpose=[] if plain else list(order))
            found.append((source, moved.reshape(batch * tokens, -1).float()))
    return found


def _before(graph: ir.Graph) -> list[int]:
    """For each node the set of nodes that it depends on, itself included, as bits of a number."""
    index = {v: i for i, node in enumerate(graph) for v in node.outputs}
    before: list[int] = []
    for i, node in enumerate(graph):
        bits = 1 << i
        for value in node.inputs:
            if value in index:
                bits |= before[index[value]]
        before.append(bits)
    return before
