"""The kernels on torch tensors, and as the CUDA implementation of the two custom ops.

Importing this module registers that implementation; it serves calls inside `with use_kernels():` only.  Everywhere
else, and for calls that the kernels do not serve (fp64, an upstream arithmetic), the op's own body runs, so that the
reference on CUDA stays the reference.  Nothing here waits for the device or reads its data: a CUDA graph can capture
all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from refmodels import ops
from refmodels.attention import AttentionFacts, AttentionInput, AttentionInputs, from_torch
from refmodels.dtypes import DTYPES
from refmodels.errors import LogitLockError
from trt_runtime.kernels import attention, rms_norm
from trt_runtime.kernels.launch import (
    KERNEL_INPUTS,
    AttentionShape,
    ElementType,
    Launch,
    NormShape,
    shape_flags,
    unread_inputs,
)

ELEMENT_TYPES: dict[torch.dtype, ElementType] = {DTYPES[name]: name for name in get_args(ElementType)}


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Scratch memory of attention launches that run one after another.

    Attributes:
        memory: uint8, contents without meaning.
        counters: int32, zero before and after every launch.
    """

    memory: Tensor
    counters: Tensor

    @staticmethod
    def allocate(shape: AttentionShape, device: torch.device) -> Workspace:
        """Enough for `shape` and every smaller batch, tokens and slots, from torch's allocator."""
        memory = torch.empty(attention.workspace_bytes(shape), dtype=torch.uint8, device=device)
        return Workspace(
            memory=memory, counters=torch.zeros(attention.counter_count(shape), dtype=torch.int32, device=device)
        )

    def holds(self, shape: AttentionShape) -> bool:
        return self.memory.numel() >= attention.workspace_bytes(shape) and self.counters.numel() >= (
            attention.counter_count(shape)
        )


@dataclass(frozen=True, kw_only=True)
class _Use:
    workspace: Workspace | None


_ACTIVE: ContextVar[_Use | None] = ContextVar("logitlock_kernels", default=None)
# By device and stream: launches on two streams may overlap and must not share scratch memory.
_WORKSPACES: dict[tuple[torch.device, int], Workspace] = {}


@contextlib.contextmanager
def use_kernels(workspace: Workspace | None = None) -> Iterator[None]:
    """Serve the custom ops on CUDA tensors by the kernels, in this context.

    Args:
        workspace: scratch memory for attention.  Without it, one is kept per device and stream, except while a CUDA
            graph is captured: a graph must own its memory, so every attention in it then allocates and zeroes its own.
            Give one (and keep it as long as the graph) to avoid that.
    """
    token = _ACTIVE.set(_Use(workspace=workspace))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def execute(launches: Sequence[Launch]) -> None:
    """Run launches whose arguments are tensors, in order, on the current stream of their device.

    The tensors are contiguous and start at a multiple of 16 bytes.  Under TRITON_INTERPRET=1 they may be on the CPU.
    """
    for launch in launches:
        device = next(a.device for a in launch.arguments.values() if isinstance(a, Tensor))
        launch = launch.on(_capability(device))
        # Triton's defaults for fusion differ between its versions.
        options = {"enable_fp_fusion": True, **launch.options, "num_warps": launch.warps, "num_stages": launch.stages}
        with torch.cuda.device(device if device.type == "cuda" else -1):
            launch.kernel[launch.grid](**launch.arguments, **launch.constants, **options)


def rms_norm_rows(x: Tensor, weight: Tensor, *, eps: float, weight_in_float: bool) -> Tensor:
    """`refmodels.ops.fused_rms_norm` by its kernel.  x [..., hidden], weight [hidden]; result like x, contiguous."""
    return _norm(x, weight, eps, weight_in_float, None)[0]


def quantized_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, weight_in_float: bool, kind: Literal["int8", "fp8"]
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm, its per-token quantized copy and that copy's scales; defined in `trt_runtime.kernels.rms_norm`.

    Args:
        x: [..., hidden] fp16, bf16 or fp32; weight: [hidden], dtype of x.
    Returns: y like x; y quantized to int8 or float8_e4m3fn; scales [..., 1] fp32, with y ~ quantized * scales.
    """
    y, codes, scales = _norm(x, weight, eps, weight_in_float, kind)
    assert codes is not None and scales is not None
    return y, codes if kind == "int8" else codes.view(torch.float8_e4m3fn), scales


def _norm(
    x: Tensor, weight: Tensor, eps: float, weight_in_float: bool, kind: Literal["int8", "fp8"] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if x.dtype not in ELEMENT_TYPES or weight.dtype != x.dtype or weight.shape != x.shape[-1:]:
        raise LogitLockError(
            f"the RMSNorm kernel takes x [..., n] and weight [n] in fp32, fp16 or bf16, not {list(x.shape)} {x.dtype} "
            f"and {list(weight.shape)} {weight.dtype}"
        )
    x, weight = _packed(x), _packed(weight)
    y = torch.empty_like(x)
    codes = torch.empty_like(x, dtype=torch.int8) if kind else None
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if kind else None
    shape = NormShape(
        rows=x.numel() // x.shape[-1],
        width=x.shape[-1],
        eps=eps,
        weight_in_float=weight_in_float,
        dtype=ELEMENT_TYPES[x.dtype],
        quantized=kind,
    )
    execute(rms_norm.launches(shape, x=x, weight=weight, y=y, quantized=codes, scales=scales))
    return y, codes, scales


def _packed(tensor: Tensor) -> Tensor:
    """The tensor as kernels read it: contiguous from a multiple of 16 bytes; a copy only if it is not so already."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80  # Triton's interpreter knows nothing newer
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _rms_norm_on_cuda(x: Tensor, weight: Tensor, eps: float, weight_in_float: bool) -> Tensor:
    served = x.dtype in ELEMENT_TYPES and weight.dtype == x.dtype and 0 < x.shape[-1] <= rms_norm.MAX_WIDTH
    if _ACTIVE.get() is None or not served:
        return ops._rms_norm_body(x, weight, eps, weight_in_float)
    return rms_norm_rows(x, weight, eps=eps, weight_in_float=weight_in_float)


