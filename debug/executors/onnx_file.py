"""Any decoder in an ONNX file as an executor, on ONNX Runtime: taps through a name map, the cache from the caller's."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime as ort
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from debug.executors.name_map import NameMap, check_width, read_name_map
from debug.executors.roles import FLOATS, read_roles
from debug.executors.step import ForeignStep
from refmodels.cache import KVCache, StepInputs
from refmodels.dtypes import BY_ONNX, BY_ONNXRUNTIME, BY_TORCH, DTYPE_TABLE, torch_name
from refmodels.errors import LogitLockError
from refmodels.files import check_regular
from refmodels.recorder import Recorder
from refmodels.spec import ModelSpec
from refmodels.taps import is_cache_tap, tap_names
from trt_runtime.engine import Engine
from trt_runtime.onnxruntime.errors import cannot_read, cannot_run, graph_errors, session_options
from trt_runtime.onnxruntime.graph_edits import inline_and_type, promote
from trt_runtime.onnxruntime.half_precision import compute_in_float


@dataclass(frozen=True)
class Group:
    """Rows that run together: indices of the rows, of the past slots and of the new tokens (all int64)."""

    rows: Tensor
    kept: Tensor
    new: Tensor


class OnnxFileEngine(Engine):
    """A decoder from another exporter (optimum, onnxruntime-genai, torch.onnx, by hand).

    Inputs and outputs are recognized by names and shapes.  A graph without cache inputs runs on the whole sequence in
    every step.  Graphs for a batch of one, or with attention that takes a length instead of a mask
    (GroupQueryAttention), run row by row without padding.  The caller's cache is the state, except for the token ids,
    which a graph without a cache needs again.

    Args:
        path: the file; its external data is beside it.
        spec: architecture facts; they must be the model's.
        names: a name map or its file; None: only the cache and the logits are tapped.
        emulate_rounding: fp16 graphs: round every node's result to fp16 (see `OnnxRuntimeEngine`); always so for bf16.
        threads: number of ONNX Runtime's threads; None: as many as torch has.
    Raises:
        LogitLockError: the file is not a readable ONNX file, inputs or outputs are not understood (all are listed), a
            name is not in the graph, or ONNX Runtime cannot run the graph.
    """

    def __init__(
        self,
        path: Path | str,
        spec: ModelSpec,
        names: NameMap | Path | None = None,
        *,
        emulate_rounding: bool = False,
        threads: int | None = None,
    ) -> None:
        self.path, self.spec, self.max_positions = Path(path), spec, spec.max_positions
        self.names = names if isinstance(names, NameMap) else NameMap() if names is None else read_name_map(names, spec)
        graph = self.load_graph().graph
        self.roles = read_roles(graph, spec, self.names, self.path)
        known = {v.name for node in graph for v in node.outputs}
        for tap, source in self.names.taps.items():
            for name in source.values():
                if name not in known:
                    raise LogitLockError(f"{self.path} has no value {name!r}, which the name map gives for {tap}")
        self.dtype, self.device = _working_dtype(graph, list(self.roles.past.values())), torch.device("cpu")
        self.emulate_rounding = self.dtype == torch.bfloat16 or (emulate_rounding and self.dtype == torch.float16)
        self.threads = torch.get_num_threads() if threads is None else threads
        shown = {"logits", *self.names.taps, *self.roles.present}
        self.tap_names = tuple(name for name in tap_names(spec) if name in shown)
        self.arithmetic = self._describe()
        self._history: weakref.WeakKeyDictionary[KVCache, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
        self._sessions: dict[bool, ort.InferenceSession] = {}
        self._session(tapped=False)

    def _describe(self) -> str:
        dtype = torch_name(self.dtype)
        text = f"{self.path.name} on ONNX Runtime on the CPU, {dtype}"
        if self.emulate_rounding:
            text += f", every node computed in float32 and rounded to {dtype}"
        elif self.dtype == torch.float16:
            text += " (computed in float32 between some nodes)"
        if not self.roles.past:
            text += "; without a cache: the whole sequence in every step"
        return text + ("; row by row without padding" if self.roles.one_row else "")

    def load_graph(self) -> ir.Model:
        """The model with function bodies inlined; external weights stay on disk."""
        check_regular(self.path)
        with graph_errors(cannot_read(self.path)):
            model = passes.InlinePass()(ir.load(self.path)).model
        # onnxruntime-genai names the slots of its fp16 attention "sequence_length", as the new tokens; a copy of that
        # shape on another value would make ONNX Runtime share buffers of unequal sizes.
        for value in (v for node in model.graph for v in node.outputs if not v.is_graph_output()):
            value.shape = None
        return model

    def session(self, values: Iterable[str]) -> ort.InferenceSession:
        """A session that also outputs these values."""
        model = self.load_graph()
        options = session_options(self.path.resolve().parent, self.threads)
        with graph_errors(cannot_run(self.path)):
            if self.emulate_rounding:
                model = inline_and_type(model)
                compute_in_float(model, ir.DataType(BY_TORCH[self.dtype].onnx), rounded=True)
            promote(model, values)
            data = ir.to_proto(model).SerializeToString()
            return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def _session(self, *, tapped: bool) -> ort.InferenceSession:
        if tapped not in self._sessions:
            self._sessions[tapped] = self.session(self.names.values() if tapped else ())
        return self._sessions[tapped]

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        foreign = ForeignStep(step, cache, recorder)
        self.remember(foreign)
        session = self._session(tapped=recorder is not None)
        results: dict[str, Tensor] = {}
        for group in self._groups(foreign):
            for tap, tensor in self._tensors(self.execute(session, foreign, group), foreign, group, recorder).items():
                whole = results.setdefault(tap, tensor.new_zeros(*step.input_ids.shape, tensor.shape[-1]))
                whole[group.rows[:, None], group.new] = tensor
        logits = foreign.logits_of(results.pop("logits"))
        for tap in self.tap_names:
            if is_cache_tap(tap) and tap in results:
                foreign.write(tap, results[tap].unflatten(-1, (self.spec.attention.kv_heads, -1)).transpose(1, 2))
            elif tap in results:
                foreign.deliver(tap, foreign.logits_of(results[tap]) if tap == "final_norm" else results[tap])
        foreign.deliver("logits", logits)
        cache.advance(step)
        return logits

    def _groups(self, foreign: ForeignStep) -> list[Group]:
        step = foreign.step
        batch, tokens = step.input_ids.shape
        if not self.roles.one_row:
            foreign.check_appended(self.path.name)
            return [Group(torch.arange(batch), torch.arange(foreign.past_slots), torch.arange(tokens))]
        groups = []
        for row in range(batch):
            # Padding is dropped, unless the model counts it.
            padded = self.spec.position_origin == "slot"
            new = torch.arange(tokens) if padded else step.new_mask[row].nonzero()[:, 0]
            kept = foreign.cache.mask[row, : foreign.past_slots].nonzero()[:, 0]
            if padded:
                kept = torch.arange(int(step.cache_lengths[row]))
            if len(new):
                groups.append(Group(torch.tensor([row]), kept, new))
        return groups

    def execute(self, session: ort.InferenceSession, foreign: ForeignStep, group: Group) -> dict[str, Tensor]:
        """All outputs of the graph for some rows of a step, by name."""
        step, roles = foreign.step, self.roles
        rows = group.rows[:, None]
        slots = torch.cat((group.kept, foreign.past_slots + group.new))
        ids = step.input_ids[rows, group.new]
        positions = None if step.position_ids is None else step.position_ids[rows, group.new]
        if not roles.past:
            old_ids, old_positions = self._history[foreign.cache]
            ids = torch.cat((old_ids[rows, group.kept], ids), 1)
            positions = None if positions is None else torch.cat((old_positions[rows, group.kept], positions), 1)
        first = len(group.kept) if roles.past else 0
        inputs: dict[str, Tensor | None] = {
            "input_ids": ids,
            "attention_mask": foreign.appended_mask()[rows, slots],
            "position_ids": positions,
            "cache_position": torch.arange(first, first + ids.shape[1]),
            "use_cache_branch": torch.tensor([bool(first)]),
        }
        named = {name: inputs[role] for role, name in roles.step.items()}
        buffers = foreign.cache.by_tap()
        for tap, name in roles.past.items():
            named[name] = roles.axes.from_ours(buffers[tap][group.rows][:, :, group.kept])
        feeds = {i.name: _ort_value(named.get(i.name), i, self.path) for i in session.get_inputs()}
        names = [o.name for o in session.get_outputs()]
        with graph_errors(cannot_run(self.path)):
            values = session.run_with_ort_values(names, feeds)
        return {name: _tensor(value) for name, value in zip(names, values, strict=True)}

    def _tensors(
        self, outputs: Mapping[str, Tensor], foreign: ForeignStep, group: Group, recorder: Recorder | None
    ) -> dict[str, Tensor]:
        """[rows, new tokens, width] of every tap."""
        rows, new = len(group.rows), len(group.new)
        tokens = new if self.roles.past else len(group.kept) + new
        logits = self.logits_in(outputs, rows, tokens)
        if logits.shape[1] == 1 < tokens:
            if bool((foreign.step.logit_index[group.rows] != group.new[-1]).any()):
                raise LogitLockError(
                    f"{self.path} gives logits of the last token only; a comparison needs them for all tokens"
                )
            logits = logits.expand(-1, tokens, -1)
        found = {"logits": logits[:, -new:]}
        for tap, name in self.roles.present.items():
            present = self.roles.axes.to_ours(outputs[name])
            if present.shape[2] not in (new, len(group.kept) + new):
                raise LogitLockError(
                    f"{self.path}: the cache output {name} has {present.shape[2]} slots after {len(group.kept)} slots "
                    f"and {new} tokens; it must hold only the new ones, or all"
                )
            found[tap] = present[:, :, -new:].transpose(1, 2).flatten(2)
        if recorder is not None:
            for tap, source in self.names.taps.items():
                if tap not in found:
                    found[tap] = check_width(self.spec, tap, source.read(outputs, rows, tokens))[:, -new:]
        return found

    def logits_in(self, outputs: Mapping[str, Tensor], rows: int, tokens: int) -> Tensor:
        """[rows, tokens or 1, vocab]: the logits of every token or of the last one.

        Raises:
            LogitLockError: the output has another shape.
        """
        found, vocab = outputs[self.roles.logits], self.spec.vocab_size
        if found.shape[-1:] != (vocab,) or found.numel() not in (rows * tokens * vocab, rows * vocab):
            raise LogitLockError(
                f"{self.path}: the output {self.roles.logits} has the shape {list(found.shape)} for {rows} rows of "
                f"{tokens} tokens; logits have the shape {[rows, tokens, vocab]}"
            )
        return found.reshape(rows, -1, vocab)

    def remember(self, foreign: ForeignStep) -> None:
        """Token ids and positions by slot, for a graph without a cache."""
        step, cache = foreign.step, foreign.cache
        if self.roles.past:
            return
        if cache not in self._history:
            empty = torch.zeros(cache.batch, cache.capacity, dtype=torch.int64)
            self._history[cache] = (empty, empty.clone())
        slots = step.cache_lengths[:, None] + torch.arange(step.input_ids.shape[1])
        for known, new in zip(self._history[cache], (step.input_ids, step.position_ids), strict=True):
            if new is not None:
                known.scatter_(1, slots, new)


def _working_dtype(graph: ir.Graph, cache: list[str]) -> torch.dtype:
    """The dtype of the cache; without a cache, the dtype of most weights."""
    sizes: dict[ir.DataType, int] = {}
    for value in graph.inputs:
        if value.name in cache and value.dtype is not None:
            return BY_ONNX[value.dtype].torch
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in FLOATS:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return BY_ONNX[max(sizes, key=lambda dtype: sizes[dtype])].torch if sizes else torch.float32


def _ort_value(tensor: Tensor | None, argument: Any, path: Path) -> ort.OrtValue:
    if tensor is None:
        raise LogitLockError(f"{path} needs {argument.name}, which this model does not have")
    tensor = tensor.to(BY_ONNXRUNTIME[argument.type].torch).contiguous()
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.uint16).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, DTYPE_TABLE["bf16"].onnx)
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _tensor(value: ort.OrtValue) -> Tensor:
    # numpy has no bfloat16.
    tensor: Tensor = from_dlpack(value) if "bfloat16" in value.data_type() else torch.from_numpy(value.numpy())
    return tensor
