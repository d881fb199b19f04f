"""Tokens per second of prefill and of decode, measured separately."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from debug.capture.prompts import random_prompts
from refmodels.errors import LogitLockError
from trt_runtime.engine import Engine
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine

_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A workload to time: `batch` rows, a prompt of `prompt` tokens, then `new` greedy tokens."""

    batch: int
    prompt: int
    new: int


DEFAULT_SHAPES = (Shape(batch=1, prompt=128, new=32),)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The median of a few runs, after one run that is not counted.

    prefill_tokens_per_second: prompt tokens of all rows, until the first new token is known.
    decode_tokens_per_second: new tokens of all rows after it.
    device: the GPU's name, or the number of CPU threads.
    rounding_emulated: the evaluated engine emulates rounding; the same graph without emulation was timed.
    """

    shape: Shape
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    device: str
    rounding_emulated: bool


_MOST_ROWS = 1 << 12


def parse_shape(text: str) -> Shape:
    """A `Shape` from BATCHxPROMPTxNEW, as 1x128x32.

    Raises:
        LogitLockError: the text has another form, a zero, or a batch beyond reason.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise LogitLockError(f"{text!r} is not a shape; write BATCHxPROMPTxNEW in tokens, such as 1x128x32")
    batch, prompt, new = map(int, match.groups())
    if batch > _MOST_ROWS:
        raise LogitLockError(f"{text!r} has a batch of {batch}; at most {_MOST_ROWS} rows can be timed")
    return Shape(batch=batch, prompt=prompt, new=new)


def measure_speed(engine: Engine, shape: Shape, *, seed: int = 0) -> Speed:
    """Time an engine on random tokens.

    Raises:
        LogitLockError: the engine does not support the shape.
    """
    emulated = isinstance(engine, OnnxRuntimeEngine) and engine.emulate_rounding
    if emulated:
        assert isinstance(engine, OnnxRuntimeEngine)
        engine = OnnxRuntimeEngine(engine.bundle, threads=engine.threads)
    run = _runner(engine, shape, seed)
    run()
    times = [run() for _ in range(_REPEATS)]
    prefill, decode = (median(part) for part in zip(*times, strict=True))
    return Speed(
        shape=shape,
        prefill_tokens_per_second=shape.batch * shape.prompt / prefill,
        decode_tokens_per_second=shape.batch * shape.new / decode,
        device=_device_name(engine),
        rounding_emulated=emulated,
    )


def _device_name(engine: Engine) -> str:
    if engine.device.type == "cuda":
        return torch.cuda.get_device_name(engine.device)
    threads = engine.threads if isinstance(engine, OnnxRuntimeEngine) else torch.get_num_threads()
    return f"{threads} CPU threads"


def _runner(engine: Engine, shape: Shape, seed: int) -> Callable[[], tuple[float, float]]:
    """One run: seconds of the prefill and of all decode steps."""
    capacity = shape.prompt + shape.new
    if shape.prompt + shape.new > engine.max_positions:
        raise LogitLockError(
            f"timing {shape.prompt} + {shape.new} tokens needs more than the {engine.max_positions} positions of "
            f"{engine.spec.variant}; give a smaller --shape"
        )
    ids = random_prompts(engine.spec.vocab_size, (shape.prompt,) * shape.batch, seed).ids

    def run() -> tuple[float, float]:
        cache = engine.new_cache(batch=shape.batch, capacity=capacity)
        began = time.perf_counter()
        token = engine.prefill(ids, cache, last_logits_only=True)[:, -1].argmax(-1)
        token.cpu()
        first = time.perf_counter()
        for _ in range(shape.new):
            token = engine.decode(token, cache)[:, -1].argmax(-1)
        # Wait for the GPU: the loop itself does not, because it keeps its tokens there.
        token.cpu()
        return first - began, time.perf_counter() - first

    def without_grad() -> tuple[float, float]:
        with torch.inference_mode():
            return run()

    return without_grad
