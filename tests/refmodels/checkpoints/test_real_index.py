"""The tensor names of published checkpoints: each is mapped, none is left over, and the sizes add up to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import refmodels
from refmodels.checkpoints.load import empty_decoder, match_names
from refmodels.checkpoints.shards import StoredTensor
from refmodels.errors import LogitLockError
from tests.support.marks import quick_first
from tests.support.paths import REAL

INDEXES = sorted(REAL.glob("*/*.index.json"))
pytestmark = pytest.mark.skipif(not INDEXES, reason=f"no published indexes in {REAL}")
BUFFERS = {"chatglm2-6b": ["transformer.rotary_pos_emb.inv_freq"]}


def opened(index: Path) -> tuple[refmodels.ModelSource, dict[str, Any], dict[str, StoredTensor]]:
    """The model, its index, and the tensors that the index names, in the shapes that the family expects."""
    source = refmodels.resolve(index.parent)
    content = json.loads(index.read_text())
    shapes = {p.name: p.shape for parts in source.family.weights(source.spec).values() for p in parts}
    return (
        source,
        content,
        {
            name: StoredTensor(
                name=name, file=index.parent / file, shape=shapes.get(name, ()), dtype=torch.float16, dtype_name="F16"
            )
            for name, file in content["weight_map"].items()
        },
    )


def test_the_indexes_are_the_published_ones() -> None:
    assert {index.parent.name for index in INDEXES} == {"Baichuan2-13B-Chat", "Qwen-7B", "chatglm2-6b"}


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: index.parent.name)
def test_nothing_missing_and_nothing_left_over(index: Path) -> None:
    source, _, tensors = opened(index)
    table = source.family.weights(source.spec)
    found = match_names(tensors, table, source)
    assert sorted(set(tensors) - {tensor.name for tensor in found.values()}) == BUFFERS.get(index.parent.name, [])
    assert {part.name for parts in table.values() for part in parts} == set(found)


@pytest.mark.parametrize("index", quick_first(INDEXES), ids=lambda index: index.parent.name)
def test_every_name_counts(index: Path) -> None:
    source, _, tensors = opened(index)
    table = source.family.weights(source.spec)
    for name in set(tensors) - set(BUFFERS.get(index.parent.name, [])):
        with pytest.raises(LogitLockError, match="lacks"):
            match_names({n: t for n, t in tensors.items() if n != name}, table, source)
    ghost = next(iter(tensors.values()))
    with pytest.raises(LogitLockError, match=r"ghost\.weight"):
        match_names(tensors | {"ghost.weight": ghost}, table, source)


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: index.parent.name)
def test_sizes_add_up_to_the_byte(index: Path) -> None:
    source, content, _ = opened(index)
    table = source.family.weights(source.spec)
    shapes = {part.name: part.shape for parts in table.values() for part in parts}
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    if BUFFERS.get(index.parent.name):
        assert source.spec.rope is not None
        elements += source.spec.rope.dim // 2
    # All three are published in half precision.
    assert elements * 2 == content["metadata"]["total_size"]
    parameters = dict(empty_decoder(source.spec).named_parameters())
    assert set(parameters) == set(table)
    for name, parts in table.items():
        assert parameters[name].shape[0] == sum(part.row_count for part in parts), name
