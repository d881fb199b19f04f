"""How executors that are named by text are opened, run and compared: the options of diff, trace and drift, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How executors are opened and run.

    Attributes:
        model: what they were made from: a family name, a directory or a hub id; None: what an executor says of itself.
        prompts: texts of at least 8 tokens; none: default texts, or random ids for a model without a tokenizer.
        steps: decode steps.
        seed: of random ids.
        name_map: which values of an ONNX file are which taps.
        emulate_rounding: on ONNX Runtime: round every node of a half-precision bundle to its dtype (see
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
        floats: judge quantized bundles by the model before quantization (see `debug.executors.before_quantization`).
    """

    cut: bool = False
    floats: bool = False
