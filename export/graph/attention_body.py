"""The function body of the custom node CachedAttention in standard operators: `refmodels/ops.py` in ONNX."""

from __future__ import annotations

from export.graph.function_text import CODE_ELEMENTS, WIDE, ints
from refmodels.spec import ModelSpec, Numerics

LOWEST = -3.4028234663852886e38


def attention_body(spec: ModelSpec, dtype: int, numerics: Numerics) -> list[str]:
    """Lines that make `context`, `key` and `value` from the inputs of a CachedAttention node."""
    exact = numerics == "exact"
    arithmetic = "exact" if exact else spec.attention.upstream_arithmetic
    return [
        *query_key_value(spec, dtype, numerics),
        *_cache_write(spec),
        *_cache_read(spec, exact=exact),
        *mask(spec),
        *(
            _wide_attention(spec, dtype, exact=exact)
            if arithmetic in ("exact", "sdpa")
            else _eager_attention(spec, dtype, divide="divide" in arithmetic, upcast=arithmetic == "eager_upcast")
        ),
    ]


def query_key_value(spec: ModelSpec, dtype: int, numerics: Numerics) -> list[str]:
    """`query` [B, heads, S, D] (fp32 in exact numerics), `new_key` and `new_value` [B, kv_heads, S, D]."""
    a = spec.attention
    query_type = WIDE if numerics == "exact" else dtype
    query_width, kv_width = a.heads * a.head_dim, a.kv_heads * a.head_dim
    lines = []
    if spec.rope is None:
        lines += [
            ints("widths", query_width, kv_width, kv_width),
            "query_working, key_rows, value_rows = Split <axis = -1> (qkv, widths)",
            f"query_rows = Cast <to = {query_type}> (query_working)",
        ]
    else:
        lines += [
            ints("rotated_widths", query_width + kv_width, kv_width),
            "query_key, value_rows = Split <axis = -1> (qkv, rotated_widths)",
        ]
        working_table = numerics == "upstream" and spec.rope.table != "float32" and dtype != WIDE
        if working_table:
            lines += _rotation_in_working_dtype(spec)
        else:
            lines += [
                f"query_key_wide = Cast <to = {WIDE}> (query_key)",
                f"rotated = RotaryEmbedding <num_heads = {a.heads + a.kv_heads}, rotary_embedding_dim = "
                f"{spec.rope.dim}, interleaved = {int(spec.rope.interleaved)}> (query_key_wide, cos, sin)",
            ]
        lines += [
            ints("widths", query_width, kv_width),
            "query_turned, key_turned = Split <axis = -1> (rotated, widths)",
            f"query_rows = Cast <to = {query_type}> (query_turned)",
            f"key_rows = Cast <to = {dtype}> (key_turned)",
        ]
    lines += [
        ints("query_heads", 0, 0, a.heads, a.head_dim),
        ints("kv_heads", 0, 0, a.kv_heads, a.head_dim),
        "query_by_token = Reshape (query_rows, query_heads)",
        "key_by_token = Reshape (key_rows, kv_heads)",
        "value_by_token = Reshape (value_rows, kv_heads)",
    ]
    scaled = "query_by_token"
    if a.logn_seq_length is not None:
        scaled = "query_logn"
        lines += [
            ints("query_scale_axes", 2, 3),
            "query_scale_by_token = Unsqueeze (query_scale, query_scale_axes)",
            "query_logn = Mul (query_by_token, query_scale_by_token)",
        ]
    return [
        *lines,
        f"query = Transpose <perm = [0, 2, 1, 3]> ({scaled})",
        "new_key = Transpose <perm = [0, 2, 1, 3]> (key_by_token)",
        "new_value = Transpose <perm = [0, 2, 1, 3]> (value_by_token)",
    ]


def _rotation_in_working_dtype(spec: ModelSpec) -> list[str]:
    """`rotated` from `query_key`, each product and sum rounded, as upstream does with half-precision tables."""
    a, rope = spec.attention, spec.rope
    assert rope is not None
    half = rope.dim // 2
    heads = a.heads + a.kv_heads
    lines = [
        ints("all_heads", 0, 0, heads, a.head_dim),
        "unturned = Reshape (query_key, all_heads)",
        ints("rotary_widths", rope.dim, a.head_dim - rope.dim),
        "rotary, rest = Split <axis = -1> (unturned, rotary_widths)",
        ints("head_axis", 2),
        "cos_by_head = Unsqueeze (cos, head_axis)",
        "sin_by_head = Unsqueeze (sin, head_axis)",
    ]
    if rope.interleaved:
        lines += [
            ints("pairs", 0, 0, 0, half, 2),
            "rotary_pairs = Reshape (rotary, pairs)",
            "first_4d, second_4d = Split <axis = -1, num_outputs = 2> (rotary_pairs)",
            ints("last_axis", -1),
            "first = Squeeze (first_4d, last_axis)",
            "second = Squeeze (second_4d, last_axis)",
        ]
    else:
        lines += [ints("halves", half, half), "first, second = Split <axis = -1> (rotary, halves)"]
    lines += [
        "first_cos = Mul (first, cos_by_head)",
        "second_sin = Mul (second, sin_by_head)",
        "first_turned = Sub (first_cos, second_sin)",
        "second_cos = Mul (second, cos_by_head)",
        "first_sin = Mul (first, sin_by_head)",
        "second_turned = Add (second_cos, first_sin)",
    ]
    if rope.interleaved:
        lines += [
            "first_last = Unsqueeze (first_turned, last_axis)",
            "second_last = Unsqueeze (second_turned, last_axis)",
            "turned_pairs = Concat <axis = -1> (first_last, second_last)",
            ints("flat", 0, 0, 0, rope.dim),
            "turned = Reshape (turned_pairs, flat)",
        ]
    else:
        lines.append("turned = Concat <axis = -1> (first_turned, second_turned)")
    return [
        *lines,
        "whole = Concat <axis = -1> (turned, rest)",
        ints("rows", 0, 0, heads * a.head_dim),
        "rotated = Reshape (whole, rows)",
    ]


