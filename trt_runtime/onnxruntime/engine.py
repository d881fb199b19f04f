"""The CPU engine: a bundle's graph on ONNX Runtime, the caches bound in place.

The memory of the cache's torch tensors is bound both as the graph's `past.*` inputs and as the cache outputs; the
graph writes it by TensorScatter, which ONNX Runtime does in place when both are one buffer.  A step therefore neither
copies nor allocates anything of the size of the cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime as ort
import torch
from torch import Tensor

from refmodels.cache import KVCache, StepInputs
from refmodels.dtypes import BY_ONNXRUNTIME, BY_TORCH, DTYPE_TABLE, DTYPES, torch_name
from refmodels.errors import LogitLockError
from refmodels.quantization.formats import CODE_TYPES
from refmodels.recorder import Recorder
from refmodels.spec import ModelSpec
from refmodels.taps import is_cache_tap, tap_names
from trt_runtime.bundle import Bundle, read_bundle
from trt_runtime.engine import Engine
from trt_runtime.onnxruntime.before_opset_24 import has_tensor_scatter, without_tensor_scatter
from trt_runtime.onnxruntime.errors import cannot_run, graph_errors, session_options
from trt_runtime.onnxruntime.graph_edits import cut_at, inline_and_type, load_graph, promote
from trt_runtime.onnxruntime.half_precision import HALF_TYPES, compute_in_float
from trt_runtime.onnxruntime.integer_kernels import SESSION_OPTIONS, cache_as_bytes, use_integer_kernels

_FP8, _BYTES = DTYPE_TABLE["fp8"], DTYPE_TABLE["uint8"]
"""fp8 caches are bound as bytes: ONNX Runtime's kernels do not move fp8 (see `cache_as_bytes`)."""
_BOTH_SESSIONS_BYTES = 2 << 30
"""Maximum size of the weights, in bytes, at which the tapped and the untapped session stay loaded together."""
_WRONG = {"MatMulIntegerToFloatFusion"}
"""Optimizations of ONNX Runtime 1.31 that change results: this one takes a scale for each token for one of all."""
_FED = "fed."
_Mode = Literal["plain", "tapped", "cut"]


@dataclass(frozen=True, eq=False)
class _Binding:
    """The buffers that a session has bound for one cache."""

    io: Any
    pointers: tuple[int, ...]


class _Session:
    """One ONNX Runtime session and its bindings, one per cache."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.step_inputs = [i.name for i in session.get_inputs() if not i.name.startswith("past.")]
        self.outputs = {o.name: _torch_type(o.type) for o in session.get_outputs()}
        self._bindings: weakref.WeakKeyDictionary[KVCache, _Binding] = weakref.WeakKeyDictionary()

    def binding(self, cache: KVCache) -> Any:
        """The IOBinding with the cache's buffers as inputs and outputs; made anew when the buffers are others."""
        buffers = (*cache.key, *cache.value)
        pointers = tuple(t.data_ptr() for t in buffers)
        known = self._bindings.get(cache)
        if known is not None and known.pointers == pointers:
            return known.io
        io = self.session.io_binding()
        for name, tensor in cache.by_tap().items():
            bind(io.bind_input, f"past.{name}", tensor)
            bind(io.bind_output, name, tensor)
        self._bindings[cache] = _Binding(io, pointers)
        return io


def bind(binder: Any, name: str, tensor: Tensor) -> None:
    """Bind the memory of a contiguous CPU tensor; the tensor must outlive the run."""
    dtype = BY_TORCH[tensor.dtype]
    number = (_BYTES if dtype == _FP8 else dtype).onnx
    binder(name, "cpu", 0, number, tuple(tensor.shape), tensor.data_ptr())


def _torch_type(spelled: str) -> torch.dtype:
    dtype = BY_ONNXRUNTIME[spelled]
    return (_FP8 if dtype == _BYTES else dtype).torch


