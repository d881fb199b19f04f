"""Gluon kernels of Hopper as plain Python on CPU tensors, for tests: Triton's interpreter does not know them.

Only what `quantized_gemm_hopper` uses.  Every group of warps is a thread.  A matrix product reads its operands as late
as it may, when it is waited for: a buffer that is given back too early is read after it was overwritten.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trt_runtime.kernels.launch import Launch

PATIENCE = 20.0


class Scalar(int):
    def to(self, _: Any) -> Scalar:
        return self

    def __mod__(self, other: int) -> Scalar:
        return Scalar(int(self) % int(other))

    def __floordiv__(self, other: int) -> Scalar:
        return Scalar(int(self) // int(other))


class Value(Tensor):
    """As in Triton, += makes a new one."""

    def __iadd__(self, other: Any) -> Any:  # type: ignore[override, misc]
        return self + other


class Pointer:
    def __init__(self, base: Tensor, at: Any = 0) -> None:
        self.base, self.at = base, at
        self.dtype = types.SimpleNamespace(element_ty=base.dtype)

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.base, self.at + by)


class Buffer:
    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, i: int) -> Buffer:
        return Buffer(self.data[i])

    def slice(self, start: int, length: int, dim: int) -> Buffer:
        return Buffer(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Buffer:
        return Buffer(self.data.permute(order))


class Barrier:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def arrive(self, count: int = 0, nbytes: int = 0) -> None:
        with self.changed:
            self.missing -= count
            self.bytes += nbytes
            assert self.missing >= 0, "more arrivals than a phase has"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase & 1 != phase, PATIENCE), "deadlock"


class Sum:
    """An accumulator with products under way."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class _Gl:
    int32, int64, float32 = torch.int32, torch.int64, torch.float32
    exp = staticmethod(torch.exp)

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.programs = program, programs
        self.under_way = threading.local()

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("Layout"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def program_id(self, _: int) -> int:
        return self.program

    def num_programs(self, _: int) -> int:
        return self.programs

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def minimum(self, a: int, b: int) -> int:
        return min(a, b)

    def static_range(self, n: int) -> range:
        return range(n)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype).as_subclass(Value)

    def arange(self, start: int, stop: int, layout: Any) -> Tensor:
        return torch.arange(start, stop)

    def expand_dims(self, x: Tensor, axis: int) -> Tensor:
        return x.unsqueeze(axis)

    def convert_layout(self, x: Tensor, layout: Any) -> Tensor:
        return x

    def load(self, pointer: Pointer, mask: Any = None, other: float = 0.0) -> Tensor:
        at = torch.as_tensor(pointer.at)
        live = torch.ones_like(at, dtype=torch.bool) if mask is None else mask
        found = pointer.base.flatten()[torch.where(live, at, 0)]
        return torch.where(live, found, torch.tensor(other, dtype=found.dtype))

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        at, mask = torch.as_tensor(pointer.at).expand(value.shape), mask.expand(value.shape)
        pointer.base.view(-1)[at[mask]] = value.as_subclass(Tensor)[mask]

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if dtype == torch.int64:
            barriers = [Barrier() for _ in range(shape[0])]
            return types.SimpleNamespace(index=lambda i: barriers[i])
        return Buffer(torch.full(shape, 99, dtype=torch.int8).view(dtype))

    def warp_specialize(self, parts: list[tuple[Any, Any]], warps: list[int], registers: list[int]) -> None:
        errors: list[BaseException] = []

        def run(function: Any, arguments: Any) -> None:
            self.under_way.queue = []
            try:
                function(*arguments)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
        if errors:
            raise errors[0]

    def warpgroup_mma(self, a: Buffer, b: Buffer, onto: Any, *, use_acc: bool = True, is_async: bool) -> Sum:
        total = onto if isinstance(onto, Sum) else Sum(onto if use_acc else torch.zeros_like(onto))

        def multiply() -> None:
            product = a.data.to(torch.float64) @ b.data.to(torch.float64)
            total.value = total.value + product.to(total.value.dtype)

        self.under_way.queue.append(multiply)
        return total

    def warpgroup_mma_wait(self, outstanding: int, deps: list[Sum]) -> Any:
        while len(self.under_way.queue) > outstanding:
            self.under_way.queue.pop(0)()
        found = [total if outstanding else total.value.as_subclass(Value) for total in deps]
        return found[0] if len(found) == 1 else found


def _fetch_tile(operand: Any, at: list[int], ready: Barrier, into: Buffer) -> None:
    rows, columns = operand.shape
    whole = operand.base.view(torch.int8).reshape(-1)[: rows * columns].view(rows, columns)
    part = whole[at[0] : at[0] + into.data.shape[0], at[1] : at[1] + into.data.shape[1]]
    into.data.view(torch.int8).zero_()[: part.shape[0], : part.shape[1]] = part
    ready.arrive(nbytes=-into.data.numel())


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def _arrive(barrier: Barrier, pred: bool = True) -> None:
    if pred:
        barrier.arrive(count=1)


MBARRIER = types.SimpleNamespace(
    init=_init,
    wait=lambda barrier, phase: barrier.wait(phase),
    expect=lambda barrier, nbytes: barrier.arrive(count=1, nbytes=nbytes),
    arrive=_arrive,
    MBarrierLayout=lambda: None,
)


def execute_on_cpu(launch: Launch) -> None:
    """Run a launch of a `gluon.jit` function, program after program."""
    module = vars(__import__(launch.kernel.fn.__module__, fromlist=["_"]))
    for program in range(launch.grid[0]):
        gl = _Gl(program, launch.grid[0])
        names: dict[str, Any] = {
            "gl": gl,
            "mbarrier": MBARRIER,
            "_fetch_tile": _fetch_tile,
            "warpgroup_mma": gl.warpgroup_mma,
            "warpgroup_mma_wait": gl.warpgroup_mma_wait,
            "range": lambda *bounds: (Scalar(i) for i in range(*bounds)),
        }

        def plain(function: Any, names: dict[str, Any] = names) -> Callable[..., Any]:
            return types.FunctionType(function.fn.__code__, names)

        names |= {
            name: plain(value) for name, value in module.items() if hasattr(value, "fn") and name not in names
        } | {"min": min}
        arguments = {
            name: Pointer(value) if isinstance(value, Tensor) else Operand(value) if hasattr(value, "base") else value
            for name, value in launch.arguments.items()
        }
        plain(launch.kernel)(**arguments, **launch.constants)


class Operand:
    """A `TensorDescriptor`, as kernels see it."""

    def __init__(self, descriptor: Any) -> None:
        self.base, self.shape, self.layout = descriptor.base, descriptor.shape, descriptor.layout
        self.dtype = descriptor.base.dtype
