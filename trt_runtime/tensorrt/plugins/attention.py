"""CachedAttention: `refmodels.ops.cached_attention` (arithmetic "exact") as a TensorRT plugin.

The caches are inputs and outputs of one address: output `key` aliases input `past_key`, `value` aliases `past_value`,
and a step writes only the slots of its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from refmodels.errors import LogitLockError
from trt_runtime.kernels.launch import AttentionShape
from trt_runtime.tensorrt.api import trt
from trt_runtime.tensorrt.plugins.base import ELEMENTS, Kernels, Plugin, reported

_ALIASES = {1: 1, 2: 2}
"""Output -> input of the same memory."""


@dataclass(frozen=True, kw_only=True)
class AttentionAttributes:
    """As the arguments of the op.  `rotary_dim` 0: no cos and sin; flags are 0 or 1; `window` 0: none."""

    heads: int
    kv_heads: int
    scale: float
    rotary_dim: int
    rotary_interleaved: int
    window: int
    has_query_scale: int
    has_alibi: int


class CachedAttentionPlugin(Plugin):
    """Inputs as `export.graph.functions.attention_inputs`, outputs context, key and value.

    qkv, the caches and context have one dtype (fp32, fp16, bf16); cache_lengths is int64, visible bool; cos, sin and
    query_scale have one dtype, any of the three; alibi_slopes is fp32.
    """

    NAME = "CachedAttention"
    OUTPUTS = 3
    Attributes = AttentionAttributes

    def __init__(self, attributes: AttentionAttributes, *, layer: str = "", kernels: Kernels | None = None) -> None:
        super().__init__(attributes, layer=layer, kernels=kernels)
        self._counters: list[torch.Tensor] = []

    def inputs(self) -> tuple[str, ...]:
        names = ["qkv", "past_key", "past_value", "cache_lengths", "visible"]
        if self.attributes.rotary_dim:
            names += ["cos", "sin"]
        if self.attributes.has_query_scale:
            names.append("query_scale")
        if self.attributes.has_alibi:
            names.append("alibi_slopes")
        return tuple(names)

    def input_types(self, types: Sequence[Any]) -> list[tuple[Any, ...]]:
        floats = tuple(ELEMENTS)
        working = floats if not types else (types[0],)
        table = floats if len(types) <= 5 else (types[5],)
        allowed: dict[str, tuple[Any, ...]] = {
            "qkv": floats,
            "past_key": working,
            "past_value": working,
            "cache_lengths": (trt.int64,),
            "visible": (trt.bool,),
            "alibi_slopes": (trt.float32,),
        }
        return [allowed.get(name, table) for name in self.inputs()]

    def output_types(self, types: Sequence[Any]) -> list[Any]:
        return list(types[:3])

    @reported
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        for name, tensor, rank in zip(self.inputs(), inputs, (3, 4, 4, 1, 2), strict=False):
            if len(tensor) != rank:
                raise LogitLockError(f"the input {name} has {len(tensor)} axes; it must have {rank}")
        a, width, head_dim = self.attributes, inputs[0][2], inputs[1][3]
        if not (width.is_constant() and head_dim.is_constant()):
            raise LogitLockError("the last axes of qkv and past_key must have a fixed size")
        expected = (a.heads + 2 * a.kv_heads) * head_dim.get_constant_value()
        if width.get_constant_value() != expected:
            raise LogitLockError(
                f"qkv is {width.get_constant_value()} wide; the heads and the cache ask for {expected}"
            )
        context = trt.DimsExprs(inputs[0])
        context[2] = builder.constant(a.heads * head_dim.get_constant_value())
        return [context, trt.DimsExprs(inputs[1]), trt.DimsExprs(inputs[2])]

    def get_aliased_input(self, output: int) -> int:
        return _ALIASES.get(output, -1)

    @reported
    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        from trt_runtime.kernels.attention import workspace_bytes

        return workspace_bytes(self.shape([tuple(i.max) for i in inputs], [i.desc.type for i in inputs]))

    @reported
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        if not torch.cuda.is_available():  # TensorRT-RTX builds without a GPU
            return
        self.counters(self.shape([tuple(i.dims) for i in inputs], [i.type for i in inputs]))

    @reported
    def enqueue(
        self,
        input_descs: Sequence[Any],
        output_descs: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        for output, source in _ALIASES.items():
            if outputs[output] != inputs[source]:
                raise LogitLockError(f"the cache {self.inputs()[source]} is not updated in place: TensorRT copied it")
        shape = self.shape([tuple(d.dims) for d in input_descs], [d.type for d in input_descs])
        given = dict(zip(self.inputs(), inputs, strict=True))
        self.launcher().attention(
            shape,
            qkv=given["qkv"],
            key_cache=given["past_key"],
            value_cache=given["past_value"],
            cache_lengths=given["cache_lengths"],
            visible=given["visible"],
            cos=given.get("cos"),
            sin=given.get("sin"),
            query_scale=given.get("query_scale"),
            alibi_slopes=given.get("alibi_slopes"),
            context=outputs[0],
            workspace=workspace,
            counters=self.counters(shape).data_ptr(),
            stream=stream,
        )

    def shape(self, dims: Sequence[tuple[int, ...]], types: Sequence[Any]) -> AttentionShape:
        """What the kernels must know, from the dims and types of the inputs."""
        a = self.attributes
        return AttentionShape(
            batch=dims[0][0],
            tokens=dims[0][1],
            slots=dims[4][1],
            capacity=dims[1][2],
            heads=a.heads,
            kv_heads=a.kv_heads,
            head_dim=dims[1][3],
            scale=a.scale,
            dtype=ELEMENTS[types[0]],
            rotary_dim=a.rotary_dim,
            rotary_interleaved=bool(a.rotary_interleaved),
            window=a.window,
            has_query_scale=bool(a.has_query_scale),
            has_alibi=bool(a.has_alibi),
            table_dtype=ELEMENTS[types[5]] if a.rotary_dim or a.has_query_scale else "fp32",
        )

    def counters(self, shape: AttentionShape) -> torch.Tensor:
        """Zeroed int32 counters in device memory, at least as many as the kernels of `shape` use.

        Kernels leave them zero, so they are zeroed once.  They may grow, but never move under a captured graph: old
        ones are kept.

        Raises:
            LogitLockError: more are needed while a CUDA graph is captured; run the shape once before.
        """
        from trt_runtime.kernels.attention import counter_count

        count = max(1, counter_count(shape))
        if not self._counters or self._counters[-1].numel() < count:
            if torch.cuda.is_current_stream_capturing():
                raise LogitLockError("counters must grow while a CUDA graph is captured; run the step once before")
            self._counters.append(torch.zeros(count, dtype=torch.int32, device="cuda"))
            # TensorRT's stream does not wait for torch's.
            torch.cuda.current_stream().synchronize()
        return self._counters[-1]
