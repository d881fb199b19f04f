"""The kernels on torch tensors, and as the CUDA implementation of the two custom ops.

Importing this module registers that implementation; it serves calls inside `with use_kernels():` only.  Everywhere
else, and for what the kernels do not serve (fp64, an upstream arithmetic), the op's own body runs, so that the
reference on CUDA stays the reference.  Nothing here waits for the device or reads its data: all of it can be captured
in a CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from refmodels import ops
from refmodels.dtypes import DTYPES
from refmodels.errors import LogitLockError
from trt_runtime.kernels import attention, rms_norm
from trt_runtime.kernels.launch import AttentionShape, ElementType, Launch, NormShape

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
        workspace: scratch memory for attention.  Without it, one is kept for each device and stream, except while a
            CUDA graph is captured: a graph must own its memory, so every attention in it then allocates and zeroes its
            own.  Give one (and keep it as long as the graph) to spare the graph that.
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
    Returns: y like x; codes like x in int8 or float8_e4m3fn; scales [..., 1] fp32, with y ~ codes * scales.
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
    """The tensor as kernels read it: contiguous from a multiple of 16 bytes.  A copy if it is not so already."""
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
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    visible: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query_scale: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    rotary_interleaved: bool = False,
    window: int = 0,
    workspace: Workspace | None = None,
) -> Tensor:
    """`refmodels.ops.cached_attention` (arithmetic "exact") by its kernels: the context; the caches are updated.

    Arguments as there; the caches are contiguous and of qkv's dtype (fp32, fp16 or bf16), and cos, sin and query_scale
    have one dtype.  `workspace`: as for `use_kernels`.
    """
    batch, tokens, width = qkv.shape
    head_dim = width // (heads + 2 * kv_heads)
    tables = [_packed(t) if t is not None else None for t in (cos, sin, query_scale)]
    table = next((t for t in tables if t is not None), None)
    shape = AttentionShape(
        batch=batch,
        tokens=tokens,
        slots=visible.shape[1],
        capacity=key_cache.shape[2],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=scale,
        dtype=ELEMENT_TYPES[qkv.dtype],
        rotary_dim=2 * cos.shape[-1] if cos is not None else 0,
        rotary_interleaved=rotary_interleaved,
        window=window,
        has_query_scale=query_scale is not None,
        has_alibi=alibi_slopes is not None,
        table_dtype=ELEMENT_TYPES[table.dtype] if table is not None else "fp32",
    )
    qkv = _packed(qkv)
    context = qkv.new_empty(batch, tokens, heads * head_dim)
    if context.numel() == 0:
        return context
    scratch = _workspace(shape, qkv.device, workspace)
    execute(
        attention.launches(
            shape,
            qkv=qkv,
            key_cache=key_cache,
            value_cache=value_cache,
            cache_lengths=_packed(cache_lengths),
            visible=_packed(visible),
            cos=tables[0],
            sin=tables[1],
            query_scale=tables[2],
            alibi_slopes=_packed(alibi_slopes.float()) if alibi_slopes is not None else None,
            context=context,
            workspace=scratch.memory,
            counters=scratch.counters,
            capability=_capability(qkv.device),
        )
    )
    return context


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


def _attention_on_cuda(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    visible: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    query_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    rotary_interleaved: bool,
    window: int,
    arithmetic: str,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    use = _ACTIVE.get()
    tensors = (qkv, key_cache, value_cache, cache_lengths, visible, cos, sin, query_scale, alibi_slopes)
    tables = {t.dtype for t in (cos, sin, query_scale) if t is not None}
    served = (
        arithmetic == "exact"
        and qkv.dtype in ELEMENT_TYPES
        and all(c.dtype == qkv.dtype and c.is_contiguous() and c.data_ptr() % 16 == 0 for c in (key_cache, value_cache))
        and len(tables) <= 1
        and tables <= ELEMENT_TYPES.keys()
    )
    if use is None or not served:
        return ops._attention_body(
            *tensors, heads, kv_heads, scale, rotary_interleaved, window, arithmetic, key_scale, value_scale,
            in_place=True,
        )[0]  # fmt: skip
    return attention_into_caches(
        *tensors,
        heads=heads,
        kv_heads=kv_heads,
        scale=scale,
        rotary_interleaved=rotary_interleaved,
        window=window,
        workspace=use.workspace,
    )


_LIBRARY = torch.library.Library("refmodels", "IMPL")
_LIBRARY.impl("fused_rms_norm", _rms_norm_on_cuda, "CUDA")
_LIBRARY.impl("cached_attention", _attention_on_cuda, "CUDA")
