"""Consecutive GEMVs with int4 weights, for one token, in one launch; the kernel is quantized_chain.cu.

In a decoder block these are the attention's output projection, gate and up, down, and the next block's query, key and
value, with the norms between and the residuals.  As separate launches each starts with an empty pipeline and ends with
a drained one, which at int4 takes as long as reading the weights.  Here one block per multiprocessor stays from the
first product to the last, and keeps loading weights while the blocks exchange the results of a product.

It is CUDA C++, because Triton cannot express what it needs: a warp that only loads memory, barriers of some of the
warps, and spin-waiting on tagged words.  NVRTC, which comes with torch, compiles it at first use.  The launch is a
programmatic dependent one: the kernel requests its first weights before the kernel ahead has ended.

All blocks must be on the GPU at once, or they would wait for each other forever: the launch is cooperative.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refmodels.errors import LogitLockError
from trt_runtime.kernels.driver import load_function, start

GROUP = 128
"""Columns that share a scale."""
MAX_NORM_COLUMNS = 8192
MAX_PRODUCTS = 4
MAX_PREFETCH = 4

_TILE = 16
_THREADS = 32 * (16 + 3 + 1)
_SHARED = 215_296
DEFINES = (f"-DBLOCK_THREADS={_THREADS}", f"-DSHARED_BYTES={_SHARED}")
"""Constants with which quantized_chain.cu is compiled; it checks them."""
_SOURCE = Path(__file__).with_suffix(".cu")
_ENTRY = "quantized_chain"


@dataclass(frozen=True, kw_only=True)
class Product:
    """out = residual + (norm(input) @ weight.T + bias), or with `gated` silu of its first half times its second half.

    Attributes:
        rows, columns: of the weight (of one of both halves, if gated); columns a multiple of `GROUP`, rows of 16.
        weight: int32, from `packing.pack`; scale: fp16, from `packing.by_tile`.
        input: fp16 [columns]; None: the results of the product before.
        norm: RMSNorm's weight, fp16 [columns], or None; at most `MAX_NORM_COLUMNS`.
        eps, weight_in_float: of the norm, as `refmodels.ops.fused_rms_norm`.
        bias: fp16 [rows], if gated [2 * rows], or None.
        residual: fp16 [rows], or the number of an earlier product of the chain whose results it is, or None.
        out: fp16 [rows], written; None: only later products of the chain want the results.
    """

    rows: int
    columns: int
    weight: Tensor
    scale: Tensor
    input: Tensor | None = None
    norm: Tensor | None = None
    eps: float = 0.0
    weight_in_float: bool = False
    bias: Tensor | None = None
    residual: Tensor | int | None = None
    gated: bool = False
    out: Tensor | None = None


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "input", "norm", "bias", "residual", "earlier")),
        *((name, ctypes.c_void_p) for name in ("results", "out")),
        *((name, ctypes.c_int32) for name in ("rows", "columns", "first", "gated", "weight_in_float")),
        ("eps", ctypes.c_float),
    )


class _Prefetch(ctypes.Structure):
    _fields_ = (("memory", ctypes.c_void_p), ("bytes", ctypes.c_uint32), ("share", ctypes.c_uint32))


class _Chain(ctypes.Structure):
    _fields_ = (
        ("products", _Product * MAX_PRODUCTS),
        ("prefetch", _Prefetch * MAX_PREFETCH),
        ("counters", ctypes.c_void_p),
        ("count", ctypes.c_int32),
    )


def on(device: torch.device) -> bool:
    """Whether the kernel runs on a device: compute capability 9.0, with cuda.bindings, as beside torch for CUDA 13."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


def serves(*, rows: int, columns: int, group: int | None) -> bool:
    """Whether the kernel takes an int4 weight of these sizes, without zeros, with scales in fp16."""
    return group == GROUP and columns % GROUP == 0 and rows % _TILE == 0