def attention_into_caches(
    inputs: AttentionInputs, facts: AttentionFacts, *, workspace: Workspace | None = None
) -> Tensor:
    """`refmodels.ops.cached_attention` (arithmetic "exact") by its kernels: the context; the caches are updated.

    Args:
        inputs, facts: as there; the caches are contiguous and of qkv's dtype (fp32, fp16 or bf16).
        workspace: as for `use_kernels`.
    Raises:
        LogitLockError: no kernel reads one of the inputs, or the workspace is too small.
    """
    given = {name: tensor for name, tensor in inputs._asdict().items() if tensor is not None}
    flags = shape_flags(given)
    qkv, key_cache = inputs.qkv, inputs.key_cache
    tables = _tables(given)
    shape = AttentionShape(
        batch=qkv.shape[0],
        tokens=qkv.shape[1],
        slots=inputs.visible.shape[1],
        capacity=key_cache.shape[2],
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=key_cache.shape[3],
        scale=facts.scale,
        dtype=ELEMENT_TYPES[qkv.dtype],
        rotary_dim=2 * inputs.cos.shape[-1] if inputs.cos is not None else 0,
        rotary_interleaved=facts.rotary_interleaved,
        window=facts.window,
        **flags,
        table_dtype=ELEMENT_TYPES[tables[0].dtype] if tables else "fp32",
    )
    context = qkv.new_empty(shape.batch, shape.tokens, shape.heads * shape.head_dim)
    if context.numel() == 0:
        return context
    scratch = _workspace(shape, qkv.device, workspace)
    read: dict[str, Any] = {row.name: _as_read(row, given[row.name]) for row in KERNEL_INPUTS if row.name in given}
    execute(
        attention.launches(
            shape,
            **read,
            context=context,
            workspace=scratch.memory,
            counters=scratch.counters,
            capability=_capability(qkv.device),
        )
    )
    return context


def _tables(given: Mapping[str, Tensor]) -> list[Tensor]:
    """Inputs that must share a dtype."""
    return [given[row.name] for row in KERNEL_INPUTS if row.dtype == "table" and row.name in given]


def _as_read(row: AttentionInput, tensor: Tensor) -> Tensor:
    """An input as kernels read it; a cache is written, so it must be so already."""
    if row.updated:
        return tensor
    return _packed(tensor.float() if row.dtype == "fp32" else tensor)


def _workspace(shape: AttentionShape, device: torch.device, given: Workspace | None) -> Workspace:
    if given is not None:
        if not given.holds(shape):
            raise LogitLockError(
                f"the attention workspace is too small for batch {shape.batch}, {shape.tokens} tokens and "
                f"{shape.slots} slots; allocate it for the largest of each"
            )
        return given
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return Workspace.allocate(shape, device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    kept = _WORKSPACES.get(key)
    if kept is None or not kept.holds(shape):
        kept = _WORKSPACES[key] = Workspace.allocate(shape, device)
    return kept


def _attention_on_cuda(*arguments: Any) -> Tensor:
    use = _ACTIVE.get()
    inputs, facts = from_torch(*arguments)
    given = {name: tensor for name, tensor in inputs._asdict().items() if tensor is not None}
    dtype, tables = inputs.qkv.dtype, {table.dtype for table in _tables(given)}
    served = (
        facts.arithmetic == "exact"
        and dtype in ELEMENT_TYPES
        and not unread_inputs(given)
        and all(
            c.dtype == dtype and c.is_contiguous() and c.data_ptr() % 16 == 0
            for c in (inputs.key_cache, inputs.value_cache)
        )
        and len(tables) <= 1
        and tables <= ELEMENT_TYPES.keys()
    )
    if use is None or not served:
        return ops.attention_body(inputs, facts, in_place=True)[0]
    return attention_into_caches(inputs, facts, workspace=use.workspace)


_LIBRARY = torch.library.Library("refmodels", "IMPL")
_LIBRARY.impl("fused_rms_norm", _rms_norm_on_cuda, "CUDA")
_LIBRARY.impl("cached_attention", _attention_on_cuda, "CUDA")
