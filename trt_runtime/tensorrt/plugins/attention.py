"""CachedAttention: `refmodels.ops.cached_attention` (arithmetic "exact") as a TensorRT plugin.

The caches are inputs and outputs at one address: output `key` aliases input `past_key`, `value` aliases `past_value`,
and a step writes only the slots of its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, make_dataclass
from typing import Any

import torch

from refmodels.attention import NODE_ATTRIBUTES, AttentionInput, plugin_inputs
from refmodels.errors import LogitLockError
from trt_runtime.kernels.launch import KERNEL_INPUTS, AttentionShape, shape_flags
from trt_runtime.tensorrt.api import trt
from trt_runtime.tensorrt.plugins.base import ELEMENTS, Kernels, Plugin, reported

_ALIASES = {1: 1, 2: 2}
"""Output -> input of the same memory."""


AttentionAttributes = make_dataclass(
    "AttentionAttributes",
    [(name, kind, field(default=0) if name.startswith("has_") else field()) for name, kind in NODE_ATTRIBUTES.items()],
    frozen=True,
    kw_only=True,
)
"""Values of the node's attributes.  `rotary_dim` 0: no cos and sin; flags are 0 or 1; `window` 0: none."""


class CachedAttentionPlugin(Plugin):
    """Inputs as `refmodels.attention.plugin_inputs` has them for the attributes; outputs context, key and value.

    The working dtype, which is that of the caches too, and that of tables are fp32, fp16 or bf16 each.
    """

    NAME = "CachedAttention"
    OUTPUTS = 3
    Attributes = AttentionAttributes

    def __init__(self, attributes: Any, *, layer: str = "", kernels: Kernels | None = None) -> None:
        super().__init__(attributes, layer=layer, kernels=kernels)
        self._counters: list[torch.Tensor] = []

    def rows(self) -> tuple[AttentionInput, ...]:
        """The inputs, in order."""
        return plugin_inputs(self.attributes)

    def inputs(self) -> tuple[str, ...]:
        return tuple(row.node for row in self.rows())

    def input_types(self, types: Sequence[Any]) -> list[tuple[Any, ...]]:
        floats = tuple(ELEMENTS)
        working = floats if not types else (types[0],)
        table = self.table_type(types)
        allowed: dict[str, tuple[Any, ...]] = {
            "working": working,
            "cache": working,
            "int64": (trt.int64,),
            "bool": (trt.bool,),
            "table": floats if table is None else (table,),
            "fp32": (trt.float32,),
        }
        return [allowed[row.dtype] for row in self.rows()]

    def table_type(self, types: Sequence[Any]) -> Any:
        """The type that tables have; None if there is none among the inputs with these types, the first ones."""
        return next((kind for row, kind in zip(self.rows(), types, strict=False) if row.dtype == "table"), None)

    def output_types(self, types: Sequence[Any]) -> list[Any]:
        return list(types[:3])

    @reported
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        for row, tensor in zip(self.rows(), inputs, strict=False):
            if len(tensor) != len(row.axes):
                raise LogitLockError(f"the input {row.node} has {len(tensor)} axes; it must have {len(row.axes)}")
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
        addresses = dict(zip((row.name for row in self.rows()), inputs, strict=True))
        self.launcher().attention(
            shape,
            **{row.name: addresses.get(row.name) for row in KERNEL_INPUTS},
            context=outputs[0],
            workspace=workspace,
            counters=self.counters(shape).data_ptr(),
            stream=stream,
        )

    def shape(self, dims: Sequence[tuple[int, ...]], types: Sequence[Any]) -> AttentionShape:
        """The shape that the kernels need, from the dims and types of the inputs."""
        a, given = self.attributes, [row.name for row in self.rows()]
        at = dict(zip(given, dims, strict=True))
        table = self.table_type(types)
        batch, tokens, _ = at["qkv"]
        _, _, capacity, head_dim = at["key_cache"]
        return AttentionShape(
            batch=batch,
            tokens=tokens,
            slots=at["visible"][1],
            capacity=capacity,
            heads=a.heads,
            kv_heads=a.kv_heads,
            head_dim=head_dim,
            scale=a.scale,
            dtype=ELEMENTS[types[0]],
            rotary_dim=a.rotary_dim,
            rotary_interleaved=bool(a.rotary_interleaved),
            window=a.window,
            **shape_flags(given),
            table_dtype="fp32" if table is None else ELEMENTS[table],
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
