"""The options of `evaluate_model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from debug.evaluate.speed import DEFAULT_SHAPES, Shape


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of an evaluation.

    Attributes:
        model: the model, before quantization, that the executors were made from; `reference` and `hf` without a
            directory run it.  None: as recorded in an executor.
        against: the executor to compare with.
        tasks: tasks of the bundled toys, or JSONL files (see `debug.evaluate.questions`); none: all of a toy.
        texts: files of UTF-8 text for perplexity.
        limit: examples per task.
        compared: number of these examples that both models also read for KL and top-1; None: all.
        seed: random seed for the choice of examples, and for the tokens to time.
        window, stride: for texts, in tokens (see `debug.evaluate.passages`); None: the model's positions up to 1024,
            and half of the window.
        shapes: the workloads to time.
        batch_size: maximum number of rows per batch.
        chat, max_new_tokens: for JSONL tasks.
        name_map, emulate_rounding, trust_remote_code, device: see `debug.executors.open.open_executor`.
    """

    model: str | None = None
    against: str | None = None
    tasks: Sequence[str] = ()
    texts: Sequence[Path | str] = ()
    limit: int = 200
    compared: int | None = None
    seed: int = 1
    window: int | None = None
    stride: int | None = None
    shapes: Sequence[Shape] = DEFAULT_SHAPES
    batch_size: int = 64
    chat: bool = False
    max_new_tokens: int = 128
    name_map: Path | None = None
    emulate_rounding: bool = True
    trust_remote_code: bool = False
    device: str | None = None
