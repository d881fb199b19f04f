"""Configs and checkpoints mean here what they mean to the installed transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import refmodels
from refmodels.notices import say_once
from tests.support.checkpoints import read_case, write_model
from tests.support.upstream import assert_computes_as_transformers, transformers_model


@pytest.fixture(autouse=True)
def unsaid() -> None:
    say_once.cache_clear()


@pytest.mark.parametrize("layout", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("case", ["gpt2_b1", "qwen2_tied_b1"])
def test_a_head_of_its_own_in_a_tied_config(
    case: str, layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after merging a LoRA into the head or the embedding alone."""
    config, tensors, _ = read_case(case)
    embedding = next(t for name, t in tensors.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
    head = embedding.clone()
    head[-1, -1] += 0.5
    write_model(tmp_path / "own", config, tensors | {"lm_head.weight": head}, layout)
    decoder = assert_computes_as_transformers(tmp_path / "own")
    assert not decoder.spec.tied_head and torch.equal(decoder.head.weight, head)
    refmodels.resolve(tmp_path / "own")
    said = [record.getMessage() for record in caplog.records if record.name == "logitlock"]
    assert len(said) == 1 and "tie_word_embeddings, but the head that is stored is not the embedding" in said[0]

    write_model(tmp_path / "same", config, tensors | {"lm_head.weight": embedding.clone()}, layout)
    tied = assert_computes_as_transformers(tmp_path / "same")
    assert tied.head.weight is tied.embed.weight
    assert len([record for record in caplog.records if record.name == "logitlock"]) == 1


def test_transformers_agrees_that_such_a_head_is_not_tied(tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen2_tied_b1")
    write_model(tmp_path, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    theirs = transformers_model(tmp_path)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
