"""`--attention native`: CachedAttention in the operators that TensorRT has for it.

RotaryEmbedding, `TRT_KVCacheUpdate` (in place) and `TRT_Attention` (one fused kernel) are imported by TensorRT's
parser by their names.  The two that ONNX does not define have bodies in the file, which other runtimes execute.

This body has two more roundings than the exact one, both to the working type: of the query (rotated, scaled by logn and
by the softmax scale in fp32 before it) and of the probabilities.  Scores, softmax and sums stay in fp32, as in fused
kernels.  ALiBi's bias is rounded too, because the mask must have the type of the query; the error is relative to its
size, about 2**-12 (bf16: 2**-9), for the keys that get a noticeable weight.  `numerics="upstream"` has upstream's
tables and rotation, but not the rounding inside its attention, which a fused kernel does not have.

The form follows from the behaviour of TensorRT-RTX 1.7.  The mask is explicit: the causal modes know no padding, and
TensorRT silently drops `key_value_lengths` if there is a mask.  Its documentation does not say that its kernels skip
masked keys, so they get the used slots only, although TensorRT copies these first.  A query that sees no key must not
reach a kernel: the result is not documented, and a NaN in the padding of one layer is a NaN in the cache of the next,
which no mask hides (0 * NaN).  ALiBi's mask has one element per head, query and key: with 8 x 2048 tokens on 4096 slots
it takes 5.4 GB for the 40 heads of Baichuan-13B, so build such engines with a smaller --max-input.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from export.graph.attention_body import (
    LOWEST,
    alibi_bias,
    context_rows,
    grouped_context,
    grouped_scores,
    live_slots,
    mask,
    query_key_value,
)
from export.graph.function_text import WIDE, make_function
from refmodels.spec import ModelSpec, Numerics

DOMAIN = "trt"
HIDDEN = -65504.0
"""Value of a float mask for a masked key: finite in fp16, and far below every score."""


def native_attention_body(spec: ModelSpec, dtype: int, numerics: Numerics) -> list[str]:
    """As `export.graph.attention_body.attention_body`, calling the functions of `native_functions`."""
    return [
        *query_key_value(spec, dtype, numerics),
        f"key = {DOMAIN}.TRT_KVCacheUpdate (past_key, new_key, cache_lengths)",
        f"value = {DOMAIN}.TRT_KVCacheUpdate (past_value, new_value, cache_lengths)",
        *live_slots(),
        *mask(spec),
        f"query_wide = Cast <to = {WIDE}> (query)",
        "query_scaled = Mul (query_wide, scale_number)",
        f"query_ready = Cast <to = {dtype}> (query_scaled)",
        *_attended(spec, dtype, relative=numerics == "exact"),
        # Where TensorRT has no fused kernel (fp32), it must be allowed to take the operator apart.
        f"context_by_head = {DOMAIN}.TRT_Attention <TRT_decomposable = 1> "
        "(query_ready, live_key, live_value, attended)",
        f"sees_any_working = Cast <to = {dtype}> (sees_any)",
        "context_seen = Mul (context_by_head, sees_any_working)",
        *context_rows(spec, "context_seen", "context"),
    ]


def _attended(spec: ModelSpec, dtype: int, *, relative: bool) -> list[str]:
    """`attended`: the mask, bool [B, 1, S, T]; with ALiBi a bias [B, heads, S, T] of the query's type.

    A query that sees no key (padding) attends to all of them, and its context is set to 0 afterwards.
    """
    if spec.position == "alibi":
        return [
            *alibi_bias(spec, relative=relative),
            f"hidden = Constant <value_float = {HIDDEN}> ()",
            "bias_seen = Where (seen, bias, hidden)",
            f"attended = Cast <to = {dtype}> (bias_seen)",
        ]
    return [
        f"sees_some = Cast <to = {TensorProto.BOOL}> (sees_any)",
        "sees_none = Not (sees_some)",
        "attended = Or (seen, sees_none)",
    ]


def native_functions(spec: ModelSpec, dtype: int) -> list[onnx.FunctionProto]:
    """TensorRT's own operators as functions, for a model of this spec."""
    update = ["updated = TensorScatter <axis = 2> (cache, update, write_indices)"]
    if spec.position == "alibi":
        masked = [f"mask_wide = Cast <to = {WIDE}> (mask)", "masked = Add (scores, mask_wide)"]
    else:
        masked = [f"lowest = Constant <value_float = {LOWEST!r}> ()", "masked = Where (mask, scores, lowest)"]
    attention = [
        f"query_wide = Cast <to = {WIDE}> (query)",
        f"key_wide = Cast <to = {WIDE}> (key)",
        f"value_wide = Cast <to = {WIDE}> (value)",
        *grouped_scores(spec, "query_wide", "key_wide", "scores"),
        *masked,
        "weights = Softmax <axis = -1> (masked)",
        f"weights_rounded = Cast <to = {dtype}> (weights)",
        f"weights_wide = Cast <to = {WIDE}> (weights_rounded)",
        *grouped_context(spec, "weights_wide", "value_wide"),
        f"context = Cast <to = {dtype}> (context_by_head)",
    ]
    return [
        make_function(
            "TRT_KVCacheUpdate",
            ("cache", "update", "write_indices"),
            ("updated",),
            update,
            attributes="",
            domain=DOMAIN,
        ),
        make_function(
            "TRT_Attention",
            ("query", "key", "value", "mask"),
            ("context",),
            attention,
            attributes="TRT_decomposable: int = 0",
            domain=DOMAIN,
        ),
    ]
