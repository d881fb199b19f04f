"""Run the diff on every mutant of a model and say what it named."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import refmodels
from debug.capture.prompts import random_prompts
from debug.comparison.compare import diff_engine
from export.bundle import export_model
from refmodels.dtypes import DTYPES
from tests.support.goldens import GOLDENS, case_source
from tests.support.mutate import LoadedBundle
from tests.support.mutations import model_wide, mutations
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine

MODELS = ("chatglm2", "baichuan2_7b", "baichuan_13b", "qwen_ntk", "gpt2", "gpt_bigcode", "starcoder2_sliding")
"""Golden cases; one for each position scheme, mask form and head layout."""
LEAST = {"tap": 0.95, "name": 0.85}
"""Shares of mutants with the right first tap, and with the right first diagnosis, that the project promises."""


class TappedEngine(OnnxRuntimeEngine):
    """Runs with taps always: one session instead of two, for mutants, whose observer effect is of no interest."""

    def _session(self, mode: Any) -> Any:
        return super()._session("tapped")


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One planted fault and what the diff said."""

    model: str
    precision: str
    mutation: str
    planted: str
    first_tap: str | None
    ratio: float
    first_diagnosis: str | None
    tap: bool
    name: bool


def run(
    model: str, precision: str, *, seed: int, steps: int = 3, only: Collection[str] | None = None
) -> Iterator[Mutant]:
    """The mutants of one model, all or some by name.  `model`: a golden case or a family name (its toy)."""
    source = case_source(model) if (GOLDENS / model).is_dir() else refmodels.resolve(model)
    spec = source.spec
    truth = refmodels.load(source, dtype=torch.float64)
    lengths = (90, 13, 9) if spec.max_positions >= 128 else (20, 13, 9)
    prompts = random_prompts(spec.vocab_size, lengths, seed=seed)
    chance = random.Random(f"{model} {precision} {seed}")
    with tempfile.TemporaryDirectory() as directory:
        bundle = export_model(
            source,
            precision=precision,
            attention="decomposed",
            output=Path(directory) / "clean",  # type: ignore[arg-type]
        )
        loaded = LoadedBundle(bundle)
        rounded = refmodels.load(source, dtype=DTYPES[precision])  # type: ignore[index]
        planted = [(m, m.tap) for m in model_wide(spec)]
        names = [m.name for m in mutations(spec, spec.layers - 1)]
        for name in names:
            layer = chance.randrange(spec.layers)
            found = [m for m in mutations(spec, layer) if m.name == name]
            if not found:
                layer = spec.layers - 1
                found = [m for m in mutations(spec, layer) if m.name == name]
            planted.append((found[0], f"blocks.{layer}.{found[0].tap}".rstrip(".")))
        for mutation, tap in planted:
            if only is not None and mutation.name not in only:
                continue
            broken = loaded.mutant(mutation.apply, Path(directory) / "mutant")
            engine = TappedEngine(broken, emulate_rounding=True, threads=1)
            result = diff_engine(engine, truth, rounded, prompts, steps=steps)
            first = result.culprits[0] if result.culprits else None
            diagnosis = first.diagnosis[0].fault if first and first.diagnosis else None
            yield Mutant(
                model=model,
                precision=precision,
                mutation=mutation.name,
                planted=tap,
                first_tap=first.tap if first else None,
                ratio=first.ratio if first else max(t.ratio for t in result.taps),
                first_diagnosis=diagnosis,
                tap=first is not None and first.tap == tap,
                name=first is not None and first.tap == tap and (diagnosis or "").startswith(mutation.diagnosis),
            )


def rates(mutants: Sequence[Mutant]) -> dict[str, float]:
    return {key: sum(getattr(m, key) for m in mutants) / len(mutants) for key in LEAST}