def _cache_write(spec: ModelSpec) -> list[str]:
    """`key` and `value`: the caches with the new slots, quantized if the cache is (`quantize_cache`)."""
    lines = []
    for part in ("key", "value"):
        new = f"new_{part}"
        if spec.cache_code is not None:
            lines += [
                f"{part}_scale_wide = Cast <to = {WIDE}> ({part}_scale)",
                f"{new}_wide = Cast <to = {WIDE}> ({new})",
                f"{new}_codes = QuantizeLinear <axis = 1, output_dtype = {CODE_ELEMENTS[spec.cache_code]}> "
                f"({new}_wide, {part}_scale_wide)",
            ]
            new += "_codes"
        lines.append(f"{part} = TensorScatter <axis = 2> (past_{part}, {new}, cache_lengths)")
    return lines


def _cache_read(spec: ModelSpec, *, exact: bool) -> list[str]:
    """`live_key`, `live_value` [B, kv_heads, T, D]: the used slots, dequantized."""
    if spec.cache_code is None:
        return live_slots()
    scale = "scale_wide" if exact else "scale"
    # Slicing first would touch the used slots only, but ONNX has no Slice of fp8.
    numbers = [f"{part}_number = DequantizeLinear <axis = 1> ({part}, {part}_{scale})" for part in ("key", "value")]
    return [*numbers, *live_slots(suffix="_number")]


def live_slots(*, suffix: str = "") -> list[str]:
    """`live_key`, `live_value` [B, kv_heads, T, D]: the used slots."""
    return [
        "live = Shape <start = 1, end = 2> (visible)",
        ints("start", 0),
        ints("slot_axis", 2),
        f"live_key = Slice (key{suffix}, start, live, slot_axis)",
        f"live_value = Slice (value{suffix}, start, live, slot_axis)",
    ]


def mask(spec: ModelSpec) -> list[str]:
    """`seen` [B, 1, S, T] bool; `sees_any` [B, 1, S, 1], 1.0 or 0.0: a query that sees no key has context 0."""
    # The length is that of an input which all layers share: ONNX Runtime then computes the mask once, not per layer.
    by_token = "qkv" if spec.rope is None else "cos"
    lines = [
        "zero = Constant <value_int = 0> ()",
        "one = Constant <value_int = 1> ()",
        "live_count = Squeeze (live)",
        "key_slot = Range (zero, live_count, one)",
        f"tokens = Shape <start = 1, end = 2> ({by_token})",
        "token_count = Squeeze (tokens)",
        "steps = Range (zero, token_count, one)",
        ints("length_axes", 1, 2, 3),
        "first_slot = Unsqueeze (cache_lengths, length_axes)",
        ints("step_axis", 1),
        "steps_column = Unsqueeze (steps, step_axis)",
        "query_slot = Add (first_slot, steps_column)",
        "causal = LessOrEqual (key_slot, query_slot)",
        ints("visible_axes", 1, 2),
        "visible_by_query = Unsqueeze (visible, visible_axes)",
    ]
    seen = "seen = And (causal, visible_by_query)"
    if spec.attention.window is not None:
        lines += [
            "seen_unlimited = And (causal, visible_by_query)",
            "window_size = Constant <value_int: int = @window> ()",
            "last_hidden = Sub (query_slot, window_size)",
            "inside = Greater (key_slot, last_hidden)",
            "unlimited = Equal (window_size, zero)",
            "in_window = Or (inside, unlimited)",
        ]
        seen = "seen = And (seen_unlimited, in_window)"
    return [
        *lines,
        seen,
        f"seen_number = Cast <to = {WIDE}> (seen)",
        ints("key_axis", -1),
        "sees_any = ReduceMax (seen_number, key_axis)",
        f"lowest = Constant <value_float = {LOWEST!r}> ()",
        "scale_number = Constant <value_float: float = @scale> ()",
    ]


