"""What `pytest -m gpu tests/trt_runtime/tensorrt/test_on_any_gpu.py` checks of one engine, and the page that it
writes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import refmodels
from debug.sides import diff_bundle
from export.bundle import export_model
from refmodels.checkpoints.load import load_tokenizer
from trt_runtime.bundle import PLAN_NAME, AttentionMode, Precision, read_bundle
from trt_runtime.engine import Engine
from trt_runtime.generation import GenerationConfig, generate
from trt_runtime.open import open_engine
from trt_runtime.torch_gpu.engine import TorchEngine

PROMPTS = ("世界上第二高的山峰是哪座？", "12+35=", "Once upon a time")
NEW_TOKENS = 32
TIMED_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine.

    seconds: to export and build both plans.  megabytes: of engine.plan.  tokens: greedy tokens that equal the fp32
    reference's, up to each prompt's first difference, and `of`: how many there are.  worst: the largest local error in
    floors, and the tap.  milliseconds: median of a decode step at batch 1.  captured: a CUDA graph replays it.
    """

    family: str
    precision: str
    attention: str
    seconds: float
    megabytes: float
    tokens: int
    of: int
    verdict: str
    margin_flips: int
    worst: tuple[float, str]
    milliseconds: float
    captured: bool


def check_engine(family: str, precision: Precision, attention: AttentionMode, output: Path) -> Row:
    """Build a toy's engine, generate with it, compare every tap, time a decode step."""
    start = time.perf_counter()
    export_model(
        family, precision=precision, attention=attention, backend="tensorrt", output=output, max_batch=4, taps=True
    )
    return measure(family, output, seconds=time.perf_counter() - start)


def measure(family: str, bundle: Path, *, seconds: float) -> Row:
    """Generate with a toy's engine, compare every tap, time a decode step."""
    info = read_bundle(bundle).info
    engine: Any = open_engine(bundle, engine="tensorrt")
    source = refmodels.resolve(family)
    tokenizer = load_tokenizer(source)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    config = GenerationConfig(max_new_tokens=NEW_TOKENS)
    expected = generate(TorchEngine(refmodels.load(source)), None, prompts, config)
    found = generate(engine, None, prompts, config)
    pairs = [(f.token_ids, e.token_ids) for f, e in zip(found, expected, strict=True)]
    milliseconds, captured = time_decode(engine, prompts[0])
    del engine
    diff = diff_bundle(bundle, family, engine="tensorrt", steps=4)
    worst = max(diff.taps, key=lambda tap: tap.ratio)
    return Row(
        family=family,
        precision=info.precision,
        attention=info.attention,
        seconds=seconds,
        megabytes=(bundle / PLAN_NAME).stat().st_size / 1e6,
        tokens=sum(equal_start(*pair) for pair in pairs),
        of=sum(len(e) for _, e in pairs),
        verdict=diff.verdict,
        margin_flips=diff.logits.margin_flips,
        worst=(worst.ratio, worst.tap),
        milliseconds=milliseconds,
        captured=captured,
    )


def equal_start(found: Sequence[int], expected: Sequence[int]) -> int:
    """How many tokens are equal before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))


def time_decode(engine: Engine, prompt: Sequence[int]) -> tuple[float, bool]:
    """Milliseconds of a decode step until its logits are on the host, and whether a CUDA graph ran it."""
    cache = engine.new_cache(batch=1, capacity=len(prompt) + TIMED_STEPS + 5)
    token = engine.prefill(torch.tensor([list(prompt)]), cache, last_logits_only=True).cpu()[:, -1].argmax(-1)
    times = []
    for _ in range(TIMED_STEPS + 5):
        start = time.perf_counter()
        token = engine.decode(token, cache).cpu()[:, -1].argmax(-1)
        times.append(time.perf_counter() - start)
    steps: Any = engine._plans[False]._steps  # type: ignore[attr-defined]
    captured = any(step is not None and step.replay is not None for step in steps.values())
    return 1e3 * statistics.median(times[5:]), captured


def page(rows: Sequence[Row], *, machine: str) -> str:
    """The report, in Markdown."""
    lines = [
        "# TensorRT engines of the toys",
        "",
        machine,
        "",
        f"Tokens: greedy tokens equal to the fp32 reference's ({len(PROMPTS)} prompts, at most {NEW_TOKENS} each).  "
        "Diff: verdict of `logitlock diff --engine tensorrt`, greedy tokens changed beyond doubt, and the largest "
        f"local error in noise floors (8 are an error).  Decode: median of {TIMED_STEPS} steps at batch 1.",
        "",
        "| model | dtype | attention | built in s | plan MB | tokens | diff | flips | worst tap | decode ms | graph |",
        "|---|---|---|---:|---:|---:|---|---:|---|---:|---|",
    ]
    lines += [
        f"| {r.family} | {r.precision} | {r.attention} | {r.seconds:.1f} | {r.megabytes:.1f} | {r.tokens}/{r.of} | "
        f"{r.verdict} | {r.margin_flips} | {r.worst[0]:.2f} at {r.worst[1]} | {r.milliseconds:.2f} | "
        f"{'yes' if r.captured else 'no'} |"
        for r in rows
    ]
    fine = sum(r.verdict == "aligned" and r.margin_flips == 0 for r in rows)
    return "\n".join([*lines, "", f"{fine} of {len(rows)} engines are aligned with the reference.", ""])
