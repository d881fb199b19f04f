"""The options of diff, trace and drift: how executors are opened, run and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How executors are opened and run.

    Attributes:
        model: the model that they were made from: a family name, a directory or a hub id; None: as recorded in an
            executor.
        prompts: texts of at least 8 tokens; none: default texts, or random ids for a model without a tokenizer.
        steps: number of decode steps.
        seed: random seed for random ids.
        name_map: a file that maps values of an ONNX file to taps.
        emulate_rounding: on ONNX Runtime, round every node of a half-precision bundle to its dtype (see
            `OnnxRuntimeEngine`).
        trust_remote_code: run the Python code of a Hugging Face directory.
    """

    model: str | None = None
    prompts: Sequence[str] = ()
    steps: int = 8
    seed: int = 0
    name_map: Path | None = None
    emulate_rounding: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class DiffOptions(RunOptions):
    """How executors are compared.

    Attributes:
        cut: also run the modules of bundles on the reference's tensors (see `debug.comparison.cut`).
        floats: compare quantized bundles with the model before quantization (see
            `debug.executors.before_quantization`).
    """

    cut: bool = False
    floats: bool = False