def grouped_scores(spec: ModelSpec, query: str, key: str, scores: str) -> list[str]:
    """query . key without repeated keys: the query heads of a group are further rows of one product."""
    a = spec.attention
    lines = [f"key_columns = Transpose <perm = [0, 1, 3, 2]> ({key})"]
    if a.heads == a.kv_heads:
        return [*lines, f"{scores} = MatMul ({query}, key_columns)"]
    return [
        *lines,
        ints("grouped", 0, a.kv_heads, -1, a.head_dim),
        f"query_grouped = Reshape ({query}, grouped)",
        "scores_grouped = MatMul (query_grouped, key_columns)",
        ints("by_head", 0, a.heads, -1, 0),
        f"{scores} = Reshape (scores_grouped, by_head)",
    ]


def grouped_context(spec: ModelSpec, weights: str, value: str) -> list[str]:
    """`context_by_head` [B, heads, S, D]: weights . value."""
    a = spec.attention
    if a.heads == a.kv_heads:
        return [f"context_by_head = MatMul ({weights}, {value})"]
    return [
        ints("weights_shape", 0, a.kv_heads, -1, 0),
        f"weights_grouped = Reshape ({weights}, weights_shape)",
        f"context_grouped = MatMul (weights_grouped, {value})",
        ints("context_shape", 0, a.heads, -1, a.head_dim),
        "context_by_head = Reshape (context_grouped, context_shape)",
    ]


def context_rows(spec: ModelSpec, context: str, result: str) -> list[str]:
    return [
        f"context_by_token = Transpose <perm = [0, 2, 1, 3]> ({context})",
        ints("context_rows_shape", 0, 0, spec.attention.heads * spec.attention.head_dim),
        f"{result} = Reshape (context_by_token, context_rows_shape)",
    ]


def alibi_bias(spec: ModelSpec, *, relative: bool) -> list[str]:
    """`bias`: slope * (key slot - query slot) [B, heads, S, T], or upstream's slope * key slot [heads, 1, T]."""
    if spec.position != "alibi":
        return []
    distance = ["distance = Sub (key_slot, query_slot)"] if relative else ["distance = Identity (key_slot)"]
    return [
        *distance,
        f"distance_wide = Cast <to = {WIDE}> (distance)",
        ints("slope_axes", 1, 2),
        "slopes = Unsqueeze (alibi_slopes, slope_axes)",
        "bias = Mul (slopes, distance_wide)",
    ]


def _wide_attention(spec: ModelSpec, dtype: int, *, exact: bool) -> list[str]:
    """Scores, softmax and context in fp32, one rounding at the end: exact numerics, and torch's SDPA."""
    lines = [
        f"query_wide = Cast <to = {WIDE}> (query)",
        f"key_wide = Cast <to = {WIDE}> (live_key)",
        f"value_wide = Cast <to = {WIDE}> (live_value)",
        *grouped_scores(spec, "query_wide", "key_wide", "products"),
        "scores = Mul (products, scale_number)",
        *alibi_bias(spec, relative=exact),
    ]
    biased = "scores"
    if spec.position == "alibi":
        lines.append("biased = Add (scores, bias)")
        biased = "biased"
    return [
        *lines,
        f"masked = Where (seen, {biased}, lowest)",
        "weights = Softmax <axis = -1> (masked)",
        *grouped_context(spec, "weights", "value_wide"),
        "context_seen = Mul (context_by_head, sees_any)",
        *context_rows(spec, "context_seen", "context_wide"),
        f"context = Cast <to = {dtype}> (context_wide)",
    ]


def _eager_attention(spec: ModelSpec, dtype: int, *, divide: bool, upcast: bool) -> list[str]:
    """Upstream's eager attention: scores rounded, scaled, rounded; softmax in fp32 and rounded; rounded products.

    `upcast` computes the scores in fp32 and does not round them.
    """
    query, key, score_type = ("query_wide", "key_wide", WIDE) if upcast else ("query", "live_key", dtype)
    widening = [f"query_wide = Cast <to = {WIDE}> (query)", f"key_wide = Cast <to = {WIDE}> (live_key)"]
    if divide:
        scaling = ["one_float = Constant <value_float = 1.0> ()", "divisor = Div (one_float, scale_number)"]
        scaling.append("scores_wide = Div (products_wide, divisor)")
    else:
        scaling = ["scores_wide = Mul (products_wide, scale_number)"]
    lines = [
        *(widening if upcast else []),
        *grouped_scores(spec, query, key, "products"),
        f"products_wide = Cast <to = {WIDE}> (products)",
        *scaling,
        f"scores = Cast <to = {score_type}> (scores_wide)",
        *alibi_bias(spec, relative=False),
    ]
    biased = "scores"
    if spec.position == "alibi":
        lines += [f"bias_working = Cast <to = {dtype}> (bias)", "biased = Add (scores, bias_working)"]
        biased = "biased"
    return [
        *lines,
        f"biased_wide = Cast <to = {WIDE}> ({biased})",
        "masked = Where (seen, biased_wide, lowest)",
        "weights_wide = Softmax <axis = -1> (masked)",
        "weights_seen = Mul (weights_wide, sees_any)",
        f"weights = Cast <to = {dtype}> (weights_seen)",
        *grouped_context(spec, "weights", "live_value"),
        *context_rows(spec, "context_by_head", "context"),
    ]
