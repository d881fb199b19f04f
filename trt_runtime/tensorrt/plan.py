"""Running a deserialized TensorRT plan: contexts, bindings, and CUDA graphs of steps that repeat."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refmodels.dtypes import DTYPE_TABLE
from refmodels.errors import LogitLockError

KEPT_STEPS = 16
"""Number of steps of different shapes or caches that a plan remembers; each captured one has its own context."""
_TYPES = ("fp32", "fp16", "bf16", "int32", "int64", "bool")
"""The dtypes of a plan's inputs and outputs."""


class CudaStream:
    """The stream that a plan runs on.  TensorRT must not use the default one."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self.handle: int = self._stream.cuda_stream

    @contextmanager
    def working(self) -> Iterator[None]:
        """The block's work waits for the caller's stream, and the caller's next work waits for the block's."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that replays the CUDA graph of `work`."""
        graph = torch.cuda.CUDAGraph()
        # TensorRT-RTX may compile kernels in other threads meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


@dataclass(kw_only=True)
class _BoundStep:
    """A step of given shapes on given caches: its context, bound buffers and, once captured, its graph."""

    context: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    replay: Callable[[], None] | None = None


class TensorRTPlan:
    """A deserialized plan with its contexts and bindings.

    Contexts share one block of scratch memory: they run one after the other on one stream.

    Args:
        engine: `trt.ICudaEngine`.
        step_inputs: its inputs other than caches.
        outputs: its outputs other than caches, which must exist; others may be there.
        caches: names of cache tensors, each output `name` and input `past.name`.
        device: of all tensors.
        stream: a `CudaStream`.
    Raises:
        LogitLockError: the plan has other inputs and outputs.
    """

    def __init__(
        self,
        engine: Any,
        *,
        step_inputs: Sequence[str],
        outputs: Sequence[str],
        caches: Sequence[str],
        device: torch.device,
        stream: Any,
    ) -> None:
        from trt_runtime.tensorrt.api import tensorrt_type, trt

        self._trt, self._engine, self._device, self._stream = trt, engine, device, stream
        types = {tensorrt_type(name): DTYPE_TABLE[name].torch for name in _TYPES}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        ins = {n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
        wanted = {*step_inputs, *(f"past.{name}" for name in caches)}
        lacking = {*outputs, *caches} - (set(names) - ins)
        if ins != wanted or lacking:
            differing = ", ".join(sorted((ins ^ wanted) | lacking)[:3])
            raise LogitLockError(f"the plan does not fit its bundle.json: its inputs and outputs differ in {differing}")
        self.dtypes = {name: types[engine.get_tensor_dtype(name)] for name in names}
        self._step_inputs = tuple(step_inputs)
        self._outputs = tuple(n for n in names if n not in ins and n not in caches)
        self._contexts: dict[int, Any] = {}
        self._steps: OrderedDict[Any, _BoundStep | None] = OrderedDict()
        self._scratch = torch.empty(max(1, engine.device_memory_size_v2), dtype=torch.uint8, device=device)

    def run(
        self, profile: int, inputs: Mapping[str, Tensor], caches: Mapping[str, Tensor], *, repeats: bool
    ) -> dict[str, Tensor]:
        """Run one step.

        Args:
            profile: index of the optimization profile.
            inputs: step inputs on the CPU; those that the plan lacks are ignored.
            caches: by name, on the device; updated in place.
            repeats: keep the step's context and buffers, and capture the step when it comes again.
        Returns: outputs by name; those of a step that repeats are overwritten by its next run.
        Raises:
            LogitLockError: TensorRT or a plugin fails.
        """
        given = {name: inputs[name] for name in self._step_inputs}
        shapes = tuple(tuple(tensor.shape) for tensor in given.values())
        key = (profile, shapes, tuple(tensor.data_ptr() for tensor in caches.values()))
        with self._stream.working():
            if not repeats:
                return self._execute(self._bind(self._context(profile), given, caches), given)
            # The first time, the step may never come again; the second time it gets its own context, which a graph
            # needs, and is captured after it has run; from then on it is replayed.
            seen = key in self._steps
            step = self._steps.pop(key, None)
            if step is None:
                context = self._new_context(profile) if seen else self._context(profile)
                step = self._bind(context, given, caches)
            outputs = self._execute(step, given)
            if seen and step.replay is None and self._capturable(step):
                step.replay = self._stream.capture(lambda: self._enqueue(step))
            self._steps[key] = step if seen else None
            while len(self._steps) > KEPT_STEPS:
                self._steps.popitem(last=False)
            return outputs

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def _new_context(self, profile: int) -> Any:
        from trt_runtime.tensorrt.plugins import raise_failure

        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        raise_failure()
        if context is None:
            raise LogitLockError("TensorRT cannot make an execution context; is GPU memory full?")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        self._check(context.set_optimization_profile_async(profile, self._stream.handle), f"choose profile {profile}")
        return context

    def _bind(self, context: Any, inputs: Mapping[str, Tensor], caches: Mapping[str, Tensor]) -> _BoundStep:
        tensors = {
            name: torch.empty(tensor.shape, dtype=self.dtypes[name], device=self._device)
            for name, tensor in inputs.items()
        }
        past = {f"past.{name}": tensor for name, tensor in caches.items()}
        for name, tensor in (tensors | past).items():
            self._check(context.set_input_shape(name, tuple(tensor.shape)), f"take {name} of {list(tensor.shape)}")
        unknown = context.infer_shapes()
        if unknown:
            raise LogitLockError(f"TensorRT lacks the shape of {', '.join(unknown)}")
        outputs = {
            name: torch.empty(tuple(context.get_tensor_shape(name)), dtype=self.dtypes[name], device=self._device)
            for name in self._outputs
        }
        for name, tensor in (tensors | past | dict(caches) | outputs).items():
            self._check(context.set_tensor_address(name, tensor.data_ptr()), f"bind {name}")
        return _BoundStep(context=context, inputs=tensors, outputs=outputs)

    def _execute(self, step: _BoundStep, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, buffer in step.inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        if step.replay is None:
            self._enqueue(step)
        else:
            step.replay()
        return step.outputs

    def _enqueue(self, step: _BoundStep) -> None:
        from trt_runtime.tensorrt.api import LOGGER, errors_of
        from trt_runtime.tensorrt.plugins import raise_failure

        with LOGGER.collect() as messages:
            fine = step.context.execute_async_v3(self._stream.handle)
        raise_failure()
        if not fine:
            raise LogitLockError(f"TensorRT cannot run the step: {join_messages(errors_of(messages))}")

    def _capturable(self, step: _BoundStep) -> bool:
        from trt_runtime.tensorrt.api import IS_RTX

        # TensorRT-RTX may still be compiling kernels for these shapes in the background.
        return not IS_RTX or bool(step.context.is_stream_capturable(self._stream.handle))

    def _check(self, fine: bool, what: str) -> None:
        if not fine:
            raise LogitLockError(f"TensorRT does not {what}; was the engine built for such steps?")


def join_messages(texts: Sequence[str]) -> str:
    """The first of TensorRT's messages, on one line."""
    return "; ".join(" ".join(text.split()) for text in texts[:3]) or "it gives no reason"
