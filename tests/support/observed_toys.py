"""The toys with the inputs of all their linear layers, and what else tests of methods quantize."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import refmodels
from export.quantization.fold import BLOCK_SITES, input_tap
from refmodels.model import Decoder
from refmodels.quantization.formats import LinearFormat
from refmodels.toys.tasks import TASKS, toy_examples

TOYS = ("chatglm2", "baichuan", "qwen", "gpt")
INT4 = LinearFormat(weight="int4", group=32)
FORMATS = {
    "int4 groups": INT4,
    "int4 zero points": dataclasses.replace(INT4, symmetric=False),
    "int4 rows": LinearFormat(weight="int4"),
    "int8 rows": LinearFormat(weight="int8"),
    "fp8 rows": LinearFormat(weight="fp8"),
}
by_format = pytest.mark.parametrize("linear", FORMATS.values(), ids=FORMATS.keys())


def token_batches(name: str, *, split: str = "train", seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Ids and mask of a few prompts of every task with their answers, padded on the right."""
    tokenizer = refmodels.load_tokenizer(name)
    batches = []
    for task in TASKS:
        rows = toy_examples(task, split=split, count=6, seed=seed)  # type: ignore[arg-type]
        ids = [tokenizer.encode(e.prompt) + tokenizer.encode(e.answer, add_special=False) for e in rows]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        batches.append((padded, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])))
    return batches


def logits_of(model: Decoder, ids: Tensor, mask: Tensor) -> Tensor:
    return model.step(ids, model.new_cache(batch=len(ids), capacity=ids.shape[1]), mask)


@lru_cache
def toy(name: str) -> tuple[Decoder, dict[str, Tensor]]:
    """A toy and the inputs [tokens, width] of all its linears, by tap."""
    model = refmodels.load(name)
    spec = model.spec
    taps = [f"blocks.{i}.{input_tap(spec, site)}" for i in range(spec.layers) for site in BLOCK_SITES] + ["final_norm"]
    seen: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    with torch.no_grad():
        for ids, mask in token_batches(name):
            with refmodels.recording(refmodels.Recorder(taps)) as recorder:
                logits_of(model, ids, mask)
            assert recorder is not None
            for tap, tensor in recorder.tensors.items():
                seen[tap].append(tensor[mask.bool()])
    return model, {tap: torch.cat(parts) for tap, parts in seen.items()}


def linears_of(model: Decoder, inputs: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """(name, weight, its inputs) of every linear of a toy."""
    linears = [tap for tap in model.spec.taps.values() if tap.module in model.spec.linears]
    return [(t.module, model.get_submodule(t.module).weight.detach(), inputs[t.reads[0]]) for t in linears]


def hessian_of(x: Tensor) -> Tensor:
    return x.t() @ x * (2 / len(x))


def made_layer(seed: int, rows: int = 24, columns: int = 64, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight, and correlated inputs whose channels differ in size by e^2."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64) / columns**0.5
    sizes = torch.randn(columns, generator=g, dtype=torch.float64).exp()
    x = torch.randn(tokens, columns, generator=g, dtype=torch.float64) @ mix * sizes
    return torch.randn(rows, columns, generator=g, dtype=torch.float64), x
