"""The installed transformers' reading of a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import refmodels
from refmodels.model import Decoder


def transformers_model(folder: Path, **options: Any) -> Any:
    """The model that transformers loads, in fp32 and with eager attention unless `options` say otherwise."""
    transformers = pytest.importorskip("transformers")
    options = {"dtype": torch.float32, "attn_implementation": "eager", **options}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def assert_computes_as_transformers(folder: Path, *, tokens: int = 24) -> Decoder:
    """The same logits in fp32, of a prompt and of four steps behind it."""
    theirs, ours = transformers_model(folder), refmodels.load(folder)
    shape = (2, tokens + 4)
    ids = torch.randint(0, ours.spec.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        cache = ours.new_cache(batch=2, capacity=tokens + 4)
        steps = (ids[:, :tokens], *ids[:, tokens:].split(1, 1))
        got = torch.cat([ours.step(step, cache) for step in steps], 1)
    difference = float((got - expected).abs().max())
    assert difference <= 1e-4, f"logits differ by {difference}"
    return ours