class ChainRunner:
    """Runs chains whose products have at most `rows` rows, one after another, on one GPU of compute capability 9.0."""

    def __init__(self, *, rows: int, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._blocks = properties.multi_processor_count
        # First, because it makes the CUDA context that loading the kernel needs.
        self._results, self._counters = scratch(rows, device)
        with torch.cuda.device(device):
            self._function = _function(torch.cuda.current_device())

    def run(self, products: Sequence[Product], prefetch: Sequence[Tensor] = ()) -> None:
        """Launch on the current stream; waits for nothing, so a CUDA graph can be captured around it.

        Args:
            products: one after another, at most `MAX_PRODUCTS`.
            prefetch: contiguous weights that later launches read first, at most `MAX_PREFETCH`: they are brought into
                L2 once the last of this chain's are loaded, while the kernels between the launches run.
        """
        chain = described(products, prefetch, self._results, self._counters, self._blocks)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(chain))
        start(
            self._function,
            _ENTRY,
            ctypes.addressof(arguments),
            grid=(self._blocks, 1, 1),
            threads=_THREADS,
            shared=_SHARED,
            stream=torch.cuda.current_stream(self._counters.device).cuda_stream,
            overlap=True,
            cooperative=True,
        )


def scratch(rows: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Results int64 [`MAX_PRODUCTS`, rows / 2], rows beginning at multiples of 16 bytes, and counters int32 [2]."""
    results = torch.zeros(MAX_PRODUCTS, -(-rows // 4) * 2, dtype=torch.int64, device=device)
    return results, torch.tensor([1, 0], dtype=torch.int32, device=device)


def described(
    products: Sequence[Product], prefetch: Sequence[Tensor], results: Tensor, counters: Tensor, blocks: int
) -> _Chain:
    """The kernel's argument, for launches of `blocks` blocks; `ChainRunner` describes the others.

    Args:
        results, counters: from `scratch`, the same for launches that follow one another.
    """
    chain = _Chain(counters=counters.data_ptr(), count=len(products))
    first = 0
    for i, product in enumerate(products):
        residual = product.residual
        chain.products[i] = _Product(
            weight=product.weight.data_ptr(),
            scale=product.scale.data_ptr(),
            input=_address(product.input),
            norm=_address(product.norm),
            bias=_address(product.bias),
            residual=None if isinstance(residual, int) else _address(residual),
            earlier=_address(results[residual]) if isinstance(residual, int) else None,
            results=_address(results[i]) if i + 1 < len(products) else None,
            out=_address(product.out),
            rows=product.rows,
            columns=product.columns,
            first=first,
            gated=product.gated,
            weight_in_float=product.weight_in_float,
            eps=product.eps,
        )
        # Distributed in turn, so that every multiprocessor reads the same amount.
        first = (first + product.rows // _TILE) % blocks
    for j, memory in enumerate(prefetch):
        share = -(-memory.nbytes // (16 * blocks)) * 16
        chain.prefetch[j] = _Prefetch(memory=memory.data_ptr(), bytes=memory.nbytes, share=share)
    return chain


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _function(device: int) -> Any:
    """The CUfunction for the current device."""
    return load_function(compiled(), _ENTRY, _SHARED)


def compiled() -> bytes:
    """The cubin for compute capability 9.0; needs NVRTC, but no GPU.

    Raises:
        LogitLockError: NVRTC is not there, or refuses the source.
    """
    from cuda.bindings import nvrtc

    def done(result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
            nvrtc.nvrtcGetProgramLog(program, log)
            raise LogitLockError(f"NVRTC cannot compile {_SOURCE.name}: {log.decode().strip(chr(0) + chr(10))}")
        return result[1] if len(result) > 1 else None

    header = _SOURCE.with_name("hopper.cuh")
    sources = (_SOURCE.read_bytes(), _SOURCE.name.encode(), 1, [header.read_bytes()], [header.name.encode()])
    try:
        program = nvrtc.nvrtcCreateProgram(*sources)[1]
    except RuntimeError as error:
        # cuda.bindings looks for the library when it is first called.
        raise LogitLockError(f"NVRTC (nvidia-cuda-nvrtc) cannot be loaded: {error}") from error
    options = [b"--gpu-architecture=sm_90a", *(define.encode() for define in DEFINES)]
    done(nvrtc.nvrtcCompileProgram(program, len(options), options))
    cubin = bytearray(done(nvrtc.nvrtcGetCUBINSize(program)))
    done(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)
