"""One table of attention's inputs: the torch schemas of before, named arguments, and what is made from the table."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from refmodels.attention import (
    ATTENTION_INPUTS,
    NODE_ATTRIBUTES,
    TENSORRT_ARGUMENTS,
    TENSORRT_INPUTS,
    AttentionFacts,
    AttentionInputs,
    from_torch,
    inputs_of,
    node_attributes,
    node_inputs,
    to_torch,
    torch_schema,
)
from tests.support.goldens import CASES, case_source


def test_schemas_are_those_of_saved_programs() -> None:
    assert torch_schema("cached_attention") == (
        "cached_attention(Tensor qkv, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_lengths, "
        "Tensor visible, Tensor? cos, Tensor? sin, Tensor? query_scale, Tensor? alibi_slopes, int heads, "
        "int kv_heads, float scale, bool rotary_interleaved, int window, str arithmetic, Tensor? key_scale=None, "
        "Tensor? value_scale=None) -> Tensor"
    )
    assert torch_schema("cached_attention_functional", TENSORRT_INPUTS, functional=True) == (
        "cached_attention_functional(Tensor qkv, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, "
        "Tensor visible, Tensor? cos, Tensor? sin, Tensor? query_scale, Tensor? alibi_slopes, int heads, int kv_heads, "
        "float scale, bool rotary_interleaved, int window, str arithmetic) -> (Tensor, Tensor, Tensor)"
    )
    import refmodels.ops  # noqa: F401

    names = [argument.name for argument in torch.ops.refmodels.cached_attention.default._schema.arguments]
    assert names == [
        *AttentionInputs._fields[:9],
        *(f.name for f in fields(AttentionFacts)),
        "key_scale",
        "value_scale",
    ]
    assert list(TENSORRT_ARGUMENTS) == names[:-2]


def test_the_table_is_the_named_tuple() -> None:
    assert tuple(row.name for row in ATTENTION_INPUTS) == AttentionInputs._fields
    assert {row.name for row in ATTENTION_INPUTS if row.optional} == set(AttentionInputs._field_defaults)
    for row in ATTENTION_INPUTS:
        # An input that models may lack says when they have it, and a plugin must learn it from an attribute.
        assert row.optional == (row.when != "always") == (row.attribute is not None or not row.tensorrt), row.name
        assert not row.late or row.optional, row.name
    late = [row.late for row in ATTENTION_INPUTS]
    assert late == sorted(late), "late inputs are the last"


@pytest.mark.parametrize("late", [0, 1, 2])
def test_torch_arguments_there_and_back(late: int) -> None:
    """torch leaves arguments out that have their default."""
    inputs = AttentionInputs(*map(torch.tensor, range(9 + late)))
    facts = AttentionFacts(4, 2, 0.5, rotary_interleaved=True, window=7, arithmetic="sdpa")
    arguments = to_torch(inputs, facts)
    assert arguments[9:15] == (4, 2, 0.5, True, 7, "sdpa")
    assert from_torch(*arguments) == (inputs, facts)
    assert from_torch(*arguments[: 15 + late]) == (inputs, facts)


@pytest.mark.parametrize("case", CASES)
def test_inputs_of_a_spec(case: str) -> None:
    spec = case_source(case).spec
    given = [row.name for row in inputs_of(spec)]
    assert node_inputs(spec)[:5] == ("qkv", "past_key", "past_value", "cache_lengths", "visible")
    assert [*given[5:]] == [
        *(["cos", "sin"] if spec.rope is not None else []),
        *(["query_scale"] if spec.attention.logn_seq_length is not None else []),
        *(["alibi_slopes"] if spec.position == "alibi" else []),
        *(["key_scale", "value_scale"] if spec.cache_code is not None else []),
    ]


def test_attributes_of_a_node() -> None:
    facts = AttentionFacts(4, 2, 1, rotary_interleaved=True)
    expected: dict[str, Any] = {
        "heads": 4, "kv_heads": 2, "scale": 1.0, "rotary_dim": 6, "rotary_interleaved": 1, "window": 0,
        "has_query_scale": 0, "has_alibi": 1,
    }  # fmt: skip
    found = node_attributes(facts, ["qkv", "alibi_slopes"], rotary_dim=6)
    assert found == expected and list(found) == list(NODE_ATTRIBUTES) == list(expected)
    assert [type(value) for value in found.values()] == list(NODE_ATTRIBUTES.values())