class OnnxRuntimeEngine(Engine):
    """A bundle on the CPU.

    Args:
        bundle: a bundle or its directory.
        emulate_rounding: for fp16 and bf16 bundles: round every node's result to the half type, so that rounding and
            overflow are those of an engine that really computes in it.  Without it only the caches are rounded, which
            is faster.  fp32 bundles are the same in both.
        threads: of ONNX Runtime; default: torch's.
    Raises:
        LogitLockError: as `read_bundle`; the graph does not fit its bundle.json.
    """

    def __init__(
        self, bundle: Bundle | Path | str, *, emulate_rounding: bool = False, threads: int | None = None
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        info = self.bundle.info
        self.spec, self.max_positions = self.bundle.spec, info.max_positions
        self.dtype, self.device = DTYPES[info.precision], torch.device("cpu")
        self.tap_names = tuple(name for name in tap_names(self.spec) if name in info.taps)
        self.emulate_rounding = emulate_rounding and info.precision != "fp32"
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise LogitLockError(f"threads must be at least 1, got {threads}")
        self.arithmetic = _describe(self.dtype, self.spec, emulated=self.emulate_rounding)
        self.keep_both_sessions = sum(file.bytes for file in info.files.values()) <= _BOTH_SESSIONS_BYTES
        self._tap_of = {value: tap for tap, value in info.taps.items()}
        self._sessions: dict[_Mode, _Session] = {}
        self._graph: ir.Model | None = None
        self._session("plain")

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        outputs = self._run("plain" if recorder is None else "tapped", step, cache, {})
        if recorder is not None:
            self._deliver(recorder, outputs, step, cache)
        return outputs["logits"]

    def run_cut(self, step: StepInputs, cache: KVCache, fed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run every module by itself: the graph is cut at every tap but the cache's, and `fed` is its input there.

        Args:
            step, cache: as for `run`; the cache is updated.
            fed: for every tap that is not a cache tensor, [batch, tokens, width].
        Returns: the results of the modules, by tap.
        """
        cut = {f"{_FED}{self.bundle.info.taps[tap]}": fed[tap] for tap in self.tap_names if not is_cache_tap(tap)}
        outputs = self._run("cut", step, cache, cut)
        return {self._tap_of.get(name, name): tensor for name, tensor in outputs.items()}

    def _run(self, mode: _Mode, step: StepInputs, cache: KVCache, fed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session = self._session(mode)
        self._check_cache(cache)
        io = session.binding(cache)
        # Held until the run is over: ONNX Runtime knows only their addresses.
        inputs = {name: tensor.contiguous() for name, tensor in {**step.tensors(), **fed}.items()}
        for name in session.step_inputs:
            bind(io.bind_input, name, inputs[name])
        batch, tokens = step.input_ids.shape
        outputs: dict[str, Tensor] = {}
        for name, dtype in session.outputs.items():
            tap = self._tap_of.get(name, name)
            if not is_cache_tap(tap):
                length = step.logit_index.shape[1] if tap in ("logits", "final_norm") else tokens
                outputs[name] = torch.empty(batch, length, self.spec.taps[tap].width, dtype=dtype)
                bind(io.bind_output, name, outputs[name])
        with graph_errors(cannot_run(self.bundle.model_path)):
            session.session.run_with_iobinding(io)
        cache.advance(step)
        return outputs

    def _deliver(self, recorder: Recorder, outputs: dict[str, Tensor], step: StepInputs, cache: KVCache) -> None:
        recorder.live_slots = step.attention_mask.shape[1]
        caches = cache.by_tap()
        for name in self.tap_names:
            tensor = caches[name] if name in caches else outputs[self.bundle.info.taps[name]]
            if recorder(name, tensor) is not tensor:
                raise LogitLockError(f"the recorder substitutes {name}, which only the reference can do")

    def _check_cache(self, cache: KVCache) -> None:
        code = self.spec.cache_code
        dtype = self.dtype if code is None else CODE_TYPES[code]
        if cache.capacity > self.max_positions or cache.key[0].dtype != dtype or cache.spec != self.spec:
            raise LogitLockError(
                f"this cache ({cache.spec.variant}, {cache.key[0].dtype}, {cache.capacity} tokens) is not one of "
                f"{self.spec.variant} in {dtype} with at most {self.max_positions}; use the engine's new_cache"
            )

    def _session(self, mode: _Mode) -> _Session:
        if mode not in self._sessions:
            if not self.keep_both_sessions:
                self._sessions.clear()
            with graph_errors(cannot_run(self.bundle.model_path)):
                self._sessions[mode] = self._open(mode)
        return self._sessions[mode]

    def _open(self, mode: _Mode) -> _Session:
        path, info = self.bundle.model_path, self.bundle.info
        quantized = self.spec.quantization is not None
        if mode == "tapped" and self._graph is not None:
            model, self._graph = self._graph, None
        else:
            model = self._prepared(mode)
        if mode == "plain" and self.keep_both_sessions and not quantized:
            # The tapped graph is this one with more outputs.  Quantized layers have edits that depend on the taps.
            self._graph = model
        promote(model, () if mode == "plain" else tuple(info.taps.values()))
        if quantized:
            cache_as_bytes(model)
            # Or ONNX Runtime dequantizes all weights that no node reads any more before it drops them.
            passes.RemoveUnusedNodesPass()(model)
        if not has_tensor_scatter():
            model = without_tensor_scatter(model)
        options = session_options(path.parent, self.threads)
        for key, value in SESSION_OPTIONS.items() if quantized else ():
            options.add_session_config_entry(key, value)
        data = ir.to_proto(model).SerializeToString()
        providers = ["CPUExecutionProvider"]
        return _Session(ort.InferenceSession(data, options, providers=providers, disabled_optimizers=_WRONG))

    def _prepared(self, mode: _Mode) -> ir.Model:
        """The graph as ONNX Runtime computes it, with its own outputs."""
        info = self.bundle.info
        model = load_graph(self.bundle.model_path, files=info.files)
        quantized = self.spec.quantization is not None
        if info.precision != "fp32" or quantized:
            model = inline_and_type(model)
        if mode == "cut":
            # After the bodies of norms are in place: what a norm makes codes of is one of the values that are fed.
            cut_at(model, [info.taps[tap] for tap in self.tap_names if not is_cache_tap(tap)], prefix=_FED)
        if quantized:
            use_integer_kernels(model, weights_rounded=self.emulate_rounding)
        if info.precision != "fp32":
            compute_in_float(model, HALF_TYPES[info.precision], rounded=self.emulate_rounding)
        return model


def _describe(dtype: torch.dtype, spec: ModelSpec, *, emulated: bool) -> str:
    name = torch_name(dtype)
    codes = "" if spec.quantization is None else f"; {spec.quantization.describe()}"
    if dtype == torch.float32:
        return f"ONNX Runtime on the CPU in float32{codes}"
    if emulated:
        return f"ONNX Runtime on the CPU, every node computed in float32 and rounded to {name}{codes}"
    return f"ONNX Runtime on the CPU in float32 with {name} weights and caches; nothing between nodes is rounded{codes}"
