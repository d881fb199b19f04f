"""What is compared with what: bundles, models and prompts, opened and checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from debug.diff import diff_engine, spec_difference
from debug.prompts import default_prompts, text_prompts
from debug.results import DiffResult
from debug.streaming import Reference, StreamedDecoder
from refmodels.checkpoint import ModelSource, checkpoint_hash, empty_decoder, load, load_tokenizer_for, resolve
from refmodels.errors import LogitLockError
from refmodels.families import FAMILIES
from refmodels.spec import Numerics
from trt_runtime.bundle import read_bundle
from trt_runtime.engines import EngineChoice, open_engine, serves_tensorrt

if TYPE_CHECKING:
    from refmodels.tokenizer import Tokenizer

LEAST_TOKENS = 8
"""A prompt needs this many: on one token at position 0 faults of rotation, mask and scale give a difference of 0."""
_IN_MEMORY = 50_000_000
"""Parameters up to which the reference stays in memory as a whole (0.4 GB in fp64)."""


def diff_bundle(
    bundle: Path,
    model: str | None = None,
    *,
    prompts: Sequence[str] = (),
    steps: int = 8,
    seed: int = 0,
    engine: EngineChoice = "auto",
    emulate_rounding: bool = True,
) -> DiffResult:
    """Compare a bundle's engine with the reference of the model that it was made from.

    Args:
        bundle: its directory.
        model: family name, directory or hub id; None: the family toy that the bundle names.
        prompts: texts of at least 8 tokens; none: default texts, or random ids for a model without a tokenizer.
        steps, seed: decode steps; seed of random ids.
        engine: see `trt_runtime.engines.open_engine`.
        emulate_rounding: on ONNX Runtime: round every node of a half-precision bundle to its dtype (see
            `OnnxRuntimeEngine`).
    Raises:
        LogitLockError: no or a damaged bundle or model, a bundle of another model or checkpoint, a prompt too short or
            too long.
    """
    opened = read_bundle(bundle)
    info = opened.info
    if model is None and info.model not in FAMILIES:
        raise LogitLockError(f"{bundle} was made from {info.model!r}; say with --model where that model is")
    source = resolve(info.model if model is None else model)
    if source.spec != opened.spec:
        differing = spec_difference(source.spec, opened.spec)
        raise LogitLockError(f"{bundle} is not a bundle of {source.name}: the architecture differs in {differing}")
    checkpoint = checkpoint_hash(source)
    if checkpoint != info.checkpoint_hash:
        raise LogitLockError(
            f"{bundle} was made from another checkpoint than {source.name}: its weights have SHA-256 "
            f"{info.checkpoint_hash[:12]}…, those of the model {checkpoint[:12]}…; export it again"
        )
    chosen: EngineChoice = "tensorrt" if engine == "auto" and serves_tensorrt(opened) else engine
    executor = open_engine(opened, engine=chosen, emulate_rounding=emulate_rounding and chosen != "tensorrt")
    room = executor.max_positions - steps
    if chosen == "tensorrt" and info.engine is not None:
        # The prompt is one step.
        room = min(room, info.engine.max_input)
    if room < LEAST_TOKENS:
        raise LogitLockError(
            f"{bundle} serves {executor.max_positions} positions, but a diff needs {LEAST_TOKENS} prompt tokens "
            f"and {steps} decode steps"
        )
    if prompts:
        batch = text_prompts(prompts, load_tokenizer_for(source), least=LEAST_TOKENS)
    else:
        batch = default_prompts(source.spec, _tokenizer(source), room=room, seed=seed)
    truth = reference_of(source, dtype=torch.float64)
    rounded = reference_of(source, dtype=executor.dtype, numerics=info.numerics)
    result = diff_engine(executor, truth, rounded, batch, steps=steps)
    result.context = {
        "model": source.name,
        "bundle": bundle.name,
        "precision": info.precision,
        "numerics": info.numerics,
        "attention": info.attention,
        "checkpoint_hash": checkpoint,
    }
    return result


def reference_of(source: ModelSource, *, dtype: torch.dtype, numerics: Numerics = "exact") -> Reference:
    """The reference model; a large one holds the weights of one part at a time."""
    size = sum(parameter.numel() for parameter in empty_decoder(source.spec).parameters())
    if size > _IN_MEMORY:
        return StreamedDecoder(source, dtype=dtype, numerics=numerics)
    return load(source, dtype=dtype, numerics=numerics)


def _tokenizer(source: ModelSource) -> Tokenizer | None:
    try:
        return load_tokenizer_for(source)
    except LogitLockError:
        # Default prompts are random ids then; a prompt that the user gave needs one and says so.
        return None
