"""A TensorRT plan that is not one: `ICudaEngine` and its contexts played by ONNX Runtime on the CPU.

Addresses, shapes and profiles are given as to TensorRT; executing runs the bundle's graph on the memory that was
bound.  What is left out of such a test is TensorRT itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime as ort

from trt_runtime.bundle import (
    INFO_NAME,
    KERNELS_NAME,
    PLAN_NAME,
    TAPS_PLAN_NAME,
    BundleDraft,
    BundleInfo,
    EngineInfo,
    Profile,
    read_bundle,
)
from trt_runtime.tensorrt.api import trt

_TYPES = {
    "tensor(float)": (trt.float32, 1),
    "tensor(float16)": (trt.float16, 10),
    "tensor(bfloat16)": (trt.bfloat16, 16),
    "tensor(int64)": (trt.int64, 7),
}
HANDLE = 77
"""Of the only stream."""


class FakeStream:
    handle = HANDLE

    def __init__(self) -> None:
        self.captured = 0

    @contextmanager
    def working(self) -> Iterator[None]:
        yield

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        return work


class FakeEngine:
    """Inputs and outputs of `session`; `info` has the profiles."""

    device_memory_size_v2 = 1000
    handle: int | None = HANDLE

    def __init__(self, session: ort.InferenceSession, info: BundleInfo) -> None:
        self.session, self.info = session, info
        self.inputs = {i.name: (i.type, i.shape) for i in session.get_inputs()}
        self.outputs = {o.name: (o.type, o.shape) for o in session.get_outputs()}
        self.contexts: list[FakeContext] = []
        self.names = [*self.inputs, *self.outputs]

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return _TYPES[(self.inputs | self.outputs)[name][0]][0]

    def create_execution_context(self, strategy: Any) -> FakeContext:
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]

    def play(self, context: FakeContext, stream: int) -> None:
        """Run the graph on what a context has bound."""
        binding = self.session.io_binding()
        for names, bind in ((self.inputs, binding.bind_input), (self.outputs, binding.bind_output)):
            for name, (kind, _) in names.items():
                shape = context.get_tensor_shape(name)
                bind(name, "cpu", 0, _TYPES[kind][1], shape, context.addresses[name])
        self.session.run_with_iobinding(binding)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.memory: tuple[int, int] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.executed: list[dict[str, tuple[int, ...]]] = []
        self.capturable = True
        self.fails = False

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert self.engine.handle in (None, stream)
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Refuses what is outside the profile, as TensorRT does."""
        profile = self.engine.info.profiles[self.profile or 0]
        limits = {"batch": profile.batch, "tokens": profile.tokens, "logit_tokens": profile.tokens}
        limits |= {"slots": [1, profile.capacity[1]], "capacity": profile.capacity}
        for size, axis in zip(shape, self.engine.inputs[name][1], strict=True):
            low, high = limits[axis] if isinstance(axis, str) else (axis, axis)
            if not low <= size <= high:
                return False
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        axes = {
            axis: size
            for given, shape in self.shapes.items()
            for axis, size in zip(self.engine.inputs[given][1], shape, strict=True)
        }
        return tuple(axes.get(axis, axis) for axis in (self.engine.inputs | self.engine.outputs)[name][1])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable

    def execute_async_v3(self, stream: int) -> bool:
        assert self.engine.handle in (None, stream)
        assert self.memory is not None and self.memory[1] >= self.engine.device_memory_size_v2
        if self.fails:
            return False
        self.engine.play(self, stream)
        self.executed.append(dict(self.shapes))
        return True


def add_engine(directory: Path, built: EngineInfo, profiles: list[Profile], *, kernels: bytes | None = None) -> None:
    """Make a bundle say that it has a TensorRT engine; its plans are no plans."""
    for name in (PLAN_NAME, TAPS_PLAN_NAME):
        (directory / name).write_bytes(b"no plan")
    if kernels is not None:
        (directory / KERNELS_NAME).write_bytes(kernels)
    info = dataclasses.replace(read_bundle(directory).info, engine=built, profiles=profiles)
    (directory / INFO_NAME).unlink()
    BundleDraft(directory).finish(info)
