"""From `Decoder.forward` to an ONNX graph: a `torch.fx` trace, lowered node by node through one table of rules.

The trace runs on a decoder without memory (device "meta"), so a graph costs milliseconds and no weights.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from export.graph.lowering import TABLES, Graph, Lowering
from export.graph.rules import RULES
from refmodels.checkpoints.load import empty_decoder
from refmodels.dtypes import DTYPES
from refmodels.errors import LogitLockError
from refmodels.model import Decoder, gelu_fast, gelu_new, quick_gelu
from refmodels.ops import (
    by_head,
    cached_attention,
    fused_rms_norm,
    heads_in_a_row,
    join_qkv,
    rope_rows,
    select_tokens,
    split_qkv,
)
from refmodels.positions import build_tables
from refmodels.quantization.linear import QuantizedLinear
from refmodels.recorder import tap
from refmodels.spec import ModelSpec, Numerics
from trt_runtime.bundle import AttentionMode, Precision

_LEAF_FUNCTIONS = (
    *(tap, cached_attention, fused_rms_norm, rope_rows, select_tokens, gelu_new, gelu_fast, quick_gelu),
    *(split_qkv, join_qkv, by_head, heads_in_a_row),
)
"""Functions that the trace keeps as one node each."""


def build_graph(
    spec: ModelSpec,
    *,
    precision: Precision,
    numerics: Numerics = "exact",
    attention: AttentionMode = "plugin",
    max_positions: int | None = None,
    float32: Collection[str] = (),
) -> Graph:
    """Trace the decoder of `spec` and lower it.

    Args:
        precision: dtype of weights, activations and cache.
        numerics: "exact" (fp32 tables and reductions) or "upstream" (Hugging Face's tables and rounding).
        attention: "plugin" keeps `refmodels::*` nodes with their function bodies, "decomposed" inlines the bodies,
            "native" inlines bodies that use TensorRT's own operators for attention.
        max_positions: the longest cache that the position tables serve; None: what the model allows.
        float32: taps of linear layers that compute in fp32, with weights (or their scales) in fp32 (see
            `export.precision_plan`).
    Raises:
        LogitLockError: attention "native" for a quantized cache, which TensorRT's operators do not have.
    """
    if attention == "native" and spec.cache_code is not None:
        raise LogitLockError(f"--attention native has no {spec.cache_code} cache; use --attention plugin or decomposed")
    decoder = empty_decoder(spec, numerics=numerics)
    positions = max_positions or spec.max_positions
    built = build_tables(spec, positions=positions, numerics=numerics, dtype=DTYPES[precision])
    decoder.use_tables(built)
    for name in TABLES:
        table = getattr(decoder, name)
        if table is not None:
            # As a buffer the table becomes a node of the trace instead of a constant in it.
            delattr(decoder, name)
            decoder.register_buffer(name, table, persistent=False)
    lowering = Lowering(decoder, spec, precision, numerics, attention, frozenset(float32), RULES)
    return lowering.run(trace_decoder(decoder))


def trace_decoder(decoder: Decoder) -> fx.Graph:
    """`Decoder.forward` as a graph with one node per linear layer, embedding, norm, fused operation and tap.

    The decoder needs no memory (`refmodels.empty_decoder`), but its position tables (`Decoder.prepare_tables`).
    """
    return _Tracer(autowrap_functions=_LEAF_FUNCTIONS).trace(decoder)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm, QuantizedLinear))
