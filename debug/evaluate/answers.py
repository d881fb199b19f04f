"""Greedy answers of an engine to many prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from debug.evaluate.questions import Task
from debug.executors.step import counts_slots
from refmodels.text.tokenizer import Tokenizer
from trt_runtime.engine import Engine
from trt_runtime.generation import GenerationConfig, GenerationResult, generate
from trt_runtime.torch_gpu.engine import TorchEngine

Advance = Callable[[int], None]
"""Called with the number of further examples that are done."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A model's answers to the questions of a task, in order: whether each is right, and its text."""

    right: list[bool]
    texts: list[str]


def rows_at_once(engine: Engine, batch_size: int) -> int:
    """Number of rows of different lengths that an engine can decode together.

    Code that appends a token to all rows at one slot cannot, if the model counts slots (see `debug.executors.step`).
    """
    ours = isinstance(engine, TorchEngine) or hasattr(engine, "bundle")
    return batch_size if ours or not counts_slots(engine.spec) else 1


def continue_prompts(
    engine: Engine,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    batch_size: int,
    advance: Advance = lambda count: None,
) -> list[GenerationResult]:
    """`trt_runtime.generation` of any number of prompts, in batches of similar length, which need the least padding.

    Raises:
        LogitLockError: as `generate`.
    """
    size = rows_at_once(engine, batch_size)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, GenerationResult] = {}
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        results = generate(engine, tokenizer, [prompts[i] for i in chunk], config)
        found |= dict(zip(chunk, results, strict=True))
        advance(len(chunk))
    return [found[i] for i in range(len(prompts))]


def answer_task(
    engine: Engine, tokenizer: Tokenizer, task: Task, *, batch_size: int, advance: Advance = lambda count: None
) -> Answers:
    """The greedy answers of an engine to a task; errors as `continue_prompts`."""
    config = GenerationConfig(max_new_tokens=task.max_new_tokens, stop_ids=task.stop_ids)
    results = continue_prompts(
        engine,
        tokenizer,
        [question.prompt for question in task.questions],
        config,
        batch_size=batch_size,
        advance=advance,
    )
    pairs = list(zip(results, task.questions, strict=True))
    if task.exact_tokens:
        right = [
            result.finish_reason == "stop_id" and result.token_ids[:-1] == question.answer for result, question in pairs
        ]
    else:
        right = [result.text.strip() == question.answer_text.strip() for result, question in pairs]
    return Answers(right=right, texts=[result.text for result in results])
